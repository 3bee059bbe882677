"""Attestation: milliseconds to verify one piece of real evidence, offline, chain and all.

nitro_verify_ms, snp_verify_ms and tdx_verify_ms are medians over the rounds; a round verifies each kind once, in
alternating order, twice: at first nothing is remembered (nitro_first_ms and so on), then the signatures of the
certificates are, as in a service that has seen them before. tdx remembers nothing, needs the extra "tdx", and is
left out without it.

    >>> rounds, figures = run(1, True)
    >>> figures["nitro_verify_ms"] > 0
    True
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import resources

from isolate.attestation.verifiers import find, nitro
from isolate.crypto import x509
from isolate.errors import MissingExtra

_SNP_TIME = 1780272000  # 2026-06-01, when the certificates are valid
_TDX_TIME = 1750377600  # 2025-06-20, when the collateral is


def _file(name: str) -> bytes:
    return resources.files(__package__).joinpath("evidence", name).read_bytes()


def _kinds() -> dict[str, Callable[[], object]]:
    document, report, quote = _file("nitro.bin"), _file("snp.bin"), _file("tdx.bin")
    chain, collateral = _file("snp.pem"), _file("tdx.json")
    made = nitro.own_time(document)
    found: dict[str, Callable[[], object]] = {
        "nitro": lambda: find("nitro")(document, at=made),
        "snp": lambda: find("sev-snp")(report, at=_SNP_TIME, collateral=[chain]),
        "tdx": lambda: find("tdx")(quote, at=_TDX_TIME, collateral=[collateral]),
    }
    for kind in list(found):
        try:
            found[kind]()  # also loads modules and roots before the first round
        except MissingExtra:
            del found[kind]
    return found


def _timed(measure: Callable[[], object]) -> float:
    begin = time.perf_counter()
    measure()
    return time.perf_counter() - begin


def run(rounds: int | None, quick: bool) -> tuple[int, dict[str, float]]:
    """The figures in milliseconds: 200 rounds, or 5 with ``quick``."""
    rounds = rounds or (5 if quick else 200)
    kinds = _kinds()
    seen: dict[str, list[float]] = {}
    for turn in range(rounds):
        for kind in kinds if turn % 2 == 0 else reversed(kinds):
            x509.issued_by.cache_clear()
            seen.setdefault(f"{kind}_first_ms", []).append(_timed(kinds[kind]))
            seen.setdefault(f"{kind}_verify_ms", []).append(_timed(kinds[kind]))
    figures = {name: round(statistics.median(times) * 1000, 3) for name, times in sorted(seen.items())}
    return rounds, figures
