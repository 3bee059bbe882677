"""Signatures: Ed25519 everywhere, with ML-DSA-65 beside it where a signature must last (sealed files).

    >>> from isolate.crypto.signing import Purpose, SigningKey
    >>> key = SigningKey.generate()
    >>> signature = key.sign(Purpose.GRANT, b"message")
    >>> key.verifying_key.verify(Purpose.GRANT, b"message", signature)
    True
    >>> key.verifying_key.verify(Purpose.POLICY, b"message", signature)
    False

What is signed is ``b"isolate/v1/" + purpose + b"\\0" + message``: a signature made for one purpose is none for
another. Ed25519 is libsodium's, which refuses the small-order keys that OpenSSL accepts, and is the faster one.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

import nacl.bindings
import nacl.exceptions
from attrs import frozen
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from isolate.crypto.aead import SODIUM
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.errors import KeyFormatError, StorageError, UsageError

SEED_SIZE = 32
ED25519_SIGNATURE = 64
MLDSA65_PUBLIC = 1952
MLDSA65_SIGNATURE = 3309
HYBRID_SIGNATURE = ED25519_SIGNATURE + MLDSA65_PUBLIC + MLDSA65_SIGNATURE

MAX_KEY_FILE = 65536  # bytes that are read of a key file: a wrong path may be a device or a whole model

TOKEN_START = b"eyJ"  # base64url of the first bytes of a JSON object

_SECRET_PREFIX = "ISOLATE-SIGNING-KEY-"  # noqa: S105 (a prefix, no secret)
_PUBLIC_PREFIX = "isolate-verify-"


class Purpose(StrEnum):
    """What a signature is made for. One place signs for each, one place verifies."""

    SEALED_DIRECTORY = "sealed/directory"
    POLICY = "attestation/policy"
    REFERENCE = "attestation/reference"
    SERVICE_CERTIFICATE = "service/certificate"
    RELEASE = "service/release"
    ENCLAVE_REQUEST = "service/request"
    OWNER_REQUEST = "service/owner-request"
    ANSWER = "service/answer"
    HOLDER_REQUEST = "service/holder-request"
    TRUST_BUNDLE = "service/trust-bundle"
    CHANNEL_PEER = "channel/peer"
    CHANNEL_HOLDER = "channel/holder"
    GRANT = "capability/grant"
    BLOCK = "capability/block"
    INVOCATION = "capability/invocation"
    RESERVATION = "capability/reservation"
    APPROVAL = "owner/approval"
    GROUP_APPROVAL = "owner/group-approval"
    RECEIPT = "capability/receipt"
    LEASE = "capability/lease"
    CHECKPOINT_OFFER = "checkpoint/offer"


_FRAMES = {purpose: b"isolate/v1/" + purpose.value.encode() + b"\0" for purpose in Purpose}


def _framed(purpose: Purpose, message: bytes) -> bytes:
    return _FRAMES[purpose] + message


def verify(public: bytes, purpose: Purpose, message: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (64 bytes) is this Ed25519 key's (32 bytes) for this purpose and message."""
    if len(public) != 32 or len(signature) != ED25519_SIGNATURE:
        return False
    try:
        nacl.bindings.crypto_sign_open(signature + _framed(purpose, message), public)
    except (nacl.exceptions.CryptoError, ValueError, TypeError):
        return False
    return True


def verify_note(public: bytes, text: bytes, signature: bytes) -> bool:
    """Whether ``signature`` is this Ed25519 key's over the bare text of a C2SP note (see SigningKey.sign_note)."""
    if len(public) != 32 or len(signature) != ED25519_SIGNATURE or b"\0" in text:
        return False
    try:
        nacl.bindings.crypto_sign_open(signature + text, public)
    except (nacl.exceptions.CryptoError, ValueError, TypeError):
        return False
    return True


# The y of every point of order 1, 2, 4 and 8, and the two of them that have a second, non-canonical encoding;
# libsodium keeps the same list.
_SMALL_ORDER = frozenset(
    bytes.fromhex(one)
    for one in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
)


def is_small_order(raw: bytes) -> bool:
    """Whether this Ed25519 public key is of small order: under 1 us, where is_public_key takes 70.

    >>> is_small_order(bytes([1]) + bytes(31)), is_small_order(bytes(31) + bytes([128]))
    (True, True)
    """
    return len(raw) == 32 and raw[:31] + bytes([raw[31] & 0x7F]) in _SMALL_ORDER


def is_public_key(raw: bytes) -> bool:
    """Whether this is a usable Ed25519 public key: canonical, on the curve, of large prime order.

    Under a key of small order a signature over anything can be forged, so none may ever be written into a token.

    >>> is_public_key(bytes([1]) + bytes(31)), is_public_key(SigningKey.generate().verifying_key.ed25519)
    (False, True)
    """
    return type(raw) is bytes and len(raw) == 32 and bool(nacl.bindings.crypto_core_ed25519_is_valid_point(raw))


def _is_signing_input(data: bytes) -> bool:
    # Without its newline no note (SigningKey.sign_note) can pass for a token under the same key.
    return data.startswith(TOKEN_START) and b"\n" not in data


def verify_token(public: bytes, signing_input: bytes, signature: bytes) -> bool:
    """Whether ``signature`` (64 bytes) is this key's EdDSA over a JWS signing input."""
    if len(public) != 32 or len(signature) != ED25519_SIGNATURE or not _is_signing_input(signing_input):
        return False
    try:
        nacl.bindings.crypto_sign_open(signature + signing_input, public)
    except (nacl.exceptions.CryptoError, ValueError, TypeError):
        return False
    return True


def to_text(prefix: str, raw: bytes | memoryview) -> str:
    """``prefix`` and the base64url of ``raw`` with four bytes of its SHA-256, so that a slip is seen."""
    body = bytes(raw) + hashlib.sha256(prefix.encode() + bytes(raw)).digest()[:4]
    return prefix + base64.urlsafe_b64encode(body).decode().rstrip("=")


def from_text(prefix: str, text: str, size: int, what: str) -> bytes:
    """The ``size`` bytes behind such a text. Raises KeyFormatError, which never repeats the text."""
    text = text.strip()
    if not text.startswith(prefix) or not text.isascii():
        raise KeyFormatError(f"this is no {what}: it does not begin with {prefix}")
    body = text[len(prefix) :]
    try:
        raw = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != size + 4 or to_text(prefix, raw[:-4]) != text:
        raise KeyFormatError(f"this {what} is damaged: its length or checksum is wrong")
    return raw[:-4]


def write_key_file(path: str | os.PathLike[str], comment: str, line: str) -> None:
    """Write a key file that only its owner may read; an existing file is never overwritten.

    Raises StorageError; then no half-written file is left.
    """
    text = "".join(f"# {part}\n" for part in comment.splitlines()) + line + "\n"
    write_new_file(path, text.encode("ascii"), mode=0o600)


def write_new_file(path: str | os.PathLike[str], data: bytes, *, mode: int) -> None:
    """Write a file that is not there yet, synced, and whole or not at all. Raises StorageError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except FileExistsError:
        raise StorageError(f"{os.fspath(path)} exists already", hint="choose another name") from None
    except OSError as error:
        raise StorageError(f"cannot write {os.fspath(path)}: {error.strerror}") from None
    except ValueError:
        raise StorageError("cannot write the file: no file can have this name") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        Path(path).unlink(missing_ok=True)
        raise StorageError(f"cannot write {os.fspath(path)}: {error.strerror}") from None


def read_key_file(path: str | os.PathLike[str], what: str) -> str:
    """The one line of a key file that is no comment. Raises KeyFormatError or StorageError."""
    try:
        with Path(path).open("rb") as file:
            raw = file.read(MAX_KEY_FILE)
    except OSError as error:
        raise StorageError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
    except ValueError:
        raise StorageError("cannot read the key file: no file can have this name") from None
    lines = [line.strip() for line in raw.decode("ascii", errors="replace").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) != 1:
        raise KeyFormatError(f"{os.fspath(path)} holds no {what}")
    return keys[0]


@frozen
class VerifyingKey:
    """The public half: the Ed25519 key (32 bytes), and the SHA-256 of the ML-DSA-65 key (32 bytes).

    The ML-DSA-65 key itself (1952 bytes) travels in each hybrid signature and is checked against the digest, so
    that this stays short enough to type into a configuration.
    """

    ed25519: bytes
    mldsa65_digest: bytes

    def __attrs_post_init__(self) -> None:
        if len(self.ed25519) != 32 or len(self.mldsa65_digest) != 32:
            raise KeyFormatError("a verifying key is two parts of 32 bytes")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``isolate-verify-...``. Raises KeyFormatError."""
        raw = from_text(_PUBLIC_PREFIX, text, 64, "verifying key")
        return cls(raw[:32], raw[32:])

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        if len(raw) != 64:
            raise KeyFormatError("a verifying key is 64 bytes")
        return cls(raw[:32], raw[32:])

    def to_bytes(self) -> bytes:
        return self.ed25519 + self.mldsa65_digest

    def __str__(self) -> str:
        return to_text(_PUBLIC_PREFIX, self.to_bytes())

    def verify(self, purpose: Purpose, message: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is this key's Ed25519 signature (64 bytes)."""
        return verify(self.ed25519, purpose, message, signature)

    def verify_hybrid(self, purpose: Purpose, message: bytes, signature: bytes) -> bool:
        """Whether both signatures in ``signature`` (5325 bytes) are this key's."""
        if len(signature) != HYBRID_SIGNATURE:
            return False
        classical = signature[:ED25519_SIGNATURE]
        public = signature[ED25519_SIGNATURE : ED25519_SIGNATURE + MLDSA65_PUBLIC]
        lattice = signature[ED25519_SIGNATURE + MLDSA65_PUBLIC :]
        if hashlib.sha256(public).digest() != self.mldsa65_digest:
            return False
        try:
            MLDSA65PublicKey.from_public_bytes(public).verify(lattice, _framed(purpose, message))
        except (InvalidSignature, ValueError):
            return False
        return self.verify(purpose, message, classical)


class Signer(Protocol):
    """Whoever signs for a key: a SigningKey, a key file, an agent that never shows the key."""

    @property
    def verifying_key(self) -> VerifyingKey: ...
    def sign(self, purpose: Purpose, message: bytes, /) -> bytes: ...


def _sodium_key(seed: Secret, public: bytes) -> Any:
    """The key as libsodium has it, in C's memory: in a ``bytes`` it could not be wiped. None without PyNaCl's cffi.

    libsodium signs in two thirds of OpenSSL's time, and a use of a handle waits for one signature.
    """
    if SODIUM is None:
        return None
    key = SODIUM[0].new("unsigned char[64]")
    memory = SODIUM[0].buffer(key)
    memory[:32], memory[32:] = seed.expose(), public
    return key


class SigningKey:
    """The private half: one seed of 32 bytes, from which both keys are derived.

    Raises UsageError for another size, a copy or a pickle.
    """

    __slots__ = ("_ed25519", "_mldsa65", "_seed", "_sodium", "verifying_key")

    def __init__(self, seed: Secret) -> None:
        if len(seed) != SEED_SIZE:
            raise UsageError(f"a signing key is made of {SEED_SIZE} bytes, not {len(seed)}")
        self._seed = seed
        with derive(seed, Label.SIGNING_ED25519) as classical, derive(seed, Label.SIGNING_MLDSA65) as lattice:
            ed25519 = Ed25519PrivateKey.from_private_bytes(classical.expose())
            public = ed25519.public_key().public_bytes_raw()
            self._sodium = _sodium_key(classical, public)
            # One library keeps it.
            self._ed25519 = ed25519 if self._sodium is None else None
            self._mldsa65 = MLDSA65PrivateKey.from_seed_bytes(lattice.expose())
        digest = hashlib.sha256(self._mldsa65.public_key().public_bytes_raw()).digest()
        self.verifying_key = VerifyingKey(public, digest)

    def __del__(self) -> None:
        # An instance whose __init__ raised has none.
        if SODIUM is not None and (key := getattr(self, "_sodium", None)) is not None:
            SODIUM[0].buffer(key)[:] = bytes(64)

    @classmethod
    def generate(cls) -> Self:
        return cls(Secret(secrets.token_bytes(32)))

    @classmethod
    def parse(cls, text: str) -> Self:
        return cls(Secret(from_text(_SECRET_PREFIX, text, 32, "signing key")))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a key file as `isolate keygen --signing` writes it. Raises KeyFormatError or StorageError."""
        return cls.parse(read_key_file(path, "signing key"))

    def save(self, path: str | os.PathLike[str]) -> None:
        comment = f"isolate signing key: keep it secret\nverifying key: {self.verifying_key}"
        write_key_file(path, comment, to_text(_SECRET_PREFIX, self._seed.expose()))

    def forget_seed(self) -> None:
        """Wipe the seed: from now on this key signs, and can no longer be saved.

        What signs lies in the cryptographic libraries' memory, where no walk over Python objects meets it.
        """
        self._seed.wipe()

    def _sign(self, message: bytes) -> bytes:
        if self._ed25519 is not None:
            return self._ed25519.sign(message)
        return nacl.bindings.crypto_sign(message, self._sodium)[:ED25519_SIGNATURE]

    def sign(self, purpose: Purpose, message: bytes) -> bytes:
        """An Ed25519 signature, 64 bytes."""
        return self._sign(_framed(purpose, message))

    def sign_note(self, text: bytes) -> bytes:
        """An Ed25519 signature over the bare text of a C2SP note, so that any auditor's tool can verify it.

        It is no signature for a Purpose: those frame with a zero byte, and a text with one is refused here.
        """
        if b"\0" in text or not text.endswith(b"\n"):
            raise UsageError("a note is text that ends in a newline and has no zero byte")
        return self._sign(text)

    def sign_token(self, signing_input: bytes) -> bytes:
        """EdDSA over a JWS signing input (RFC 7515), 64 bytes: the one signature without our frame.

        Such an input begins with the base64url of ``{"``, which no framed message does. Raises UsageError else.
        """
        if not _is_signing_input(signing_input):
            raise UsageError("this is no JWS signing input")
        return self._sign(signing_input)

    def sign_hybrid(self, purpose: Purpose, message: bytes) -> bytes:
        """Both signatures and the ML-DSA-65 public key, 5325 bytes."""
        public = self._mldsa65.public_key().public_bytes_raw()
        return self.sign(purpose, message) + public + self._mldsa65.sign(_framed(purpose, message))

    def __repr__(self) -> str:
        # An instance whose __init__ raised has none, and a traceback with locals shows it.
        return f"SigningKey({getattr(self, 'verifying_key', 'not finished')})"

    def _refuse(self, *_: object) -> NoReturn:
        raise UsageError("a signing key is not copied or pickled", hint="open its file again")

    # A second object with the same memory would go on signing after the first had wiped it. __reduce_ex__ is
    # object's, which asks these.
    __copy__ = __deepcopy__ = __reduce__ = __getstate__ = __replace__ = _refuse
