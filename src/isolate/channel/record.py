"""Records: a sealer and an opener without I/O, each one direction's keys, counter and limits (channel.md, 5).

    >>> from isolate.channel.record import Kind, Opener, Sealer
    >>> from isolate.crypto.aead import Suite
    >>> from isolate.crypto.secret import Secret
    >>> sealer, opener = Sealer(Suite.AES_256_GCM, Secret(bytes(32))), Opener(Suite.AES_256_GCM, Secret(bytes(32)))
    >>> record = bytes(sealer.seal(Kind.DATA, b"hello"))
    >>> kind, size = opener.parse(record[:8])
    >>> out = bytearray(size)
    >>> opener.open(record[:8], record[8:], out)
    >>> kind.name, bytes(out)
    ('DATA', b'hello')

A record is an 8-byte header, which is the associated data, and the ciphertext with its tag. Its number is never
sent: it counts from 0 in each direction, over rekeys too, and is the nonce. So nothing can be dropped, repeated or
reordered; whatever does not authenticate ends the channel. Nothing here allocates with the size of a record once
the one bounce buffer has grown.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

from attrs import frozen

from isolate.crypto.aead import Cipher, Suite, as_bytes
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.errors import RecordRefused, UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer

HEADER = struct.Struct(">BBHI")  # kind, zero, zero, bytes of plaintext
HEADER_SIZE = HEADER.size
PART_SIZE = 1 << 20  # bytes of plaintext in one record at most; a longer message goes in parts of this size
SMALL = 4096  # the bounce buffer's first size, and how far a reader reads ahead
LAST_SEQUENCE = 2**64 - 1


class Kind(IntEnum):
    """The first byte of a record. Below 16 are the handshake's frames."""

    FIN = 15
    DATA = 16
    LONG = 17
    PART = 18
    REKEY = 19
    CLOSE = 20
    ATTEST = 21


_KINDS = {int(kind): kind for kind in Kind}


@frozen
class RekeyLimits:
    """How much one key protects: bytes of plaintext, records, seconds (spec, 5.4). UsageError above these."""

    bytes: int = 2**36
    records: int = 2**32
    seconds: float = 3600.0

    def __attrs_post_init__(self) -> None:
        if not (0 < self.records <= 2**32 and 0 < self.bytes <= 2**40 and self.seconds > 0):
            raise UsageError("rekey limits are above zero, and at most 2^32 records and 2^40 bytes")


def hard_limits(suite: Suite) -> RekeyLimits:
    """What a receiver takes under one key at most: a sender that goes on is broken, and refused."""
    return RekeyLimits(bytes=2**40 if suite is Suite.AEGIS_256 else 2**36)


class _Direction:
    """What sealing and opening share: the key, the record number and what the key has protected."""

    def __init__(self, suite: Suite, key: Secret, limits: RekeyLimits) -> None:
        self.suite, self.limits = suite, limits
        self._key = Secret(key.expose())
        self._cipher = Cipher(suite, self._key)
        self.tag_size = suite.tag_size
        self.sequence = 0
        self.epoch = 0
        self._bytes = 0
        self._records = 0
        self._nonce = bytearray(suite.nonce_size)
        self._counter_at = suite.nonce_size - 8

    def _set_nonce(self) -> None:
        if self.sequence >= LAST_SEQUENCE:
            raise RecordRefused("the record numbers are used up")
        _COUNTER.pack_into(self._nonce, self._counter_at, self.sequence)

    def _count(self, size: int) -> None:
        self.sequence += 1
        self._records += 1
        self._bytes += size

    def _rekey(self) -> None:
        """The next key is a one-way function of this one, which is wiped (spec, 5.4)."""
        self.epoch += 1
        new = derive(self._key, Label.CHANNEL_REKEY, self.epoch)
        self._key.wipe()
        self._cipher.wipe()
        self._key, self._cipher = new, Cipher(self.suite, new)
        self._bytes = self._records = 0

    def wipe(self) -> None:
        """Forget the keys; whatever comes after raises UsageError."""
        self._key.wipe()
        self._cipher.wipe()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.suite.title}, record {self.sequence}, keys hidden)"


_COUNTER = struct.Struct(">Q")


class Sealer(_Direction):
    """Makes records in the order in which they must be sent. One thread at a time: the channel has a lock."""

    def __init__(
        self,
        suite: Suite,
        key: Secret,
        limits: RekeyLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        hard = hard_limits(suite)
        super().__init__(suite, key, limits or hard)
        if self.limits.bytes > hard.bytes:
            raise UsageError(f"{suite.title} protects at most {hard.bytes} bytes under one key")
        self._clock = clock
        self._born = clock()
        self._bounce = bytearray(HEADER_SIZE + SMALL + self.tag_size)
        self._view = memoryview(self._bounce)

    def seal(self, kind: Kind, plaintext: Buffer = b"") -> memoryview:
        """The next record, in a buffer that the next call overwrites. At most PART_SIZE bytes (UsageError)."""
        source = as_bytes(plaintext)
        size = len(source)
        end = HEADER_SIZE + size + self.tag_size
        if end > len(self._bounce):
            self._grow(size)
        self._set_nonce()
        header = HEADER.pack(kind, 0, 0, size)
        self._view[:HEADER_SIZE] = header
        self._cipher.seal_into(self._view[HEADER_SIZE:end], source, self._nonce, header)
        self._count(size)
        return self._view[:end]

    def due(self, size: int) -> bool:
        """Whether a REKEY record must go before a record of ``size`` bytes."""
        limits = self.limits
        return (
            self._records + 2 > limits.records
            or self._bytes + size > limits.bytes
            or self._clock() - self._born >= limits.seconds
        ) and self._records > 0

    def rekey(self) -> memoryview:
        """The REKEY record; whatever is sealed after it is under the next key."""
        record = self.seal(Kind.REKEY)
        self._rekey()
        self._born = self._clock()
        return record

    def _grow(self, size: int) -> None:
        if size > PART_SIZE:
            raise UsageError(f"one record holds at most {PART_SIZE} bytes")
        self._view.release()
        self._bounce = bytearray(HEADER_SIZE + PART_SIZE + self.tag_size)
        self._view = memoryview(self._bounce)


class Opener(_Direction):
    """Opens records in the order in which they were made; anything else is RecordRefused, and the end."""

    def __init__(self, suite: Suite, key: Secret) -> None:
        super().__init__(suite, key, hard_limits(suite))

    def parse(self, header: Buffer) -> tuple[Kind, int]:
        """Kind and bytes of plaintext of a header, which is not yet authenticated. Raises RecordRefused."""
        number, flags, reserved, size = HEADER.unpack(header)
        kind = _KINDS.get(number)
        if kind is None or flags or reserved or size > PART_SIZE:
            raise RecordRefused("a record's header is malformed")
        return kind, size

    def open(self, header: bytes, sealed: Buffer, plaintext: Buffer) -> None:
        """Open a record into ``plaintext``. Raises RecordRefused, and ``plaintext`` is wiped."""
        self._set_nonce()
        size = len(sealed) - self.tag_size  # type: ignore[arg-type]  # a view of bytes, by the caller
        if self._records >= self.limits.records or self._bytes + size > self.limits.bytes:
            raise RecordRefused("the peer went on under a key that is used up")
        if not self._cipher.open_into(plaintext, sealed, self._nonce, header):
            raise RecordRefused("a record does not authenticate")
        self._count(size)
        if header[0] == Kind.REKEY:
            self._rekey()
