"""Every message has one encoding, and parse takes that and nothing else; signatures cover every field."""

from __future__ import annotations

import typing
from typing import Annotated, Any

import attrs
import numpy as np
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from isolate.crypto import cbor
from isolate.crypto.kem import Identity
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import IsolateError, MalformedError, RefusedError, UsageError
from isolate.messages import approve, attest, base, http, invoke, lease, limits, owner
from isolate.messages.attest import Challenge, ChallengeRequest, Release, ReleaseContext, ReleaseRequest
from isolate.messages.base import MAX_MESSAGE, Answer, Limit, Message, Refusal, Signed
from isolate.messages.invoke import (
    BUCKET,
    MAX_BYTES_OUT,
    REQUEST_BUCKET,
    Invoke,
    Receipt,
    Reply,
    Reservation,
    SettleRequest,
    encode_argument,
)

KEY = SigningKey.generate()
SIZES = {
    "nonce": 32, "client_nonce": 32, "key": 64, "digest": 32, "channel_binding": 32, "argument_hash": 32,
    "release": 64, "result": 64, "log": 64, "recipient": 1216, "handle": 32, "settle-request.invocation": 32,
    "destination": 1216, "group-approval.approvers": 32,
    "standing-request.": 32, "standing-request.instance": 32,
}  # fmt: skip


# What has a form of its own beside its type and size.
GIVEN: dict[tuple[str, str], Any] = {
    (kind, name): value
    for kind in ("approvers", "set-approvers")
    for name, value in (
        ("threshold", 2),
        ("keys", [SigningKey.generate().verifying_key.to_bytes() for _ in range(2)]),
        ("approvals", [b"approval"]),
    )
}


def messages() -> list[type[Message]]:
    return [
        kind
        for module in (base, attest, invoke, lease, owner, limits, approve)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Message) and "TYPE" in vars(kind)
    ]


def example(kind: type[Message]) -> Message:
    """A message of that type with some value in each field."""

    def value(name: str, hint: Any) -> Any:
        if hint is bytes:
            return bytes(SIZES.get(f"{kind.TYPE}.{name}", SIZES.get(name, 3)))
        if (kind.TYPE, name) in GIVEN:
            return GIVEN[kind.TYPE, name]
        simple = {str: "text", int: 5, bool: True, typing.Any: 7}
        if hint in simple:
            return simple[hint]
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is list:
            return [value("recipient" if name == "recovery" else "", arguments[0])]
        if origin is dict:
            return {"k": value("", arguments[1])}
        return value(name, arguments[0])

    hints = typing.get_type_hints(kind)
    return kind(**{one.name: value(one.name, hints[one.name]) for one in attrs.fields(kind)})  # type: ignore[arg-type]


KINDS = list(dict.fromkeys(messages()))


def test_there_are_as_many_messages_as_the_specification_lists() -> None:
    assert sorted(kind.TYPE for kind in KINDS) == sorted({kind.TYPE for kind in KINDS})
    assert len(KINDS) >= 39


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.TYPE))
def test_a_message_reads_back_and_nothing_else_reads(kind: type[Message]) -> None:
    message = example(kind)
    encoded = message.encode()
    assert kind.parse(encoded) == message
    fields = cbor.decode(encoded)
    for change in (
        {**fields, "type": "another"},
        {**fields, "more": 1},
        {name: one for name, one in fields.items() if name != "type"},
    ):
        with pytest.raises(MalformedError):
            kind.parse(cbor.encode(change))
    for name, one in fields.items():
        hint = typing.get_type_hints(kind).get(name)
        if hint in (None, Any):
            continue
        # True is no integer, and 1 is no truth.
        for odd in (1 if isinstance(one, bool) else True, [[]], {} if hint == dict[str, Any] else {"k": []}):
            if odd == {}:
                continue
            with pytest.raises(MalformedError):
                kind.parse(cbor.encode({**fields, name: odd}))
        with pytest.raises(MalformedError):
            kind.parse(cbor.encode({key: part for key, part in fields.items() if key != name}))
    for at in range(0, len(encoded), max(1, len(encoded) // 50)):
        for raw in (encoded[:at], encoded + b"\0"):
            with pytest.raises(MalformedError):
                kind.parse(raw)
    with pytest.raises(MalformedError):
        kind.parse(bytes(MAX_MESSAGE + 1))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.TYPE))
def test_sizes_are_checked_when_a_message_is_read(kind: type[Message]) -> None:
    fields = cbor.decode(example(kind).encode())
    for name in set(fields) & set(SIZES):
        if kind in (Challenge, ReleaseContext, attest.Registered, approve.ExportContext):
            continue  # what the service says, under its signature
        with pytest.raises(MalformedError):
            kind.parse(cbor.encode({**fields, name: b"short"}))


@attrs.frozen
class Limited(Message):
    TYPE = "limited"
    several: Annotated[list[Annotated[bytes, Limit(1, 2)]], Limit(0, 2)] = attrs.field(factory=list)
    named: dict[Annotated[str, Limit(1, 2)], Annotated[int, Limit(0, 9)]] = attrs.field(factory=dict)
    perhaps: Annotated[str, Limit(1, 2)] | Annotated[bytes, Limit(3, 4)] | None = None


@pytest.mark.parametrize(
    ("field", "good", "bad", "said"),
    [
        ("several", [b"a", b"bc"], [b"a", b"b", b"c"], "0 to 2 long"),
        ("several", [], [b"a", b"bcd"], "1 to 2 bytes"),
        ("named", {"a": 0, "bc": 9}, {"a": 0, "b": 10}, "0 to 9"),
        ("named", {}, {"a": 0, "bcd": 0}, "1 to 2 long"),
        ("perhaps", "a", "abc", "1 to 2 long"),
        ("perhaps", b"abc", b"a", "3 to 4 bytes"),
    ],
)
def test_limits_inside_lists_maps_and_choices(field: str, good: Any, bad: Any, said: str) -> None:
    assert Limited.parse(Limited(**{field: good}).encode()) == Limited(**{field: good})
    value = {"type": "limited", "several": [], "named": {}, "perhaps": None, field: bad}
    with pytest.raises(MalformedError, match=f"^{field} of message limited is {said}$"):
        Limited.parse(cbor.encode(value))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_by_every_message(data: bytes) -> None:
    for kind in KINDS:
        with pytest.raises(MalformedError):
            kind.parse(data)


@pytest.mark.threat("SVC-8")
def test_a_signed_request_is_covered_in_every_field() -> None:
    signed = Signed.make(Purpose.OWNER_REQUEST, KEY, b"body", bytes(32), "svc", "token")
    assert signed.verify(Purpose.OWNER_REQUEST, "svc") == KEY.verifying_key
    other = SigningKey.generate().verifying_key.to_bytes()
    for changes in (
        {"body": b"other"}, {"nonce": b"1" * 32}, {"token": ""}, {"key": other}, {"signature": bytes(64)},
        {"signature": b""},
    ):  # fmt: skip
        with pytest.raises(RefusedError) as refused:
            evolve(signed, **changes).verify(Purpose.OWNER_REQUEST, "svc")
        assert refused.value.code == "bad_signature"
    for purpose in set(Purpose) - {Purpose.OWNER_REQUEST}:
        with pytest.raises(RefusedError):
            signed.verify(purpose, "svc")
    with pytest.raises(RefusedError) as refused:
        signed.verify(Purpose.OWNER_REQUEST, "another")
    assert refused.value.code == "wrong_audience"


@pytest.mark.threat("SVC-27")
def test_an_answer_is_to_one_request() -> None:
    one, two = (Signed.make(Purpose.OWNER_REQUEST, KEY, b"body", nonce * 32, "svc") for nonce in (b"1", b"2"))
    answer = Answer.make(one, owner.Done(1), KEY)
    assert answer.open(one, KEY.verifying_key, owner.Done) == owner.Done(1)
    for attempt in (
        lambda: answer.open(two, KEY.verifying_key, owner.Done),
        lambda: evolve(answer, request=two.digest).open(two, KEY.verifying_key, owner.Done),
        lambda: evolve(answer, body=owner.Done(2).encode()).open(one, KEY.verifying_key, owner.Done),
        lambda: answer.open(one, SigningKey.generate().verifying_key, owner.Done),
    ):
        with pytest.raises(RefusedError) as refused:
            attempt()
        assert refused.value.code == "forged_answer"


def certificate(**changes: Any) -> attest.ServiceCertificate:
    fields: dict[str, Any] = {
        "name": "svc", "lineage": "acme", "epoch": 1, "not_before": 10, "not_after": 20,
        "recipient": Identity.generate().recipient.raw, "recovery": [Identity.generate().recipient.raw],
    }  # fmt: skip
    keys = dict.fromkeys(("release", "result", "log"), KEY.verifying_key.to_bytes())
    return attest.ServiceCertificate(**(fields | keys | changes)).sign(KEY)


@pytest.mark.threat("ENC-1")
def test_a_certificate_is_covered_in_every_field() -> None:
    good, root = certificate(), KEY.verifying_key
    assert good.verify(root, "acme") == good
    other = Identity.generate().recipient.raw
    for changes in (
        {"name": "x"}, {"lineage": "x"}, {"not_before": 9}, {"not_after": 21}, {"recipient": other},
        {"recovery": []}, {"recovery": [*good.recovery, other]}, {"release": bytes(64)}, {"result": bytes(64)},
        {"log": bytes(64)}, {"signature": bytes(64)},
    ):  # fmt: skip
        with pytest.raises(RefusedError) as refused:
            evolve(good, **changes).verify(root, "acme")
        assert refused.value.code == "service_uncertified"
    with pytest.raises(RefusedError):
        good.verify(SigningKey.generate().verifying_key, "acme")
    with pytest.raises(RefusedError):
        good.verify(root, "another")


@pytest.mark.threat("ENC-1")
def test_a_challenge_is_covered_and_its_certificate_is_valid_at_its_time() -> None:
    asked = ChallengeRequest(b"c" * 32, "job", 1)

    def challenge(**changes: Any) -> Challenge:
        fields = {
            "client_nonce": b"c" * 32, "nonce": b"n" * 32, "job": "job", "rank": 1, "generation": 1, "time": 15,
            "certificate": certificate().encode(),
        }  # fmt: skip
        return Challenge(**(fields | changes)).sign(KEY)  # type: ignore[arg-type]

    def code(one: Challenge) -> str:
        try:
            one.verify(KEY.verifying_key, "acme", asked)
        except IsolateError as error:
            return error.code
        return ""

    assert code(challenge()) == ""
    for changes in ({"nonce": b"m" * 32}, {"generation": 2}, {"time": 16}, {"signature": bytes(64)}):
        assert code(evolve(challenge(), **changes)) == "service_uncertified"
    for changes in ({"client_nonce": b"d" * 32}, {"job": "other"}, {"rank": 2}):
        assert code(challenge(**changes)) == "challenge_mismatch"
    for time in (9, 20):
        assert code(challenge(time=time)) == "service_expired"
    assert code(challenge(certificate=b"rubbish")) == "malformed"


@pytest.mark.threat("ENC-2")
def test_a_release_is_for_one_request_and_one_instance() -> None:
    me, asked, valid = Identity.generate(), ReleaseRequest(b"d" * 32, [], b"n" * 32), certificate()
    fields: dict[str, Any] = {
        "asset": "a", "digest": b"d" * 32, "epoch": 1, "compartments": ["main"], "nonce": b"n" * 32,
        "instance": b"i" * 32, "policy": b"p" * 32, "log_index": 1, "time": 15,
    }  # fmt: skip

    def release(key: SigningKey = KEY, **changes: Any) -> Release:
        context = ReleaseContext(**(fields | changes))
        return Release.make(context, {"main": bytes(32)}, me.recipient.raw, key)

    def code(one: Release, request: ReleaseRequest = asked, instance: bytes = b"i" * 32) -> str:
        try:
            one.verify(valid, request, instance)
        except IsolateError as error:
            return error.code
        return ""

    assert code(release()) == ""
    for changes in ({"nonce": b"m" * 32}, {"digest": b"e" * 32}, {"instance": b"j" * 32}):
        assert code(release(**changes)) == "release_mismatch"
    assert code(release(), evolve(asked, compartments=["other"])) == "release_mismatch"
    assert code(release(time=20)) == "service_expired"
    assert code(release(SigningKey.generate())) == "service_uncertified"
    # The box of one release under the context of another.
    one, two = release(), release(epoch=2)
    assert code(Release(one.context, two.box, one.signature)) == "service_uncertified"


@pytest.mark.threat("SVC-22")
def test_a_reservation_and_a_receipt_are_covered_in_every_field() -> None:
    valid, number = certificate(), b"i" * 32
    reserved = Reservation.make(number, 3, 15, KEY)
    reserved.verify(valid, number)
    asked = SettleRequest(number, 256, "revoked")
    receipt = Receipt(number, 256, "revoked", 4, b"l" * 32, 15).sign(KEY)
    receipt.verify(valid, asked)

    def code(attempt: Any) -> str:
        with pytest.raises(IsolateError) as refused:
            attempt()
        return refused.value.code

    changes: tuple[dict[str, Any], ...]
    changes = ({"invocation": b"j" * 32}, {"log_index": 5}, {"time": 16}, {"signature": bytes(64)})
    for one in changes:
        assert code(lambda one=one: evolve(reserved, **one).verify(valid, number)) == "receipt_refused"
    for one in (*changes, {"bytes_out": 257}, {"code": ""}, {"leaf": b"m" * 32}):
        assert code(lambda one=one: evolve(receipt, **one).verify(valid, asked)) == "receipt_refused"
    for one in ({"bytes_out": 255}, {"code": ""}, {"invocation": b"j" * 32}):
        assert code(lambda one=one: receipt.verify(valid, evolve(asked, **one))) == "receipt_refused"
    assert code(lambda: Reservation.make(number, 3, 15, SigningKey.generate()).verify(valid, number)) != ""
    # One is none of the other: what may run is not yet what may leave.
    for kind in (Reservation, Receipt):
        wrong = {Reservation: receipt, Receipt: reserved}[kind].encode()
        with pytest.raises(MalformedError):
            kind.parse(wrong)


@pytest.mark.parametrize("code", ["Revoked", "a" * 65, "a b", "\n", "a\n"])
def test_what_is_no_code_of_a_settlement(code: str) -> None:
    with pytest.raises(MalformedError):
        SettleRequest(bytes(32), 0, code)
    for bytes_out in (-1, MAX_BYTES_OUT + 1):
        with pytest.raises(MalformedError):
            SettleRequest(bytes(32), bytes_out, "")


# Padding


@given(st.integers(0, 3000), st.sampled_from([0, 1, 23, 24, 255, 256]))
def test_a_padded_message_is_a_whole_number_of_buckets(size: int, code: int) -> None:
    reply = Reply("c" * code, bytes(size), "r")
    padded = reply.padded()
    assert len(padded) % BUCKET == 0
    assert len(padded) - len(reply.encode()) < 2 * BUCKET
    assert evolve(Reply.parse(padded), padding=b"") == reply
    request = Invoke(bytes(size), b"", {})
    assert len(request.padded()) % REQUEST_BUCKET == 0
    assert evolve(Invoke.parse(request.padded()), padding=b"") == request


@pytest.mark.threat("ENC-3")
def test_replies_of_results_and_refusals_have_one_length() -> None:
    replies = [Reply("", value, "0" * 16) for value in (0, 9, 2**63, "x" * 60)]
    replies += [Reply(code, None, "0" * 16) for code in ("revoked", "budget_exhausted", "x" * 64)]
    assert {len(one.padded()) for one in replies} == {BUCKET}


def test_arguments_travel_as_bytes() -> None:
    assert encode_argument(np.array([[1, 2]], ">u2")) == b"\x01\x00\x02\x00"
    assert encode_argument(np.float32(1)) == np.float32(1).tobytes()
    assert encode_argument("text") == "text"

    class OnDevice:
        def __array__(self) -> Any:
            raise TypeError("canary")

    for odd in (OnDevice(), np.array([object()]), np.array(["a", None])):
        with pytest.raises(UsageError) as refused:
            encode_argument(odd)
        assert "canary" not in str(refused.value)


# Refusals and addresses


@given(st.text(max_size=700), st.text(max_size=100), st.text(max_size=100))
def test_a_refusal_of_anybody_is_one_printable_line(message: str, code: str, kind: str) -> None:
    error = http.error_of(Refusal(code, message, message, message, kind))
    assert isinstance(error, IsolateError)
    assert str(error).isprintable()
    assert len(str(error)) < 800
    assert error.code.isascii()


@pytest.mark.parametrize(
    "address",
    ["", "unix:", "tcp:host", "tcp::1", "tcp:host:x", "tcp:host:65536", "tcp:host:²", "http://x", "host:1"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError):
        http.parse_address(address)
