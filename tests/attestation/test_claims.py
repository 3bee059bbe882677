"""Only a verifier makes claims, and no foreign exception leaves one."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import pytest

from isolate.attestation import roots, verifiers
from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.errors import EvidenceRefused, MalformedError, StorageError, UsageError


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
    for collateral in ([b""] * 17, [bytes(131_073)]):
        with pytest.raises(EvidenceRefused) as refused:
            sample(b"fine", at=0, collateral=collateral)
        assert refused.value.code == "evidence_size"
    for wrong in ({"at": -1}, {"at": 2**40}, {"at": True}, {"at": 0, "anchors": [b"short"]}):
        with pytest.raises(UsageError):
            sample(b"fine", **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        sample("text", at=0)  # type: ignore[arg-type]


class Offer:
    """An entry point of another distribution."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self) -> Any:
        return sample


def test_other_kinds_come_by_entry_points_and_replace_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    offers = [Offer("sample"), Offer("nitro"), Offer("twice"), Offer("twice")]

    def entry_points(*, group: str, name: str | None = None) -> list[Offer]:
        assert group == "isolate.verifiers"
        return [one for one in offers if name in (None, one.name)]

    monkeypatch.setattr(verifiers.metadata, "entry_points", entry_points)
    verifiers.find.cache_clear()
    assert verifiers.kinds() == ["nitro", "nvidia-gpu", "sample", "sev-snp", "simulated", "tdx", "twice"]
    assert verifiers.find("sample") is sample and verifiers.find("nitro") is not sample
    for unclear in ("twice", "none"):
        with pytest.raises(UsageError):
            verifiers.find(unclear)
    verifiers.find.cache_clear()


def test_ours_are_installed_under_the_group() -> None:
    installed = {one.name: one.value for one in metadata.entry_points(group="isolate.verifiers")}
    for kind, module in verifiers.OURS.items():
        assert installed[kind] == f"isolate.attestation.verifiers.{module}:verify"


@pytest.mark.threat("ATT-3")
def test_pinned_roots_are_what_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, fingerprint in roots.FINGERPRINTS.items():
        assert hashlib.sha256(roots.root(name)).hexdigest() == fingerprint
    folder = Path(roots.__file__).parent
    files = {file.stem for file in folder.iterdir() if file.suffix in (".pem", ".der")}
    assert files == set(roots.FINGERPRINTS)
    assert "simulated" not in roots.PINNED
    readme = (folder / "README.md").read_text()
    assert all(name in readme for name in roots.FINGERPRINTS)
    monkeypatch.setitem(roots.FINGERPRINTS, "aws-nitro-g1", "00" * 32)
    roots.root.cache_clear()
    for name in ("aws-nitro-g1", "none"):
        with pytest.raises(StorageError):
            roots.root(name)


def test_a_failed_requirement_names_its_number_and_code() -> None:
    require(True, 1, "x", "never")
    with pytest.raises(EvidenceRefused, match="why \\(check 7\\)") as refused:
        require(False, 7, "seven", "why")
    assert refused.value.code == "evidence_seven"
