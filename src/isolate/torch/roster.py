"""Who is there, who is gone, and whom to blame when time is up: no I/O, the clock is handed in.

    >>> from isolate.torch.roster import Roster
    >>> time = [0.0]
    >>> roster = Roster([0, 1, 2], me=0, beat=1.0, clock=lambda: time[0])
    >>> time[0] = 5.0
    >>> roster.heard(1, started=7)
    >>> roster.blame(started=7, waiting=1)
    (2, 'it has not been heard of for 5.0 s')

And the messages of a control link (docs/spec/process-group.md, 3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from attrs import frozen

from isolate.crypto import cbor
from isolate.errors import MalformedError

MAX_CONTROL = 256  # bytes of one message
MISSED = 3  # heartbeats, after which a rank counts as silent
_CODE = re.compile(r"[a-z_]{1,64}")


@frozen
class Beat:
    """I am alive, and have begun so many collectives of this group."""

    started: int

    def encode(self) -> bytes:
        return cbor.encode({"kind": "beat", "number": self.started, "code": ""})


@frozen
class Failed:
    """The group is over, because of this rank."""

    rank: int
    code: str

    def encode(self) -> bytes:
        return cbor.encode({"kind": "failed", "number": self.rank, "code": self.code})


@frozen
class Left:
    """I have done all that I wanted, and go."""

    def encode(self) -> bytes:
        return cbor.encode({"kind": "left", "number": 0, "code": ""})


def parse(raw: bytes | bytearray | memoryview) -> Beat | Failed | Left:
    """Raises MalformedError."""
    fields = cbor.record(raw, {"kind": str, "number": int, "code": str}, max_size=MAX_CONTROL)
    kind, number, code = fields["kind"], fields["number"], fields["code"]
    if number < 0:
        raise MalformedError("a number in a control message is negative")
    if kind == "failed" and _CODE.fullmatch(code):
        return Failed(number, code)
    if kind == "beat" and not code:
        return Beat(number)
    if kind == "left" and not code and not number:
        return Left()
    raise MalformedError("no control message")


class Roster:
    """What one rank knows of the others. ``ranks`` are global; an index is a rank in the group."""

    def __init__(self, ranks: Sequence[int], *, me: int, beat: float, clock: Callable[[], float]) -> None:
        self._ranks, self._me, self._beat, self._clock = tuple(ranks), me, beat, clock
        self._heard = [clock()] * len(self._ranks)
        self._started = [0] * len(self._ranks)
        self._died: dict[int, float] = {}
        self._left: set[int] = set()

    def heard(self, index: int, *, started: int) -> None:
        self._heard[index], self._started[index] = self._clock(), started

    def died(self, index: int) -> None:
        """Its control link ended, and it had not said why."""
        if index not in self._left:
            self._died.setdefault(index, self._clock())

    def left(self, index: int) -> None:
        self._left.add(index)

    def has_left(self, index: int) -> bool:
        return index in self._left

    def ended(self, index: int) -> bool:
        """Whether nothing more will come from it."""
        return index in self._left or index in self._died

    def silent(self, index: int) -> float:
        """Seconds since this rank was heard of, or 0 while that is no wonder."""
        passed = self._clock() - self._heard[index]
        return passed if passed > MISSED * self._beat else 0.0

    def dead(self, since: float, grace: float) -> int | None:
        """A rank that died at least ``grace`` seconds ago, while nothing moved since ``since``."""
        for index, when in self._died.items():
            if self._clock() - max(when, since) > grace:
                return index
        return None

    def lost(self, limit: float) -> int | None:
        """A rank that has been silent for longer than ``limit`` seconds, and did not leave."""
        for index in range(len(self._ranks)):
            if index not in (self._me, *self._left) and self.silent(index) > limit:
                return index
        return None

    def blame(self, *, started: int, waiting: int | None) -> tuple[int, str]:
        """Which rank (its index) keeps the others waiting, and why it is thought to.

        1. One that died.
        2. One that is silent, the longest first.
        3. One that has begun fewer collectives than we have, the fewest first.
        4. The one that we wait for.
        """
        others = [index for index in range(len(self._ranks)) if index != self._me]
        for index in others:
            if index in self._died:
                return index, "it is gone"
        silent = max((index for index in others if index not in self._left), key=self.silent, default=None)
        if silent is not None and self.silent(silent):
            return silent, f"it has not been heard of for {self.silent(silent):.1f} s"
        behind = min(others, key=lambda index: self._started[index])
        if self._started[behind] < started:
            # The newest beat may be old by one interval: "at least".
            return behind, "it does not take part"
        return (others[0] if waiting is None else waiting), "it sends or takes nothing"

    def absent(self, *, started: int) -> list[int]:
        """Every other rank that is gone or silent, or has begun fewer collectives than we have."""
        return [
            index
            for index in range(len(self._ranks))
            if index != self._me and (index in self._died or self.silent(index) or self._started[index] < started)
        ]
