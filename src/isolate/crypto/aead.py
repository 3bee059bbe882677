"""Authenticated encryption into buffers that the caller owns: the one place that touches AEAD libraries.

    >>> from isolate.crypto.aead import Cipher, Suite
    >>> from isolate.crypto.secret import Secret
    >>> cipher = Cipher(Suite.AES_256_GCM, Secret(bytes(32)))
    >>> sealed = bytearray(5 + cipher.tag_size)
    >>> cipher.seal_into(sealed, b"hello", bytes(cipher.nonce_size), b"header")
    >>> out = bytearray(5)
    >>> cipher.open_into(out, sealed, bytes(cipher.nonce_size), b"header"), bytes(out)
    (True, b'hello')

Every buffer is cast to bytes before a length is taken: a float32 view counted in elements would leave three
quarters of it in plaintext. AEGIS-256 (RFC 10032) goes through PyNaCl's libsodium into the given buffers,
because its public functions allocate (0.7 against 8.5 GB/s); a known answer is computed at import, and where
it is wrong or the private module is gone, the public functions serve.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nacl.bindings
import nacl.exceptions
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from isolate.crypto.secret import Secret, wipe
from isolate.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

KEY_SIZE = 32
_NUMBER = struct.Struct(">Q")
# Bytes in one call. OpenSSL's interface counts in 31 bits; one limit for all suites keeps them exchangeable.
MAX_PLAINTEXT = 2**31 - 1 - 32


class Suite(IntEnum):
    """The number is what stands in a file or a prologue. Keys are derived with it, so it cannot be swapped."""

    AEGIS_256 = 1
    AES_256_GCM = 2
    CHACHA20_POLY1305 = 3

    @property
    def nonce_size(self) -> int:
        return 32 if self is Suite.AEGIS_256 else 12

    @property
    def tag_size(self) -> int:
        return 32 if self is Suite.AEGIS_256 else 16

    @property
    def title(self) -> str:
        return {1: "AEGIS-256", 2: "AES-256-GCM", 3: "ChaCha20-Poly1305"}[self.value]


def _cpu_features() -> set[str] | None:
    try:
        return set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return None


@cache
def preferred_suite() -> Suite:
    """AEGIS-256 where the CPU has AES instructions, ChaCha20-Poly1305 where it has none."""
    words = _cpu_features()
    if words is None:
        return Suite.AES_256_GCM
    return Suite.AEGIS_256 if "aes" in words else Suite.CHACHA20_POLY1305


@cache
def fastest_suite() -> Suite:
    """For counted nonces and keys that are soon replaced: AES-256-GCM where AVX-512 has AES in it.

    OpenSSL then takes four blocks an instruction (13.6 GB/s, docs/adr/0012), libsodium's AEGIS-256 one (7.7 GB/s).
    """
    wide = {"vaes", "vpclmulqdq", "avx512f"} <= (_cpu_features() or set())
    return Suite.AES_256_GCM if wide else preferred_suite()


def as_bytes(buffer: Buffer, *, writable: bool = False) -> memoryview:
    """A flat view in bytes. Raises UsageError when it is no buffer, not C-contiguous, or not writable as asked."""
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError):
        raise UsageError(f"a {type(buffer).__name__} gives no buffer of bytes") from None
    if not view.c_contiguous:
        raise UsageError("the buffer is not C-contiguous")
    if writable and view.readonly:
        raise UsageError("the buffer is read-only")
    if view.ndim == 1 and view.format == "B":
        return view
    # Names of fields stand between colons.
    if "O" in re.sub(":[^:]*:", "", view.format):
        raise UsageError("the buffer holds Python objects: their addresses, not their bytes")
    # A zero in the shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"" if view.readonly else bytearray())


def _load_sodium() -> tuple[Any, Any] | None:
    """PyNaCl's cffi module, if it computes a known answer and refuses a wrong one.

    The answer is test vector 1 of RFC 10032's AEGIS-256: 16 zero bytes, tag of 256 bits.
    """
    key, nonce = bytes.fromhex("1001" + "00" * 30), bytes.fromhex("10000200" + "00" * 28)
    known = "754fc3d8c973246dcc6d741412a4b2361181a1d18091082bf0266f66297d167d2e68b845f61a3b0527d31fc7b7b89f13"
    sealed, opened = bytearray(16 + 32), bytearray(b"x" * 16)
    try:
        from nacl._sodium import ffi, lib

        def opens(text: bytes) -> bool:
            plain = ffi.from_buffer(opened)
            status = lib.crypto_aead_aegis256_decrypt(
                plain, ffi.NULL, ffi.NULL, text, len(text), b"", 0, nonce, key
            )
            return bool(status == 0)

        lib.crypto_aead_aegis256_encrypt(
            ffi.from_buffer(sealed), ffi.NULL, bytes(16), 16, b"", 0, ffi.NULL, nonce, key
        )
        good = sealed.hex() == known and opens(bytes(sealed)) and opened == bytes(16)
        sealed[-1] ^= 1
        good = good and not opens(bytes(sealed))
    except (ImportError, AttributeError, TypeError):
        return None
    return (ffi, lib) if good else None


SODIUM = _load_sodium()


class Cipher:
    """One key of one suite. Shapes: ``plaintext`` n bytes, ``sealed`` n + tag_size bytes (the tag is last).

    Threads may share one: no state is kept between calls. The caller never seals twice under one nonce: in every
    suite that gives away plaintext and lets others forge. ``sealed`` and ``plaintext`` are apart or start together;
    any other overlap gives garbage.
    """

    __slots__ = ("_key", "nonce_size", "openssl", "suite", "tag_size")

    def __init__(self, suite: Suite, key: Secret) -> None:
        if len(key) != KEY_SIZE:
            raise UsageError(f"a cipher key is {KEY_SIZE} bytes")
        self.suite = suite
        self.nonce_size = suite.nonce_size
        self.tag_size = suite.tag_size
        self.openssl: AESGCM | ChaCha20Poly1305 | None = None
        self._key: Secret | None = None
        if suite is Suite.AES_256_GCM:
            self.openssl = AESGCM(key.expose())
        elif suite is Suite.CHACHA20_POLY1305:
            self.openssl = ChaCha20Poly1305(key.expose())
        else:
            self._key = Secret(key.expose())

    def __repr__(self) -> str:
        return f"Cipher({self.suite.title}, key hidden)"

    def wipe(self) -> None:
        """Forget the key; a later call raises UsageError. An OpenSSL context keeps its own copy until freed."""
        if self._key is not None:
            self._key.wipe()
        self.openssl = self._key = None

    def _exposed(self) -> memoryview:
        if self._key is None:
            raise UsageError("this key was wiped")
        return self._key.expose()

    def seal_into(self, sealed: Buffer, plaintext: Buffer, nonce: Buffer, data: bytes = b"") -> None:
        """Encrypt ``plaintext`` into ``sealed``, which is tag_size bytes longer. The two may start together."""
        source, target = as_bytes(plaintext), as_bytes(sealed, writable=True)
        self._check(len(source), len(target), nonce)
        if self.openssl is not None:
            self.openssl.encrypt_into(as_bytes(nonce), source, data, target)
            return
        key = self._exposed()
        if SODIUM is None:
            target[:] = nacl.bindings.crypto_aead_aegis256_encrypt(bytes(source), data, bytes(nonce), bytes(key))
            return
        ffi, lib = SODIUM
        lib.crypto_aead_aegis256_encrypt(
            ffi.from_buffer(target), ffi.NULL, ffi.from_buffer(source), len(source), data, len(data),
            ffi.NULL, ffi.from_buffer(nonce), ffi.from_buffer(key),
        )  # fmt: skip

    def open_into(self, plaintext: Buffer, sealed: Buffer, nonce: Buffer, data: bytes = b"") -> bool:
        """Decrypt ``sealed`` into ``plaintext``, which is tag_size bytes shorter, and may start together with it.

        Answers whether it authenticates. When it does not, ``plaintext`` is wiped before this returns.
        """
        source, target = as_bytes(sealed), as_bytes(plaintext, writable=True)
        self._check(len(target), len(source), nonce)
        if self.openssl is not None:
            try:
                self.openssl.decrypt_into(as_bytes(nonce), source, data, target)
            except InvalidTag:
                wipe(target)
                return False
            return True
        key = self._exposed()
        if SODIUM is None:
            try:
                target[:] = nacl.bindings.crypto_aead_aegis256_decrypt(
                    bytes(source), data, bytes(nonce), bytes(key)
                )
            except nacl.exceptions.CryptoError:
                wipe(target)
                return False
            return True
        ffi, lib = SODIUM
        status = lib.crypto_aead_aegis256_decrypt(
            ffi.from_buffer(target), ffi.NULL, ffi.NULL, ffi.from_buffer(source), len(source), data, len(data),
            ffi.from_buffer(nonce), ffi.from_buffer(key),
        )  # fmt: skip
        if status != 0:
            wipe(target)
            return False
        return True

    def seal(self, plaintext: Buffer, nonce: Buffer, data: bytes = b"") -> bytes:
        """``seal_into`` a new buffer: for small things."""
        if self.openssl is not None and len(as_bytes(nonce)) == self.nonce_size:
            return self.openssl.encrypt(as_bytes(nonce), as_bytes(plaintext), data)
        sealed = bytearray(as_bytes(plaintext).nbytes + self.tag_size)
        self.seal_into(sealed, plaintext, nonce, data)
        return bytes(sealed)

    def open(self, sealed: Buffer, nonce: Buffer, data: bytes = b"") -> bytes | None:
        """``open_into`` a new buffer: for small things. None when it does not authenticate."""
        size = as_bytes(sealed).nbytes - self.tag_size
        if size < 0:
            return None
        if self.openssl is not None and len(as_bytes(nonce)) == self.nonce_size:
            try:
                return self.openssl.decrypt(as_bytes(nonce), as_bytes(sealed), data)
            except InvalidTag:
                return None
        plaintext = bytearray(size)
        return bytes(plaintext) if self.open_into(plaintext, sealed, nonce, data) else None

    def _check(self, plain: int, sealed: int, nonce: Buffer) -> None:
        if sealed != plain + self.tag_size:
            raise UsageError(f"the sealed side is {self.tag_size} bytes longer than the plain side")
        if plain > MAX_PLAINTEXT:
            raise UsageError(f"at most {MAX_PLAINTEXT} bytes are sealed in one call")
        if as_bytes(nonce).nbytes != self.nonce_size:
            raise UsageError(f"a nonce of {self.suite.title} is {self.nonce_size} bytes")


class Pin:
    """A buffer that stays where it is, so that its address is taken once. Released when no lane uses it."""

    __slots__ = ("body", "head", "pointer", "raw", "size", "view")

    def __init__(self, size: int) -> None:
        self.size = size
        self.raw = bytearray(size)
        self.view = memoryview(self.raw)
        self.head = self.view[: Lane.HEAD]
        self.pointer: Any = None if SODIUM is None else SODIUM[0].from_buffer(self.raw)
        self.body: Any = None if self.pointer is None or size < Lane.HEAD else self.pointer + Lane.HEAD


class Lane:
    """One key for numbered records: 8 bytes of associated data, then the ciphertext, then the tag.

    A ``Cipher`` spends more time on checking and pinning five buffers than on 64 bytes; a lane pins key and nonce
    once. The record's number is the nonce (big-endian, zeros before it): the caller never uses one twice.

    >>> from isolate.crypto.aead import Lane, Pin, Suite
    >>> from isolate.crypto.secret import Secret
    >>> lane, pin, out = Lane(Suite.AEGIS_256, Secret(bytes(32))), Pin(8 + 5 + 32), bytearray(5)
    >>> lane.seal(0, pin, memoryview(b"hello"))
    >>> lane.open(0, pin, 0, memoryview(out)), bytes(out)
    (True, b'hello')

    ``seal(number, pin, source)`` seals ``source`` (flat bytes) behind the first 8 bytes of ``pin``.
    ``open(number, pin, at, target)`` opens the record at ``pin[at:]`` into ``target``, which is wiped when the
    answer is False. Both raise UsageError for buffers that do not fit, and after ``wipe``.
    """

    HEAD = 8

    __slots__ = ("_aead", "_key", "_nonce", "open", "seal", "suite", "tag_size")

    open: Callable[[int, Pin, int, memoryview], bool]
    seal: Callable[[int, Pin, memoryview], None]

    def __init__(self, suite: Suite, key: Secret) -> None:
        self.suite, self.tag_size = suite, suite.tag_size
        self._aead = Cipher(suite, key)
        self._nonce = Pin(suite.nonce_size)
        self._key: Pin | None = None
        if suite is Suite.AEGIS_256 and SODIUM is not None:
            self._key = Pin(KEY_SIZE)
            self._key.raw[:] = key.expose()
            self.seal, self.open = _sodium_lane(self._key, self._nonce)
        elif suite is Suite.AEGIS_256:
            self.seal, self.open = self._seal_slowly, self._open_slowly
        else:
            self.seal, self.open = _openssl_lane(self._aead.openssl, self._nonce)

    def __repr__(self) -> str:
        return f"Lane({self.suite.title}, key hidden)"

    def wipe(self) -> None:
        """Forget the key; a later call raises UsageError. Not while another thread is in a call."""
        self._aead.wipe()
        # From now on through the cipher, which refuses.
        self.seal, self.open = self._seal_slowly, self._open_slowly
        if self._key is not None:
            wipe(self._key.raw)

    def _seal_slowly(self, number: int, pin: Pin, source: memoryview) -> None:
        _NUMBER.pack_into(self._nonce.raw, self._nonce.size - 8, number)
        end = self.HEAD + len(source) + self.tag_size
        self._aead.seal_into(pin.view[self.HEAD : end], source, self._nonce.raw, bytes(pin.view[: self.HEAD]))

    def _open_slowly(self, number: int, pin: Pin, at: int, target: memoryview) -> bool:
        _NUMBER.pack_into(self._nonce.raw, self._nonce.size - 8, number)
        begin = at + self.HEAD
        sealed = pin.view[begin : begin + len(target) + self.tag_size]
        return self._aead.open_into(target, sealed, self._nonce.raw, bytes(pin.view[at:begin]))


def _openssl_lane(aead: Any, nonce: Pin) -> tuple[Callable[..., None], Callable[..., bool]]:
    """AES-256-GCM or ChaCha20-Poly1305, into and out of a pin without a copy."""
    encrypt, decrypt, pack, counter = aead.encrypt_into, aead.decrypt_into, _NUMBER.pack_into, nonce.raw
    place, tag, head = nonce.size - 8, Suite.AES_256_GCM.tag_size, Lane.HEAD

    def seal(number: int, pin: Pin, source: memoryview) -> None:
        pack(counter, place, number)
        end = head + len(source) + tag
        if end > pin.size:
            raise UsageError("the record does not fit into its buffer")
        encrypt(counter, source, pin.head, pin.view[head:end])

    def open_(number: int, pin: Pin, at: int, target: memoryview) -> bool:
        pack(counter, place, number)
        begin = at + head
        end = begin + len(target) + tag
        if end > pin.size or target.readonly:
            raise UsageError("the record does not fit into its buffers")
        try:
            decrypt(counter, pin.view[begin:end], pin.view[at:begin] if at else pin.head, target)
        except InvalidTag:
            wipe(target)
            return False
        return True

    return seal, open_


def _sodium_lane(key: Pin, nonce: Pin) -> tuple[Callable[..., None], Callable[..., bool]]:
    """AEGIS-256 with every name bound beforehand: these two functions are most of a small record's time."""
    ffi, lib = SODIUM  # type: ignore[misc]
    encrypt, decrypt = lib.crypto_aead_aegis256_encrypt, lib.crypto_aead_aegis256_decrypt
    null, pin_down, pack, counter = ffi.NULL, ffi.from_buffer, _NUMBER.pack_into, nonce.raw
    place, tag, head = nonce.size - 8, Suite.AEGIS_256.tag_size, Lane.HEAD
    nonce_at, key_at = nonce.pointer, key.pointer

    def seal(number: int, pin: Pin, source: memoryview) -> None:
        pack(counter, place, number)
        size = len(source)
        if head + size + tag > pin.size:
            raise UsageError("the record does not fit into its buffer")
        encrypt(pin.body, null, pin_down(source), size, pin.pointer, head, null, nonce_at, key_at)

    def open_(number: int, pin: Pin, at: int, target: memoryview) -> bool:
        pack(counter, place, number)
        sealed = len(target) + tag
        if at + head + sealed > pin.size or target.readonly:
            raise UsageError("the record does not fit into its buffers")
        data, body = (pin.pointer + at, pin.body + at) if at else (pin.pointer, pin.body)
        if decrypt(pin_down(target), null, null, body, sealed, data, head, nonce_at, key_at) == 0:
            return True
        wipe(target)
        return False

    return seal, open_
