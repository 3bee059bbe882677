"""The service over HTTP: one POST route a message, under /v1/. Starlette and uvicorn (extra ``service``).

What is asked and answered stands in isolate.service.routes. A refusal is status 400, 403, 404 or 503.
Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from isolate.messages.base import MAX_MESSAGE, Message, Refusal
from isolate.messages.http import parse_address
from isolate.service.routes import Service

BODY_TIMEOUT = 30  # seconds for a whole body
MAX_CONNECTIONS = 512  # at once; more are answered with status 503

log = structlog.get_logger("isolate.service")


def application(service: Service) -> Starlette:
    """The ASGI application."""

    def respond(status: int, message: Message) -> Response:
        return Response(message.encode(), status_code=status, media_type="application/cbor")

    async def handle(request: Request) -> Response:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_MESSAGE:
                        return respond(413, Refusal("too_large", f"at most {MAX_MESSAGE} bytes are read", "", ""))
        except TimeoutError:
            return respond(408, Refusal("too_slow", "the request did not come whole in time", "", ""))
        except ClientDisconnect:
            return Response(status_code=400)
        return respond(*await run_in_threadpool(service.answer, request.path_params["route"], bytes(body)))

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def log_file(request: Request) -> Response:
        file = await run_in_threadpool(service.tiles.answer, request.path_params["path"])
        headers = {"Cache-Control": file.cache}
        return Response(file.body, status_code=file.status, media_type=file.media_type, headers=headers)

    routes = [Route("/v1/{route:path}", handle, methods=["POST"]), Route("/log/{path:path}", log_file)]
    return Starlette(routes=[*routes, Route("/health", health)])


class _Protocol(H11Protocol):
    """Logs who connected over a Unix socket: the process id that the kernel vouches for."""

    def connection_made(self, transport: Any) -> None:
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family == socket.AF_UNIX:
            pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            log.info("connection.accepted", peer_pid=pid, peer_uid=uid)
        super().connection_made(transport)


def serve(service: Service, address: str, *, ready: Callable[[], None]) -> None:
    """Serve until a signal ends it. ``address`` is ``unix:/path`` or ``tcp:host:port``."""
    kind, host, port = parse_address(address)
    where: dict[str, Any] = {"uds": host} if kind == "unix" else {"host": host, "port": port}
    config = uvicorn.Config(
        application(service),
        http=_Protocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        limit_concurrency=MAX_CONNECTIONS,
        **where,
    )

    class _Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    _Server(config).run()
