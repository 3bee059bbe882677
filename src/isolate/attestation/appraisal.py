"""Does authentic evidence satisfy the owner's policy? A numbered list, every item of which leaves a reason.

The numbers stand in this list, in the code, in the tests and in docs/spec/evidence.md, 6:

 1. envelope       it can be read; profile and kind of the runtime map are those of the envelope
 2. simulated      simulated evidence only under a policy with INSECURE_accept_simulated
 3. authentic      the verifier of its kind accepts it: chain to an anchor, signature, form
 4. binding        the evidence carries the digest of this runtime map: keys, nonce, slot, submodules
 5. nonce          the runtime map has the nonce that was issued for this session
 6. evidence-nonce the evidence's own nonce, where it has one, is the same
 7. fresh          the evidence's own time, where it has one, is within the policy's age and skew (in REPLAY: it is
                   the time of the appraisal)
 8. purpose        the runtime map's purpose is what was asked for, and the policy admits it
 9. slot           the runtime map's slot is the one that the service issued, or both have none
10. debug          no debug environment, no all-zero PCR0
11. configuration  migration, SMT and privilege level, where the evidence states them
12. tcb            the platform's versions and the guest's security version are at least the policy's
13. status         the vendor's status and advisories, where stated, are admitted
14. signers        who signed the image and what the host configured are admitted, where the policy asks
15. platform       the machine is on the allow-list, where there is one; its product is not denied
16. measurement    the registers equal those of a reference; without references nothing does
17. validity       one of those references is valid now
18. revocation     none of those references is revoked
19. submods        the devices that the runtime map names are there, and those that the policy asks for
20. submods-authentic   the verifier of each device's kind accepts its evidence
21. submods-bound  each device signed a nonce derived from this session's nonce and keys

Items 10 to 18 apply to the devices' evidence too. All are evaluated, so that each stands alone; evidence is
accepted when all passed.

    >>> from isolate.attestation.appraisal import appraise
    >>> from isolate.attestation.policy import Policy
    >>> appraisal = appraise(b"no envelope", policy=Policy(lineage="x", sequence=1), nonce=None, at=0)
    >>> appraisal.accepted, len(appraisal.checks), appraisal.refusals[0].name
    (False, 21, 'envelope')
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from attrs import frozen

from isolate.attestation.case import Case, Mode, short, verify_part
from isolate.attestation.claims import VerifiedClaims
from isolate.attestation.evidence import PROFILE, Envelope, Part, Slot, gpu_nonce
from isolate.attestation.manifest import admitted
from isolate.attestation.policy import Policy, Reference, Rules
from isolate.errors import AppraisalRefused, RefusedError, UsageError

__all__ = ["CHECKS", "Appraisal", "Check", "Mode", "appraise", "compare"]


@frozen
class Check:
    """One item of the list: what was expected and what was found, in words and shortened hex."""

    number: int
    name: str
    passed: bool
    expected: str
    found: str

    def __str__(self) -> str:
        if self.passed:
            return f"check {self.number} ({self.name}) passed: {self.found}"
        return f"check {self.number} ({self.name}) failed: expected {self.expected}, found {self.found}"


@frozen(init=False)
class Appraisal:
    """What the list came to. Only ``appraise`` makes one."""

    checks: tuple[Check, ...]
    envelope: Envelope | None
    claims: VerifiedClaims | None
    parts: tuple[VerifiedClaims, ...]
    policy: Policy
    reference: str  # the name of the reference that matched, or ""
    mode: Mode
    at: int

    def __init__(self, *_: object, **__: object) -> None:
        raise UsageError("an Appraisal is made by appraise() only")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("an Appraisal does not travel: issue a result from it")

    @property
    def accepted(self) -> bool:
        return len(self.checks) == len(CHECKS) and all(one.passed for one in self.checks)

    @property
    def refusals(self) -> tuple[Check, ...]:
        return tuple(one for one in self.checks if not one.passed)

    def require(self) -> None:
        """Raise AppraisalRefused with the first failed check; its code is ``appraisal_`` and the check's name."""
        for one in self.refusals:
            refusal = AppraisalRefused(str(one), code=f"appraisal_{one.name.replace('-', '_')}")
            refusal.checks = self.checks
            raise refusal


Finding = tuple[bool, str, str]  # passed, expected, found
CHECKS: list[tuple[int, str, Callable[[Case], Finding]]] = []
_NOTHING = (False, "authentic evidence", "none")


def _numbered(number: int, name: str) -> Callable[[Callable[[Case], Finding]], Callable[[Case], Finding]]:
    def enter(check: Callable[[Case], Finding]) -> Callable[[Case], Finding]:
        CHECKS.append((number, name, check))
        return check

    return enter


def _each(case: Case, look: Callable[[VerifiedClaims, Rules], Finding]) -> Finding:
    """Apply ``look`` to every device; the first that fails is the finding."""
    last = _NOTHING
    for device in case.devices:
        if device.claims is None:
            return _NOTHING
        last = look(device.claims, case.policy.rules_for(device.claims.kind))
        if not last[0]:
            return last
    return last


@_numbered(1, "envelope")
def _envelope(case: Case) -> Finding:
    if case.envelope is None:
        return False, "an envelope", case.problem
    runtime = case.envelope.runtime
    found = f"{runtime.profile} of kind {runtime.kind}"
    passed = runtime.profile == PROFILE and runtime.kind == case.envelope.kind
    return passed, f"{PROFILE} of kind {case.envelope.kind}", found


@_numbered(2, "simulated")
def _simulated(case: Case) -> Finding:
    tiers = {one.claims.tier if one.claims else _tier(one.part.kind) for one in case.devices}
    found = "simulated evidence" if "simulated" in tiers else "hardware evidence"
    passed = "simulated" not in tiers or case.policy.INSECURE_accept_simulated
    return passed, "hardware evidence, as this policy does not accept simulated evidence", found


def _tier(kind: str) -> str:
    return "simulated" if kind == "simulated" else "unknown"


@_numbered(3, "authentic")
def _authentic(case: Case) -> Finding:
    if not case.devices:
        return _NOTHING
    device = case.devices[0]
    return device.claims is not None, f"authentic {device.part.kind} evidence", device.problem or "authentic"


@_numbered(4, "binding")
def _binding(case: Case) -> Finding:
    if case.envelope is None or case.claims is None:
        return _NOTHING
    expected, found = case.envelope.runtime.binding(), case.claims.binding
    return hmac.compare_digest(expected, found), short(expected), short(found)


@_numbered(5, "nonce")
def _nonce(case: Case) -> Finding:
    if case.envelope is None:
        return _NOTHING
    found = case.envelope.runtime.nonce
    if case.nonce is None:
        passed = case.mode is Mode.REPLAY or not case.policy.require_nonce
        return passed, "a nonce issued for this session", short(found)
    return hmac.compare_digest(case.nonce, found), short(case.nonce), short(found)


@_numbered(6, "evidence-nonce")
def _evidence_nonce(case: Case) -> Finding:
    if case.envelope is None or case.claims is None:
        return _NOTHING
    expected, found = case.envelope.runtime.nonce, case.claims.nonce
    if found is None:
        return True, "none, or the session's", "none"
    return hmac.compare_digest(expected, found), short(expected), short(found)


@_numbered(7, "fresh")
def _fresh(case: Case) -> Finding:
    if case.claims is None:
        return _NOTHING
    made = case.claims.timestamp
    if made is None:
        return True, "the nonce says how fresh it is", "no time of its own"
    if case.mode is Mode.REPLAY:
        return made == case.at, f"the record's own time, {case.at}", str(made)
    policy, age = case.policy, case.at - made
    passed = -policy.max_skew <= age <= policy.max_age
    return passed, f"an age of {-policy.max_skew} to {policy.max_age} s", f"{age} s"


@_numbered(8, "purpose")
def _purpose(case: Case) -> Finding:
    if case.envelope is None:
        return _NOTHING
    found = case.envelope.runtime.purpose
    asked = [case.purpose] if case.purpose is not None else []
    passed = all(found == one for one in asked) and (not case.policy.purposes or found in case.policy.purposes)
    return passed, " or ".join(asked or case.policy.purposes) or "any", found


@_numbered(9, "slot")
def _slot(case: Case) -> Finding:
    if case.envelope is None:
        return _NOTHING
    found = case.envelope.runtime.slot
    return found == case.slot, _slot_text(case.slot), _slot_text(found)


def _slot_text(slot: Slot | None) -> str:
    return "no slot" if slot is None else f"{slot.job} rank {slot.rank} generation {slot.generation}"


@_numbered(10, "debug")
def _debug(case: Case) -> Finding:
    return _each(
        case,
        lambda claims, rules: (
            not claims.debug or rules.allow_debug,
            "no debug environment",
            f"{claims.kind} {'in debug mode' if claims.debug else 'not in debug mode'}",
        ),
    )


@_numbered(11, "configuration")
def _configuration(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        if claims.migration and not rules.allow_migration:
            return False, "no migration", "migration allowed by the guest's policy"
        if claims.smt and not rules.allow_smt:
            return False, "no SMT", "SMT allowed by the guest's policy"
        if claims.vmpl is not None and claims.vmpl not in rules.vmpls:
            return False, f"VMPL in {list(rules.vmpls)}", f"VMPL {claims.vmpl}"
        return True, "an admitted configuration", "admitted"

    return _each(case, look)


@_numbered(12, "tcb")
def _tcb(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        if rules.least_svn and (claims.svn is None or claims.svn < rules.least_svn):
            return False, f"SVN at least {rules.least_svn}", f"SVN {claims.svn}"
        if not rules.least_tcb:
            return True, "any", "no minimum in the policy"
        least = rules.least_tcb.get(claims.product)
        if least is None:
            return False, f"a product in {sorted(rules.least_tcb)}", claims.product
        for name, number in least.items():
            if claims.tcb.get(name, -1) < number:
                return False, f"{name} at least {number}", f"{name} {claims.tcb.get(name, 'not stated')}"
        return True, "the policy's minimum", "at least that"

    return _each(case, look)


@_numbered(13, "status")
def _status(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        if claims.status is not None and claims.status not in rules.statuses:
            return False, f"status in {list(rules.statuses)}", claims.status
        odd = [one for one in claims.advisories if one not in rules.advisories]
        return not odd, "no advisory that the policy does not tolerate", ", ".join(odd) or "none"

    return _each(case, look)


@_numbered(14, "signers")
def _signers(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        if rules.signers and not set(rules.signers) & set(claims.signers.values()):
            return False, "an admitted signer", ", ".join(map(short, claims.signers.values())) or "none"
        if rules.host_data and claims.host_data not in rules.host_data:
            return False, "admitted host data", short(claims.host_data)
        return True, "admitted", "admitted"

    return _each(case, look)


@_numbered(15, "platform")
def _platform(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        if claims.product in rules.denied_products:
            return False, "a product that is not denied", claims.product
        passed = not rules.platforms or claims.platform in rules.platforms
        return passed, "a platform of the allow-list", short(claims.platform)

    return _each(case, look)


@_numbered(16, "measurement")
def _measurement(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        matching = case.matching(claims)
        if matching:
            return True, "a reference", matching[0].name
        # Only for a device beside the CPU: code that asks for keys is always compared.
        if rules.any_measurement and (case.envelope is None or claims is not case.claims):
            return True, "any measurement", "not compared, as the policy says"
        known = [one for one in case.references if one.kind == claims.kind]
        if not known:
            return False, f"a reference for {claims.kind}", "none in the policy"
        return _difference(known, claims.measurements)

    return _each(case, look)


def _difference(known: Sequence[Reference], found: Mapping[str, bytes]) -> Finding:
    """Name the registers that differ from the nearest reference."""

    def odd(reference: Reference) -> list[str]:
        return [name for name, value in reference.registers.items() if found.get(name) != value]

    nearest = min(known, key=lambda one: len(odd(one)))
    expected = ", ".join(f"{name} {short(nearest.registers[name])}" for name in odd(nearest))
    return (
        False,
        f"{nearest.name}: {expected}",
        ", ".join(f"{name} {short(found.get(name))}" for name in odd(nearest)),
    )


@_numbered(17, "validity")
def _validity(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        matching = case.matching(claims)
        passed = not matching or any(one.valid_at(case.at) for one in matching)
        return passed, "a reference that is valid now", ", ".join(one.name for one in matching) or "no reference"

    return _each(case, look)


@_numbered(18, "revocation")
def _revocation(case: Case) -> Finding:
    def look(claims: VerifiedClaims, rules: Rules) -> Finding:
        revoked = [one.name for one in case.matching(claims) if one.revoked_by(case.at)]
        return not revoked, "no revoked reference", ", ".join(revoked) or "none"

    return _each(case, look)


@_numbered(19, "submods")
def _submods(case: Case) -> Finding:
    if case.envelope is None:
        return _NOTHING
    named = [(one.kind, one.digest) for one in case.envelope.runtime.submods]
    there = [(one.kind, one.digest) for one in case.envelope.parts]
    if named != there:
        return False, f"the {len(named)} submodules of the runtime map", f"{len(there)} parts, or other ones"
    kinds = [kind for kind, _ in there]
    lacking = [kind for kind in case.policy.require_submods if kind not in kinds]
    return not lacking, ", ".join(case.policy.require_submods) or "any", ", ".join(kinds) or "none"


@_numbered(20, "submods-authentic")
def _submods_authentic(case: Case) -> Finding:
    for device in case.devices[1:]:
        if device.claims is None:
            return False, f"authentic {device.part.kind} evidence", device.problem
    return True, "authentic evidence of each", f"{max(len(case.devices) - 1, 0)} submodules"


@_numbered(21, "submods-bound")
def _submods_bound(case: Case) -> Finding:
    if case.envelope is None:
        return _NOTHING
    expected = gpu_nonce(case.envelope.runtime.nonce, case.envelope.runtime.keys_digest)
    for device in case.devices[1:]:
        found = b"" if device.claims is None else device.claims.binding
        if not hmac.compare_digest(expected, found):
            return False, short(expected), short(found)
    return True, "the derived nonce in each", f"{max(len(case.devices) - 1, 0)} submodules"


EVIDENCE_ALONE = frozenset({2, 3, 7, *range(10, 19)})  # what can be asked without a runtime map


def compare(
    part: Part,
    *,
    policy: Policy,
    at: int,
    mode: Mode = Mode.LIVE,
    manifests: Sequence[bytes] = (),
    anchors: Mapping[str, Sequence[bytes]] | None = None,
) -> tuple[VerifiedClaims | None, tuple[Check, ...]]:
    """The items that need no runtime map (2, 3, 7, 10 to 18), for evidence from anywhere. No result comes of it.

    The answer is the claims, or None where the evidence is not authentic, and those checks.
    """
    device = verify_part(part, policy, at, anchors or {})
    references = (*policy.references, *admitted(manifests, policy))
    case = Case(None, "", (device,), policy, references, None, None, None, mode, at)
    checks = (Check(number, name, *check(case)) for number, name, check in CHECKS if number in EVIDENCE_ALONE)
    return device.claims, tuple(checks)


def _reference(case: Case) -> str:
    """The name of the reference that the CPU's evidence matches, a valid one first."""
    matching = [] if case.claims is None else case.matching(case.claims)
    names = [one.name for one in sorted(matching, key=lambda one: not one.valid_at(case.at))]
    return names[0] if names else ""


def appraise(
    envelope: Envelope | bytes,
    *,
    policy: Policy,
    nonce: bytes | None,
    at: int,
    mode: Mode = Mode.LIVE,
    slot: Slot | None = None,
    purpose: str | None = None,
    manifests: Sequence[bytes] = (),
    anchors: Mapping[str, Sequence[bytes]] | None = None,
) -> Appraisal:
    """Go through the list. Never raises on hostile evidence: what is wrong stands in the checks.

    ``at`` is unix seconds: now in LIVE, the record's own time in REPLAY. ``nonce`` is the one that the service
    issued, ``slot`` the one it issued with it, ``purpose`` what was asked for (None: what the policy admits).
    ``manifests`` are signed reference manifests; ``anchors`` replaces the pinned roots of a kind (tests, private
    roots). Raises UsageError for a wrong argument.
    """
    problem, parsed = "", envelope if isinstance(envelope, Envelope) else None
    if parsed is None:
        try:
            parsed = Envelope.parse(bytes(envelope))  # type: ignore[arg-type]
        except RefusedError as error:
            problem = error.message
    parts = () if parsed is None else (parsed.main, *parsed.parts)
    case = Case(
        envelope=parsed,
        problem=problem,
        devices=tuple(verify_part(one, policy, at, anchors or {}) for one in parts),
        policy=policy,
        references=(*policy.references, *admitted(manifests, policy)),
        nonce=nonce,
        slot=slot,
        purpose=purpose,
        mode=mode,
        at=at,
    )
    claims = case.claims
    appraisal = Appraisal.__new__(Appraisal)
    appraisal.__attrs_init__(
        checks=tuple(Check(number, name, *check(case)) for number, name, check in CHECKS),
        envelope=parsed,
        claims=claims,
        parts=tuple(one.claims for one in case.devices[1:] if one.claims is not None),
        policy=policy,
        reference=_reference(case),
        mode=mode,
        at=at,
    )
    return appraisal
