"""The service over HTTP: one POST route a message, under /v1/. Starlette and uvicorn (extra ``service``).

Every answer is a message in CBOR. A refusal is status 403 with a code, one line and a request id; anything
unforeseen is status 500 with the code ``internal`` and nothing else. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from isolate.crypto.signing import Purpose
from isolate.errors import IsolateError, MalformedError, RefusedError, UnavailableError
from isolate.messages.attest import AttestRequest, CertificateRequest, ChallengeRequest, RegisterRequest
from isolate.messages.base import MAX_MESSAGE, Message, Refusal, Signed
from isolate.messages.http import parse_address
from isolate.messages.invoke import BudgetRequest, ChargeRequest
from isolate.messages.owner import AssetRequest, AssetRule, EvidenceRequest, LogRequest, PolicyUpdate, Revoke
from isolate.service.appraiser import Appraiser
from isolate.service.broker import Broker
from isolate.service.budgets import Budgets
from isolate.service.log import Log
from isolate.service.state import State

log = structlog.get_logger("isolate.service")


class Service:
    """The rooms of one service, and the table from a route to what answers it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.log = Log(state)
        self.appraiser = Appraiser(state, self.log)
        self.broker = Broker(state, self.log, self.appraiser)
        self.budgets = Budgets(state, self.log)
        self.routes: dict[str, Callable[[bytes], Message]] = {
            "certificate": self._certificate,
            "challenge": lambda body: self.appraiser.challenge(ChallengeRequest.parse(body)),
            "attest": lambda body: self.appraiser.attest(AttestRequest.parse(body)),
            "release": lambda body: self.broker.release(Signed.parse(body)),
            "register": self._register,
            "charge": self._charge,
            "budget": self._budget,
            "log": lambda body: self.log.answer(LogRequest.parse(body)),
            "owner/policy": lambda body: self.appraiser.set_policy(PolicyUpdate.parse(self._owner(body))),
            "owner/rule": lambda body: self.broker.set_rule(AssetRule.parse(self._owner(body))),
            "owner/register": self._owner_register,
            "owner/asset": lambda body: self.broker.newest(AssetRequest.parse(self._owner(body))),
            "owner/revoke": lambda body: self.budgets.revoke(Revoke.parse(self._owner(body))),
            "owner/evidence": lambda body: self.appraiser.evidence(EvidenceRequest.parse(self._owner(body))),
        }

    def _certificate(self, body: bytes) -> Message:
        CertificateRequest.parse(body)
        return self.state.certificate

    def _owner(self, body: bytes) -> bytes:
        """The body of a request that the owner signed, once. Raises RefusedError."""
        request = Signed.parse(body)
        if request.verify(Purpose.OWNER_REQUEST, self.state.name) != self.state.owner:
            raise RefusedError("only the owner asks for this", code="not_owner")
        with self.state.transaction() as database:
            self.state.use_nonce(database, request.nonce)
        return request.body

    def _owner_register(self, body: bytes) -> Message:
        request = RegisterRequest.parse(self._owner(body))
        return self.broker.register(request, signer=self.state.owner.to_bytes(), measurement=None)

    def _register(self, body: bytes) -> Message:
        signed = Signed.parse(body)
        caller = self.broker.caller(signed)
        request = RegisterRequest.parse(signed.body)
        return self.broker.register(request, signer=caller.signing_key, measurement=caller.result.measurement)

    def _charge(self, body: bytes) -> Message:
        signed = Signed.parse(body)
        return self.budgets.charge(self.broker.caller(signed), ChargeRequest.parse(signed.body))

    def _budget(self, body: bytes) -> Message:
        signed = Signed.parse(body)
        holder = signed.verify(Purpose.HOLDER_REQUEST, self.state.name)
        with self.state.transaction() as database:
            self.state.use_nonce(database, signed.nonce)
        return self.budgets.budget(BudgetRequest.parse(signed.body).token, holder.ed25519)

    def answer(self, route: str, body: bytes) -> tuple[int, Message]:
        """The status and the message. Never raises: what is unforeseen becomes the code ``internal``."""
        request_id = secrets.token_hex(8)
        try:
            answer = self.routes[route](body)
        except IsolateError as error:
            log.info("request.refused", route=route, code=error.code, request_id=request_id)
            status = (
                503 if isinstance(error, UnavailableError) else 400 if isinstance(error, MalformedError) else 403
            )
            return status, Refusal(error.code, error.message, error.hint, request_id)
        except Exception as error:  # noqa: BLE001 (the boundary: a type's name is all that is kept)
            log.error("request.failed", route=route, kind=type(error).__name__, request_id=request_id)
            return 500, Refusal("internal", "the service failed", "ask its owner about this request", request_id)
        log.info("request.answered", route=route, request_id=request_id)
        return 200, answer


def application(service: Service) -> Starlette:
    """The ASGI application."""

    def endpoint(route: str) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > MAX_MESSAGE:
                    return PlainTextResponse("too large", status_code=413)
            status, message = await run_in_threadpool(service.answer, route, bytes(body))
            return Response(message.encode(), status_code=status, media_type="application/cbor")

        return handle

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    routes = [Route(f"/v1/{name}", endpoint(name), methods=["POST"]) for name in service.routes]
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
        application(service), http=_Protocol, log_config=None, access_log=False, lifespan="off", **where
    )

    class _Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    _Server(config).run()
