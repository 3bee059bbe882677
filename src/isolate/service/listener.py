"""Who listens for the service: a Unix socket, TCP on this machine, or TLS 1.3. uvicorn (extra ``service``).

    >>> check_exposed(Address.parse("tcp:0.0.0.0:8440"))
    Traceback (most recent call last):
    isolate.errors.UsageError: a service listens without TLS on this machine only (use tls:host:port or unix:/path)

uvicorn reads HTTP; what it does not have is added here: who the peer is, a place for each connection, an end to
connections on which nothing comes to an end, and an end to waiting for them. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from isolate.errors import UnavailableError, UsageError
from isolate.messages.http import Address
from isolate.service.app import Application
from isolate.service.limits import peer_of_address
from isolate.service.tls import TlsIdentity

CONNECTION_TIMEOUT = 60  # seconds from a connection's begin, or its last answer, to the end of the next answer
KEEP_ALIVE = 5  # seconds that an idle connection is kept
GRACE = 10  # seconds, when it is ended, to answer what was begun
HANGUP = 1  # seconds to say goodbye in: TLS waits for the other side to say it too

log = structlog.get_logger("isolate.service")


def check_exposed(address: Address) -> None:
    """Raise UsageError for plain TCP that other machines could connect to, and read."""
    if address.kind != "tcp" or address.host == "localhost":
        return
    try:
        if ipaddress.ip_address(address.host).is_loopback:
            return
    except ValueError:
        pass
    raise UsageError("a service listens without TLS on this machine only", hint="use tls:host:port or unix:/path")


def _peer(transport: Any) -> tuple[str, dict[str, Any]]:
    """Whom a connection counts as, and what is worth a line about it."""
    plain = transport.get_extra_info("socket")
    if plain is not None and plain.family == socket.AF_UNIX:
        # The process id that the kernel vouches for.
        pid, uid, _ = struct.unpack("3i", plain.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"uid:{uid}", {"peer_pid": pid, "peer_uid": uid}
    name = transport.get_extra_info("peername")
    secured = transport.get_extra_info("ssl_object")
    said: dict[str, Any] = {}
    if secured is not None:
        # Which key exchange it was, Python tells from 3.15 on.
        group = getattr(secured, "group", None)
        said = {"tls": secured.version(), "cipher": secured.cipher()[0], "group": group() if group else None}
    return peer_of_address(str(name[0]) if name else ""), said


def _protocol(application: Application) -> type[H11Protocol]:
    limits, metrics = application.limits, application.metrics

    class Protocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _peer = ""
        _seats: tuple[Any, str] | None = None

        def connection_made(self, transport: Any) -> None:
            self._peer, said = _peer(transport)
            if limits.connections.take(self._peer):
                self._seats = (limits.connections, self._peer)
            elif limits.unseated.take():
                self._seats = (limits.unseated, "")
            else:
                metrics.limited("connections")
            if said:
                log.info("connection.accepted", **said)
            # uvicorn gives each request a copy of it.
            seated = self._seats is not None and self._seats[0] is limits.connections
            self.app_state = {**self.app_state, "peer": self._peer, "seated": seated}
            metrics.connections.inc()
            super().connection_made(transport)
            self._arm(CONNECTION_TIMEOUT)
            if self._seats is None:
                transport.abort()

        def _arm(self, seconds: float) -> None:
            self._disarm()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._arm(CONNECTION_TIMEOUT)

        def shutdown(self) -> None:
            super().shutdown()
            if self.transport.is_closing():
                self._arm(HANGUP)

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            metrics.connections.dec()
            if self._seats is not None:
                seats, holder = self._seats
                seats.leave(holder)
            super().connection_lost(exc)

    return Protocol


class Listener(uvicorn.Server):
    """A server for one application. ``ready`` is told the address at which it listens, its pin included."""

    def __init__(
        self,
        application: Application,
        address: Address,
        *,
        identity: TlsIdentity | None = None,
        ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        check_exposed(address)
        if (address.kind == "tls") != (identity is not None) or address.pin is not None:
            raise UsageError(
                "a TLS listener has a key and a certificate, and no pin", hint="--listen tls:host:port"
            )
        self._address, self._identity, self._ready = address, identity, ready
        where: dict[str, Any] = (
            {"uds": address.host} if address.kind == "unix" else {"host": address.host, "port": address.port}
        )
        config = uvicorn.Config(
            application,
            http=_protocol(application),
            loop="asyncio",
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            # A header that names the peer is the peer's own word.
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
            **where,
        )
        config.load()
        config.ssl = identity.context() if identity else None
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready(self._listening())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def _listening(self) -> str:
        address = self._address
        if address.kind == "unix":
            return f"unix:{address.host}"
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{address.host}]" if ":" in address.host else address.host
        # A certificate that somebody else vouches for may be renewed: its pin would not last.
        pin = f"#{self._identity.pin.hex()}" if self._identity and self._identity.self_signed else ""
        return f"{address.kind}:{host}:{port}{pin}"


class _Lines(logging.Handler):
    """What uvicorn and asyncio say, as a line of ours: without arguments and tracebacks, which could hold data."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        said = str(record.msg).splitlines() or [""]
        log.warning("server", said=said[0][:200], **({"kind": kind} if kind else {}))


def serve(
    application: Application,
    address: Address,
    *,
    identity: TlsIdentity | None = None,
    ready: Callable[[str], None],
) -> None:
    """Serve until a signal ends it. Raises UsageError, and UnavailableError where it cannot listen."""
    for name in ("uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Lines(logging.WARNING)], False
    server = Listener(application, address, identity=identity, ready=ready)
    try:
        server.run()
    except OSError as error:
        if server.started:
            raise
        raise UnavailableError(f"cannot listen on {address.host}: {error.strerror}") from None
    except SystemExit as end:
        # uvicorn's way to say that the port is taken; else it is the signal's own end.
        if server.started or not end.code:
            raise
        raise UnavailableError(f"cannot listen on {address.host}, port {address.port}") from None
