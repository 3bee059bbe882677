"""TDX quotes through dcap-qvl, and what it leaves to us."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from typing import Any

import pytest

from isolate.attestation.verifiers import tdx
from isolate.attestation.verifiers.tdx import verify
from isolate.errors import EvidenceRefused, MissingExtra

pytest.importorskip("dcap_qvl", reason="the extra `tdx` is not installed")

AT = 1_750_377_600  # 2025-06-20
QUOTE, COLLATERAL = "tdx/dcapqvl_tdx_quote", "tdx/dcapqvl_tdx_quote_collateral.json"
Read = Callable[[str], bytes]


def refused(quote: bytes, collateral: Any, at: int = AT, **changes: Any) -> str:
    with pytest.raises(EvidenceRefused) as error:
        verify(quote, at=at, collateral=collateral, **changes)
    return error.value.code


def put(quote: bytes, offset: int, value: bytes) -> bytes:
    return quote[:offset] + value + quote[offset + len(value) :]


def test_a_real_quote(vector: Read) -> None:
    quote = vector(QUOTE)
    claims = verify(quote, at=AT, collateral=[vector(COLLATERAL)])
    assert (claims.product, claims.status, claims.advisories, claims.debug) == ("TDX", "UpToDate", (), False)
    assert (
        claims.binding == quote[48 + 520 : 48 + 584] and claims.measurements["MRTD"] == quote[48 + 136 : 48 + 184]
    )
    assert sorted(claims.measurements) == ["MRSEAM", "MRTD", "RTMR0", "RTMR1", "RTMR2", "RTMR3"]
    assert claims.tcb["svn0"] == 6 and claims.tcb["pce_svn"] == 11 and len(claims.platform) == 16
    assert (claims.smt, claims.migration, claims.host_data) == (True, False, b"")
    assert claims.expires is not None and claims.expires > AT


def test_1_form(vector: Read) -> None:
    quote, collateral = vector(QUOTE), [vector(COLLATERAL)]
    for odd in (put(quote, 0, b"\x06"), put(quote, 2, b"\x03"), quote[:600], b"\x04\x00\x02\x00"):
        assert refused(odd, collateral) in ("evidence_form", "evidence_kind")
    assert refused(put(quote, 0, b"\x06"), collateral) == "evidence_form"


@pytest.mark.threat("ATT-20")
def test_2_an_sgx_quote_is_no_tdx_quote(vector: Read) -> None:
    collateral = [vector("tdx/dcapqvl_sgx_quote_collateral.json")]
    assert refused(vector("tdx/dcapqvl_sgx_quote"), collateral) == "evidence_kind"
    assert refused(put(vector(QUOTE), 4, b"\x82"), [vector(COLLATERAL)]) == "evidence_kind"


def test_3_zeros_after_the_quote_are_stripped_and_reported(vector: Read) -> None:
    quote, collateral = vector(QUOTE), [vector(COLLATERAL)]
    assert len(quote) == 5006
    found = verify(quote, at=AT, collateral=collateral)
    assert any(one.startswith("70 zero bytes") for one in found.not_checked)
    bare = verify(quote[:4936], at=AT, collateral=collateral)
    assert not any("zero bytes" in one for one in bare.not_checked)
    assert dict(bare.measurements) == dict(found.measurements)


@pytest.mark.threat("ATT-21")
def test_3_anything_else_after_the_quote_is_refused(vector: Read) -> None:
    quote, collateral = vector(QUOTE), [vector(COLLATERAL)]
    for odd in (quote[:4936] + b"\1", quote[:-1] + b"\1", quote + b"\1", quote[:4935], quote[:640], quote * 2):
        assert refused(odd, collateral) == "evidence_length"


@pytest.mark.threat("ATT-8")
def test_4_a_debug_td_is_refused(vector: Read) -> None:
    quote = vector("tdx/trustee_tdx_quote_4.dat")
    assert refused(quote, [vector(COLLATERAL)]) == "evidence_debug"
    assert refused(quote, []) == "evidence_debug"


@pytest.mark.threat("ATT-3")
def test_6_anchor(vector: Read) -> None:
    for anchors in ([], [b"x" * 32]):
        assert refused(vector(QUOTE), [vector(COLLATERAL)], anchors=anchors) == "evidence_anchor"


def test_7_collateral(vector: Read) -> None:
    quote, good = vector(QUOTE), vector(COLLATERAL)
    lacking = json.dumps({k: v for k, v in json.loads(good).items() if k != "pck_crl"}).encode()
    deep = b"[" * 100_000
    for odd in ([], [good, good], [b"{}"], [b"junk"], [b"\xff"], [lacking], [deep], [good[:-9]]):
        assert refused(quote, odd) == "evidence_collateral"


@pytest.mark.threat("ATT-23")
def test_7_expired_collateral_is_refused(vector: Read) -> None:
    for at in (1_755_000_000, 1_795_000_000):
        assert refused(vector(QUOTE), [vector(COLLATERAL)], at) == "evidence_collateral_expired"


def test_8_quote(vector: Read) -> None:
    quote, good = vector(QUOTE), vector(COLLATERAL)
    assert refused(quote, [good], 1_700_000_000) == "evidence_quote"
    value = json.loads(good)
    other = value | {"tcb_info": value["tcb_info"].replace("UpToDate", "Revoked")}
    assert refused(quote, [json.dumps(other).encode()]) == "evidence_quote"
    assert refused(put(quote, 48 + 520, b"\1" * 64), [good]) == "evidence_quote"
    assert refused(put(quote, 636, bytes(64)), [good]) == "evidence_quote"


@pytest.mark.threat("ATT-21")
def test_5_what_dcap_qvl_does_not_look_at_has_one_form(vector: Read) -> None:
    """Found by flipping every byte: it takes any type of certification data, any root and odd line ends."""
    quote, collateral = vector(QUOTE)[:4936], [vector(COLLATERAL)]
    newline = quote.index(b"\n", 1300)
    for position, value in ((764, b"\x07"), (1252, b"\x04"), (newline, b"\x0b"), (4000, b"A"), (4935, b" ")):
        assert quote[position : position + 1] != value
        assert refused(put(quote, position, value), collateral) == "evidence_certification"


def _flips(read: Read, positions: range) -> None:
    quote, collateral = read(QUOTE)[:4936], [read(COLLATERAL)]
    for position in positions:
        flipped = put(quote, position, bytes([quote[position] ^ 1 << position % 8]))
        assert refused(flipped, collateral).startswith("evidence_"), position


@pytest.mark.threat("ATT-19")
def test_flipped_bytes_are_refused(vector: Read) -> None:
    _flips(vector, range(0, 4936, 13))


@pytest.mark.slow
@pytest.mark.threat("ATT-19")
def test_every_flipped_byte_is_refused(vector: Read) -> None:
    _flips(vector, range(4936))


def test_every_truncation_is_refused(vector: Read) -> None:
    quote, collateral = vector(QUOTE)[:4936], [vector(COLLATERAL)]
    for size in range(1, 4936, 41):
        assert refused(quote[:size], collateral).startswith("evidence_")


def test_without_the_extra_it_says_what_to_install(vector: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "dcap_qvl":
            raise ImportError
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match="tdx"):
        verify(vector(QUOTE), at=AT, collateral=[vector(COLLATERAL)])


def test_a_quote_of_version_5_is_read(vector: Read) -> None:
    """Its collateral admits no TCB level, so that only the parser is reached."""
    quote = vector("tdx/dcapqvl_tdx_quote_outdated")
    assert quote[0] == 5
    collateral = [vector("tdx/dcapqvl_tdx_quote_outdated_collateral.json")]
    fields = tdx._fields(quote)
    # TD 1.5 begins as 1.0 does: header 48, type and size of the body 6, then the body.
    assert (
        fields["td_attributes"] == quote[54 + 120 : 54 + 128]
        and fields["report_data"] == quote[54 + 520 : 54 + 584]
    )
    assert fields["mr_td"] == quote[54 + 136 : 54 + 184] and len(fields["tee_tcb_svn"]) == 16
    assert refused(quote, collateral) in ("evidence_quote", "evidence_collateral_expired")
    assert refused(quote[:-1] + b"\1", collateral) == "evidence_certification"
    assert refused(quote + b"\1", collateral) == "evidence_length"
