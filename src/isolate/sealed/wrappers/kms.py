"""A key in AWS KMS (extra ``kms``).

    >>> from isolate.sealed.wrappers.kms import KmsWrapper
    >>> wrapper = KmsWrapper("arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")
    >>> wrapper.label, wrapper.region
    ('symmetric', 'eu-central-1')

KMS encrypts the file key under a symmetric key; SHA-256 of the context is its encryption context, so it stands in
the account's log, which names no model. docs/spec/sealed-folder.md, section 6.2. Credentials come from boto3's
usual places.

The file key travels to KMS and back inside TLS. Who records that traffic and breaks its key exchange later has the
key: a file that must stay closed against quantum computers is sealed to X-Wing recipients only.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import re
from contextlib import closing
from typing import Any, ClassVar

from attrs import field, frozen

from isolate.crypto.secret import Secret
from isolate.errors import (
    IsolateError,
    KeyServiceRefused,
    KeyServiceUnavailable,
    MissingExtra,
    Tampered,
    UsageError,
)
from isolate.sealed.wrappers import bounded

# An alias can be moved to another key, and the name in the file must go on meaning this one.
_ARN = re.compile(r"arn:aws[a-z-]*:kms:([a-z0-9-]+):[0-9]{12}:key/[A-Za-z0-9-]+")
_ATTEMPTS = 3
_FORGED = {"InvalidCiphertextException", "IncorrectKeyException"}
_BUSY = {
    "ThrottlingException", "Throttling", "LimitExceededException", "KMSInternalException",
    "DependencyTimeoutException", "KeyUnavailableException", "RequestTimeout", "InternalFailure",
    "ServiceUnavailable", "500", "502", "503", "504",
}  # fmt: skip


def _check_arn(instance: Any, attribute: Any, value: str) -> None:
    if not _ARN.fullmatch(value):
        raise UsageError("a KMS key is named by the ARN of the key, not by an alias or a bare id")


@frozen(eq=False)
class KmsWrapper:
    """Recipient and identity at once. ``arn``: of a symmetric key; ``timeout``: seconds for one operation.

    Raises KeyServiceUnavailable (no answer in time, or throttled), KeyServiceRefused (credentials, key policy,
    disabled or absent key), Tampered (a box that KMS does not open under this context), UsageError.
    """

    label: ClassVar[str] = "symmetric"

    arn: str = field(validator=_check_arn)
    timeout: float = field(kw_only=True, default=10.0)
    endpoint_url: str | None = field(kw_only=True, default=None)

    def __attrs_post_init__(self) -> None:
        if not 0 < self.timeout <= 600:
            raise UsageError("timeout= is more than 0 and at most 600 seconds")

    @property
    def name(self) -> str:
        """Stands in the file for everyone to read: the ARN names account and region."""
        return f"aws-kms:{self.arn}"

    @property
    def region(self) -> str:
        found = _ARN.fullmatch(self.arn)
        return found[1] if found else ""

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """KMS's own blob for a key of 32 bytes."""
        answer = self._ask("encrypt", {"KeyId": self.arn, "Plaintext": bytes(key.expose())}, context)
        return bytes(answer["CiphertextBlob"])

    def unwrap(self, blob: bytes, context: bytes) -> Secret:
        """The key in the blob."""
        answer = self._ask("decrypt", {"KeyId": self.arn, "CiphertextBlob": blob}, context)
        return Secret(answer["Plaintext"])

    def _ask(self, operation: str, arguments: dict[str, Any], context: bytes) -> dict[str, Any]:
        boto3, config, exceptions = _boto()
        arguments["EncryptionContext"] = {"isolate": hashlib.sha256(context).hexdigest()}
        # Looking for credentials, connecting, three attempts and the pauses between them: all in the one bound.
        share = self.timeout / _ATTEMPTS
        options = config.Config(
            connect_timeout=share, read_timeout=share, retries={"mode": "standard", "total_max_attempts": _ATTEMPTS}
        )

        def run() -> dict[str, Any]:
            try:
                client = boto3.Session().client(
                    "kms", region_name=self.region, endpoint_url=self.endpoint_url, config=options
                )
                with closing(client):
                    answer: dict[str, Any] = getattr(client, operation)(**arguments)
            except exceptions.ClientError as error:
                raise _typed(error) from None
            except exceptions.NoCredentialsError:
                raise KeyServiceRefused("there are no credentials for KMS") from None
            except (exceptions.BotoCoreError, OSError, ValueError):
                raise KeyServiceUnavailable("KMS does not answer") from None
            if not hmac.compare_digest(str(answer.get("KeyId", "")), self.arn):
                raise KeyServiceRefused("KMS used another key than it was asked for")
            return answer

        return bounded(run, self.timeout, "KMS")


def _boto() -> tuple[Any, Any, Any]:
    try:
        session = importlib.import_module("boto3.session")
        return session, importlib.import_module("botocore.config"), importlib.import_module("botocore.exceptions")
    except ImportError:
        raise MissingExtra("a key in AWS KMS needs boto3", hint="pip install 'isolate-confidential[kms]'") from None


def _typed(error: Any) -> IsolateError:
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    if code in _FORGED:
        return Tampered("unlock: KMS does not open this wrapped key")
    if code in _BUSY or answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
        return KeyServiceUnavailable("KMS cannot answer now")
    return KeyServiceRefused("KMS does not allow this use of the key, or there is no such key")
