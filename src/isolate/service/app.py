"""The service over HTTP: one POST route a message, under /v1/, and a few files. Starlette (extra ``service``).

    >>> CODES[429], FRAMING
    ('too_many', {404: 'unknown_route', 405: 'unknown_method'})

What is asked and answered stands in isolate.service.routes, who listens in isolate.service.listener. Whatever
happens, the answer is a message: a refusal is status 400, 403, 404, 405, 408, 413, 429 or 503, and what is
unforeseen is 500 with the code ``internal`` and no more. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isolate.errors import IsolateError, ServiceUnavailable
from isolate.messages import base
from isolate.messages.base import MAX_MESSAGE, Refusal
from isolate.service import metrics as figures
from isolate.service.limits import Limits
from isolate.service.metrics import Metrics
from isolate.service.openapi import description
from isolate.service.routes import Service

DRAIN_SIZE, DRAIN_TIMEOUT = 64 * 1024, 1.0  # bytes and seconds that are read of a request that is refused at once
BODY_TIMEOUT = 30  # seconds for a whole body
SCRAPE_TIMEOUT = 1  # seconds that figures wait for the state; then the last ones are told

CODES = {408: "too_slow", 413: "too_large", 429: "too_many", 503: "busy"}
FRAMING = {404: "unknown_route", 405: "unknown_method"}

log = structlog.get_logger("isolate.service")


def respond(status: int, message: base.Message, headers: dict[str, str] | None = None) -> Response:
    return Response(message.encode(), status_code=status, media_type="application/cbor", headers=headers)


def refuse(status: int, message: str, *, wait: float | None = None) -> Response:
    """A refusal for a limit. ``wait``: seconds after which the request may be made again, as it was not begun."""
    code = CODES[status]
    kind = ServiceUnavailable.default_code if wait is not None else ""
    headers = None if wait is None else {"Retry-After": str(max(1, math.ceil(wait)))}
    return respond(status, Refusal(code, message, "", "", kind), headers)


async def _drain(receive: Receive) -> None:
    """Read what a refused request sends, within limits: closed before that, a socket may lose the refusal."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_TIMEOUT):
            while size <= DRAIN_SIZE:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


class Application:
    """The ASGI application of one service."""

    def __init__(self, service: Service, limits: Limits | None = None, metrics: Metrics | None = None) -> None:
        self.service = service
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self._scrape: asyncio.Task[None] | None = None
        self._limited = 0
        routes = [
            Route("/v1/{route:path}", self._message, methods=["POST"]),
            Route("/log/{path:path}", self._log_file),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/openapi.json", self._openapi),
        ]
        self._app = Starlette(routes=routes, exception_handlers={HTTPException: _not_here, Exception: _unforeseen})
        # A redirect would lead to whatever host the request named.
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began = time.monotonic()
        # What the request turns out to be; the handlers say it.
        seen = scope.setdefault("state", {})
        seen |= {"route": "unknown", "code": ""}
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        app: ASGIApp = self._app
        if scope["path"] != "/health" and (refusal := self._limit(seen)):
            await _drain(receive)
            app = refusal
        try:
            await app(scope, receive, sending)
        except Exception as error:  # noqa: BLE001 (the boundary: a type's name is all that is kept)
            log.error("request.failed", route=seen["route"], kind=type(error).__name__)
        finally:
            code = seen["code"] or ("ok" if status == 200 else f"http_{status}")
            self.metrics.answered(seen["route"], code, time.monotonic() - began)

    def _limit(self, seen: dict[str, Any]) -> Response | None:
        """The refusal of a request that is not to be begun."""
        peer = seen.get("peer", "unknown")
        wait = self.limits.rate.take(peer)
        if wait:
            return self._limits_met("rate", peer, seen, refuse(429, "more requests than are taken now", wait=wait))
        if not seen.get("seated", True):
            response = refuse(503, "the service has no room for another connection", wait=1)
            response.headers["Connection"] = "close"
            return self._limits_met("connections", peer, seen, response)
        return None

    def _limits_met(self, limit: str, peer: str, seen: dict[str, Any], response: Response) -> Response:
        self.metrics.limited(limit)
        seen["code"] = CODES[response.status_code]
        self._limited += 1
        # The 1st, 2nd, 4th, 8th ...: a flood of requests is no flood of lines.
        if self._limited & (self._limited - 1) == 0:
            log.warning("request.limited", limit=limit, peer=peer, count=self._limited)
        return response

    async def _in_worker(self, request: Request, work: Callable[[], Response]) -> Response:
        """What ``work`` answers, in a thread; or ``busy``, when too many wait for one."""
        if not self.limits.begun.take():
            seen = request.scope["state"]
            response = refuse(503, "the service has more to do than it can now", wait=1)
            return self._limits_met("busy", seen.get("peer", "unknown"), seen, response)
        self.metrics.begun.inc()
        try:
            return await run_in_threadpool(work)
        finally:
            self.metrics.begun.dec()
            self.limits.begun.leave()

    async def _body(self, request: Request) -> bytes | Response:
        seen, body = request.scope["state"], bytearray()
        peer = seen.get("peer", "unknown")
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                async for part in request.stream():
                    body += part
                    if len(body) > MAX_MESSAGE:
                        response = refuse(413, f"at most {MAX_MESSAGE} bytes are read")
                        return self._limits_met("size", peer, seen, response)
        except TimeoutError:
            return self._limits_met("time", peer, seen, refuse(408, "the request did not come whole in time"))
        except ClientDisconnect:
            seen["code"] = "gone"
            return Response(status_code=400)
        return bytes(body)

    async def _message(self, request: Request) -> Response:
        route, seen = request.path_params["route"], request.scope["state"]
        seen["route"] = route
        body = await self._body(request)
        if isinstance(body, Response):
            return body

        def work() -> Response:
            status, message = self.service.answer(route, body)
            seen["code"] = message.code if isinstance(message, Refusal) else "ok"
            return respond(status, message)

        return await self._in_worker(request, work)

    async def _log_file(self, request: Request) -> Response:
        path = request.path_params["path"]
        request.scope["state"]["route"] = "tiles"

        def work() -> Response:
            file = self.service.tiles.answer(path)
            headers = {"Cache-Control": file.cache}
            return Response(file.body, status_code=file.status, media_type=file.media_type, headers=headers)

        return await self._in_worker(request, work)

    async def _health(self, request: Request) -> Response:
        request.scope["state"]["route"] = "health"
        return PlainTextResponse("ok\n")

    async def _openapi(self, request: Request) -> Response:
        request.scope["state"]["route"] = "openapi"
        return Response(json.dumps(description()), media_type="application/json")

    async def _metrics(self, request: Request) -> Response:
        request.scope["state"]["route"] = "metrics"
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.create_task(run_in_threadpool(self._look))
        # Who looks after a slow disk must not wait for it.
        await asyncio.wait({self._scrape}, timeout=SCRAPE_TIMEOUT)
        return Response(self.metrics.text(), media_type=figures.MEDIA_TYPE)

    def _look(self) -> None:
        """Read what the state knows."""
        state = self.service.state
        self.metrics.time.set(state.clock())
        self.metrics.certificate_end.set(state.certificate.not_after)
        self.metrics.skew.set(state.clock.skew())
        try:
            with state.transaction() as database:
                _, size = self.service.log.tree(database)
        except IsolateError as error:
            log.warning("metrics.stale", code=error.code)
        else:
            self.metrics.log_entries.set(size)


def _not_here(request: Request, error: Exception) -> Response:
    """No such path or method: what Starlette refuses, as a message."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    code = FRAMING.get(status, "malformed")
    request.scope["state"]["code"] = code
    said = {404: "the service has no such route", 405: "this is asked with another method"}
    return respond(status, Refusal(code, said.get(status, "this is no request"), "", "", "usage"), headers)


def _unforeseen(request: Request, _: Exception) -> Response:
    request.scope["state"]["code"] = "internal"
    return respond(500, Refusal("internal", "the service failed", "ask its owner about this request", ""))
