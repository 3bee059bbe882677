"""Reference values as signed manifests: shipping new code without a new policy (docs/spec/evidence.md, 5.3).

    >>> from isolate.attestation.manifest import Manifest
    >>> from isolate.crypto.signing import SigningKey
    >>> key = SigningKey.generate()
    >>> signed = Manifest("trainer", 3, "nitro", {"PCR0": b"\\1" * 48}).sign(key)
    >>> Manifest.open(signed).version, Manifest.open(signed).signer == str(key.verifying_key)
    (3, True)

A manifest says who vouches for which registers. Whether that counts is the policy's: it names product, signer and
least version, so that an old version stops counting when the policy says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import attrs
from attrs import field, frozen

from isolate.attestation.plain import from_plain, to_plain
from isolate.attestation.policy import Policy, Reference
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, SigningKey, VerifyingKey
from isolate.errors import KeyFormatError, PolicyRefused, RefusedError

FORMAT = "isolate/reference/v1"
MAX_MANIFEST = 16 * 1024
MAX_MANIFESTS = 64


@frozen
class Manifest:
    """Registers of one version of one product. ``signer`` is empty until it was read under a signature."""

    product: str
    version: int
    kind: str
    registers: Mapping[str, bytes] = field(hash=False)
    not_before: int | None = None
    not_after: int | None = None
    signer: str = ""

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.version < 2**63:
            raise PolicyRefused("a manifest's version is a whole number")
        _ = self.reference

    @property
    def reference(self) -> Reference:
        return Reference(
            f"{self.product} {self.version}", self.kind, self.registers, self.not_before, self.not_after
        )

    def sign(self, key: SigningKey) -> bytes:
        """The signed form, deterministic CBOR."""
        named = attrs.evolve(self, signer=str(key.verifying_key))
        body = cbor.encode({"format": FORMAT, **to_plain(named)})
        return cbor.encode({"manifest": body, "signature": key.sign(Purpose.REFERENCE, body)})

    @classmethod
    def open(cls, data: bytes) -> Self:
        """Read and verify under the key that it names. Raises PolicyRefused or MalformedError."""
        value = cbor.record(data, {"manifest": bytes, "signature": bytes}, max_size=MAX_MANIFEST)
        body = cbor.decode(value["manifest"], max_size=MAX_MANIFEST)
        if not isinstance(body, dict) or body.pop("format", None) != FORMAT:
            raise PolicyRefused("this is no reference manifest of a known version")
        manifest = from_plain(cls, body, "manifest")
        try:
            signer = VerifyingKey.parse(manifest.signer)
        except KeyFormatError:
            raise PolicyRefused("the manifest names no signer") from None
        if not signer.verify(Purpose.REFERENCE, value["manifest"], value["signature"]):
            raise PolicyRefused("the manifest's signature does not verify", code="manifest_signature")
        return manifest


def admitted(manifests: Sequence[bytes], policy: Policy) -> list[Reference]:
    """The references of those manifests that the policy trusts; the others are as if they were not there."""
    found = []
    for data in manifests[:MAX_MANIFESTS]:
        try:
            manifest = Manifest.open(data)
        except RefusedError:
            continue
        if any(
            (one.product, one.signer) == (manifest.product, manifest.signer)
            and one.least_version <= manifest.version
            for one in policy.trusted_signers
        ):
            found.append(manifest.reference)
    return found
