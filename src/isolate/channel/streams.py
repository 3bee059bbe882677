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
import math
import os
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from isolate.channel.blocking import Channel
from isolate.channel.handshake import MAX_FRAME, Handshake, Session, refusal
from isolate.channel.peers import Attested, Expect, Holder
from isolate.channel.record import HEADER_SIZE, SMALL, RekeyLimits
from isolate.channel.session import Inbox
from isolate.crypto.aead import Suite
from isolate.errors import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    HandshakeRefused,
    StorageError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Collection


TIMEOUT = 30.0  # seconds
BACKLOG = 1024
# Waking a process that sleeps costs 5 to 50 us, a look 1. So a reader looks this often before it sleeps: for longer
# than a metered use takes its enclave. After looks that were in vain it goes to sleep at once, SLEEPS times and
# twice as often each time, so that who waits for long hardly looks. All looks together are longer than a round
# trip with sleepers at both ends: were they shorter, two ends that once slept would sleep for ever.
LOOKS = 500
SLEEPS = 31
_MOST_SLEEPS = 1023


def parse_address(address: str) -> tuple[str, Any]:
    """``unix:/path``, ``shm:/path`` or ``tcp:host:port`` (an IPv6 host in brackets). Raises UsageError."""
    kind, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    host = host.strip("[]")
    # What no file and no host can be called, sockets refuse with errors of their own.
    with contextlib.suppress(UnicodeError):
        if "\0" not in rest:
            if kind in ("unix", "shm") and 0 < len(os.fsencode(rest)) < 108:
                return kind, rest
            number = int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else 65536
            if kind == "tcp" and host.encode("idna") and number < 65536:
                return kind, (host, number)
    raise UsageError(f"no address of a channel: {address[:120]!a}", hint="unix:/path, shm:/path or tcp:host:port")


def _set_receive_timeout(sock: socket.socket, seconds: float | None) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))


def _set_timeout(sock: socket.socket, seconds: float | None) -> None:
    """A timeout that the kernel keeps: the socket stays blocking, so that MSG_WAITALL means it."""
    _set_receive_timeout(sock, seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(seconds))


def _timeval(seconds: float | None) -> bytes:
    whole = 0.0 if seconds is None else max(seconds, 0.001)
    return struct.pack("@ll", int(whole), int(whole % 1 * 1_000_000))


def shut_down(sock: socket.socket) -> None:
    """End the connection, so that what was sent last still arrives."""
    with contextlib.suppress(OSError):
        # TCP resets a connection that is closed over unread bytes, and forgets what it has still to send.
        unread = bytearray(65536)
        for _ in range(64):
            if not sock.recv_into(unread, 0, socket.MSG_DONTWAIT):
                break
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class SocketWire:
    """A connected socket with deadlines: reads into an inbox, sends whole frames. Foreign errors become ours."""

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self.sock, self.timeout = sock, timeout
        self.inbox = Inbox()
        # Bound once: a small record is mostly look-ups.
        self._recv_into, self._sendall = sock.recv_into, sock.sendall
        # On a machine of one CPU the peer cannot run while we look.
        self._sleeps: float = 0 if (os.cpu_count() or 1) > 1 else math.inf
        self._shortened = False  # whether the kernel has less than the timeout now
        self._vain = 0  # how often it sleeps after it has looked in vain once more
        sock.setblocking(True)
        _set_timeout(sock, timeout)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fill(self, need: int, deadline: float | None = None) -> bool:
        """Read until ``need`` bytes are there; False at the end of the transport. Raises ChannelTimeout.

        The kernel bounds one wait; ``deadline``, or the timeout from the first wait that was too short, bounds all.
        """
        if not self.inbox.end and need <= SMALL and not self._look():
            return False
        try:
            return self._fill(need, deadline)
        finally:
            if self._shortened:
                self._shortened = False
                _set_receive_timeout(self.sock, self.timeout)

    def _fill(self, need: int, deadline: float | None) -> bool:
        inbox = self.inbox
        while (missing := need - inbox.end + inbox.start) > 0:
            # Little is read ahead, in one call; much is read exactly, and waited for in one call.
            try:
                if missing > SMALL:
                    count = self._recv_into(inbox.space(need), 0, socket.MSG_WAITALL)
                elif inbox.end:
                    count = self._recv_into(inbox.space(need))
                else:
                    count = self._recv_into(inbox.first)
            except BlockingIOError:
                raise ChannelTimeout("the peer sent nothing in time") from None
            except OSError:
                return False
            if not count:
                return False
            inbox.end += count
            if count < missing and self.timeout is not None:
                now = time.monotonic()
                if deadline is None:
                    deadline = now + self.timeout
                elif now >= deadline:
                    raise ChannelTimeout("the peer sends too slowly")
                # Only what is left of it is waited for.
                self._shortened = True
                _set_receive_timeout(self.sock, deadline - now)
        return True

    def _look(self) -> bool:
        """Look a few times whether something is there, and take it; False at the end of the transport."""
        if self._sleeps:
            self._sleeps -= 1
            return True
        for _ in range(LOOKS):
            try:
                self.inbox.end = self._recv_into(self.inbox.first, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                continue
            except OSError:
                return False
            self._vain = 0
            return self.inbox.end > 0
        self._sleeps = self._vain = min(2 * self._vain + 1, _MOST_SLEEPS) if self._vain else SLEEPS
        return True

    def send(self, data: memoryview | bytes) -> bool:
        """Send all of it; False when the other end is gone. Raises ChannelTimeout."""
        try:
            self._sendall(data)
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
                answer = core.step(event, body, self._send_or_gone)
                if answer:
                    self._send_or_gone(answer)
        except HandshakeRefused as error:
            if error.code != "peer_refused":
                with contextlib.suppress(ChannelError):
                    self.send(refusal(error))
            raise
        return core.session

    def fileno(self) -> int:
        return self.sock.fileno()

    def drop(self, *, shared: bool) -> None:
        if not shared:
            shut_down(self.sock)
        self.sock.close()

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
        if not self.fill(size, deadline):
            raise HandshakeRefused("the peer went away during the handshake", code="peer_gone")
        return self.inbox.take(size)


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
        core = Handshake(initiator=False, **self._options)
        try:
            self._sock.settimeout(timeout)
            sock, _ = self._sock.accept()
        except TimeoutError:
            raise ChannelTimeout("nobody connected in time") from None
        except OSError:
            raise ChannelClosed("the listener is closed") from None
        shm = self.address.startswith("shm:")
        return _establish(sock, self._timeout, core, shm=shm)

    def close(self) -> None:
        close_listening(self._sock, self.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _establish(sock: socket.socket, timeout: float | None, core: Handshake, *, shm: bool) -> Channel:
    try:
        wire = SocketWire(sock, timeout)
        session = wire.handshake(core)
        if not shm:
            return Channel(wire, session)
        # Not at the top: an enclave that only ever speaks over sockets maps no shared memory.
        from isolate.channel import ring

        return Channel((ring.accept_offer if core.initiator else ring.offer)(sock, timeout), session)
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
    sock, address = bound_socket(address)
    return Listener(sock, address, options, timeout)


def bound_socket(address: str) -> tuple[socket.socket, str]:
    """A listening socket and its address, with the port that it got. Raises UsageError or StorageError."""
    kind, where = parse_address(address)
    sock = socket.socket(family(kind, where), socket.SOCK_STREAM)
    try:
        if kind != "tcp":
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
    return sock, address


def close_listening(sock: socket.socket, address: str) -> None:
    """Close it; a Unix socket's file goes too."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    kind, _, path = address.partition(":")
    if kind != "tcp":
        Path(path).unlink(missing_ok=True)


def family(kind: str, where: Any) -> socket.AddressFamily:
    """The address family of a parsed address."""
    if kind != "tcp":
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in where[0] else socket.AF_INET


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
    sock = socket.socket(family(kind, where), socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(where)
    except TimeoutError:
        sock.close()
        raise ChannelTimeout(f"nobody answers at {address} in time") from None
    except OSError as error:
        sock.close()
        raise UnavailableError(f"cannot connect to {address}: {error.strerror}") from None
    return _establish(sock, timeout, core, shm=kind == "shm")
