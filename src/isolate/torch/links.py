"""The attested channels between the ranks of one group, and what ends all (docs/spec/process-group.md, 1 to 3).

Two channels to every other rank: a *control link*, on which each tells that it is alive, that it leaves, or who
failed; and a *link* for the collectives. Both are pinned to job, rank and group, the second also to the instance of
the first, whose standing is that of both. Point-to-point messages have channels of their own (points.py).

    >>> from isolate.torch.links import Peers
    >>> from isolate.enclave.workload import Workload
    >>> issubclass(Workload, Peers)
    True

Whatever goes wrong with a rank ends the group on every rank, with RankFailed, which names it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from attrs import evolve

from isolate.channel import Attested, AttestedPeer, Channel, Expect, Listener, connect, listen
from isolate.errors import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    ChannelTruncated,
    HandshakeRefused,
    IsolateError,
    MalformedError,
    RankFailed,
    UsageError,
)
from isolate.torch import rendezvous
from isolate.torch.link import Link, give_up
from isolate.torch.rendezvous import Doors, Hint, Store
from isolate.torch.roster import MAX_CONTROL, Beat, Failed, Left, Roster, parse

BEAT = 1.0  # seconds between two signs of life; less where the timeout is short
GRACE = 1.0  # seconds for those who do not wait for a dead rank themselves to get what is still on its way
HANDSHAKE = 30.0  # seconds for one, and for one control message
# A refusal that a stray or broken connection can cause. The others mean that a rank is not who it should be.
_NOISE = {"malformed", "peer_gone", "out_of_order", "handshake_refused"}
_ACCEPTORS = 4
CORES = 3  # for a rank, from which a second thread of it finds one
# What ends one group, and says nothing about the rank in others.
_OF_ONE_GROUP = {"collective_mismatch", "group_over", "rank_aborted", "rank_left", "rank_missing"}
LINK, POINT = b"link", b"point"


@runtime_checkable
class Peers(Protocol):
    """Whose identity a group speaks with, and what it expects of a rank. A Workload is one."""

    def attested(self) -> Attested:
        """What this rank shows."""
        ...

    def expect(self, rank: int | None) -> Expect:
        """The pins on a rank of the same job; None: any rank of it."""
        ...


class Links:
    """The mesh of one group. ``rank`` is the rank in the group, ``ranks[rank]`` the global one, which is attested.

    Raises RankFailed when a rank does not come, or is not who it should be, within ``timeout`` seconds.
    """

    def __init__(
        self, store: Store, rank: int, ranks: tuple[int, ...], *, group: str, peers: Peers, timeout: float
    ) -> None:
        self.rank, self.ranks, self.size, self.timeout = rank, ranks, len(ranks), timeout
        self.failure: RankFailed | None = None
        self.closed = False
        self.started = 0  # collectives
        self.waiting: int | None = None  # the rank that a collective waits for, now
        self.moved = time.monotonic()  # when a collective last got something
        self.spare = False  # whether there are cores for a second thread of every rank here
        self.watched: list[Callable[[float], tuple[str, int | None] | None]] = []  # what may be late
        self._on_point: Callable[[int, Channel], None] | None = None
        self._on_end: Callable[[], None] | None = None
        self._identity, self._peers = peers.attested(), peers
        self._group = rendezvous.group_name(group, ranks)
        self._links: list[Link | None] = [None] * self.size
        self._control: list[Channel | None] = [None] * self.size
        self._hints: list[Hint | None] = [None] * self.size
        self._changed = threading.Condition()
        self._refused: HandshakeRefused | None = None
        self._stop = threading.Event()
        self._doors: Doors | None = None
        self._farewell: threading.Thread | None = None
        self._beat = min(BEAT, timeout / 8)
        # A link's own limit comes after that of what uses it, which knows better whom to blame.
        self._patience = timeout + max(5.0, timeout / 4)
        self._roster = Roster(ranks, me=rank, beat=self._beat, clock=time.monotonic)
        self._boot = rendezvous.boot()
        with _GUARD:
            _LIVE.add(self)
        if self.size == 1:
            return
        try:
            self._open(store, time.monotonic() + timeout)
        except BaseException as error:
            if isinstance(error, RankFailed):
                self.fail(error)
            self.close(orderly=False)
            raise

    # Opening.

    def _expect(self, index: int | None, *, control: bool) -> Expect:
        """The pins on a rank of the group (an index; None: whoever connects, to be looked at afterwards)."""
        pins = evolve(self._peers.expect(None if index is None else self.ranks[index]), group=self._group)
        if control:
            return pins
        known = None if index is None else self._control[index]
        # The control link is always read, so it sees each newer token; a link may lie idle for hours.
        instance = known.peer.result.instance if known and isinstance(known.peer, AttestedPeer) else None
        return evolve(pins, max_stale=None, instance=instance)

    def _open(self, store: Store, deadline: float) -> None:
        self._doors = doors = Doors()
        control = doors.open("control", lambda address: self._listen(address, control=True))
        link = doors.open("link", lambda address: self._listen(address, control=False))
        for count, listeners, admit in ((1, control, self._admit_control), (_ACCEPTORS, link, self._admit_link)):
            for listener in listeners:
                for _ in range(min(count, self.size - 1)):
                    self._thread(self._accept, listener, admit)
        own = Hint(self._boot, tuple(one.address for one in control), tuple(one.address for one in link))
        rendezvous.publish(store, self.rank, own)
        self._thread(self._watch)
        for index in range(self.rank):
            hint = self._hint(store, index, deadline)
            self._hints[index] = hint
            channel, address = self._connect(index, hint.control, control=True)
            self._add_control(index, channel)
            channel, address = self._connect(index, hint.link, control=False)
            self._say(index, channel, LINK)
            self._add_link(index, channel, address)
        self._wait_for_all(deadline)
        # Only now: a rank below us connects for points too, and had published before we connected.
        for index in range(self.rank + 1, self.size):
            self._hints[index] = self._hint(store, index, deadline)
        here = 1 + sum(hint is not None and hint.boot == self._boot for hint in self._hints)
        self.spare = len(os.sched_getaffinity(0)) >= CORES * here

    def _thread(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, name="isolate-links", daemon=True).start()

    def _listen(self, address: str, *, control: bool) -> Listener:
        return listen(
            address,
            identity=self._identity,
            expect=self._expect(None, control=control),
            purpose="torch/control" if control else "torch/link",
            timeout=HANDSHAKE if control else self._patience,
        )

    def _hint(self, store: Store, index: int, deadline: float) -> Hint:
        try:
            hint = rendezvous.fetch(store, index, deadline, self.check)
        except MalformedError as error:
            raise self._named(index, error.message, error.code) from None
        if hint is None:
            raise self._named(index, "it did not come in time", "rank_missing")
        return hint

    def _connect(self, index: int, addresses: tuple[str, ...], *, control: bool) -> tuple[Channel, str]:
        """Connect to a rank by the first address where somebody answers. Raises RankFailed."""
        problem: IsolateError = UsageError("it has no address that can be reached from here")
        hint = self._hints[index]
        for address in hint.reachable(addresses, self._boot) if hint else ():
            self.check()
            try:
                channel = connect(
                    address,
                    identity=self._identity,
                    expect=self._expect(index, control=control),
                    profile="peer",
                    purpose="torch/control" if control else "torch/link",
                    timeout=min(self.timeout, HANDSHAKE) if control else self._patience,
                )
                return channel, address
            except (ChannelError, HandshakeRefused) as error:
                self.check()
                raise self._named(index, error.message, error.code) from None
            except IsolateError as error:
                problem = error
        raise self._named(index, problem.message, "rank_missing")

    def _say(self, index: int, channel: Channel, what: bytes) -> None:
        try:
            channel.send(what)
        except ChannelError as error:
            raise self._named(index, error.message, error.code) from None

    def _accept(self, listener: Listener, admit: Callable[[Channel, str], None]) -> None:
        while not self.closed:
            try:
                channel = listener.accept()
            except ChannelClosed:
                return
            except IsolateError as error:
                self._note(error)
                continue
            try:
                admit(channel, listener.address)
            except IsolateError as error:
                self._note(error)
                give_up(channel)

    def _note(self, error: IsolateError) -> None:
        """Anybody can connect, and who is refused stops nobody else; but it may be the rank that is missing."""
        if isinstance(error, HandshakeRefused) and error.code not in _NOISE:
            with self._changed:
                self._refused = self._refused or error
                self._changed.notify_all()

    def _who(self, channel: Channel) -> int:
        """The index of the rank that connected. Raises HandshakeRefused for one that has no business here."""
        slot = channel.peer.result.slot if isinstance(channel.peer, AttestedPeer) else None
        if slot is None or slot.rank not in self.ranks or slot.rank == self.ranks[self.rank]:
            raise HandshakeRefused("the peer is no other rank of this group", code="wrong_rank")
        return self.ranks.index(slot.rank)

    def _admit_control(self, channel: Channel, _: str) -> None:
        index = self._who(channel)
        # The higher rank connects.
        if index < self.rank:
            raise HandshakeRefused("the peer should have waited", code="wrong_rank")
        self._add_control(index, channel)

    def _admit_link(self, channel: Channel, address: str) -> None:
        index = self._who(channel)
        buffer = bytearray(16)
        what = bytes(buffer[: channel.recv_into(buffer)])
        with self._changed:
            self._changed.wait_for(lambda: self._control[index] is not None or self.over, self.timeout)
            control = self._control[index]
        if control is None or self.over or not _same_instance(control, channel):
            raise HandshakeRefused(
                "the peer is another instance than that of its control link", code="wrong_instance"
            )
        if what == LINK and index > self.rank:
            self._add_link(index, channel, address)
        elif what == POINT:
            # A rank that was ready before us may send already.
            with self._changed:
                self._changed.wait_for(lambda: self._on_point is not None or self.over, self.timeout)
            if self._on_point is None:
                raise HandshakeRefused("the group is over", code="group_over")
            self._on_point(index, channel)
        else:
            raise HandshakeRefused("no such link", code="malformed")

    def _add_control(self, index: int, channel: Channel) -> None:
        with self._changed:
            if self._control[index] is not None or self.over:
                raise HandshakeRefused("this rank is connected already", code="wrong_instance")
            self._control[index] = channel
            self._roster.heard(index, started=0)
            self._changed.notify_all()
        self._thread(self._read_control, index, channel)

    def _add_link(self, index: int, channel: Channel, address: str) -> None:
        with self._changed:
            if self._links[index] is not None or self.over:
                raise HandshakeRefused("this rank is connected already", code="wrong_instance")
            self._links[index] = Link(self, index, channel, ring=address.startswith("shm:"))
            self._changed.notify_all()

    def _wait_for_all(self, deadline: float) -> None:
        """Wait for the higher ranks. Raises RankFailed; soon, when somebody was refused meanwhile."""
        missing: list[int] = []

        def complete() -> bool:
            missing[:] = [one for one in range(self.size) if one != self.rank and self._links[one] is None]
            return not missing or self.over

        with self._changed:
            while not complete() and time.monotonic() < deadline:
                if self._refused is not None:
                    # The others may be on their way; whoever was refused will not come again.
                    self._changed.wait_for(complete, min(deadline - time.monotonic(), 2 * GRACE))
                    break
                self._changed.wait(max(deadline - time.monotonic(), 0))
            complete()
        self.check()
        if missing:
            error = self._refused
            why = "it did not come in time" if error is None else f"who came was refused: {error.message}"
            raise self._named(missing[0], why, "rank_missing" if error is None else error.code)

    def attach(self, on_point: Callable[[int, Channel], None], on_end: Callable[[], None]) -> None:
        """Who takes the channels that others open for messages, and who is told that the group is over."""
        with self._changed:
            self._on_point, self._on_end = on_point, on_end
            self._changed.notify_all()

    def open_point(self, index: int) -> Channel:
        """A channel of its own for messages to this rank. Raises RankFailed."""
        hint = self._hints[index]
        channel, _ = self._connect(index, hint.link if hint else (), control=False)
        self._say(index, channel, POINT)
        return channel

    # Working.

    @property
    def over(self) -> bool:
        return self.closed or self.failure is not None

    def check(self) -> None:
        """Raise what ended the group."""
        if self.failure is not None:
            raise self.failure
        if self.closed:
            raise RankFailed("this process group was destroyed", rank=self.ranks[self.rank], code="group_over")

    def link(self, index: int) -> Link:
        link = self._links[index]
        if link is None:
            self.check()
            raise self._named(index, "there is no link to it", "rank_missing")
        return link

    def broken(self, index: int, error: IsolateError) -> RankFailed:
        """A channel to this rank failed: end the group. Answers the error that everybody here gets."""
        if isinstance(error, RankFailed):
            return self.fail(error)
        if isinstance(error, ChannelTimeout):
            return self.late("sending", index)
        if not isinstance(error, ChannelTruncated | ChannelClosed):
            return self.fail(self._named(index, error.message, error.code))
        # Maybe it ended because of another rank: then its control link says so, before that ends too.
        with self._changed:
            self._changed.wait_for(lambda: self.over or self._roster.ended(index), 2 * GRACE)
        if self._roster.has_left(index):
            return self.fail(self._named(index, "it left the group", "rank_left"))
        return self.fail(self._named(index, "it is gone", "rank_gone"))

    def _named(self, index: int, why: str, code: str) -> RankFailed:
        rank = self.ranks[index]
        return RankFailed(f"rank {rank} failed: {why}", rank=rank, code=code)

    def fail(self, error: RankFailed) -> RankFailed:
        """End the group here, and tell the others. Only the first failure counts: it is answered."""
        with self._changed:
            if self.failure is not None:
                return self.failure
            if self.closed:
                return error
            self.failure = error
            self._farewell = threading.Thread(target=self._tell_all, args=(error,), daemon=True)
            # Here: whoever closes the group meanwhile waits for it, which one may not before it is started.
            self._farewell.start()
            self._changed.notify_all()
        # The others read of the reason before they see links end; but one that does not read must not hold us.
        self._farewell.join(0.2)
        # Whoever is blocked in a channel wakes up.
        self._give_up_links()
        with _GUARD:
            live = list(_LIVE)
        for other in live:
            # The other groups of this rank, which may have longer limits: the job has lost a rank.
            if other._peers is self._peers and error.rank in other.ranks and error.code not in _OF_ONE_GROUP:
                other.fail(error)
        return error

    def _give_up_links(self) -> None:
        for link in self._links:
            if link is not None:
                link.give_up()
        if self._on_end is not None:
            self._on_end()

    def _tell_all(self, error: RankFailed) -> None:
        rank = self.ranks[self.rank] if error.rank is None else error.rank
        message = Failed(rank, error.code).encode()
        # Those that are silent last: sending to them may block.
        order = sorted(range(self.size), key=lambda index: (self.ranks[index] == rank, self._roster.silent(index)))
        for index in order:
            control = self._control[index]
            if control is not None:
                with contextlib.suppress(IsolateError):
                    control.send(message)

    def late(self, what: str, waiting: int | None) -> RankFailed:
        """Time is up for ``what``: name who is to blame, and end the group."""
        if self.failure is not None:
            return self.failure
        index, why = self._roster.blame(started=self.started, waiting=waiting)
        others = [self.ranks[one] for one in self._roster.absent(started=self.started) if one != index]
        if others:
            why += f" (nor do ranks {', '.join(map(str, others))} take part)"
        return self.fail(self._named(index, f"the timeout of {what} passed, and {why}", "rank_timeout"))

    def _watch(self) -> None:
        """Tell the others that we live, and look whether something is late."""
        tick, next_beat = min(0.1, self._beat / 2), 0.0
        while not self._stop.wait(tick):
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self._beat
                self._send_beats()
            for look in list(self.watched):
                found = look(now)
                if found is not None:
                    self.late(*found)
            # Also when nobody waits for it: the job has lost a rank.
            dead = self._roster.dead(self.moved, GRACE)
            if dead is not None:
                self.fail(self._named(dead, "it is gone", "rank_gone"))
            lost = self._roster.lost(self.timeout)
            if lost is not None:
                why = f"it has not been heard of for {self._roster.silent(lost):.1f} s"
                self.fail(self._named(lost, why, "rank_timeout"))

    def _send_beats(self) -> None:
        message = Beat(self.started).encode()
        for index, control in enumerate(self._control):
            # One that does not read would block us in the end.
            if control is not None and self._roster.silent(index) < 10 * self._beat:
                with contextlib.suppress(IsolateError):
                    control.send(message)

    def _read_control(self, index: int, channel: Channel) -> None:
        buffer = bytearray(MAX_CONTROL)
        while not self._stop.is_set():
            try:
                message = parse(memoryview(buffer)[: channel.recv_into(buffer)])
            except ChannelTimeout:
                continue
            except (ChannelTruncated, ChannelClosed):
                with self._changed:
                    self._roster.died(index)
                    self._changed.notify_all()
                return
            except IsolateError as error:
                # Revoked, stale, tampered with, or no control message.
                self.broken(index, error)
                return
            if isinstance(message, Beat):
                self._roster.heard(index, started=message.started)
            elif isinstance(message, Left):
                with self._changed:
                    self._roster.left(index)
                    self._changed.notify_all()
            elif message.rank in self.ranks:
                told = self.ranks[index]
                why = f"rank {message.rank} failed: rank {told} says so ({message.code})"
                self.fail(RankFailed(why, rank=message.rank, code=message.code))

    # Ending.

    def close(self, *, orderly: bool = True) -> None:
        """Leave the group. The others may go on with what they have of us; a failure is not told again."""
        with self._changed:
            if self.closed:
                return
            self.closed = True
            self._changed.notify_all()
        if self._farewell is not None:
            self._farewell.join(2.0)
        self._stop.set()
        orderly = orderly and self.failure is None
        for link in self._links:
            if link is not None:
                link.close() if orderly else link.give_up()
        if self._on_end is not None:
            self._on_end()
        for control in self._control:
            if control is None:
                continue
            if orderly:
                with contextlib.suppress(IsolateError):
                    control.send(Left().encode())
                    control.close()
            give_up(control)
        if self._doors is not None:
            self._doors.close()


_LIVE: weakref.WeakSet[Links] = weakref.WeakSet()
_GUARD = threading.Lock()  # a set that grows cannot be gone through


def _same_instance(one: Channel, other: Channel) -> bool:
    first, second = one.peer, other.peer
    return (
        isinstance(first, AttestedPeer)
        and isinstance(second, AttestedPeer)
        and first.result.instance == second.result.instance
    )
