"""Verifiers by kind: the entry points of the group ``isolate.verifiers``.

    >>> from isolate.attestation import verifiers
    >>> "simulated" in verifiers.kinds()
    True

Another distribution may add a kind by an entry point in this group; it cannot replace one of ours, and nothing of
it runs before a policy has a reference value or a rule for its kind.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata

from isolate.attestation.claims import Verifier
from isolate.errors import UsageError

GROUP = "isolate.verifiers"
OURS = {  # kind -> module of this package
    "simulated": "simulated",
    "nitro": "nitro",
    "sev-snp": "sev_snp",
    "tdx": "tdx",
    "nvidia-gpu": "nvidia",
}
TIMED = ("nitro", "simulated")


def kinds() -> list[str]:
    """Every kind that can be verified here, sorted."""
    return sorted({*OURS, *(one.name for one in metadata.entry_points(group=GROUP))})


@cache
def find(kind: str) -> Verifier:
    """The verifier of ``kind``. Raises UsageError when there is none, or when two distributions offer it."""
    if kind in OURS:
        ours: Verifier = import_module(f"{__name__}.{OURS[kind]}").verify
        return ours
    offered = list(metadata.entry_points(group=GROUP, name=kind))
    if len(offered) != 1:
        raise UsageError(f"{len(offered)} verifiers for this kind of evidence", hint=f"known: {', '.join(OURS)}")
    theirs: Verifier = offered[0].load()
    return theirs


def own_time(kind: str, evidence: bytes) -> int:
    """The time that the evidence states itself, unix seconds, *unverified*: the ``at`` of a REPLAY.

    Raises UsageError for a kind that states none, EvidenceRefused for evidence that cannot be read.
    """
    if kind not in TIMED:
        raise UsageError(f"evidence of this kind states no time of its own; {' and '.join(TIMED)} do")
    found: int = import_module(f"{__name__}.{OURS[kind]}").own_time(evidence)
    return found
