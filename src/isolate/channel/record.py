"""Records: a sealer and an opener without I/O, each one direction's keys, counter and limits (channel.md, 5).

    >>> from isolate.channel.record import Kind, Opener, Sealer
    >>> from isolate.crypto.aead import Pin, Suite
    >>> from isolate.crypto.secret import Secret
    >>> sealer, opener = Sealer(Suite.AES_256_GCM, Secret(bytes(32))), Opener(Suite.AES_256_GCM, Secret(bytes(32)))
    >>> pin = Pin(100)
    >>> record = sealer.seal(Kind.DATA, memoryview(b"hello"))
    >>> pin.view[: len(record)] = record
    >>> kind, size = opener.parse(pin.raw, 0)
    >>> out = bytearray(size)
    >>> opener.open(pin, 0, kind, memoryview(out))
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

from attrs import frozen

from isolate.crypto.aead import Lane, Pin, Suite
from isolate.crypto.kdf import Label, derive
from isolate.crypto.secret import Secret
from isolate.errors import RecordRefused, UsageError

HEADER = struct.Struct(">BBHI")  # kind, zero, zero, bytes of plaintext
HEADER_SIZE = HEADER.size
PART_SIZE = 1 << 20  # bytes of plaintext in one record at most; a longer message goes in parts of this size
SMALL = 4096  # the bounce buffer's first size, and how far a reader reads ahead
LAST_SEQUENCE = 2**64 - 1
_NOTHING = memoryview(b"")


class Kind(IntEnum):
    """The first byte of a record. Below 16 are the handshake's frames."""

    FIN = 15
    DATA = 16
    LONG = 17
    PART = 18
    REKEY = 19
    CLOSE = 20
    ATTEST = 21


# The same header in two words: the first is the kind and three zeros.
_WORDS = struct.Struct(">II")
_write, _read = _WORDS.pack_into, _WORDS.unpack_from
_REKEY = Kind.REKEY
_KINDS = {kind << 24: kind for kind in Kind}


@frozen
class RekeyLimits:
    """How much one key protects: bytes of plaintext, records, seconds (spec, 5.4). UsageError above these."""

    bytes: int = 2**36
    records: int = 2**32
    seconds: float = 3600.0

    def __attrs_post_init__(self) -> None:
        if not (1 < self.records <= 2**32 and 0 < self.bytes <= 2**40 and self.seconds > 0):
            raise UsageError("rekey limits are above one record and zero, and at most 2^32 records and 2^40 bytes")


def hard_limits(suite: Suite) -> RekeyLimits:
    """What a receiver takes under one key at most: a sender that goes on is broken, and refused."""
    return RekeyLimits(bytes=2**40 if suite is Suite.AEGIS_256 else 2**36)


class _Direction:
    """What sealing and opening share: the key, the record number and what the key has protected."""

    __slots__ = (
        "_key",
        "_lane",
        "bytes_left",
        "epoch",
        "limits",
        "overhead",
        "records_left",
        "sequence",
        "suite",
        "tag_size",
    )

    def __init__(self, suite: Suite, key: Secret, limits: RekeyLimits) -> None:
        self.suite, self.limits = suite, limits
        self._key = Secret(key.expose())
        self._lane = Lane(suite, self._key)
        self.tag_size = suite.tag_size
        self.overhead = HEADER_SIZE + suite.tag_size
        self.sequence = 0
        self.epoch = 0
        self.bytes_left, self.records_left = limits.bytes, limits.records

    def _rekey(self) -> None:
        """The next key is a one-way function of this one, which is wiped (spec, 5.4)."""
        self.epoch += 1
        new = derive(self._key, Label.CHANNEL_REKEY, self.epoch)
        self.wipe()
        self._key, self._lane = new, Lane(self.suite, new)
        self.bytes_left, self.records_left = self.limits.bytes, self.limits.records
        if self.sequence + self.records_left > LAST_SEQUENCE:
            raise RecordRefused("the record numbers are used up")

    def wipe(self) -> None:
        """Forget the keys; whatever comes after raises UsageError. Not while another thread is in a call."""
        self._key.wipe()
        self._lane.wipe()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.suite.title}, record {self.sequence}, keys hidden)"


class Sealer(_Direction):
    """Makes records in the order in which they must be sent. One thread at a time: the channel has a lock."""

    __slots__ = ("_clock", "_pin", "until")

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
        self._pin = Pin(HEADER_SIZE + SMALL + self.tag_size)
        self.until = clock() + self.limits.seconds

    def seal(self, kind: int, plaintext: memoryview = _NOTHING) -> memoryview:
        """The next record, in a buffer that the next call overwrites.

        ``plaintext`` is a flat view of bytes (``aead.as_bytes``), at most PART_SIZE of them (UsageError).
        """
        size, sequence, pin = len(plaintext), self.sequence, self._pin
        end = size + self.overhead
        if end > pin.size:
            if size > PART_SIZE:
                raise UsageError(f"one record holds at most {PART_SIZE} bytes")
            pin = self._pin = Pin(HEADER_SIZE + PART_SIZE + self.tag_size)
        # Counted before it is sealed: whatever happens then, this number is not used again.
        self.sequence = sequence + 1
        self.records_left -= 1
        self.bytes_left -= size
        _write(pin.raw, 0, kind << 24, size)
        self._lane.seal(sequence, pin, plaintext)
        return pin.view[:end]

    def due(self, size: int) -> bool:
        """Whether a REKEY record must go before a record of ``size`` bytes."""
        used = self.records_left < self.limits.records
        # One record is kept for the REKEY itself.
        return used and (self.records_left <= 1 or self.bytes_left < size or self._clock() >= self.until)

    def rekey(self) -> memoryview:
        """The REKEY record; whatever is sealed after it is under the next key."""
        record = self.seal(Kind.REKEY)
        self._rekey()
        self.until = self._clock() + self.limits.seconds
        return record


class Opener(_Direction):
    """Opens records in the order in which they were made; anything else is RecordRefused, and the end."""

    __slots__ = ()

    def __init__(self, suite: Suite, key: Secret) -> None:
        super().__init__(suite, key, hard_limits(suite))

    @staticmethod
    def parse(raw: bytearray | bytes, at: int) -> tuple[Kind, int]:
        """Kind and bytes of plaintext of the header at ``at``, not yet authenticated. Raises RecordRefused."""
        word, size = _read(raw, at)
        kind = _KINDS.get(word)
        if kind is None or size > PART_SIZE:
            raise RecordRefused("a record's header is malformed")
        return kind, size

    def open(self, pin: Pin, at: int, kind: Kind, plaintext: memoryview) -> None:
        """Open the record at ``pin[at:]`` into ``plaintext``. Raises RecordRefused, and ``plaintext`` is wiped."""
        sequence = self.sequence
        self.records_left -= 1
        self.bytes_left -= len(plaintext)
        if self.records_left < 0 or self.bytes_left < 0:
            raise RecordRefused("the peer went on under a key that is used up")
        if not self._lane.open(sequence, pin, at, plaintext):
            raise RecordRefused("a record does not authenticate")
        self.sequence = sequence + 1
        if kind is _REKEY:
            self._rekey()
