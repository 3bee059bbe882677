"""Export of plaintext: the seven numbered checks of service/approvals.py, and who may name the approvers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from isolate import sealed
from isolate.client import approve as approving
from isolate.client.approve import Exporter
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import MalformedError, NoRecipient, RefusedError, UsageError
from isolate.messages.approve import (
    Approval,
    Approvers,
    Export,
    ExportContext,
    ExportRequest,
    GroupApproval,
    GroupSet,
    SetApprovers,
    Wish,
)
from isolate.messages.base import Answer
from isolate.service.recovery import recover


class Office:
    """Three approvers of whom two must agree, an archive to export to, and one registered file."""

    def __init__(self, realm: Any) -> None:
        self.realm = realm
        self.people = [SigningKey.generate() for _ in range(3)]
        self.archive = Identity.generate()
        self.path: Path = realm.asset()
        self.digest = sealed.public_facts(self.path).digest

    @property
    def service(self) -> str:
        return str(self.realm.state.audience)

    def keys(self, people: Sequence[SigningKey] | None = None) -> list[bytes]:
        return [one.verifying_key.to_bytes() for one in people or self.people]

    def name(
        self, people: Sequence[SigningKey] | None = None, *, threshold: int = 2, approvals: Any = ()
    ) -> GroupSet:
        body = SetApprovers(threshold, self.keys(people), [one.encode() for one in approvals])
        answer: GroupSet = self.realm.tell("approvers", body, GroupSet)
        return answer

    def agree(
        self, person: SigningKey, people: Sequence[SigningKey], sequence: int = 2, **changes: Any
    ) -> GroupApproval:
        fields = {
            "service": self.service,
            "sequence": sequence,
            "not_after": self.realm.clock() + 60,
            "threshold": 2,
        }
        fields |= changes
        group = Approvers(fields.pop("threshold"), self.keys(people))
        return GroupApproval.make(group, person, **fields)

    def wish(self, **changes: Any) -> Wish:
        fields: dict[str, Any] = {
            "service": self.service, "asset": "a/b", "digest": self.digest,
            "destination": self.archive.recipient.raw, "reason": "yearly archive",
        }  # fmt: skip
        return Wish(**(fields | changes))

    def approve(self, person: SigningKey, *, not_after: int | None = None, **changes: Any) -> Approval:
        until = self.realm.clock() + 60 if not_after is None else not_after
        return Approval.make(self.wish(**changes), person, not_after=until, nonce=os.urandom(32))

    def export(self, approvals: Sequence[Approval], **changes: Any) -> Export:
        wish = self.wish(**changes)
        request = ExportRequest(
            wish.asset, wish.digest, wish.destination, wish.reason, os.urandom(32),
            [one.encode() for one in approvals],
        )  # fmt: skip
        answer: Export = self.realm.post("", "export", request, Export)
        return answer

    def code(self, approvals: Sequence[Approval], **changes: Any) -> str:
        return str(self.realm.code(lambda: self.export(approvals, **changes)))

    def exporter(self, approvals: Sequence[Approval], destination: Identity | None = None) -> Exporter:
        return Exporter(
            approvals, destination or self.archive, service="", owner=self.realm.owner.verifying_key, lineage="acme"
        )


@pytest.fixture
def office(realm: Any, monkeypatch: pytest.MonkeyPatch) -> Office:
    monkeypatch.setattr(approving, "post", realm.post)
    monkeypatch.setattr(approving, "now", realm.clock)
    return Office(realm)


@pytest.fixture
def named(office: Office) -> Office:
    office.name()
    return office


def test_two_of_three_export_a_file_to_its_destination(named: Office, tmp_path: Path) -> None:
    first, second, _ = named.people
    given = [named.approve(first), named.approve(second)]
    sealed.unseal_file(named.path, tmp_path / "plain.safetensors", identity=named.exporter(given))
    from safetensors.numpy import load_file

    assert load_file(tmp_path / "plain.safetensors")["w"].tolist() == [1, 2, 3, 4]
    (entry,) = named.realm.entries("export")
    assert (entry["asset"], entry["digest"], entry["reason"]) == ("a/b", named.digest, "yearly archive")
    assert entry["destination"] == named.archive.recipient.raw
    assert entry["approvers"] == named.keys([first, second])


@pytest.mark.threat("EXP-1")
def test_one_administrator_alone_exports_nothing(named: Office, tmp_path: Path) -> None:
    alone, key = named.people[0], named.realm.owner
    for given in ([], [named.approve(alone)], [named.approve(alone), named.approve(alone)],
                  [named.approve(alone), named.approve(key)], [named.approve(alone)] * 2):  # fmt: skip
        assert named.code(given) in ("approvals_missing", "not_approver")
    assert not named.realm.entries("export")
    # He tried, and that stands in the log.
    refused = named.realm.entries("export refused")
    assert {one["code"] for one in refused} == {"approvals_missing", "not_approver"}
    with pytest.raises(RefusedError) as error:
        sealed.unseal_file(named.path, tmp_path / "p", identity=named.exporter([named.approve(alone)]))
    assert error.value.code == "approvals_missing"
    assert not (tmp_path / "p").exists()


@pytest.mark.threat("EXP-1")
def test_check_1_nobody_exports_before_approvers_are_named(office: Office) -> None:
    given = [office.approve(one) for one in office.people]
    assert office.code(given) == "no_approvers"
    office.name()
    assert office.code(given[:2]) == ""


@pytest.mark.threat("EXP-2")
def test_check_2_an_approval_is_for_one_thing_only(named: Office) -> None:
    first, second, _ = named.people
    other = Identity.generate().recipient.raw
    good = named.approve(first)
    for changes in (
        {"asset": "a/c"}, {"digest": b"d" * 32}, {"destination": other}, {"reason": "another"},
        {"service": "svc/2"}, {"service": "other/1"},
    ):  # fmt: skip
        assert named.code([good, named.approve(second, **changes)]) == "approval_mismatch"
        # A thief of two good approvals changes what is asked for: above all the destination.
        if "service" not in changes:
            assert named.code([good, named.approve(second)], **changes) == "approval_mismatch"
    for changed in (
        evolve(named.approve(second), not_after=named.realm.clock() + 10**6),
        evolve(named.approve(second), nonce=b"n" * 32),
        evolve(named.approve(second), signature=bytes(64)),
        evolve(good, key=second.verifying_key.to_bytes()),
    ):
        assert named.code([good, changed]) == "bad_signature"
    # Words for a change of the group are none for an export.
    agreed = named.agree(second, named.people)
    assert named.code([good, evolve(named.approve(second), signature=agreed.signature)]) == "bad_signature"
    assert named.code([good, named.approve(second)]) == ""


@pytest.mark.threat("EXP-1")
def test_check_3_strangers_and_doubles_are_no_approvers(named: Office) -> None:
    first, second, third = named.people
    stranger = SigningKey.generate()
    assert named.code([named.approve(stranger), named.approve(SigningKey.generate())]) == "not_approver"
    assert not named.realm.entries("export refused")  # a stranger writes nothing into the log
    assert named.code([named.approve(first), named.approve(stranger)]) == "not_approver"
    assert named.code([named.approve(first), named.approve(first), named.approve(second)]) == "not_approver"
    assert named.code([named.approve(first), named.approve(third)]) == ""


@pytest.mark.threat("EXP-2")
def test_check_4_an_approval_expires(named: Office) -> None:
    first, second, _ = named.people
    late = named.approve(second, not_after=named.realm.clock())
    assert named.code([named.approve(first), late]) == "approval_expired"
    given = [named.approve(first), named.approve(second)]
    named.realm.clock.now += 60
    assert named.code(given) == "approval_expired"
    # Set back, the clock brings nothing back.
    named.realm.clock.now -= 60
    assert named.code(given) == "approval_expired"
    until = named.realm.clock() + 120
    assert named.code([named.approve(first, not_after=until), named.approve(second, not_after=until)]) == ""


@pytest.mark.threat("EXP-2")
def test_check_6_an_approval_is_used_once(named: Office) -> None:
    first, second, third = named.people
    given = [named.approve(first), named.approve(second)]
    assert named.code(given) == ""
    assert named.code(given) == "replayed"
    assert named.code([given[0], named.approve(third)]) == "replayed"
    named.realm.reopen()
    assert named.code(given) == "replayed"
    # The one that was refused beside a used one is still good.
    fresh = named.approve(third)
    assert named.code([given[0], fresh]) == "replayed"
    assert named.code([fresh, named.approve(first)]) == ""


@pytest.mark.threat("EXP-1")
def test_check_5_the_threshold_is_that_of_the_group(office: Office) -> None:
    office.name(threshold=3)
    given = [office.approve(one) for one in office.people]
    assert office.code(given[:2]) == "approvals_missing"
    assert office.code(given) == ""


@pytest.mark.threat("EXP-2")
def test_check_7_only_what_is_registered_for_that_asset(named: Office) -> None:
    first, second, _ = named.people
    changes = {"digest": b"e" * 32}
    assert (
        named.code([named.approve(first, **changes), named.approve(second, **changes)], **changes)
        == "unknown_asset"
    )
    named.realm.asset("c/d")
    changes = {"asset": "c/d"}
    assert (
        named.code([named.approve(first, **changes), named.approve(second, **changes)], **changes)
        == "unknown_asset"
    )


@pytest.mark.threat("EXP-3")
def test_the_keys_open_for_the_destination_and_in_their_context_only(named: Office, monkeypatch: Any) -> None:
    first, second, _ = named.people
    answer = named.export([named.approve(first), named.approve(second)])
    for reader in (Identity.generate(), named.realm.recovery):
        with pytest.raises(NoRecipient):
            reader.open(answer.box, info=answer.context)
    with pytest.raises(NoRecipient):
        named.archive.open(answer.box, info=answer.context[:-1] + b"x")
    assert named.archive.open(answer.box, info=answer.context)
    # Whoever carries it cannot put another's answer in its place.
    kept: list[Export] = []

    def courier(route: str, body: bytes) -> tuple[int, bytes]:
        status, found = named.realm.serve(route, body)
        if route != "export":
            return status, found
        kept.append(Export.parse(found))
        return status, kept[0].encode()

    named.realm.courier = courier
    facts = sealed.public_facts(named.path)
    exporter = named.exporter([named.approve(first), named.approve(second)])
    assert exporter.unlock(facts)
    with pytest.raises(RefusedError) as refused:
        named.exporter([named.approve(first), named.approve(second)]).unlock(facts)
    assert refused.value.code == "release_mismatch"
    named.realm.courier = lambda route, body: (
        (200, evolve(kept[0], signature=bytes(64)).encode())
        if route == "export"
        else named.realm.serve(route, body)
    )
    with pytest.raises(RefusedError) as refused:
        named.exporter([named.approve(first), named.approve(second)]).unlock(facts)
    assert refused.value.code == "service_uncertified"


def test_an_export_that_holds_other_keys_than_it_says(named: Office) -> None:
    """Signed by the certified service, with its own box: what it says is compared with what opens."""
    good, facts = {"*": bytes(32), "main": bytes(32)}, sealed.public_facts(named.path)
    sent: list[Any] = [
        {}, {"main": bytes(32)}, good | {"main": bytes(31)}, good | {"main": 3}, good | {"more": bytes(32)},
        [*good],
    ]  # fmt: skip

    def courier(route: str, body: bytes) -> tuple[int, bytes]:
        status, found = named.realm.serve(route, body)
        if route == "export":
            context = ExportContext.parse(Export.parse(found).context)
            assert context.compartments == [*good]
            found = Export.make(context, sent[0], named.realm.state.keys.release).encode()
        return status, found

    named.realm.courier = courier
    while sent:
        exporter = named.exporter([named.approve(one) for one in named.people[:2]])
        assert named.realm.code(lambda exporter=exporter: exporter.unlock(facts)) == "release_mismatch"
        del sent[0]


@pytest.mark.threat("EXP-4")
def test_the_export_is_in_the_log_before_the_keys_leave(named: Office) -> None:
    first, second, _ = named.people
    given, real = [named.approve(first), named.approve(second)], named.realm.state._database
    for statement in ("COMMIT", "RELEASE", "INSERT INTO approved", "INSERT INTO entry"):
        named.realm.fail(statement)
        assert named.code(given) == "storage"
        named.realm.state._database = real
        assert not named.realm.entries("export")
    assert named.code(given) == ""


@pytest.mark.threat("EXP-4")
def test_an_approvers_word_that_is_used_for_another_thing_leaves_a_trace(named: Office) -> None:
    first, second, _ = named.people
    stolen, other = named.approve(first), Identity.generate().recipient.raw
    stranger, forged = named.approve(SigningKey.generate()), evolve(named.approve(second), signature=bytes(64))
    for given in ([stranger], [forged], [stranger, forged]):
        assert named.code(given, destination=other) == "approval_mismatch"
    assert not named.realm.entries("export refused")  # names alone are nobody's word
    assert named.code([stolen, forged], destination=other) == "approval_mismatch"
    assert named.code([stolen, forged]) == "bad_signature"
    for entry, code, destination in zip(
        named.realm.entries("export refused"),
        ("approval_mismatch", "bad_signature"),
        (other, named.archive.recipient.raw),
        strict=True,
    ):
        assert (entry["code"], entry["destination"]) == (code, destination)
        assert entry["approvers"] == named.keys([first])


@pytest.mark.threat("EXP-5")
def test_the_root_key_alone_does_not_name_other_approvers(named: Office) -> None:
    first, second, third = named.people
    mine = [SigningKey.generate() for _ in range(2)]
    refused: list[tuple[list[GroupApproval], str]] = [
        ([], "approvals_missing"),
        ([named.agree(first, mine)], "approvals_missing"),
        ([named.agree(first, mine), named.agree(first, mine)], "not_approver"),
        ([named.agree(first, mine), named.agree(mine[0], mine)], "not_approver"),
        ([named.agree(first, mine), named.agree(named.realm.owner, mine)], "not_approver"),
        ([named.agree(first, mine), named.agree(second, [first, second])], "approval_mismatch"),
        ([named.agree(first, mine), named.agree(second, mine, sequence=3)], "approval_mismatch"),
        ([named.agree(first, mine), named.agree(second, mine, service="svc/2")], "approval_mismatch"),
        ([named.agree(first, mine), evolve(named.agree(second, mine), signature=bytes(64))], "bad_signature"),
        ([named.agree(first, mine), named.agree(second, mine, not_after=named.realm.clock())], "approval_expired"),
    ]
    for approvals, code in refused:
        assert named.realm.code(lambda approvals=approvals: named.name(mine, approvals=approvals)) == code
    assert named.code([named.approve(mine[0]), named.approve(mine[1])]) == "not_approver"
    agreed = [named.agree(first, mine), named.agree(third, mine)]
    assert named.name(mine, approvals=agreed).sequence == 2
    assert named.code([named.approve(first), named.approve(second)]) == "not_approver"
    assert named.code([named.approve(mine[0]), named.approve(mine[1])]) == ""
    # What the first group agreed to is no word of the second's, nor for a later group.
    assert named.realm.code(lambda: named.name(mine, approvals=agreed)) == "approval_mismatch"
    # And the owner's key it takes, too.
    body = SetApprovers(2, named.keys(), [])
    signed = named.realm.owner_request(body, key=SigningKey.generate())
    assert named.realm.code(lambda: named.realm.ask("owner/approvers", signed, GroupSet)) == "not_owner"


@pytest.mark.threat("EXP-5")
def test_what_is_no_group() -> None:
    one, two = (SigningKey.generate().verifying_key.to_bytes() for _ in range(2))
    tries: list[Callable[[], Any]] = [
        lambda: Approvers(1, [one, two]),
        lambda: Approvers(3, [one, two]),
        lambda: Approvers(2, [one]),
        lambda: Approvers(2, [one, one]),
        # One key under two names would count twice.
        lambda: Approvers(2, [one, one[:32] + bytes(32)]),
        # Anyone signs for a key of small order.
        lambda: Approvers(2, [one, bytes([1]) + bytes(63)]),
        lambda: Approvers(2, [one, two[:-1]]),
        lambda: SetApprovers(2, [one, one[:32] + bytes(32)], []).group,
    ]
    for attempt in tries:
        with pytest.raises(MalformedError):
            attempt()


def test_an_approval_travels_as_a_line(office: Office) -> None:
    made = office.approve(office.people[0])
    assert Approval.from_text(made.to_text() + "\n") == made
    for odd in ("", "isolate-approval-", made.to_text()[:-1], made.to_text().replace("A", "B", 1), "x" * 9000):
        with pytest.raises((MalformedError, UsageError)):
            Approval.from_text(odd)
    # What would look like another thing where it is shown.
    for changes in ({"reason": "yearly\narchive"}, {"reason": "\x1b[2J"}, {"reason": ""}, {"asset": "a\u202eb"}):
        with pytest.raises(MalformedError):
            office.approve(office.people[0], **changes)


def test_what_an_export_is_not_even_asked_for(office: Office) -> None:
    first, second, _ = office.people
    good, facts = [office.approve(first), office.approve(second)], sealed.public_facts(office.path)
    with pytest.raises(UsageError):
        office.exporter([])
    with pytest.raises(UsageError):
        office.exporter([good[0], office.approve(second, reason="another")])
    with pytest.raises(UsageError):
        office.exporter(good, Identity.generate())
    other = sealed.public_facts(office.realm.seal("c/d"))
    with pytest.raises(UsageError):
        office.exporter(good).unlock(other)
    before = len(office.realm.carried)
    assert office.realm.code(lambda: office.exporter(good).unlock(facts)) == "no_approvers"
    assert [route for route, _ in office.realm.carried[before:]] == ["certificate", "export"]


def test_an_answer_of_another_kind_is_none(named: Office) -> None:
    with pytest.raises(MalformedError):
        Export.parse(Answer(b"r" * 32, b"", b"").encode())


@pytest.mark.threat("EXP-5")
def test_after_a_recovery_approvers_agree_on_themselves_before_anything_leaves(named: Office) -> None:
    """An old copy does not know whether others had followed them: even their new approvals count for nothing."""
    realm, (first, second, _) = named.realm, named.people
    before = [named.approve(first), named.approve(second)]
    realm.state.close()
    recover(realm.folder / "state", owner=realm.owner, unlock=realm.unlock, clock=realm.clock)
    realm.open()
    assert named.code(before) == "unconfirmed"
    assert named.code([named.approve(first), named.approve(second)]) == "unconfirmed"
    # The root alone confirms nobody.
    assert realm.code(lambda: named.name()) == "approvals_missing"
    named.name(approvals=[named.agree(one, named.people) for one in (first, second)])
    assert named.code(before) == "approval_mismatch"
    assert named.code([named.approve(first), named.approve(second)]) == ""
