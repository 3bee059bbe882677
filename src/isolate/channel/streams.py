"""Channels over blocking TCP and Unix sockets (docs/spec/channel.md, 6).

    >>> from isolate.channel.streams import parse_address
    >>> parse_address("tcp:127.0.0.1:7000"), parse_address("unix:/run/x")
    (('tcp', ('127.0.0.1', 7000)), ('unix', '/run/x'))

``timeout`` (seconds, None waits for ever) bounds a whole handshake, and afterwards each record: how long it may
take to begin to come, and then to come whole. A reader that timed out between messages may read again; whoever
timed out in the middle of sending may not. Threads may share a Channel: one may send while another receives.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from isolate.channel.handshake import MAX_FRAME, Handshake, Session, refusal
from isolate.channel.peers import Attested, AttestedPeer, Expect, Holder, HolderPeer
from isolate.channel.record import HEADER_SIZE, RekeyLimits
from isolate.channel.session import Endpoint, Inbox, flat
from isolate.crypto.aead import Suite
from isolate.crypto.secret import wipe
from isolate.errors import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    HandshakeRefused,
    RecordRefused,
    StorageError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Collection

    from typing_extensions import Buffer

TIMEOUT = 30.0  # seconds
BACKLOG = 1024
_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.EBADF, errno.ESHUTDOWN}


def parse_address(address: str) -> tuple[str, Any]:
    """``unix:/path`` or ``tcp:host:port`` (an IPv6 host in brackets). Raises UsageError."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and 0 < len(os.fsencode(rest)) < 108:
        return kind, rest
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdecimal() and int(port) < 65536:
        return kind, (host.strip("[]"), int(port))
    raise UsageError(f"no address of a channel: {address[:120]}", hint="unix:/path (107 bytes) or tcp:host:port")


def _set_timeout(sock: socket.socket, seconds: float | None) -> None:
    """A timeout that the kernel keeps: the socket stays blocking, so that MSG_WAITALL means it."""
    whole = 0.0 if seconds is None else max(seconds, 0.001)
    value = struct.pack("@ll", int(whole), int(whole % 1 * 1_000_000))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


class _Wire:
    """A connected socket with deadlines: reads into an inbox, sends whole frames. Foreign errors become ours."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self.sock, self.timeout = sock, timeout
        self.inbox = Inbox()
        sock.setblocking(True)
        _set_timeout(sock, timeout)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fill(self, need: int, deadline: float | None = None) -> bool:
        """Read until ``need`` bytes are there; False at the end of the transport. Raises ChannelTimeout.

        The kernel bounds one wait; ``deadline``, or the timeout from the first wait that was too short, bounds all.
        """
        inbox = self.inbox
        while (missing := need - len(inbox)) > 0:
            space = inbox.space(need)
            try:
                count = self.sock.recv_into(space, 0, socket.MSG_WAITALL if len(space) == missing else 0)
            except BlockingIOError:
                raise ChannelTimeout("the peer sent nothing in time") from None
            except OSError:
                return False
            if not count:
                return False
            inbox.added(count)
            if len(inbox) < need and self.timeout is not None:
                now = time.monotonic()
                if deadline is None:
                    deadline = now + self.timeout
                elif now > deadline:
                    raise ChannelTimeout("the peer sends too slowly")
        return True

    def send(self, data: memoryview | bytes) -> bool:
        """Send all of it; False when the other end is gone. Raises ChannelTimeout."""
        try:
            self.sock.sendall(data)
        except BlockingIOError:
            raise ChannelTimeout("the peer takes nothing in time") from None
        except OSError:
            return False
        return True

    def handshake(self, core: Handshake) -> Session:
        """Drive it to its end, within the timeout as a whole. Raises HandshakeRefused or ChannelTimeout."""
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        try:
            if core.initiator:
                self._send_or_gone(core.start())
            while not core.done:
                header = self._read(HEADER_SIZE, deadline)
                event, size = core.parse(header)
                body = self._read(core.body_size(event, size), deadline)
                answer = core.step(event, body)
                if answer:
                    self._send_or_gone(answer)
        except HandshakeRefused as error:
            if error.code != "peer_refused":
                with contextlib.suppress(ChannelError):
                    self.send(refusal(error))
            raise
        return core.session

    def _send_or_gone(self, data: bytes) -> None:
        # A peer that refused has perhaps closed already: its refusal is still there to be read.
        self.send(data)

    def _read(self, size: int, deadline: float | None) -> bytes:
        if size > MAX_FRAME:
            raise HandshakeRefused("a frame of the handshake is too long", code="malformed")
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ChannelTimeout("the handshake was not done in time")
            _set_timeout(self.sock, left)
        if not self.fill(size, deadline):
            raise HandshakeRefused("the peer went away during the handshake", code="peer_gone")
        return self.inbox.take(size)


class Channel:
    """One end of an established channel. Made by ``connect`` and ``Listener.accept``.

    ``peer`` is an AttestedPeer or a HolderPeer, ``binding`` 32 bytes that only this session has, ``suite`` how
    records are sealed. Errors: RecordRefused (tampered; the channel is over), ChannelTruncated (cut off),
    ChannelClosed (used after its end, or the peer closed), ChannelTimeout.
    """

    def __init__(self, wire: _Wire, session: Session) -> None:
        self._wire = wire
        self._end = Endpoint(session, wire.inbox)
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        _set_timeout(wire.sock, wire.timeout)

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

    def send(self, data: Buffer) -> None:
        """Send one message: bytes, a memoryview, a numpy array, a torch CPU tensor (C-contiguous)."""
        view = flat(data)
        end = self._end
        # Before the lock too: in a forked child a thread that is not there may hold it.
        end.check_open()
        with self._sending:
            end.check_open()
            self._look()
            record = end.single(view)
            if record is not None:
                self._put(record)
                return
            for record in end.outgoing(view):
                self._put(record)

    def _put(self, record: memoryview) -> None:
        try:
            if self._wire.send(record):
                return
        except ChannelTimeout:
            # Part of a record may be out: nothing can follow it.
            self._fail("sending timed out")
            raise
        if self._end.over:
            raise ChannelClosed("this channel was closed while it sent")
        self._drop()
        raise self._end.truncated()

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
        end.check_open()
        with self._receiving:
            end.check_open()
            self._show_again()
            try:
                while need := end.pull(target):
                    if not wire.fill(need):
                        if end.over:
                            raise ChannelClosed("this channel was closed while it waited")
                        self._drop()
                        raise end.truncated()
                message = end.message
            except ChannelTimeout:
                # Nothing came: one may ask again. A record that came in part never came whole in time: over, since
                # who bends a length would otherwise have the reader wait for ever.
                if end.midway:
                    self._fail("a record did not come whole in time")
                raise
            except RecordRefused as error:
                self._fail(error.message)
                raise
            except HandshakeRefused as error:
                self._refuse(error)
                raise
            except ChannelClosed:
                self._fail("the peer closed it")
                raise
            except BaseException:
                # An interrupt in the middle of a long message: the rest of it cannot be told from the next one.
                if end.midway and not isinstance(sys.exception(), UsageError):
                    self._fail("reading was interrupted")
                raise
            try:
                self._look()
            except HandshakeRefused:
                wipe(target if isinstance(message, int) else message)  # type: ignore[arg-type]
                raise
        return message

    def _look(self) -> None:
        """End a session whose peer is no longer admitted. Raises HandshakeRefused."""
        try:
            self._end.standing.look()
        except HandshakeRefused as error:
            self._refuse(error)
            raise

    def _show_again(self) -> None:
        """Show a newer token of ours, if there is one and nobody is sending: the next call will otherwise."""
        if self._end.standing.renews and self._sending.acquire(blocking=False):
            try:
                record = self._end.attesting()
                if record is not None:
                    self._put(record)
            finally:
                self._sending.release()

    def reattest(self) -> None:
        """Show our newest token now. The peer checks it before it takes anything that comes after."""
        self._end.check_open()
        with self._sending:
            record = self._end.attesting(now=True)
            if record is None:
                raise UsageError("this end is not attested")
            self._put(record)

    def _refuse(self, error: HandshakeRefused) -> None:
        """Tell the peer a code, if it can still be told, and end."""
        with contextlib.suppress(ChannelError):
            self._wire.send(self._end.closing(error.code))
        self._fail(error.message)

    def _fail(self, why: str) -> None:
        self._end.end(why)
        self._drop()

    def close(self) -> None:
        """Tell the peer that this is the end, and end; what the peer still sends is lost. Twice does no harm."""
        if not self._end.over:
            # A sender that is stuck holds the lock; shutting the socket down frees it.
            if self._sending.acquire(timeout=1.0):
                try:
                    if not self._end.over:
                        with contextlib.suppress(ChannelError):
                            self._wire.send(self._end.closing())
                finally:
                    self._sending.release()
            self._end.end("it was closed here")
        self._drop()

    def _drop(self) -> None:
        sock = self._wire.sock
        # After a fork the socket is the parent's too: shutting it down would end the parent's channel.
        if not self._end.forked:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Channel({self.peer!r}, {self.suite.title})"


class Listener:
    """Accepts channels. A peer that is refused raises from ``accept``, and the next call accepts the next one."""

    def __init__(self, sock: socket.socket, address: str, options: dict[str, Any], timeout: float | None) -> None:
        self._sock, self._options, self._timeout = sock, options, timeout
        self.address = address

    def accept(self, timeout: float | None = None) -> Channel:
        """The next channel, after its handshake; several threads may accept at once.

        ``timeout`` is how long to wait for somebody to connect. Raises HandshakeRefused when that peer is refused,
        ChannelTimeout when it is too slow or nobody came, ChannelClosed when the listener was closed.
        """
        try:
            self._sock.settimeout(timeout)
            sock, _ = self._sock.accept()
        except TimeoutError:
            raise ChannelTimeout("nobody connected in time") from None
        except OSError:
            raise ChannelClosed("the listener is closed") from None
        return _establish(sock, self._timeout, Handshake(initiator=False, **self._options))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        if self.address.startswith("unix:"):
            Path(self.address[5:]).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _establish(sock: socket.socket, timeout: float | None, core: Handshake) -> Channel:
    try:
        wire = _Wire(sock, timeout)
        return Channel(wire, wire.handshake(core))
    except BaseException:
        sock.close()
        raise


def listen(
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
    """Listen at ``address``; ``tcp:host:0`` takes a free port, which ``.address`` then names.

    Raises UsageError, and StorageError or UnavailableError when the address cannot be had.
    """
    options = {
        "identity": identity, "expect": expect, "profile": profile, "purpose": purpose, "suites": suites,
        "rekey": rekey,
    }  # fmt: skip
    Handshake(initiator=False, **options)  # type: ignore[arg-type]  # so that a misfit is told here, not at accept
    kind, where = parse_address(address)
    sock = socket.socket(socket.AF_UNIX if kind == "unix" else _family(where[0]), socket.SOCK_STREAM)
    try:
        if kind == "unix":
            _bind_unix(sock, where)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise StorageError(f"cannot listen at {address}: {error.strerror}") from None
    if kind == "tcp":
        host = f"[{where[0]}]" if sock.family == socket.AF_INET6 else where[0]
        address = f"tcp:{host}:{sock.getsockname()[1]}"
    return Listener(sock, address, options, timeout)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _bind_unix(sock: socket.socket, path: str) -> None:
    """Bind; a socket file that nobody listens at any more (its owner was killed) is taken over."""
    try:
        sock.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                pass
            else:
                raise
        Path(path).unlink()
        sock.bind(path)


def connect(
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
    """Connect and shake hands. The profile is that of the identity: "client" for a Holder, else "peer".

    Raises HandshakeRefused (and the listener then raises it too), ChannelTimeout, UnavailableError, UsageError.
    """
    core = Handshake(
        initiator=True,
        identity=identity,
        expect=expect,
        profile=profile or ("client" if isinstance(identity, Holder) else "peer"),
        purpose=purpose,
        suites=suites,
        rekey=rekey,
    )
    kind, where = parse_address(address)
    try:
        if kind == "tcp":
            sock = socket.create_connection(where, timeout)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout)
            sock.connect(where)
    except TimeoutError:
        raise ChannelTimeout(f"nobody answers at {address} in time") from None
    except OSError as error:
        if kind == "unix":
            sock.close()
        raise UnavailableError(f"cannot connect to {address}: {error.strerror}") from None
    return _establish(sock, timeout, core)
