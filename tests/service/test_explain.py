"""Why a request was refused: the owner learns each check by its number, and nobody else learns anything."""

from __future__ import annotations

from typing import Any

import pytest

from isolate import sealed
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError
from isolate.messages.attest import Release, ReleaseRequest
from isolate.messages.owner import ExplainRequest, Explanation
from isolate.service import explain


def refused(attempt: Any) -> IsolateError:
    with pytest.raises(IsolateError) as caught:
        attempt()
    assert caught.value.request_id
    return caught.value


def why(realm: Any, error: IsolateError) -> Explanation:
    found: Explanation = realm.tell("explain", ExplainRequest(error.request_id), Explanation)
    assert (found.request_id, found.code) == (error.request_id, error.code)
    return found


def failed(found: Explanation) -> list[tuple[int, str]]:
    return [(one["number"], one["name"]) for one in found.checks if one["passed"] is False]


def test_a_refused_attestation_is_explained_check_by_check(realm: Any) -> None:
    found = why(realm, refused(lambda: realm.enclave("unknown")))
    assert (found.route, len(found.checks)) == ("attest", 21)
    assert failed(found) == [(16, "measurement")]
    (check,) = [one for one in found.checks if one["number"] == 16]
    # What was expected and found, register by register.
    assert "PCR0" in check["expected"]
    assert "PCR0" in check["found"]
    assert check["expected"] != check["found"]


def test_each_check_of_a_release_is_explained_by_its_number(realm: Any) -> None:
    path, enclave, other = realm.asset(), realm.enclave(), realm.enclave("other", rank=1)
    digest = sealed.public_facts(path).digest

    def ask(workload: Any = enclave, digest: bytes = digest, **changes: Any) -> IsolateError:
        request = realm.signed_by(workload, ReleaseRequest(digest, [], bytes(32)), **changes)
        return refused(lambda: realm.ask("release", request, Release))

    expected = {
        1: ask(audience="svc/9"),
        2: ask(token="rubbish"),
        3: ask(signer=SigningKey.generate()),
        7: ask(digest=bytes(32)),
        8: ask(other),
    }
    for number, error in expected.items():
        found = why(realm, error)
        assert [one["number"] for one in found.checks] == list(range(1, 9))
        assert failed(found) == [(number, explain.CHECKS["release"][number - 1])]
        reached = [one["passed"] for one in found.checks]
        assert reached == [True] * (number - 1) + [False] + [None] * (8 - number)
    assert (found.checks[7]["expected"], found.checks[7]["found"]) == ("reader", "other")
    realm.register(realm.seal(epoch=2))
    stale = why(realm, ask())
    assert stale.checks[6]["found"] == digest.hex()
    realm.enclave()
    assert failed(why(realm, ask())) == [(4, "slot")]


@pytest.mark.threat("SVC-73")
def test_only_the_owner_learns_why(realm: Any) -> None:
    error = refused(lambda: realm.enclave("unknown"))
    asked = ExplainRequest(error.request_id)
    thief = realm.owner_request(asked, SigningKey.generate())
    assert realm.code(lambda: realm.ask("owner/explain", thief, Explanation)) == "not_owner"
    # The refusal itself carries a code, a line and an id: no checks.
    _, body = realm.serve("attest", realm.carried[-1][1])
    assert b"expected" not in body
    assert b"checks" not in body
    assert realm.code(lambda: realm.tell("explain", ExplainRequest("0" * 16), Explanation)) == "usage"


@pytest.mark.threat("SVC-73")
def test_strangers_push_out_no_explanation_but_their_own(realm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "KEEP", 5)
    monkeypatch.setattr(explain, "PRUNE", 1)
    error = refused(lambda: realm.enclave("unknown"))
    for _ in range(20):
        realm.serve("attest", b"rubbish")
        realm.serve("none", b"")
    assert failed(why(realm, error)) == [(16, "measurement")]
    count = realm.service.explanations._database.execute("SELECT count(*) FROM refusal").fetchone()
    assert count == (6,)
    realm.reopen()
    assert failed(why(realm, error)) == [(16, "measurement")]


def test_what_cannot_be_kept_is_refused_all_the_same(realm: Any) -> None:
    realm.service.explanations._database.execute("DROP TABLE refusal")
    error = refused(lambda: realm.enclave("unknown"))
    assert error.code == "appraisal_measurement"
    assert realm.code(lambda: realm.tell("explain", ExplainRequest(error.request_id), Explanation)) == "storage"
