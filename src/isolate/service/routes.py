"""The rooms of one service, and the tables from a route to what answers it. No HTTP here: bytes in, a message out.

    >>> Service.__name__
    'Service'

Every answer is a message in CBOR. A refusal has a code, one line and a request id; anything unforeseen has the code
``internal`` and no more. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import structlog

from isolate.crypto.signing import Purpose
from isolate.errors import IsolateError, MalformedError, RefusedError, UnavailableError, UsageError
from isolate.messages.attest import AttestRequest, CertificateRequest, ChallengeRequest, RegisterRequest
from isolate.messages.base import Answer, M, Message, Refusal, Signed
from isolate.messages.certificate import BundleRequest
from isolate.messages.invoke import BudgetRequest
from isolate.messages.owner import AssetRequest, AssetRule, EvidenceRequest, LogRequest, PolicyUpdate, Revoke
from isolate.service.appraiser import Appraiser
from isolate.service.authority import Authority
from isolate.service.broker import Broker
from isolate.service.budgets import Budgets
from isolate.service.log import Log
from isolate.service.state import State
from isolate.service.tiles import Tiles

MAX_LINE = 500  # characters of a refusal's message or hint

log = structlog.get_logger("isolate.service")


class Service:
    """The rooms of one service, and the tables from a route to what answers it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.log = Log(state)
        self.appraiser = Appraiser(state, self.log)
        self.broker = Broker(state, self.log, self.appraiser)
        self.budgets = Budgets(state, self.log, self.broker)
        self.tiles = Tiles(state, self.log)
        self.authority = Authority(state, self.log, self.appraiser, self.broker)
        # Anyone may ask these; what is worth protecting in an answer is signed, or sealed to whom it is for.
        self._open: dict[str, Callable[[bytes], Message]] = {
            "certificate": self._certificate,
            "challenge": lambda body: self.appraiser.challenge(ChallengeRequest.parse(body)),
            "attest": lambda body: self.appraiser.attest(AttestRequest.parse(body)),
            "log": lambda body: self.log.answer(LogRequest.parse(body)),
            "bundle": lambda body: self.authority.bundle(BundleRequest.parse(body)),
        }
        # Requests signed by an enclave, a holder or the owner; the answer is signed too.
        self._signed: dict[str, Callable[[Signed], Message]] = {
            "release": self.broker.release,
            "register": self.broker.register_for,
            "charge": self.budgets.charge,
            "budget": self._budget,
            "certify": self.authority.certify,
            "owner/policy": self._owner(PolicyUpdate, self.appraiser.set_policy),
            "owner/rule": self._owner(AssetRule, self.broker.set_rule),
            "owner/register": self._owner(RegisterRequest, self._register),
            "owner/asset": self._owner(AssetRequest, self.broker.newest),
            "owner/revoke": self._owner(Revoke, self.budgets.revoke),
            "owner/evidence": self._owner(EvidenceRequest, self.appraiser.evidence),
        }

    @property
    def routes(self) -> list[str]:
        return [*self._open, *self._signed]

    def _certificate(self, body: bytes) -> Message:
        CertificateRequest.parse(body)
        return self.state.certificate

    def _owner(self, kind: type[M], act: Callable[[M], Message]) -> Callable[[Signed], Message]:
        """What only the owner asks, once."""

        def answer(request: Signed) -> Message:
            body = kind.parse(request.body)

            def check(_: object) -> None:
                if request.verify(Purpose.OWNER_REQUEST, self.state.name) != self.state.owner:
                    raise RefusedError("only the owner asks for this", code="not_owner")

            return self.state.once(request.nonce, check, lambda _, __: act(body))

        return answer

    def _register(self, request: RegisterRequest) -> Message:
        return self.broker.register(request, signer=self.state.owner.to_bytes(), measurement=None)

    def _budget(self, request: Signed) -> Message:
        # It changes nothing, so its nonce is not kept: any key can sign such a request.
        holder = request.verify(Purpose.HOLDER_REQUEST, self.state.name)
        return self.budgets.budget(BudgetRequest.parse(request.body).token, holder.ed25519)

    def _answer(self, route: str, body: bytes) -> Message:
        if route in self._open:
            return self._open[route](body)
        if route not in self._signed:
            raise UsageError("the service has no such route", code="unknown_route")
        request = Signed.parse(body)
        return Answer.make(request, self._signed[route](request), self.state.release_key)

    def answer(self, route: str, body: bytes) -> tuple[int, Message]:
        """The status and the message. Never raises: what is unforeseen becomes the code ``internal``."""
        request_id = secrets.token_hex(8)
        shown = route if route in self.routes else "unknown"
        try:
            answer = self._answer(route, body)
        except IsolateError as error:
            log.info("request.refused", route=shown, code=error.code, request_id=request_id)
            said = (error.message[:MAX_LINE], error.hint[:MAX_LINE])
            return _status(error), Refusal(error.code, *said, request_id, error.default_code)
        except Exception as error:  # noqa: BLE001 (the boundary: a type's name is all that is kept)
            log.error("request.failed", route=shown, kind=type(error).__name__, request_id=request_id)
            return 500, Refusal("internal", "the service failed", "ask its owner about this request", request_id)
        log.info("request.answered", route=shown, request_id=request_id)
        return 200, answer


def _status(error: IsolateError) -> int:
    if error.code == "unknown_route":
        return 404
    return 503 if isinstance(error, UnavailableError) else 400 if isinstance(error, MalformedError) else 403
