"""What the numbered checks of an appraisal look at: the evidence as verified, the policy, and what was asked.

    >>> from isolate.attestation.case import verify_part
    >>> from isolate.attestation.evidence import Part
    >>> from isolate.attestation.policy import Policy
    >>> verify_part(Part("nitro", b"none"), Policy(lineage="x", sequence=1), 0, {}).problem
    'the document is no COSE_Sign1 of four members (check 1)'

Verifying comes first and once; the checks only compare. docs/spec/evidence.md, 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

from attrs import frozen

from isolate.attestation import verifiers
from isolate.attestation.claims import VerifiedClaims
from isolate.attestation.evidence import Envelope, Part, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.errors import IsolateError


class Mode(StrEnum):
    """LIVE decides about a release. REPLAY reads a stored record at its own time; no result comes of it."""

    LIVE = "live"
    REPLAY = "replay"


@frozen
class Device:
    """One piece of evidence with what its verifier said."""

    part: Part
    claims: VerifiedClaims | None
    problem: str


@frozen
class Case:
    """Everything the checks look at."""

    envelope: Envelope | None
    problem: str
    devices: tuple[Device, ...]  # the CPU first
    policy: Policy
    references: tuple[Reference, ...]
    nonce: bytes | None
    slot: Slot | None
    purpose: str | None
    mode: Mode
    at: int

    @property
    def claims(self) -> VerifiedClaims | None:
        return self.devices[0].claims if self.devices else None

    def matching(self, claims: VerifiedClaims) -> list[Reference]:
        return [one for one in self.references if one.kind == claims.kind and one.matches(claims.measurements)]


def verify_part(part: Part, policy: Policy, at: int, anchors: Mapping[str, Sequence[bytes]]) -> Device:
    """Run the verifier of the part's kind. Whatever it raises on hostile evidence becomes ``problem``.

    A verifier of another distribution runs only when the policy has a reference or rules for its kind.
    """
    named = {one.kind for one in policy.references} | set(policy.rules)
    if part.kind not in verifiers.OURS and part.kind not in named:
        return Device(part, None, "no evidence of this kind is named in the policy")
    pinned = policy.simulated_anchors if part.kind == "simulated" else anchors.get(part.kind)
    try:
        claims = verifiers.find(part.kind)(part.evidence, at=at, anchors=pinned, collateral=part.collateral)
    except IsolateError as error:
        return Device(part, None, error.message)
    # A verifier of another distribution may raise anything; evidence that makes it do so is not authentic.
    except Exception:  # noqa: BLE001
        return Device(part, None, "the verifier failed")
    if claims.kind != part.kind:
        return Device(part, None, "the verifier answered for another kind")
    return Device(part, claims, "")


def short(value: bytes | None) -> str:
    """Hex of the first eight bytes, and the length."""
    if value is None:
        return "none"
    return value.hex() if len(value) <= 8 else f"{value[:8].hex()}.. ({len(value)} bytes)"
