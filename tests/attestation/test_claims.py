"""Only a verifier makes claims, and no foreign exception leaves one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import attrs
import pytest

from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.errors import EvidenceRefused, MalformedError, UsageError


@verifier(max_size=8)
def sample(
    evidence: bytes, *, at: int, anchors: Sequence[bytes] | None = None, collateral: Sequence[bytes] = ()
) -> VerifiedClaims:
    if evidence == b"crash":
        raise KeyError("text of an attacker")
    if evidence == b"bad":
        raise MalformedError("a reason")
    return vouch(kind="sample", tier="hardware", product="sample", measurements={"PCR0": evidence})


def test_claims_are_made_by_a_verifier_only() -> None:
    claims = sample(b"fine", at=0)
    with pytest.raises(UsageError):
        VerifiedClaims(kind="x")
    with pytest.raises(UsageError):
        attrs.evolve(claims, debug=False)
    for leak in (pickle.dumps, copy.copy):
        with pytest.raises(UsageError):
            leak(claims)
    with pytest.raises(TypeError):
        claims.measurements["PCR0"] = b"other"  # type: ignore[index]


def test_a_zero_register_counts_as_debug() -> None:
    assert vouch(kind="x", tier="hardware", product="x", measurements={"PCR0": bytes(48)}).debug
    assert not vouch(kind="x", tier="hardware", product="x", measurements={"PCR0": b"\x01" * 48}).debug


@pytest.mark.threat("ATT-2")
def test_no_foreign_exception_or_text_leaves_a_verifier() -> None:
    with pytest.raises(EvidenceRefused) as refused:
        sample(b"crash", at=0)
    assert "attacker" not in str(refused.value) and refused.value.__cause__ is None
    with pytest.raises(EvidenceRefused, match="a reason"):
        sample(b"bad", at=0)


def test_sizes_and_arguments_come_first() -> None:
    for evidence in (b"", b"x" * 9):
        with pytest.raises(EvidenceRefused) as refused:
            sample(evidence, at=0)
        assert refused.value.code == "evidence_size"
    for wrong in ({"at": -1}, {"at": 2**40}, {"at": True}, {"at": 0, "anchors": [b"short"]}):
        with pytest.raises(UsageError):
            sample(b"fine", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        sample("text", at=0)  # type: ignore[arg-type]


def test_a_failed_requirement_names_its_number_and_code() -> None:
    require(True, 1, "x", "never")
    with pytest.raises(EvidenceRefused, match="why \\(check 7\\)") as refused:
        require(False, 7, "seven", "why")
    assert refused.value.code == "evidence_seven"
