"""The rooms of one service, and the table from a route to what answers it. No HTTP here: bytes in, a message out.

    >>> ROUTES["challenge"].request.TYPE, ROUTES["challenge"].answer.TYPE, ROUTES["challenge"].who
    ('challenge-request', 'challenge', 'anyone')

Every answer is a message in CBOR. A refusal has a code, one line and a request id; anything unforeseen has the code
``internal`` and no more. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any, Literal

import structlog
from attrs import frozen

from isolate.crypto.signing import Purpose
from isolate.errors import IsolateError, MalformedError, RefusedError, UnavailableError, UsageError
from isolate.messages import approve, attest, certificate, derive, invoke, lease, limits, owner, receipts
from isolate.messages.base import Answer, Message, Refusal, Signed
from isolate.service.appraiser import Appraiser
from isolate.service.approvals import Approvals
from isolate.service.authority import Authority
from isolate.service.broker import Broker
from isolate.service.budgets import Budgets
from isolate.service.derived import Derived
from isolate.service.explain import Explanations
from isolate.service.log import Log
from isolate.service.state import State
from isolate.service.tiles import Tiles

MAX_LINE = 500  # characters of a refusal's message or hint

log = structlog.get_logger("isolate.service")


class Service:
    """The rooms of one service; what goes where stands in ``ROUTES``."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.log = Log(state)
        self.appraiser = Appraiser(state, self.log)
        self.broker = Broker(state, self.log, self.appraiser)
        self.budgets = Budgets(state, self.log, self.broker)
        self.derived = Derived(self.log, self.broker)
        self.approvals = Approvals(state, self.log)
        self.tiles = Tiles(state, self.log)
        self.authority = Authority(state, self.log, self.appraiser, self.broker)
        self.explanations = Explanations(state.folder)

    def close(self) -> None:
        """What is open beside the state."""
        self.explanations.close()

    def _register(self, request: attest.RegisterRequest) -> Message:
        return self.broker.register(request, signer=self.state.owner.to_bytes(), measurement=None)

    def _holder(self, request: Signed) -> bytes:
        # What holders ask changes nothing, so the nonce is not kept: any key can sign such a request.
        return request.verify(Purpose.HOLDER_REQUEST, self.state.audience).ed25519

    def _budget(self, request: Signed) -> Message:
        return self.budgets.budget(invoke.BudgetRequest.parse(request.body).token, self._holder(request))

    def _receipt(self, request: Signed) -> Message:
        return self.budgets.receipt(receipts.ReceiptRequest.parse(request.body).invocation, self._holder(request))

    def _by_owner(self, route: Route, request: Signed) -> Message:
        """What only the owner asks, once."""
        body = route.request.parse(request.body)

        def check(_: object) -> None:
            if request.verify(Purpose.OWNER_REQUEST, self.state.audience) != self.state.owner:
                raise RefusedError("only the owner asks for this", code="not_owner")

        return self.state.once(request.nonce, check, lambda _, __: route.act(self, body))

    def _answer(self, name: str, body: bytes) -> Message:
        route = ROUTES.get(name)
        if route is None:
            raise UsageError("the service has no such route", code="unknown_route")
        if route.who == "anyone":
            return route.act(self, route.request.parse(body))
        request = Signed.parse(body)
        answer = self._by_owner(route, request) if route.who == "owner" else route.act(self, request)
        return Answer.make(request, answer, self.state.release_key)

    def answer(self, route: str, body: bytes) -> tuple[int, Message]:
        """The status and the message. Never raises: what is unforeseen becomes the code ``internal``."""
        request_id = secrets.token_hex(8)
        shown = route if route in ROUTES else "unknown"
        try:
            answer = self._answer(route, body)
        except IsolateError as error:
            log.info("request.refused", route=shown, code=error.code, request_id=request_id)
            self.explanations.keep(request_id, self.state.clock(), shown, error)
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


@frozen
class Route:
    """A row of the table: what is asked, what is answered, who may ask, and what does it.

    For ``anyone`` the request is the body itself, and ``act`` takes it parsed; what is worth protecting in an
    answer is signed, or sealed to whom it is for. For the others it is the body of a Signed, and the answer is
    signed: for the ``owner`` ``act`` takes it parsed, in the transaction that uses its nonce up; for an ``enclave``
    and a ``holder`` it takes the Signed, and checks who asks.
    """

    request: type[Message]
    answer: type[Message]
    who: Literal["anyone", "enclave", "holder", "owner"]
    act: Callable[[Service, Any], Message]


ROUTES: dict[str, Route] = {
    "certificate": Route(
        attest.CertificateRequest, attest.ServiceCertificate, "anyone", lambda s, _: s.state.certificate
    ),
    "challenge": Route(
        attest.ChallengeRequest, attest.Challenge, "anyone", lambda s, asked: s.appraiser.challenge(asked)
    ),
    "attest": Route(
        attest.AttestRequest, attest.AttestAnswer, "anyone", lambda s, asked: s.appraiser.attest(asked)
    ),
    "log": Route(owner.LogRequest, owner.LogAnswer, "anyone", lambda s, asked: s.log.answer(asked)),
    "bundle": Route(
        certificate.BundleRequest, certificate.TrustBundle, "anyone", lambda s, asked: s.authority.bundle(asked)
    ),
    "release": Route(attest.ReleaseRequest, attest.Release, "enclave", lambda s, signed: s.broker.release(signed)),
    "register": Route(
        attest.RegisterRequest, attest.Registered, "enclave", lambda s, signed: s.broker.register_for(signed)
    ),
    "reserve": Route(
        invoke.ReserveRequest, invoke.Reservation, "enclave", lambda s, signed: s.budgets.reserve(signed)
    ),
    "lease": Route(lease.LeaseRequest, lease.Lease, "enclave", lambda s, signed: s.budgets.lease(signed)),
    "settle": Route(invoke.SettleRequest, invoke.Receipt, "enclave", lambda s, signed: s.budgets.settle(signed)),
    "refused": Route(invoke.RefusalReport, invoke.Noted, "enclave", lambda s, signed: s.budgets.refused(signed)),
    "derive": Route(derive.DeriveRequest, attest.Registered, "enclave", lambda s, signed: s.derived.derive(signed)),
    "standing": Route(
        attest.StandingRequest, attest.PeerStandings, "enclave", lambda s, signed: s.broker.standing(signed)
    ),
    "certify": Route(
        certificate.IssueRequest, certificate.Issued, "enclave", lambda s, signed: s.authority.certify(signed)
    ),
    "budget": Route(invoke.BudgetRequest, invoke.Budget, "holder", lambda s, signed: s._budget(signed)),
    "receipt": Route(receipts.ReceiptRequest, receipts.UseReceipt, "holder", lambda s, signed: s._receipt(signed)),
    "owner/policy": Route(owner.PolicyUpdate, owner.Done, "owner", lambda s, asked: s.appraiser.set_policy(asked)),
    "owner/rule": Route(owner.AssetRule, owner.Done, "owner", lambda s, asked: s.broker.set_rule(asked)),
    "owner/register": Route(
        attest.RegisterRequest, attest.Registered, "owner", lambda s, asked: s._register(asked)
    ),
    "owner/asset": Route(owner.AssetRequest, attest.Registered, "owner", lambda s, asked: s.broker.newest(asked)),
    "owner/rollback": Route(owner.Rollback, attest.Registered, "owner", lambda s, asked: s.broker.rollback(asked)),
    "owner/explain": Route(
        owner.ExplainRequest, owner.Explanation, "owner", lambda s, asked: s.explanations.find(asked.request_id)
    ),
    "owner/revoke": Route(owner.Revoke, owner.Done, "owner", lambda s, asked: s.budgets.revoke(asked)),
    "owner/limits": Route(limits.AssetLimits, owner.Done, "owner", lambda s, asked: s.budgets.set_limits(asked)),
    "owner/approvers": Route(
        approve.SetApprovers, approve.GroupSet, "owner", lambda s, asked: s.approvals.set_approvers(asked)
    ),
    "export": Route(approve.ExportRequest, approve.Export, "anyone", lambda s, asked: s.approvals.export(asked)),
    "owner/entries": Route(owner.EntriesRequest, owner.Entries, "owner", lambda s, asked: s.log.entries(asked)),
    "owner/evidence": Route(
        owner.EvidenceRequest, owner.Evidence, "owner", lambda s, asked: s.appraiser.evidence(asked)
    ),
}
