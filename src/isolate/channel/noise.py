"""A Noise core (revision 34) without I/O: bytes in, bytes out, and every key can be handed in.

    >>> from isolate.channel.noise import HandshakeState
    >>> name = "Noise_XXhfs_25519+MLKEM768_AESGCM_SHA256"
    >>> alice = HandshakeState(name, initiator=True, static=CurveKey.generate())
    >>> bob = HandshakeState(name, initiator=False, static=CurveKey.generate())
    >>> _ = bob.read_message(alice.write_message()), alice.read_message(bob.write_message())
    >>> bob.read_message(alice.write_message(b"hello")), alice.finished, alice.hash == bob.hash
    (b'hello', True, True)

Channels use XXhfs with X25519 and ML-KEM-768 and nothing else (docs/spec/channel.md, 3). The other patterns are
here so that public vectors can be tried through the very code that channels run. What breaks the protocol, and
every message that does not authenticate, raises HandshakeRefused; after it every call raises UsageError.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from isolate.channel.patterns import parse_pattern
from isolate.crypto.aead import Cipher, Suite
from isolate.crypto.exchange import CURVE_SIZE, LATTICE_BOXED, LATTICE_PUBLIC, CurveKey, LatticeKey, encapsulate
from isolate.crypto.kdf import hkdf
from isolate.crypto.secret import Secret, wipe
from isolate.errors import HandshakeRefused, MalformedError, UsageError

MAX_MESSAGE = 65535  # Noise, 3
TAG_SIZE = 16
LAST_NONCE = 2**64 - 1  # reserved for rekey (Noise, 5.1)

_HASHES: dict[str, Any] = {
    "SHA256": hashlib.sha256,
    "SHA512": hashlib.sha512,
    "BLAKE2s": hashlib.blake2s,
    "BLAKE2b": hashlib.blake2b,
}
_CIPHERS = {"AESGCM": Suite.AES_256_GCM, "ChaChaPoly": Suite.CHACHA20_POLY1305}


class CipherState:
    """One key and a counter (Noise, 5.1). Without a key, what goes in comes out."""

    __slots__ = ("_cipher", "_order", "_suite", "nonce")

    def __init__(self, suite: Suite, key: Secret | None = None) -> None:
        self._suite = suite
        self._order: Any = "big" if suite is Suite.AES_256_GCM else "little"
        self._cipher = None if key is None else Cipher(suite, key)
        self.nonce = 0

    @property
    def has_key(self) -> bool:
        return self._cipher is not None

    def _iv(self, nonce: int) -> bytes:
        return bytes(4) + nonce.to_bytes(8, self._order)

    def encrypt(self, data: bytes, plaintext: bytes) -> bytes:
        if self._cipher is None:
            return plaintext
        if self.nonce >= LAST_NONCE:
            raise HandshakeRefused("the Noise nonces are used up")
        sealed = self._cipher.seal(plaintext, self._iv(self.nonce), data)
        self.nonce += 1
        return sealed

    def decrypt(self, data: bytes, sealed: bytes) -> bytes:
        if self._cipher is None:
            return sealed
        if self.nonce >= LAST_NONCE:
            raise HandshakeRefused("the Noise nonces are used up")
        plaintext = self._cipher.open(sealed, self._iv(self.nonce), data)
        if plaintext is None:
            raise HandshakeRefused("a handshake message does not authenticate")
        self.nonce += 1
        return plaintext

    def wipe(self) -> None:
        """Forget the key; whatever comes after raises UsageError."""
        if self._cipher is not None:
            self._cipher.wipe()

    def rekey(self) -> None:
        """Replace the key by a one-way function of it (Noise, 11.3)."""
        if self._cipher is not None:
            with Secret(self._cipher.seal(bytes(32), self._iv(LAST_NONCE))[:32]) as key:
                self._cipher = Cipher(self._suite, key)


class SymmetricState:
    """The chaining key and the hash of everything said (Noise, 5.2)."""

    __slots__ = ("_chaining_key", "_hash", "_hash_name", "_suite", "cipher", "hash")

    def __init__(self, name: str, suite: Suite, hash_name: str) -> None:
        self._suite = suite
        self._hash, self._hash_name = _HASHES[hash_name], hash_name
        size = self._hash().digest_size
        raw = name.encode()
        self.hash: bytes = raw.ljust(size, b"\0") if len(raw) <= size else self._hash(raw).digest()
        self._chaining_key = Secret(self.hash)
        self.cipher = CipherState(suite)

    def _hkdf(self, material: Secret | None, count: int) -> list[Secret]:
        data, size = b"" if material is None else material.expose(), len(self.hash)
        out = hkdf(self._chaining_key.expose(), data, b"", count * size, self._hash_name)
        try:
            return [Secret(memoryview(out)[place : place + size]) for place in range(0, len(out), size)]
        finally:
            wipe(out)

    def _new_key(self, key: Secret) -> CipherState:
        if len(key) == 32:
            return CipherState(self._suite, key)
        with Secret(key.expose()[:32]) as short:
            return CipherState(self._suite, short)

    def mix_hash(self, data: bytes) -> None:
        self.hash = self._hash(self.hash + data).digest()

    def mix_key(self, material: Secret) -> None:
        self._chaining_key, key = self._hkdf(material, 2)
        self.cipher = self._new_key(key)

    def mix_key_and_hash(self, material: Secret) -> None:
        self._chaining_key, digest, key = self._hkdf(material, 3)
        self.mix_hash(bytes(digest.expose()))
        self.cipher = self._new_key(key)

    def encrypt_and_hash(self, plaintext: bytes) -> bytes:
        sealed = self.cipher.encrypt(self.hash, plaintext)
        self.mix_hash(sealed)
        return sealed

    def decrypt_and_hash(self, sealed: bytes) -> bytes:
        plaintext = self.cipher.decrypt(self.hash, sealed)
        self.mix_hash(sealed)
        return plaintext

    def split(self) -> tuple[CipherState, CipherState]:
        first, second = self._hkdf(None, 2)
        return self._new_key(first), self._new_key(second)

    def chaining_key(self) -> Secret:
        """What exported secrets are derived from. No output of ``split`` tells anything about it."""
        return Secret(self._chaining_key.expose())

    def wipe(self) -> None:
        self._chaining_key.wipe()
        self.cipher.wipe()


class HandshakeState:
    """One side of a handshake (Noise, 5.3).

    ``name`` is the protocol name, say ``Noise_XX_25519_AESGCM_SHA256``. Keys are CurveKey, remote keys 32 bytes,
    each of ``psks`` 32 bytes. ``ephemeral``, ``lattice`` and ``encapsulate`` are for tests; left out, they are
    fresh. Raises UsageError for a name, or a set of keys, that makes no handshake.
    """

    # token -> (who holds the first key, and which; who holds the second): initiator's letter first.
    _DH: ClassVar[dict[str, tuple[str, str]]] = {
        "ee": ("e", "e"), "es": ("e", "s"), "se": ("s", "e"), "ss": ("s", "s"),
    }  # fmt: skip

    def __init__(
        self,
        name: str,
        *,
        initiator: bool,
        prologue: bytes = b"",
        static: CurveKey | None = None,
        remote_static: bytes | None = None,
        ephemeral: CurveKey | None = None,
        lattice: LatticeKey | None = None,
        psks: Sequence[bytes] = (),
        encapsulate: Callable[[bytes], tuple[Secret, bytes]] = encapsulate,
    ) -> None:
        parts = name.split("_")
        if len(parts) != 5 or parts[0] != "Noise" or parts[3] not in _CIPHERS or parts[4] not in _HASHES:
            raise UsageError(f"no Noise protocol of this core: {name[:80]}")
        self._pattern = parse_pattern(parts[1])
        if parts[2] != ("25519+MLKEM768" if self._pattern.hybrid else "25519"):
            raise UsageError(f"no Noise protocol of this core: {name[:80]}")
        if self._pattern.psks != len(psks) or any(len(key) != 32 for key in psks):
            raise UsageError(f"{parts[1]} takes {self._pattern.psks} pre-shared keys of 32 bytes")
        if remote_static is not None and len(remote_static) != CURVE_SIZE:
            raise UsageError(f"a static key is {CURVE_SIZE} bytes")
        self.initiator = initiator
        self._static, self._ephemeral, self._lattice = static, ephemeral, lattice
        self._given_ephemeral = ephemeral is not None
        self.remote_static = remote_static
        self._remote_ephemeral: bytes | None = None
        self._remote_lattice: bytes | None = None
        self._encapsulate = encapsulate
        self._psks = [Secret(key) for key in psks]
        self._turn = 0
        self._failed = False
        self._symmetric = SymmetricState(name, _CIPHERS[parts[3]], parts[4])
        self._symmetric.mix_hash(prologue)
        for ours, token in ((initiator, self._pattern.before[0]), (not initiator, self._pattern.before[1])):
            if token:
                key = static.public if ours and static is not None else remote_static if not ours else None
                if key is None:
                    raise UsageError(f"{parts[1]} takes a static key that was not given")
                self._symmetric.mix_hash(key)

    @property
    def finished(self) -> bool:
        return self._turn == len(self._pattern.messages) and not self._failed

    @property
    def writes_next(self) -> bool:
        """Whether the next handshake message is ours to write."""
        return not (self.finished or self._failed) and (self._turn % 2 == 0) == self.initiator

    @property
    def hash(self) -> bytes:
        """The handshake hash h: when finished, it names this session."""
        return self._symmetric.hash

    def _dh(self, token: str) -> Secret:
        mine, theirs = self._DH[token] if self.initiator else reversed(self._DH[token])
        key = self._ephemeral if mine == "e" else self._static
        public = self._remote_ephemeral if theirs == "e" else self.remote_static
        if key is None or public is None:
            raise UsageError(f"the handshake takes a key that was not given ({token})")
        try:
            return key.exchange(public)
        except MalformedError:
            raise HandshakeRefused("the peer's public key is of small order") from None

    def _mix(self, token: str) -> None:
        """The tokens that both sides treat alike."""
        if token == "psk":  # noqa: S105 (a token of a pattern)
            self._symmetric.mix_key_and_hash(self._psks.pop(0))
        else:
            self._symmetric.mix_key(self._dh(token))

    def write_message(self, payload: bytes = b"") -> bytes:
        """The next message. Raises UsageError out of turn, or when it would be longer than 65535 bytes."""
        if not self.writes_next:
            raise UsageError("this side has no handshake message to write now")
        # Hash and keys move on with each token: until the message is whole, there is no way back to go on from.
        self._failed = True
        symmetric, parts = self._symmetric, []
        for token in self._pattern.messages[self._turn]:
            if token == "e":  # noqa: S105
                if self._ephemeral is None or not self._given_ephemeral:
                    self._ephemeral = CurveKey.generate()
                parts.append(self._ephemeral.public)
                symmetric.mix_hash(self._ephemeral.public)
                if self._pattern.psks:
                    symmetric.mix_key(Secret(self._ephemeral.public))
            elif token == "s":  # noqa: S105
                if self._static is None:
                    raise UsageError("the handshake takes a static key")
                parts.append(symmetric.encrypt_and_hash(self._static.public))
            elif token == "e1":  # noqa: S105
                self._lattice = self._lattice or LatticeKey.generate()
                parts.append(symmetric.encrypt_and_hash(self._lattice.public))
            elif token == "ekem1":  # noqa: S105
                try:
                    shared, boxed = self._encapsulate(self._remote_lattice or b"")
                except MalformedError:
                    raise HandshakeRefused("the peer's ML-KEM-768 key is malformed") from None
                parts.append(symmetric.encrypt_and_hash(boxed))
                symmetric.mix_key(shared)
            else:
                self._mix(token)
        parts.append(symmetric.encrypt_and_hash(payload))
        message = b"".join(parts)
        if len(message) > MAX_MESSAGE:
            raise UsageError(f"a Noise message is at most {MAX_MESSAGE} bytes")
        self._turn, self._failed = self._turn + 1, False
        return message

    def read_message(self, message: bytes) -> bytes:
        """The payload of the peer's next message. Raises HandshakeRefused; UsageError out of turn."""
        if self.finished or self._failed or self.writes_next:
            raise UsageError("this side has no handshake message to read now")
        self._failed = True
        if len(message) > MAX_MESSAGE:
            raise HandshakeRefused(f"a Noise message is at most {MAX_MESSAGE} bytes")
        symmetric, rest = self._symmetric, message

        def take(size: int) -> bytes:
            nonlocal rest
            if len(rest) < size:
                raise HandshakeRefused("a handshake message is too short")
            part, rest = rest[:size], rest[size:]
            return part

        def opened(size: int) -> bytes:
            return symmetric.decrypt_and_hash(take(size + (TAG_SIZE if symmetric.cipher.has_key else 0)))

        for token in self._pattern.messages[self._turn]:
            if token == "e":  # noqa: S105
                self._remote_ephemeral = take(CURVE_SIZE)
                symmetric.mix_hash(self._remote_ephemeral)
                if self._pattern.psks:
                    symmetric.mix_key(Secret(self._remote_ephemeral))
            elif token == "s":  # noqa: S105
                self.remote_static = opened(CURVE_SIZE)
            elif token == "e1":  # noqa: S105
                self._remote_lattice = opened(LATTICE_PUBLIC)
            elif token == "ekem1":  # noqa: S105
                if self._lattice is None:
                    raise UsageError("the handshake takes an ML-KEM-768 key")
                boxed = opened(LATTICE_BOXED)
                symmetric.mix_key(self._lattice.decapsulate(boxed))
            else:
                self._mix(token)
        payload = symmetric.decrypt_and_hash(rest)
        self._turn, self._failed = self._turn + 1, False
        return payload

    def split(self) -> tuple[CipherState, CipherState]:
        """What encrypts from initiator to responder, and back. Raises UsageError before the last message."""
        self._need_finished()
        return self._symmetric.split()

    def chaining_key(self) -> Secret:
        """The final chaining key, for exported secrets. Raises UsageError before the last message."""
        self._need_finished()
        return self._symmetric.chaining_key()

    def wipe(self) -> None:
        """Forget every key but the static ones: this handshake is over."""
        self._failed = True
        self._symmetric.wipe()
        self._ephemeral = self._lattice = None
        self._psks.clear()

    def _need_finished(self) -> None:
        if not self.finished:
            raise UsageError("the handshake is not finished")
