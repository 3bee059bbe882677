"""Leases as the service gives them: only by the grant, charged at once to every account, ended within a minute."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import evolve

from isolate.capability.scope import Scope
from isolate.crypto.signing import SigningKey
from isolate.errors import MalformedError
from isolate.messages.invoke import Budget, ReserveRequest
from isolate.messages.lease import MAX_LEASE, MAX_LEASED, Lease, LeaseRequest
from isolate.messages.limits import AssetLimits
from isolate.messages.owner import Revoke


def request(use: ReserveRequest, uses: int) -> LeaseRequest:
    return LeaseRequest(
        use.token, use.invocation, use.channel_binding, use.argument_hash, bytes_out=use.bytes_out, uses=uses
    )


@pytest.fixture
def lend(realm: Any, till: Any, holder: SigningKey) -> Any:
    """``lend(token, uses)``: the lease that an enclave is given."""

    def ask(token: Any, uses: int, **changes: Any) -> Lease:
        body = request(realm.use(token, holder), uses)
        lease: Lease = realm.ask("lease", realm.signed_by(till.enclave, evolve(body, **changes)), Lease)
        return lease

    return ask


@pytest.mark.threat("BUD-10")
def test_a_grant_without_the_opt_in_gets_no_lease_whatever_is_narrowed_from_it(
    realm: Any, till: Any, holder: SigningKey, lend: Any
) -> None:
    plain = realm.grant(holder, uses=100)
    introduced = plain.attenuate(holder, Scope(lease=10))
    wide, forbidden = realm.grant(holder, lease=10), realm.grant(holder, lease=0)
    lower = wide.attenuate(holder, Scope(lease=3))
    for token, uses in (
        (plain, 2), (introduced, 2), (introduced.attenuate(holder, Scope(lease=5)), 2), (forbidden, 2),
        (forbidden.attenuate(holder, Scope(lease=9)), 2), (wide, 11), (lower, 4),
        (lower.attenuate(holder, Scope(lease=9)), 4), (wide.attenuate(holder, Scope(lease=0)), 2),
    ):  # fmt: skip
        assert realm.code(lambda token=token, uses=uses: lend(token, uses)) == "lease_refused"
    assert till.left(plain, holder) == Budget(100, None)
    assert not realm.entries("lease")
    assert lend(lower, 3).uses == 3 and lend(wide.attenuate(holder, Scope()), 10).uses == 10


@pytest.mark.threat("BUD-11")
def test_a_lease_is_charged_whole_and_at_once_to_every_account(
    realm: Any, till: Any, holder: SigningKey, lend: Any
) -> None:
    realm.tell("limits", AssetLimits("a/b", 40, None, None, None))
    token = realm.grant(holder, uses=20, bytes_out=20 * 256, lease=16)
    child = token.attenuate(holder, Scope())
    lease = lend(child, 8)
    assert till.left(child, holder) == till.left(token, holder) == Budget(12, 12 * 256)
    assert till.left(realm.grant(holder), holder).uses == 32  # of the asset
    (entry,) = realm.entries("lease")
    assert (entry["uses"], entry["bytes_out"], entry["expires"]) == (8, 256, lease.expires)
    assert (entry["handle"], entry["invocation"]) == (child.id, lease.invocation)
    # More than is left, of uses or bytes: nothing at all is charged, and what is left may be used one by one.
    assert realm.code(lambda: lend(token, 13)) == "budget_exhausted"
    assert realm.code(lambda: lend(token, 12, bytes_out=257)) == "budget_exhausted"
    assert till.left(token, holder) == Budget(12, 12 * 256)
    assert till.use(token, holder) == ""
    # Settling gives back bytes of the one use that was reserved, and no use.
    till.settle(lease.invocation, 56)
    assert till.left(child, holder) == Budget(11, 11 * 256 + 200)
    realm.reopen()
    assert till.left(child, holder) == Budget(11, 11 * 256 + 200)


@pytest.mark.threat("BUD-11")
def test_a_rate_counts_a_lease_as_all_its_uses(realm: Any, till: Any, holder: SigningKey, lend: Any) -> None:
    token = realm.grant(holder, rates={60: 10}, lease=50)
    assert realm.code(lambda: lend(token, 11)) == "rate_exceeded"
    lend(token, 8)
    assert realm.code(lambda: lend(token, 3)) == "rate_exceeded"
    assert [till.use(token, holder) for _ in range(3)] == ["", "", "rate_exceeded"]


@pytest.mark.threat("BUD-12")
def test_a_lease_ends_within_a_minute_and_with_its_handle(realm: Any, holder: SigningKey, lend: Any) -> None:
    now = realm.clock()
    assert lend(realm.grant(holder, lease=5), 5).expires == now + MAX_LEASE == now + 60
    assert lend(realm.grant(holder, lease=5, expires=now + 7), 5).expires == now + 7
    token = realm.grant(holder, lease=5)
    realm.tell("revoke", Revoke(token.id))
    assert realm.code(lambda: lend(token.attenuate(holder, Scope()), 5)) == "revoked"


@pytest.mark.threat("BUD-13")
def test_a_lease_takes_an_invocation_of_the_holder_once_and_a_reader(
    realm: Any, till: Any, holder: SigningKey, lend: Any
) -> None:
    token = realm.grant(holder, uses=100, lease=5)
    body = request(realm.use(token, holder), 5)

    def ask(enclave: Any, **changes: Any) -> str:
        signed = realm.signed_by(enclave, evolve(body, **changes))
        return str(realm.code(lambda: realm.ask("lease", signed, Lease)))

    assert ask(till.enclave, channel_binding=b"x" * 32) == "holder_refused"
    assert ask(realm.enclave("other", rank=5)) == "rule_denied"
    assert ask(till.enclave) == ""
    assert ask(till.enclave) == ask(realm.enclave(rank=1)) == "replayed"
    assert till.left(token, holder).uses == 95


@pytest.mark.threat("BUD-13")
def test_a_lease_is_the_services_and_for_what_was_asked(realm: Any, holder: SigningKey, lend: Any) -> None:
    token, certificate = realm.grant(holder, lease=5), realm.state.certificate
    lease, asked = lend(token, 5), request(realm.use(token, holder), 5)
    lease.verify(certificate, lease.invocation, asked)
    key = realm.state.release_key
    for wrong in (
        lease.sign(SigningKey.generate()), evolve(lease, expires=lease.expires - 1),
        evolve(lease, uses=6).sign(key), evolve(lease, bytes_out=1).sign(key),
        evolve(lease, invocation=bytes(32)).sign(key), evolve(lease, expires=lease.time + 61).sign(key),
    ):  # fmt: skip
        check = lambda wrong=wrong: wrong.verify(certificate, lease.invocation, asked)  # noqa: E731
        assert realm.code(check) == "receipt_refused"


def test_numbers_that_no_lease_has(realm: Any, holder: SigningKey) -> None:
    use = realm.use(realm.grant(holder), holder)
    for uses in (-1, 0, 1, MAX_LEASED + 1):
        with pytest.raises(MalformedError):
            request(use, uses)
