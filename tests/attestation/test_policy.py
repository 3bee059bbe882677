"""The policy as data: one form, one hash, one owner, never backwards."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import attrs
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from isolate.attestation.appraisal import CHECKS
from isolate.attestation.manifest import Manifest
from isolate.attestation.policy import Policy, Reference, Rules, SignedPolicy, TrustedSigner
from isolate.crypto import cbor
from isolate.crypto.signing import SigningKey
from isolate.errors import IsolateError, PolicyRefused

KEY = SigningKey.generate()
FULL = Policy(
    lineage="acme/träin \"1\"",
    sequence=7,
    references=(
        Reference("a", "nitro", {"PCR0": b"\1" * 48, "PCR2": b"\2" * 48}, 10, 20, 15),
        Reference("b", "sev-snp", {"MEASUREMENT": b"\3" * 48}),
    ),
    trusted_signers=(TrustedSigner("trainer", str(KEY.verifying_key), 3),),
    rules={
        "sev-snp": Rules(
            allow_debug=True, allow_migration=True, allow_smt=True, vmpls=(0, 1), least_svn=2,
            least_tcb={"Milan": {"microcode": 200, "snp": 8}, "Turin": {"fmc": 1}}, signers=(b"s" * 48,),
            host_data=(b"h" * 32,), platforms=(b"p" * 64,), denied_products=("Genoa",),
        ),
        "tdx": Rules(statuses=("UpToDate", "SWHardeningNeeded"), advisories=("INTEL-SA-1",)),
        "nvidia-gpu": Rules(any_measurement=True),
    },
    max_age=100,
    max_skew=10,
    lifetime=120,
    max_stale=600,
    require_nonce=False,
    require_submods=("nvidia-gpu",),
    purposes=("train", "serve"),
    simulated_anchors=(b"r" * 32,),
    INSECURE_accept_simulated=True,
)  # fmt: skip


def test_round_trips_through_toml_and_cbor() -> None:
    for policy in (FULL, Policy(lineage="x", sequence=0)):
        assert Policy.from_toml(policy.to_toml()) == policy
        assert Policy.parse(policy.encode()) == policy
        assert Policy.from_toml(policy.to_toml()).id == policy.id
    tomllib.loads(FULL.to_toml())


@pytest.mark.threat("ATT-12")
def test_every_field_is_part_of_the_id() -> None:
    others: dict[str, Any] = {
        "lineage": "y", "sequence": 8, "references": (), "trusted_signers": (), "rules": {}, "max_age": 101,
        "max_skew": 11, "lifetime": 121, "max_stale": 601, "require_nonce": True, "require_submods": (),
        "purposes": (), "simulated_anchors": (), "INSECURE_accept_simulated": False,
    }  # fmt: skip
    assert set(others) == {one.name for one in attrs.fields(Policy)}
    ids = {FULL.evolve(**{name: value}).id for name, value in others.items()}
    assert len(ids) == len(others) and FULL.id not in ids
    changes: dict[str, Any] = {
        "allow_debug": False, "allow_migration": False, "allow_smt": False, "vmpls": (0,), "least_svn": 3,
        "least_tcb": {}, "statuses": (), "advisories": ("x",), "signers": (), "host_data": (), "platforms": (),
        "denied_products": (), "any_measurement": True,
    }  # fmt: skip
    assert set(changes) == {one.name for one in attrs.fields(Rules)}
    rules = FULL.rules["sev-snp"]
    for name, value in changes.items():
        assert FULL.evolve(rules={**FULL.rules, "sev-snp": evolve(rules, **{name: value})}).id != FULL.id


def test_the_example_of_the_specification_is_a_policy() -> None:
    text = (Path(__file__).parents[2] / "docs" / "spec" / "evidence.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(format = \"isolate/policy.*?)```", text, re.DOTALL)
    policy = Policy.from_toml(example)
    assert [one.name for one in policy.references] == ["trainer 1.4", "trainer 1.5"]
    assert (
        policy.rules_for("sev-snp").least_tcb["Genoa"]["guest_svn"] == 2 and not policy.rules_for("tdx").allow_debug
    )


def test_the_specification_has_every_field_and_every_check() -> None:
    text = (Path(__file__).parents[2] / "docs" / "spec" / "evidence.md").read_text(encoding="utf-8")
    for one in (
        *attrs.fields(Policy),
        *attrs.fields(Rules),
        *attrs.fields(Reference),
        *attrs.fields(TrustedSigner),
    ):
        assert one.name in text, one.name
    for number, name, _ in CHECKS:
        assert f"\n{number}. {name}: " in text, name


def test_dates_may_be_written_as_such() -> None:
    text = FULL.to_toml().replace("not_before = 10", "not_before = 2026-06-01T00:00:00Z")
    assert Policy.from_toml(text).references[0].not_before == 1780272000
    with pytest.raises(PolicyRefused, match="offset"):
        Policy.from_toml(text.replace("00:00Z", "00:00"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("sequence = 7", "sequence = 7\nextra = 1", "unknown fields: extra"),
        ("allow_debug = true", "allow_debg = true", "allow_debg"),
        ("sequence = 7", 'sequence = "7"', "not of type int"),
        ("sequence = 7", "sequence = true", "not of type int"),
        ("sequence = 7", "sequence = -1", "whole number"),
        ("max_age = 100", "max_age = 9223372036854775808", "64 bits"),
        ("[rules.tdx]", '[rules."t\\nx"]', "cannot be printed"),
        ("sequence = 7", "", "lacks sequence"),
        ("lifetime = 120", "lifetime = 301", "1 to 300"),
        ("max_age = 100", "max_age = -1", "negative"),
        ("isolate/policy/v1", "isolate/policy/v2", "begins with"),
        ('"' + "72" * 32 + '"', '"7272"', "32 bytes"),
        ('"' + "72" * 32 + '"', '"XY"', "hex"),
        ('"' + "01" * 48 + '"', '"01"', "16 to 64"),
        ("vmpls = [0, 1]", "vmpls = 0", "no list"),
        ("[rules.tdx]", "[rules.tdx]]", "not valid TOML"),
    ],
)
def test_what_is_not_a_policy_is_refused(old: str, new: str, reason: str) -> None:
    text = FULL.to_toml()
    assert old in text
    with pytest.raises(PolicyRefused, match=reason):
        Policy.from_toml(text.replace(old, new, 1))


def test_a_reference_that_would_admit_everything_is_refused() -> None:
    with pytest.raises(PolicyRefused, match="admit everything"):
        Reference("x", "nitro", {})


@pytest.mark.threat("ATT-13")
def test_a_policy_of_a_lower_sequence_is_refused() -> None:
    data = SignedPolicy.sign(FULL, KEY).encode()
    assert (
        SignedPolicy.open(data, signed_by=KEY.verifying_key, lineage=FULL.lineage, least_sequence=7).policy == FULL
    )
    with pytest.raises(PolicyRefused) as refused:
        SignedPolicy.open(data, signed_by=KEY.verifying_key, least_sequence=8)
    assert refused.value.code == "policy_rolled_back"
    with pytest.raises(PolicyRefused) as refused:
        SignedPolicy.open(data, signed_by=KEY.verifying_key, lineage="other")
    assert refused.value.code == "policy_lineage"


@pytest.mark.threat("ATT-13")
def test_a_policy_that_the_owner_did_not_sign_is_refused() -> None:
    signed = SignedPolicy.sign(FULL, KEY)
    with pytest.raises(PolicyRefused) as refused:
        SignedPolicy.open(signed.encode(), signed_by=SigningKey.generate().verifying_key)
    assert refused.value.code == "policy_signature"
    swapped = SignedPolicy(FULL.evolve(sequence=9), signed.signature).encode()
    with pytest.raises(PolicyRefused):
        SignedPolicy.open(swapped, signed_by=KEY.verifying_key)
    manifest = Manifest("p", 1, "nitro", {"PCR0": b"\1" * 48}).sign(KEY)
    with pytest.raises(IsolateError):
        SignedPolicy.open(manifest, signed_by=KEY.verifying_key)


def test_a_manifest_names_its_signer_under_the_signature() -> None:
    data = Manifest("p", 1, "nitro", {"PCR0": b"\1" * 48}).sign(KEY)
    assert Manifest.open(data).signer == str(KEY.verifying_key)
    body = cbor.decode(cbor.decode(data)["manifest"])
    for change in ({"signer": str(SigningKey.generate().verifying_key)}, {"signer": "none"}, {"format": "other"}):
        forged = cbor.encode({"manifest": cbor.encode(body | change), "signature": cbor.decode(data)["signature"]})
        with pytest.raises(PolicyRefused):
            Manifest.open(forged)


@given(st.binary(max_size=300), st.text(max_size=300))
def test_hostile_input_is_a_typed_refusal(data: bytes, text: str) -> None:
    for attempt in (
        lambda: Policy.parse(data),
        lambda: Policy.from_toml(text),
        lambda: Manifest.open(data),
        lambda: SignedPolicy.open(data, signed_by=KEY.verifying_key),
    ):
        with pytest.raises(IsolateError):
            attempt()
