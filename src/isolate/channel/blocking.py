"""A channel that blocks, over whatever moves bytes: sockets (streams.py) or a shared-memory ring (ring.py).

    >>> from isolate.channel.blocking import Channel
    >>> [name for name in vars(Channel) if name in ("send", "recv", "recv_into", "close", "abort", "reattest")]
    ['send', 'recv', 'recv_into', 'reattest', 'close', 'abort']

One lock lies around sealing and sending, so that records leave in the order of their numbers; another around
receiving. Whatever goes wrong with a record ends the channel for good, on both sides (docs/spec/channel.md, 6).
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from isolate.channel.handshake import Session
from isolate.channel.peers import AttestedPeer, HolderPeer
from isolate.channel.session import Endpoint, Inbox, flat
from isolate.crypto.aead import Suite
from isolate.crypto.secret import wipe
from isolate.errors import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    HandshakeRefused,
    RecordRefused,
    UsageError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Wire(Protocol):
    """What moves bytes. False means that the other end is gone; too slow is ChannelTimeout."""

    inbox: Inbox

    def fill(self, need: int) -> bool:
        """Wait until ``need`` bytes are in the inbox."""

    def send(self, data: memoryview, /) -> bool:
        """Send all of it."""

    def fileno(self) -> int:
        """The descriptor of the socket below."""

    def drop(self, *, shared: bool) -> None:
        """Close at once; whoever waits finds the end. ``shared``: a fork's parent still uses it."""


class Channel:
    """One end of an established channel. Made by ``channel.connect`` and ``Listener.accept``.

    ``peer`` is an AttestedPeer or a HolderPeer, ``binding`` 32 bytes that only this session has, ``suite`` how
    records are sealed. Errors: RecordRefused (tampered; the channel is over), ChannelTruncated (cut off),
    ChannelClosed (used after its end, or the peer closed), ChannelTimeout.
    """

    def __init__(self, wire: Wire, session: Session) -> None:
        self._wire = wire
        self._end = Endpoint(session, wire.inbox, partial(wire.drop, shared=True))

    @property
    def peer(self) -> AttestedPeer | HolderPeer:
        return self._end.peer

    @property
    def binding(self) -> bytes:
        return self._end.binding

    @property
    def suite(self) -> Suite:
        return self._end.suite

    def fileno(self) -> int:
        """The descriptor of the socket below: to ask the kernel about the peer, never to read or write."""
        return self._wire.fileno()

    def send(self, data: Buffer) -> None:
        """Send one message: bytes, a memoryview, a numpy array, a torch CPU tensor (C-contiguous)."""
        view, end = flat(data), self._end
        try:
            with end.sending:
                record = end.single(view)
                if record is not None:
                    self._put(record)
                    return
                end.check_open()
                self._look(sending=True)
                # An end that only ever sends has to renew too.
                newer = end.attesting()
                if newer is not None:
                    self._put(newer)
                for record in end.outgoing(view):
                    self._put(record)
        finally:
            if end.over:
                end.tidy()

    def _put(self, record: memoryview) -> None:
        try:
            if self._wire.send(record):
                return
        except BaseException:
            # Part of a record may be out: nothing can follow it.
            self._fail("a record could not be sent whole")
            raise
        self._gone()

    def recv(self) -> bytearray:
        """The next message, whole."""
        received: Any = self._receive(None)
        return received  # type: ignore[no-any-return]

    def recv_into(self, buffer: Buffer) -> int:
        """The next message into ``buffer``; answers its length. One that is longer raises UsageError and stays."""
        view = flat(buffer)
        if view.readonly:
            raise UsageError("the buffer is read-only")
        count: Any = self._receive(view)
        return count  # type: ignore[no-any-return]

    def _receive(self, target: memoryview | None) -> int | bytearray:
        end, wire = self._end, self._wire
        try:
            with end.receiving:
                if end.over:
                    end.check_open()
                standing = end.standing
                if standing.renews:
                    self._show_again()
                try:
                    while need := end.pull(target):
                        if not wire.fill(need):
                            self._gone()
                except BaseException as error:
                    self._failed(error)
                    raise
                message = end.message
                if standing.clock() < standing.due:
                    return message
                try:
                    self._look(sending=False)
                except HandshakeRefused:
                    wipe(target if isinstance(message, int) else message)  # type: ignore[arg-type]
                    raise
                return message
        finally:
            if end.over:
                end.tidy()

    def _failed(self, error: BaseException) -> None:
        """What a failed read leaves of the channel: all of it, when nothing had come; else nothing."""
        end = self._end
        if isinstance(error, HandshakeRefused):
            self._refuse(error, sending=False)
        elif isinstance(error, RecordRefused | ChannelClosed):
            self._fail(error.message)
        elif isinstance(error, UsageError):
            pass
        elif end.midway if isinstance(error, ChannelTimeout) else end.within_long:
            # A record that came in part never came whole in time: over, since who bends a length would otherwise
            # have the reader wait for ever. Or an interrupt within a long message, the rest of which cannot be told
            # from the next one.
            self._fail("a record did not come whole in time")

    def _gone(self) -> NoReturn:
        """The transport ended. Raises ChannelTruncated, or ChannelClosed when it was we who ended it."""
        if self._end.over:
            raise ChannelClosed("this channel was closed meanwhile")
        self._drop()
        raise self._end.truncated()

    def _look(self, *, sending: bool) -> None:
        """End a session whose peer is no longer admitted. Raises HandshakeRefused."""
        try:
            self._end.standing.look()
        except HandshakeRefused as error:
            self._refuse(error, sending=sending)
            raise

    def _show_again(self) -> None:
        """Show a newer token of ours, if there is one and nobody is sending: the next call will otherwise."""
        if self._end.sending.acquire(blocking=False):
            try:
                record = self._end.attesting()
                if record is not None:
                    self._put(record)
            finally:
                self._end.sending.release()

    def reattest(self) -> None:
        """Show our newest token now. The peer checks it before it takes anything that comes after."""
        self._end.check_open()
        with self._end.sending:
            record = self._end.attesting(now=True)
            if record is None:
                raise UsageError("this end is not attested")
            self._put(record)

    def _refuse(self, error: HandshakeRefused, *, sending: bool) -> None:
        """Tell the peer a code, if it can still be told, and end. ``sending``: the caller holds the lock."""
        self._say_goodbye(error.code, sending=sending)
        self._fail(error.message)

    def _fail(self, why: str) -> None:
        self._end.end(why)
        self._drop()

    def close(self) -> None:
        """Tell the peer that this is the end, and end; what the peer still sends is lost. Twice does no harm."""
        if not self._end.over:
            self._say_goodbye("", sending=False)
            self._end.end("it was closed here")
        self._drop()

    def abort(self, why: str = "it was aborted here") -> None:
        """End at once, from any thread: without a word to the peer, which finds the end ChannelTruncated.

        Waits for nothing, as ``close`` may for whoever is sending. Who uses the channel here, now or later, gets
        ChannelClosed, later with ``why`` in it. Does no harm to a channel that is over.
        """
        self._fail(why)

    def _say_goodbye(self, code: str, *, sending: bool) -> None:
        end = self._end
        # A sender that is stuck holds the lock; dropping the transport afterwards frees it.
        if not sending and not end.sending.acquire(timeout=1.0):
            return
        try:
            if not end.over:
                with contextlib.suppress(ChannelError):
                    self._wire.send(end.closing(code))
        finally:
            if not sending:
                end.sending.release()

    def _drop(self) -> None:
        # After a fork the transport is the parent's too: shutting it down would end the parent's channel.
        self._wire.drop(shared=self._end.forked)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Channel({self.peer!r}, {self.suite.title})"
