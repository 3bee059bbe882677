"""What a verifier vouches for: one shape for every kind of evidence (docs/spec/evidence.md, 3).

    >>> from isolate.attestation.claims import VerifiedClaims, vouch
    >>> claims = vouch(kind="simulated", tier="simulated", product="x", measurements={"PCR0": bytes(48)})
    >>> claims.debug, sorted(claims.measurements), claims.not_checked
    (True, ['PCR0'], ())
    >>> VerifiedClaims()
    Traceback (most recent call last):
    isolate.errors.UsageError: VerifiedClaims are made by a verifier only

Only a verifier makes VerifiedClaims, with ``vouch``, after its last check: a guard against mistakes, not against
code in the same process. A fact that a kind of evidence does not state is None or empty, and a policy that asks
for it denies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import MappingProxyType
from typing import Any, Literal, NoReturn, Protocol

from attrs import field, frozen

from isolate.attestation.evidence import MAX_COLLATERAL, MAX_PIECES
from isolate.errors import EvidenceRefused, IsolateError, RefusedError, UsageError

Tier = Literal["simulated", "hardware"]
LATEST = 2**40  # unix seconds; a time beyond it is a mistake (milliseconds, usually)


@frozen(init=False)
class VerifiedClaims:
    """Authentic claims of one piece of evidence. Every value comes from signed bytes, or from the vendor's chain.

    kind          the verifier's name for this evidence
    tier          "hardware" or "simulated"
    product       the kind of machine ("Milan", "TDX", "GH100", ...): minimum TCBs and deny-lists name it
    measurements  register -> digest (PCR0.., MEASUREMENT, MRTD, RTMR0.., M01..)
    debug         whether the platform's operator could read this environment's memory
    binding       report data (64 bytes), user data (any length) or the nonce that a GPU signed (32 bytes)
    timestamp     unix seconds of the evidence's own clock, or None
    expires       unix second at which the first certificate or collateral used here ends, or None
    platform      the name of the machine, or of the simulated root
    nonce         the evidence's own nonce field where it has one, else None
    tcb           component -> version number
    svn           the guest's security version, or None
    smt, migration, vmpl   of the configuration, or None
    status        the vendor's word for the platform's patch level, or None
    advisories    the vendor's advisories that apply to the platform
    signers       who signed or configured the image: name -> digest
    host_data     what the host put in at launch (host_data, mr_config_id), or b""
    public_key    the document's own public_key field, or b"" (Nitro)
    not_checked   what a reader could think was checked, and was not
    """

    kind: str
    tier: Tier
    product: str
    measurements: Mapping[str, bytes] = field(converter=MappingProxyType)
    debug: bool
    binding: bytes
    timestamp: int | None
    expires: int | None
    platform: bytes
    nonce: bytes | None
    tcb: Mapping[str, int] = field(converter=MappingProxyType)
    svn: int | None
    smt: bool | None
    migration: bool | None
    vmpl: int | None
    status: str | None
    advisories: tuple[str, ...]
    signers: Mapping[str, bytes] = field(converter=MappingProxyType)
    host_data: bytes
    public_key: bytes
    not_checked: tuple[str, ...]

    def __init__(self, *_: object, **__: object) -> None:
        raise UsageError("VerifiedClaims are made by a verifier only")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("VerifiedClaims are made by a verifier only: send the evidence")


def vouch(
    *,
    kind: str,
    tier: Tier,
    product: str,
    measurements: Mapping[str, bytes],
    debug: bool = False,
    binding: bytes = b"",
    timestamp: int | None = None,
    expires: int | None = None,
    platform: bytes = b"",
    nonce: bytes | None = None,
    tcb: Mapping[str, int] | None = None,
    svn: int | None = None,
    smt: bool | None = None,
    migration: bool | None = None,
    vmpl: int | None = None,
    status: str | None = None,
    advisories: Sequence[str] = (),
    signers: Mapping[str, bytes] | None = None,
    host_data: bytes = b"",
    public_key: bytes = b"",
    not_checked: Sequence[str] = (),
) -> VerifiedClaims:
    """Make claims: the last line of a verifier, and of nothing else. An all-zero PCR0 counts as debug."""
    claims = VerifiedClaims.__new__(VerifiedClaims)
    fields: dict[str, Any] = {
        "kind": kind,
        "tier": tier,
        "product": product,
        "measurements": dict(measurements),
        "debug": debug or _zero(measurements.get("PCR0", b"")),
        "binding": binding,
        "timestamp": timestamp,
        "expires": expires,
        "platform": platform,
        "nonce": nonce,
        "tcb": dict(tcb or {}),
        "svn": svn,
        "smt": smt,
        "migration": migration,
        "vmpl": vmpl,
        "status": status,
        "advisories": tuple(advisories),
        "signers": dict(signers or {}),
        "host_data": host_data,
        "public_key": public_key,
        "not_checked": tuple(not_checked),
    }
    claims.__attrs_init__(**fields)
    return claims


def _zero(register: bytes) -> bool:
    return bool(register) and not any(register)


class Verifier(Protocol):
    """What stands behind an entry point of the group ``isolate.verifiers``.

    ``at`` is the unix second at which certificates must be valid; ``anchors`` are SHA-256 fingerprints of root
    certificates (None: the pinned ones of this kind, and a simulation has none); ``collateral`` is whatever the
    kind takes. Offline. Raises EvidenceRefused, and UsageError for a wrong argument.
    """

    def __call__(
        self,
        evidence: bytes,
        *,
        at: int,
        anchors: Sequence[bytes] | None = None,
        collateral: Sequence[bytes] = (),
    ) -> VerifiedClaims: ...


def require(condition: bool, number: int, code: str, reason: str) -> None:
    """One numbered check of a verifier; the numbers stand in its docstring. Raises EvidenceRefused.

    >>> require(1 + 1 == 2, 1, "sum", "arithmetic fails")
    """
    if not condition:
        raise EvidenceRefused(f"{reason} (check {number})", code=f"evidence_{code}")


def verifier(*, max_size: int) -> Callable[[Verifier], Verifier]:
    """Guard a verifier: arguments and sizes first, and no foreign exception ever leaves.

    ``max_size`` is in bytes. What a parser raised is not repeated: the text could be the attacker's.
    """

    def wrap(function: Verifier) -> Verifier:
        @wraps(function)
        def guarded(
            evidence: bytes,
            *,
            at: int,
            anchors: Sequence[bytes] | None = None,
            collateral: Sequence[bytes] = (),
        ) -> VerifiedClaims:
            if not isinstance(evidence, bytes) or not all(isinstance(one, bytes) for one in collateral):
                raise UsageError("evidence and collateral are bytes")
            if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at < LATEST:
                raise UsageError("the time of verification is in unix seconds")
            if anchors is not None and any(not isinstance(one, bytes) or len(one) != 32 for one in anchors):
                raise UsageError("an anchor is the SHA-256 fingerprint of a root certificate, 32 bytes")
            if len(collateral) > MAX_PIECES or any(len(one) > MAX_COLLATERAL for one in collateral):
                raise EvidenceRefused(
                    f"collateral is at most {MAX_PIECES} pieces of {MAX_COLLATERAL} bytes", code="evidence_size"
                )
            if not 0 < len(evidence) <= max_size:
                raise EvidenceRefused(
                    f"evidence of {len(evidence)} bytes, where 1 to {max_size} are read", code="evidence_size"
                )
            try:
                return function(evidence, at=at, anchors=anchors, collateral=collateral)
            except (EvidenceRefused, UsageError):
                raise
            except RefusedError as error:
                raise EvidenceRefused(error.message, code="evidence_malformed") from None
            except IsolateError:
                raise
            # The last net: a parser's exception is a refusal, never a crash of who verifies.
            except Exception:  # noqa: BLE001
                raise EvidenceRefused("the evidence cannot be read", code="evidence_malformed") from None

        return guarded

    return wrap
