"""Channels for asyncio: the names and errors of ``isolate.channel``, to be awaited (docs/spec/channel.md, 6).

    >>> import asyncio
    >>> from isolate.channel import aio
    >>> asyncio.iscoroutinefunction(aio.connect), asyncio.iscoroutinefunction(aio.Channel.recv_into)
    (True, True)

A task that is cancelled while it waits for a message loses nothing: the next ``recv`` goes on. One that is
cancelled in the middle of sending, or of a message of more than one record, ends the channel. ``send`` returns when
the kernel has taken all of the message, so that a slow reader holds its writer back. Records are sealed and opened
in the event loop's thread: a message of many MiB lets other tasks run only between its records.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from isolate.channel.handshake import MAX_FRAME, Handshake, Session, refusal
from isolate.channel.peers import Attested, AttestedPeer, Expect, Holder, HolderPeer
from isolate.channel.record import HEADER_SIZE, RekeyLimits
from isolate.channel.session import Endpoint, Inbox, flat
from isolate.channel.streams import TIMEOUT, bound_socket, close_listening, family, parse_address, shut_down
from isolate.crypto.aead import Suite
from isolate.crypto.secret import wipe
from isolate.errors import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    HandshakeRefused,
    RecordRefused,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer


GOODBYE = 1.0  # seconds for telling a peer the end: one that reads nothing holds nobody longer


class _Wire:
    """A connected socket: reads into an inbox, sends whole frames; foreign errors become ours."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self.sock, self.timeout, self.inbox = sock, timeout, Inbox()
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[bool, asyncio.Future[None]] = {}
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def _ready(self, *, write: bool) -> None:
        """Wait until the socket can be read or written. Cancelling this loses no byte, unlike sock_recv_into."""
        woken = self._waiting[write] = self._loop.create_future()
        add = self._loop.add_writer if write else self._loop.add_reader
        add(self.sock, self._wake, write)
        try:
            await woken
        finally:
            self._forget(write)

    def _wake(self, write: bool) -> None:
        woken = self._waiting.get(write)
        # Who waited in a loop that is closed is never woken.
        if woken is not None and not woken.done() and not self._loop.is_closed():
            woken.set_result(None)

    def _forget(self, write: bool) -> None:
        # Once dropped, the number of the descriptor may already be somebody else's.
        if self._waiting.pop(write, None) is not None and self.sock.fileno() >= 0:
            (self._loop.remove_writer if write else self._loop.remove_reader)(self.sock)

    def drop(self, *, shared: bool) -> None:
        """Close; whoever waits is woken, and finds it closed. ``shared`` after a fork: the parent goes on."""
        if not shared:
            for write in list(self._waiting):
                self._wake(write)
                self._forget(write)
            shut_down(self.sock)
        self.sock.close()

    async def fill(self, need: int) -> bool:
        """Read until ``need`` bytes are there; False at the end of the transport."""
        inbox = self.inbox
        while len(inbox) < need:
            try:
                count = self.sock.recv_into(inbox.space(need))
            except BlockingIOError:
                await self._ready(write=False)
                continue
            except OSError:
                return False
            if not count:
                return False
            inbox.added(count)
        return True

    async def send(self, data: memoryview | bytes) -> bool:
        """Send all of it; False when the other end is gone."""
        rest = memoryview(data)
        while len(rest):
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                await self._ready(write=True)
            except OSError:
                return False
        return True

    async def handshake(self, core: Handshake) -> Session:
        """Drive it to its end. Raises HandshakeRefused or ChannelTimeout."""
        try:
            async with asyncio.timeout(self.timeout):
                if core.initiator:
                    await self.send(core.start())
                while not core.done:
                    event, size = core.parse(await self._read(HEADER_SIZE))
                    answer = core.step(event, await self._read(core.body_size(event, size)))
                    if answer:
                        await self.send(answer)
        except TimeoutError:
            raise ChannelTimeout("the handshake was not done in time") from None
        except HandshakeRefused as error:
            if error.code != "peer_refused":
                with contextlib.suppress(OSError):
                    self.sock.send(refusal(error))
            raise
        return core.session

    async def _read(self, size: int) -> bytes:
        if size > MAX_FRAME:
            raise HandshakeRefused("a frame of the handshake is too long", code="malformed")
        if not await self.fill(size):
            raise HandshakeRefused("the peer went away during the handshake", code="peer_gone")
        return self.inbox.take(size)


class Channel:
    """One end of an established channel, as ``isolate.channel.Channel``. One task may send while one receives."""

    def __init__(self, wire: _Wire, session: Session) -> None:
        self._wire = wire
        self._end = Endpoint(session, wire.inbox, partial(wire.drop, shared=True))
        self._sending, self._receiving = asyncio.Lock(), asyncio.Lock()

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
        return self._wire.sock.fileno()

    async def send(self, data: Buffer) -> None:
        """Send one message: bytes, a memoryview, a numpy array, a torch CPU tensor (C-contiguous)."""
        view = flat(data)
        async with self._sending:
            self._end.check_open()
            await self._look(sending=True)
            # An end that only ever sends has to renew too.
            newer = self._end.attesting()
            if newer is not None:
                await self._put(newer)
            for record in self._end.outgoing(view):
                await self._put(record)

    async def _put(self, record: memoryview) -> None:
        try:
            async with asyncio.timeout(self._wire.timeout):
                sent = await self._wire.send(record)
        except TimeoutError:
            self._fail("sending timed out")
            raise ChannelTimeout("the peer takes nothing in time") from None
        except BaseException:
            # Part of a record may be out: nothing can follow it.
            self._fail("sending was cancelled")
            raise
        if not sent:
            if self._end.over:
                raise ChannelClosed("this channel was closed while it sent")
            self._drop()
            raise self._end.truncated()

    async def recv(self) -> bytearray:
        """The next message, whole."""
        received: Any = await self._receive(None)
        return received  # type: ignore[no-any-return]

    async def recv_into(self, buffer: Buffer) -> int:
        """The next message into ``buffer``; answers its length. One that is longer raises UsageError and stays."""
        view = flat(buffer)
        if view.readonly:
            raise UsageError("the buffer is read-only")
        count: Any = await self._receive(view)
        return count  # type: ignore[no-any-return]

    async def _receive(self, target: memoryview | None) -> int | bytearray:
        end = self._end
        async with self._receiving:
            end.check_open()
            await self._show_again()
            try:
                while need := end.pull(target):
                    async with asyncio.timeout(self._wire.timeout):
                        there = await self._wire.fill(need)
                    if not there:
                        if end.over:
                            raise ChannelClosed("this channel was closed while it waited")
                        self._drop()
                        raise end.truncated()
                message = end.message
            except TimeoutError:
                if end.midway:
                    self._fail("a record did not come whole in time")
                raise ChannelTimeout("the peer sent nothing in time") from None
            except RecordRefused as error:
                self._fail(error.message)
                raise
            except HandshakeRefused as error:
                await self._refuse(error, sending=False)
                raise
            except ChannelClosed:
                self._fail("the peer closed it")
                raise
            except asyncio.CancelledError:
                if end.within_long:
                    self._fail("reading was cancelled within a message")
                raise
            try:
                await self._look(sending=False)
            except HandshakeRefused:
                wipe(target if isinstance(message, int) else message)  # type: ignore[arg-type]
                raise
        return message

    async def _look(self, *, sending: bool) -> None:
        try:
            self._end.standing.look()
        except HandshakeRefused as error:
            await self._refuse(error, sending=sending)
            raise

    async def _show_again(self) -> None:
        if self._end.standing.renews and not self._sending.locked():
            async with self._sending:
                record = self._end.attesting()
                if record is not None:
                    await self._put(record)

    async def reattest(self) -> None:
        """Show our newest token now. The peer checks it before it takes anything that comes after."""
        async with self._sending:
            record = self._end.attesting(now=True)
            if record is None:
                raise UsageError("this end is not attested")
            await self._put(record)

    async def _refuse(self, error: HandshakeRefused, *, sending: bool) -> None:
        """Tell the peer a code, if it can still be told, and end. ``sending``: the caller holds the lock."""
        await self._say_goodbye(error.code, error.message, sending=sending)

    async def _say_goodbye(self, code: str, why: str, *, sending: bool) -> None:
        try:
            # A sender that is stuck in the middle of a record cannot be followed by anything.
            if not self._end.over and (sending or not self._sending.locked()):
                async with contextlib.nullcontext() if sending else self._sending:
                    with contextlib.suppress(ChannelError, TimeoutError):
                        async with asyncio.timeout(GOODBYE):
                            await self._wire.send(self._end.closing(code))
        finally:
            self._fail(why)

    def _fail(self, why: str) -> None:
        self._end.end(why)
        self._drop()

    async def close(self) -> None:
        """Tell the peer that this is the end, and end; what the peer still sends is lost. Twice does no harm."""
        await self._say_goodbye("", "it was closed here", sending=False)

    def abort(self, why: str = "it was aborted here") -> None:
        """End at once, without a word to the peer and nothing to await: as ``isolate.channel.Channel.abort``."""
        self._fail(why)

    def _drop(self) -> None:
        self._wire.drop(shared=self._end.forked)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"aio.Channel({self.peer!r}, {self.suite.title})"


class Listener:
    """Accepts channels, as ``isolate.channel.Listener``; several tasks may accept at once."""

    def __init__(self, sock: socket.socket, address: str, options: dict[str, Any], timeout: float | None) -> None:
        self._sock, self._options, self._timeout = sock, options, timeout
        self._turn = asyncio.Lock()
        self.address = address
        sock.setblocking(False)

    async def accept(self, timeout: float | None = None) -> Channel:
        """The next channel, after its handshake. Raises HandshakeRefused, ChannelTimeout or ChannelClosed."""
        core = Handshake(initiator=False, **self._options)
        try:
            async with asyncio.timeout(timeout), self._turn:
                sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        except TimeoutError:
            raise ChannelTimeout("nobody connected in time") from None
        except OSError:
            raise ChannelClosed("the listener is closed") from None
        return await _establish(sock, self._timeout, core)

    async def close(self) -> None:
        close_listening(self._sock, self.address)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


async def _establish(sock: socket.socket, timeout: float | None, core: Handshake) -> Channel:
    try:
        wire = _Wire(sock, timeout)
        return Channel(wire, await wire.handshake(core))
    except BaseException:
        sock.close()
        raise


def _stream_address(address: str) -> tuple[str, Any]:
    kind, where = parse_address(address)
    if kind == "shm":
        raise UsageError("a shared-memory ring blocks: use isolate.channel, in a thread of its own")
    return kind, where


async def listen(
    address: str,
    *,
    identity: Attested,
    expect: Expect | None = None,
    profile: str = "peer",
    purpose: str = "",
    timeout: float | None = TIMEOUT,
    suites: Collection[Suite] = (),
    rekey: RekeyLimits | None = None,
) -> Listener:
    """As ``isolate.channel.listen``. Raises UsageError, StorageError or UnavailableError."""
    options = {
        "identity": identity, "expect": expect, "profile": profile, "purpose": purpose, "suites": suites,
        "rekey": rekey,
    }  # fmt: skip
    Handshake(initiator=False, **options)  # type: ignore[arg-type]  # so that a misfit is told here, not at accept
    _stream_address(address)
    sock, address = bound_socket(address)
    return Listener(sock, address, options, timeout)


async def connect(
    address: str,
    *,
    identity: Attested | Holder,
    expect: Expect,
    profile: str | None = None,
    purpose: str = "",
    timeout: float | None = TIMEOUT,
    suites: Collection[Suite] = (),
    rekey: RekeyLimits | None = None,
) -> Channel:
    """As ``isolate.channel.connect``. Raises HandshakeRefused, ChannelTimeout, UnavailableError, UsageError."""
    core = Handshake(
        initiator=True,
        identity=identity,
        expect=expect,
        profile=profile or ("client" if isinstance(identity, Holder) else "peer"),
        purpose=purpose,
        suites=suites,
        rekey=rekey,
    )
    kind, where = _stream_address(address)
    sock = socket.socket(family(kind, where), socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_connect(sock, where)
    except TimeoutError:
        sock.close()
        raise ChannelTimeout(f"nobody answers at {address} in time") from None
    except OSError as error:
        sock.close()
        raise UnavailableError(f"cannot connect to {address}: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    return await _establish(sock, timeout, core)
