"""Intel TDX quotes, versions 4 and 5, through dcap-qvl (the extra ``tdx``; docs/spec/evidence.md, 4.4).

    >>> from isolate.attestation.verifiers.tdx import verify
    >>> verify(bytes(1000), at=0)
    Traceback (most recent call last):
    isolate.errors.EvidenceRefused: this is no quote of version 4 or 5 (check 1)

The checks, in order:

1. form: a quote of version 4 or 5 with an ECDSA P-256 key;
2. kind: of a TDX module, not of an SGX enclave;
3. length: the quote ends where it says; zeros after it are stripped and reported, anything else refuses;
4. debug: no debug or profiled TD: the operator of one reads its memory;
5. certification: what no signature covers has one form: the types of the certification data, the PEM text of the
   chain, and its last certificate, which is Intel's root (dcap-qvl looks at neither);
6. anchor: Intel's pinned root is among the trusted ones;
7. collateral: one JSON document, of which nothing has expired at the time of verification;
8. quote: dcap-qvl accepts chain, CRLs, TCB info, QE identity and signatures at that time.

Nothing is fetched. dcap-qvl's own texts are not repeated, as they could be the attacker's.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from isolate.attestation.claims import VerifiedClaims, require, verifier, vouch
from isolate.attestation.roots import PINNED, root
from isolate.crypto import x509
from isolate.errors import MalformedError, MissingExtra

KIND = "tdx"
MAX_SIZE = 32 * 1024
MAX_COLLATERAL = 128 * 1024
_HEADER = 48
_BODY_V4 = 584
_SIGNATURE, _KEY, _QE_REPORT = 64, 64, 384
_TEE_TDX = 0x81
_ECDSA_P256 = 2
_DEBUG_BITS = 0xFF  # td_attributes, "TD under debug": bit 0 DEBUG, the others reserved or profiling
_MIGRATABLE = 1 << 29


def _start(quote: bytes) -> int:
    """Where the signature data begins, behind its length (4 bytes)."""
    if int.from_bytes(quote[:2], "little") == 4:
        return _HEADER + _BODY_V4 + 4
    return _HEADER + 6 + int.from_bytes(quote[_HEADER + 2 : _HEADER + 6], "little") + 4


def _end(quote: bytes) -> int:
    """Where the quote says that it ends, or -1."""
    start = _start(quote)
    if start > len(quote):
        return -1
    return start + int.from_bytes(quote[start - 4 : start], "little")


def _attributes(quote: bytes) -> int:
    """td_attributes: 120 bytes into the body, in every version."""
    body = _HEADER if int.from_bytes(quote[:2], "little") == 4 else _HEADER + 6
    return int.from_bytes(quote[body + 120 : body + 128], "little")


def _certified(quote: bytes) -> bool:
    """Whether the certification data is of the types 6 and 5, and holds a chain that ends at Intel's root."""
    start = _start(quote)
    report = start + _SIGNATURE + _KEY  # of type 6: the QE's report, its signature, data, and the PCK chain
    outer, outer_size = quote[report : report + 2], int.from_bytes(quote[report + 2 : report + 6], "little")
    auth = report + 6 + _QE_REPORT + _SIGNATURE
    inner = auth + 2 + int.from_bytes(quote[auth : auth + 2], "little")
    inner_size = int.from_bytes(quote[inner + 2 : inner + 6], "little")
    if outer != b"\x06\x00" or quote[inner : inner + 2] != b"\x05\x00":
        return False
    if report + 6 + outer_size != len(quote) or inner + 6 + inner_size != len(quote):
        return False
    text = re.fullmatch(rb"([ -~\r\n]+-----END CERTIFICATE-----)\n?\0*", quote[inner + 6 :])
    chain = x509.load(quote[inner + 6 :].rstrip(b"\0"))
    written = b"".join(x509.pem(x509.der(one)) for one in chain)
    same = text is not None and re.sub(rb"\s", b"", text[1]) == re.sub(rb"\s", b"", written)
    return same and x509.der(chain[-1]) == root("intel-sgx-root")


def _unix(text: object) -> float:
    return datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()


def _collateral(pieces: Sequence[bytes]) -> tuple[str, float] | None:
    """The JSON text and the unix second at which its first part ends, unverified; None when it is none."""
    if len(pieces) != 1 or len(pieces[0]) > MAX_COLLATERAL:
        return None
    try:
        text = pieces[0].decode("utf-8")
        value = json.loads(text)
        ends = [_unix(json.loads(value[name])["nextUpdate"]) for name in ("tcb_info", "qe_identity")]
        ends += [x509.crl_next_update(bytes.fromhex(value[name])) for name in ("root_ca_crl", "pck_crl")]
    # Hostile JSON: missing keys, other types, odd dates, deep nesting.
    except Exception:  # noqa: BLE001
        return None
    return text, min(ends)


_FIELDS = (
    "mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config",
    "tee_tcb_svn", "td_attributes", "report_data",
)  # fmt: skip


def _fields(quote: bytes) -> dict[str, bytes]:
    """The fields of the TD's report, the same in every version (1.0, and 1.5 with more behind them)."""
    import dcap_qvl

    report = dcap_qvl.parse_quote(quote).report
    return {name: bytes(getattr(report, name)) for name in _FIELDS}


def _judge(quote: bytes, collateral: str, at: int) -> Mapping[str, Any] | None:
    """dcap-qvl's claims, or None when it refuses. Raises MissingExtra."""
    try:
        import dcap_qvl
    except ImportError:
        raise MissingExtra("TDX quotes need dcap-qvl", hint="pip install isolate-confidential[tdx]") from None
    try:
        checker = dcap_qvl.QuoteVerifier(root("intel-sgx-root"))
        # Every status is let through here: which are admitted is the owner's policy.
        policy = dcap_qvl.QuotePolicy.claims_only(at)
        parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral)
        claims: dict[str, Any] = json.loads(checker.verify_with_policy(quote, parsed, at, policy).to_json())
    # It raises ValueError; a panic inside comes as pyo3's PanicException, a BaseException.
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        return None
    return claims


@verifier(max_size=MAX_SIZE)
def verify(
    evidence: bytes, *, at: int, anchors: Sequence[bytes] | None = None, collateral: Sequence[bytes] = ()
) -> VerifiedClaims:
    """Verify a quote offline at the unix second ``at``; ``collateral`` is dcap-qvl's JSON, one piece.

    Raises EvidenceRefused, and MissingExtra without dcap-qvl.
    """
    version, key_type = int.from_bytes(evidence[:2], "little"), int.from_bytes(evidence[2:4], "little")
    sgx = int.from_bytes(evidence[4:8], "little") == 0 and version in (3, 4, 5)
    require(not sgx, 2, "kind", "an SGX quote is no TDX quote")
    formed = version in (4, 5) and key_type == _ECDSA_P256 and len(evidence) >= _HEADER + _BODY_V4
    require(formed, 1, "form", "this is no quote of version 4 or 5")
    require(int.from_bytes(evidence[4:8], "little") == _TEE_TDX, 2, "kind", "this is no quote of a TDX module")

    end = _end(evidence)
    tail = evidence[end:] if 0 < end <= len(evidence) else b"\xff"
    require(not any(tail), 3, "length", "the quote does not end where it says")
    quote = evidence[:end]

    require(not _attributes(quote) & _DEBUG_BITS, 4, "debug", "a debug TD: its operator reads its memory")

    try:
        certified = _certified(quote)
    except MalformedError:
        certified = False
    require(certified, 5, "certification", "the quote's certification data is not a PCK chain up to Intel's root")

    trusted = PINNED[KIND] if anchors is None else anchors
    require(PINNED[KIND][0] in trusted, 6, "anchor", "Intel's root is not among the trusted ones")

    found = _collateral(collateral)
    text, ends = found or ("", 0.0)
    require(found is not None, 7, "collateral", "a TDX quote takes one piece of collateral: dcap-qvl's JSON")
    require(at <= ends, 7, "collateral_expired", "the collateral has expired at the time of verification")

    claims = _judge(quote, text, at)
    require(claims is not None, 8, "quote", "the quote does not verify with this collateral at this time")
    return _vouch(claims or {}, _fields(quote), len(tail))


def _vouch(claims: Mapping[str, Any], raw: Mapping[str, bytes], stripped: int) -> VerifiedClaims:
    pck, svns = claims["platform"]["pck"], raw["tee_tcb_svn"]
    registers = {"MRTD": "mr_td", "RTMR0": "rt_mr0", "RTMR1": "rt_mr1", "RTMR2": "rt_mr2", "RTMR3": "rt_mr3"}
    owners = {"mr_owner": raw["mr_owner"], "mr_owner_config": raw["mr_owner_config"]}
    attributes = int.from_bytes(raw["td_attributes"], "little")
    expires = min(claims["earliest_expiration_date"], claims["qe_iden_earliest_expiration_date"])
    notes = ["how new the collateral is, within its own validity"]
    if stripped:
        notes.append(f"{stripped} zero bytes after the quote: stripped, no part of what was signed")
    return vouch(
        kind=KIND,
        tier="hardware",
        product="TDX",
        measurements={**{name: raw[key] for name, key in registers.items()}, "MRSEAM": raw["mr_seam"]},
        binding=raw["report_data"],
        expires=expires,
        platform=bytes(pck.get("platform_instance_id") or pck["ppid"]),
        tcb={**{f"svn{index}": svn for index, svn in enumerate(svns)}, "pce_svn": pck["pce_svn"]},
        smt=_tristate(pck.get("smt_enabled")),
        migration=bool(attributes & _MIGRATABLE),
        status=claims["tcb"]["status"],
        advisories=tuple(map(str, claims["tcb"]["advisory_ids"])),
        signers={name: digest for name, digest in owners.items() if any(digest)},
        host_data=raw["mr_config_id"] if any(raw["mr_config_id"]) else b"",
        not_checked=tuple(notes),
    )


def _tristate(word: object) -> bool | None:
    """dcap-qvl's True, False or Undefined."""
    return {"True": True, "False": False}.get(str(word))
