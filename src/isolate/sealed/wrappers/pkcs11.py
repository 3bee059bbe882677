"""A key in an HSM, or in a software token, through PKCS#11 (extra ``pkcs11``).

    >>> from isolate.sealed.wrappers.pkcs11 import Pkcs11Wrapper
    >>> wrapper = Pkcs11Wrapper("/usr/lib/softhsm/libsofthsm2.so", token="models", key="kek", pin="4321")
    >>> wrapper.name, wrapper.label
    ('pkcs11:token=models;object=kek;type=secret-key', 'symmetric')
    >>> wrapper
    Pkcs11Wrapper(name='pkcs11:token=models;object=kek;type=secret-key')

An AES key of the token encrypts the file key with CKM_AES_GCM; the context is the associated data. The box is the
nonce (12 bytes), the ciphertext (32) and the tag (16). docs/spec/sealed-folder.md, section 6.1.
"""

from __future__ import annotations

import importlib
import secrets
import threading
from collections.abc import Callable
from typing import Any, ClassVar
from urllib.parse import quote

from attrs import field, frozen
from attrs.validators import instance_of

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

_NONCE, _TAG = 12, 16
_BOX = _NONCE + 32 + _TAG
# A token counts logins by process, not by session: one operation at a time.
_LOGIN = threading.Lock()

# What an HSM answers when it does not let us, by the names of python-pkcs11's errors.
_DENIED = (
    "PinIncorrect", "PinInvalid", "PinExpired", "PinLenRange", "PinLocked", "UserPinNotInitialized",
    "UserTooManyTypes", "UserNotLoggedIn", "FunctionRejected",
)  # fmt: skip
_ABSENT = ("NoSuchToken", "MultipleTokensReturned")
_UNFIT = (
    "MechanismInvalid",
    "MechanismParamInvalid",
    "KeyTypeInconsistent",
    "KeySizeRange",
    "FunctionNotSupported",
)


def _as_secret(pin: str | Secret) -> Secret:
    return Secret(pin.encode()) if isinstance(pin, str) else pin


def _library() -> Any:
    try:
        return importlib.import_module("pkcs11")
    except ImportError:
        hint = "pip install 'isolate-confidential[pkcs11]'"
        raise MissingExtra("a key in an HSM needs python-pkcs11", hint=hint) from None


@frozen(eq=False, repr=False)
class Pkcs11Wrapper:
    """Recipient and identity at once. ``module``: path of the PKCS#11 library; ``token``, ``key``: labels.

    ``timeout``: seconds for one operation. Raises KeyServiceUnavailable (no library, token or answer),
    KeyServiceRefused (PIN, policy, no such key), Tampered (a box that does not authenticate), UsageError.
    """

    label: ClassVar[str] = "symmetric"

    module: str = field(validator=instance_of(str))
    token: str = field(kw_only=True)
    key: str = field(kw_only=True)
    pin: Secret = field(kw_only=True, converter=_as_secret)
    timeout: float = field(kw_only=True, default=10.0)

    def __attrs_post_init__(self) -> None:
        if not 0 < self.timeout <= 600:
            raise UsageError("timeout= is more than 0 and at most 600 seconds")
        if not self.token or not self.key or len(self.name) > 512:
            raise UsageError("token= and key= are labels, of 512 bytes together at most")

    @property
    def name(self) -> str:
        """A URI after RFC 7512, which stands in the file for everyone to read."""
        return f"pkcs11:token={quote(self.token, safe='')};object={quote(self.key, safe='')};type=secret-key"

    def __repr__(self) -> str:
        return f"Pkcs11Wrapper(name={self.name!r})"

    def wrap(self, key: Secret, context: bytes) -> bytes:
        """The box for a key of 32 bytes."""
        nonce = secrets.token_bytes(_NONCE)
        plain = bytes(key.expose())
        box = nonce + self._ask(lambda hsm, found: found.encrypt(plain, **_gcm(hsm, nonce, context)), opening=False)
        if len(box) != _BOX:
            # A module that chooses nonces itself appends its own: what it made could not be opened again.
            raise KeyServiceRefused("the HSM does not do AES-GCM with the nonce that it was given")
        return box

    def unwrap(self, blob: bytes, context: bytes) -> Secret:
        """The key in the box."""
        if len(blob) != _BOX:
            raise Tampered("unlock: the wrapped key has not the length that an HSM's has")
        nonce, sealed = blob[:_NONCE], blob[_NONCE:]
        return Secret(
            self._ask(lambda hsm, found: found.decrypt(sealed, **_gcm(hsm, nonce, context)), opening=True)
        )

    def _ask(self, use: Callable[[Any, Any], bytes], *, opening: bool) -> bytes:
        hsm = _library()

        def run() -> bytes:
            if not _LOGIN.acquire(timeout=self.timeout):
                raise KeyServiceUnavailable("the HSM is still busy with an earlier operation")
            try:
                token = hsm.lib(self.module).get_token(token_label=self.token)
                with token.open(user_pin=bytes(self.pin.expose()).decode()) as session:
                    search = {hsm.Attribute.CLASS: hsm.ObjectClass.SECRET_KEY, hsm.Attribute.LABEL: self.key}
                    keys = list(session.get_objects(search))
                    if len(keys) != 1:
                        raise KeyServiceRefused(f"the HSM has {len(keys)} secret keys of this label, not one")
                    try:
                        return bytes(use(hsm, keys[0]))
                    except hsm.PKCS11Error as error:
                        # Modules have no common answer to a false tag: SoftHSM says CKR_GENERAL_ERROR.
                        if opening and _typed(error) is None:
                            raise Tampered("unlock: the HSM does not open this wrapped key") from None
                        raise
            except hsm.PKCS11Error as error:
                raise _typed(error) or KeyServiceUnavailable("the HSM or its library failed") from None
            except UnicodeDecodeError:
                raise UsageError("the PIN is not UTF-8") from None
            finally:
                _LOGIN.release()

        return bounded(run, self.timeout, "the HSM")


def _gcm(hsm: Any, nonce: bytes, context: bytes) -> dict[str, Any]:
    return {"mechanism": hsm.Mechanism.AES_GCM, "mechanism_param": hsm.GCMParams(nonce, context, 8 * _TAG)}


def _typed(error: Exception) -> IsolateError | None:
    kind = type(error).__name__
    if kind in _DENIED:
        return KeyServiceRefused("the HSM refuses this PIN or this use of the key")
    if kind in _ABSENT:
        return KeyServiceRefused("the HSM has not exactly one token of this label")
    if kind in _UNFIT:
        return KeyServiceRefused("this token or key does not do AES-GCM")
    return None
