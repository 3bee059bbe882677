"""The result token: who relies on it checks everything again."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import attrs
import jwt
import pytest
from attrs import evolve
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from isolate.attestation import result
from isolate.attestation.appraisal import Mode
from isolate.attestation.claims import vouch
from isolate.attestation.evidence import Envelope, Slot, instance_id
from isolate.attestation.policy import Policy, Reference
from isolate.crypto.signing import SigningKey
from isolate.errors import AppraisalRefused, ResultRefused, UsageError

NOW = 1_780_000_000
KEY = SigningKey.generate()
PUBLIC = KEY.verifying_key.ed25519


def text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def body(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    value: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return value


def signed(value: Any, header: Any = None, key: SigningKey = KEY) -> str:
    """A token over any claims, by a key of ours: for faults behind the signature."""
    head = json.dumps(result.HEADER if header is None else header, separators=(",", ":")).encode()
    start = f"{text(head)}.{text(json.dumps(value, separators=(',', ':')).encode())}"
    return f"{start}.{text(key.sign_token(start.encode()))}"


def refused(token: Any, **changes: Any) -> str:
    with pytest.raises(ResultRefused) as error:
        result.verify(token, **({"issuer_key": PUBLIC, "now": NOW, "INSECURE_accept_simulated": True} | changes))
    return error.value.code


@pytest.fixture
def token(world: Any) -> str:
    return result.issue(world.appraise(), key=KEY, issuer="service", now=NOW)


@pytest.fixture
def hardware(world: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token of a kind whose verifier says "hardware"."""
    from isolate.attestation import verifiers

    runtime = world.with_runtime(kind="fake")
    registers = {"PCR0": b"\1" * 48}
    claims = vouch(kind="fake", tier="hardware", product="P", measurements=registers, binding=runtime.binding())
    monkeypatch.setattr(verifiers, "find", lambda kind: lambda evidence, **_: claims)
    policy = Policy(lineage="x", sequence=1, references=(Reference("r", "fake", registers),))
    appraisal = world.appraise(Envelope("fake", b"e", (), runtime), policy=policy)
    return result.issue(appraisal, key=KEY, issuer="service", now=NOW, lifetime=60)


def test_what_a_result_says(world: Any, token: str) -> None:
    found = result.verify(token, issuer_key=PUBLIC, now=NOW, INSECURE_accept_simulated=True)
    assert found.instance == instance_id(world.runtime.keys_digest) and len(found.instance) == 32
    assert found.keys_digest == world.runtime.keys_digest and found.nonce == world.runtime.nonce
    assert (found.policy_id, found.lineage, found.sequence) == (world.policy.id, "acme/train", 3)
    assert (found.tier, found.kind, found.measurement) == ("simulated", "simulated", "trainer-1")
    assert (found.issuer, found.issued, found.expires) == ("service", NOW, NOW + 300)
    assert found.slot == Slot("job", 0, 1) and found.purpose == "train" and found.submods == ()


def test_a_foreign_reader_sees_an_ear_token(hardware: str) -> None:
    """An independent library verifies it, and finds EAR's own claims."""
    public = Ed25519PublicKey.from_public_bytes(PUBLIC)
    claims = jwt.decode(hardware, public, algorithms=["EdDSA"], options={"verify_exp": False, "verify_iat": False})
    assert claims["eat_profile"] == "tag:github.com,2023:veraison/ear" and claims["exp"] == NOW + 60
    assert claims["submods"]["isolate"]["ear.status"] == "affirming"
    assert set(claims["submods"]["isolate"]["ear.trustworthiness-vector"].values()) == {2}
    assert claims["ear.verifier-id"]["developer"] == "isolate"


@pytest.mark.threat("ATT-14")
def test_insecure_acceptance_ends_with_who_was_opened_to_it(token: str, hardware: str) -> None:
    """One permissive verifier upstream opens nothing downstream: each consumer refuses again by default."""
    assert refused(token, INSECURE_accept_simulated=False) == "result_simulated"
    assert body(token)["submods"]["isolate"]["ear.status"] == "contraindicated"
    assert result.verify(hardware, issuer_key=PUBLIC, now=NOW).tier == "hardware"


@pytest.mark.threat("ATT-14")
def test_a_simulated_result_is_never_affirming(token: str) -> None:
    claims = body(token)
    claims["submods"]["isolate"]["ear.status"] = "affirming"
    assert refused(signed(claims)) == "result_status"


@pytest.mark.threat("ATT-15")
def test_another_algorithm_is_refused(token: str) -> None:
    _, payload, signature = token.split(".")
    for header in (
        {"alg": "none", "typ": "JWT"}, {"alg": "HS256", "typ": "JWT"}, {"alg": "EdDSA"},
        {"alg": "EdDSA", "typ": "JWT", "kid": "x"}, {"alg": "EdDSA", "typ": "JWT", "jwk": {}}, [], "EdDSA",
    ):  # fmt: skip
        assert refused(f"{text(json.dumps(header).encode())}.{payload}.{signature}") == "result_header"
    assert refused(jwt.encode(body(token), "x" * 64, algorithm="HS256")) == "result_header"


@pytest.mark.threat("ATT-15")
def test_a_result_of_another_issuer_or_with_other_claims_is_refused(token: str) -> None:
    head, payload, signature = token.split(".")
    other = body(token) | {"exp": NOW + 299}
    swapped = text(json.dumps(other).encode())
    assert refused(f"{head}.{swapped}.{signature}") == "result_signature"
    assert refused(f"{head}.{payload}.{text(bytes(64))}") == "result_signature"
    assert refused(token, issuer_key=SigningKey.generate().verifying_key.ed25519) == "result_signature"
    assert refused(token, issuer_key=bytes(32)) == "result_signature"
    assert refused(signed(body(token), key=SigningKey.generate())) == "result_signature"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: "", lambda t: t + ".x", lambda t: t.replace(".", "", 1), lambda t: t + "=", lambda t: " " + t,
        lambda t: t + "A" * 9000, lambda t: t.encode(), lambda t: None, lambda t: t.replace(".", ".\u00e9", 1),
    ],
)  # fmt: skip
def test_malformed_tokens(token: str, change: Callable[[str], Any]) -> None:
    assert refused(change(token)) == "result_malformed"


def test_there_is_one_spelling_of_a_token(token: str) -> None:
    """The last character of 64 bytes in base64url has four unused bits: they must be zero."""
    last = token[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = alphabet[alphabet.index(last) ^ 1]
    assert refused(token[:-1] + other) == "result_malformed"


@pytest.mark.threat("ATT-16")
def test_an_expired_or_endless_result_is_refused(token: str) -> None:
    assert refused(token, now=NOW + 300) == "result_expired"
    assert result.verify(token, issuer_key=PUBLIC, now=NOW + 299, INSECURE_accept_simulated=True)
    assert refused(token, now=NOW - 31) == "result_time"
    assert refused(signed(body(token) | {"exp": NOW + 301})) == "result_lifetime"
    assert refused(signed(body(token) | {"exp": NOW})) == "result_lifetime"


def test_other_fields_and_types_are_refused(token: str) -> None:
    claims = body(token)
    for change in (
        {"extra": 1}, {"iat": str(NOW)}, {"iat": True}, {"exp": float(NOW + 10)}, {"eat_nonce": "*"},
        {"cnf": {}}, {"submods": {}}, {"submods": {"isolate": {}}},
    ):  # fmt: skip
        assert refused(signed(claims | change)) == "result_claims"
    inner = claims["submods"]["isolate"]
    for change in (
        {"isolate.tier": "real"}, {"isolate.instance": text(b"short")}, {"isolate.slot": {"job": "x"}},
        {"isolate.submods": [1]}, {"isolate.sequence": "3"},
    ):  # fmt: skip
        assert refused(signed(claims | {"submods": {"isolate": inner | change}})) == "result_claims"
    assert refused(signed(claims | {"eat_profile": "other"})) == "result_claims"
    assert refused(signed([])) == "result_claims"


def test_the_instance_is_that_of_the_keys(token: str) -> None:
    claims = body(token)
    claims["submods"]["isolate"]["isolate.instance"] = text(b"i" * 32)
    assert refused(signed(claims)) == "result_instance"


def test_only_an_accepted_live_appraisal_gives_a_result(world: Any) -> None:
    with pytest.raises(AppraisalRefused):
        result.issue(world.appraise(nonce=b"x"), key=KEY, issuer="s", now=NOW)
    replayed = world.appraise(mode=Mode.REPLAY)
    with pytest.raises(UsageError, match="replayed"):
        result.issue(replayed, key=KEY, issuer="s", now=NOW)
    for lifetime in (0, 301):
        with pytest.raises(UsageError):
            result.issue(world.appraise(), key=KEY, issuer="s", now=NOW, lifetime=lifetime)
    short = world.policy.evolve(lifetime=10)
    token = result.issue(world.appraise(policy=short), key=KEY, issuer="s", now=NOW)
    assert body(token)["exp"] == NOW + 10


def test_the_slot_is_the_one_of_the_runtime_map(world: Any) -> None:
    with pytest.raises(UsageError):
        result.issue(world.appraise(), key=KEY, issuer="s", now=NOW, slot=Slot("job", 1, 1))
    bare = world.appraise(world.envelope(runtime=world.with_runtime(slot=None)), slot=None)
    given = result.issue(bare, key=KEY, issuer="s", now=NOW, slot=Slot("job", 5, 1))
    found = result.verify(given, issuer_key=PUBLIC, now=NOW, INSECURE_accept_simulated=True)
    assert found.slot == Slot("job", 5, 1)


def test_a_result_is_made_by_verify_only(token: str) -> None:
    found = result.verify(token, issuer_key=PUBLIC, now=NOW, INSECURE_accept_simulated=True)
    with pytest.raises(UsageError):
        evolve(found, tier="hardware")
    with pytest.raises(UsageError):
        result.AttestationResult()
    assert attrs.has(type(found))


@given(st.data())
def test_no_token_raises_anything_but_a_refusal(data: st.DataObject) -> None:
    head = text(json.dumps(result.HEADER, separators=(",", ":")).encode())
    junk = st.text(st.characters(codec="ascii"), max_size=60)
    token = data.draw(st.one_of(junk, st.builds(lambda a, b: f"{head}.{a}.{b}", junk, junk)))
    assert refused(token)
