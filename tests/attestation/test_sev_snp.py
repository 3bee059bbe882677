"""SEV-SNP reports: real ones of three products, and every disagreement between report and certificate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import __version__ as cryptography_version
from cryptography import x509 as foreign

from isolate.attestation.verifiers.sev_snp import verify
from isolate.crypto import x509
from isolate.errors import EvidenceRefused

JUNE = 1_780_272_000  # 2026-06-01
Read = Callable[[str], bytes]


def pieces(read: Read, product: str) -> tuple[bytes, list[bytes]]:
    return read(f"snp/ms_{product}_report.bin"), [read(f"snp/ms_{product}_{kind}.pem") for kind in ("vcek", "ask")]


def refused(report: bytes, collateral: list[bytes], at: int = JUNE, **changes: Any) -> str:
    with pytest.raises(EvidenceRefused) as error:
        verify(report, at=at, collateral=collateral, **changes)
    return error.value.code


def put(report: bytes, offset: int, value: bytes) -> bytes:
    return report[:offset] + value + report[offset + len(value) :]


@pytest.mark.parametrize(
    ("product", "version", "tcb"),
    [
        ("milan", 3, {"bootloader": 4, "tee": 0, "snp": 24, "microcode": 219}),
        ("genoa", 3, {"bootloader": 10, "tee": 0, "snp": 23, "microcode": 84}),
        ("turin", 5, {"fmc": 1, "bootloader": 1, "tee": 1, "snp": 4, "microcode": 81}),
    ],
)
def test_real_reports(vector: Read, product: str, version: int, tcb: dict[str, int]) -> None:
    report, collateral = pieces(vector, product)
    claims = verify(report, at=JUNE, collateral=collateral)
    assert claims.product == product.title() and dict(claims.tcb) == tcb | {
        "report_version": version,
        "guest_svn": 2,
    }
    assert claims.measurements["MEASUREMENT"] == report[0x90:0xC0] and claims.binding == report[0x50:0x90]
    assert len(claims.platform) == (8 if product == "turin" else 64)
    assert (claims.debug, claims.smt, claims.migration, claims.vmpl, claims.svn) == (False, True, False, 0, 2)
    assert claims.host_data == report[0xC0:0xE0] and "id_key" in claims.signers
    # In one file, in the other order, with the ARK beside them, in DER: the same.
    ark = x509.pem(x509.der(x509.load(vector("snp/az_vcek.pem"))[2]))
    der = x509.der(x509.load(collateral[0])[0])
    for other in ([collateral[1] + collateral[0]], [*reversed(collateral), ark], [der, collateral[1]]):
        assert verify(report, at=JUNE, collateral=other).tcb == claims.tcb


def test_a_vlek_names_its_provider_and_no_chip(vector: Read) -> None:
    report = vector("snp/trustee_test-vlek-report.bin")
    collateral = [vector("snp/trustee_test-vlek.der"), vector("amd/cdai_asvk_milan.der")]
    claims = verify(report, at=1_748_736_000, collateral=collateral)  # 2025-06-01
    assert claims.platform == b"CN=cc-us-east-2.amazonaws.com" and claims.vmpl == 1
    # The certificate ended on 2025-12-10: at a later time nothing says that the key is still the provider's.
    assert refused(report, collateral) == "evidence_chain"
    assert refused(report, [collateral[0], vector("amd/oak_ask_milan.pem")], 1_748_736_000) == "evidence_issuer"


@pytest.mark.threat("ATT-8")
def test_debug_is_read_from_the_guest_policy(vector: Read) -> None:
    collateral = [vector("snp/gosev_vcek.testcer"), vector("amd/oak_ask_milan.pem")]
    claims = verify(vector("snp/gosev_attestation.bin"), at=JUNE, collateral=collateral)
    assert claims.debug and claims.smt


def test_1_form(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    for odd in (report[:-1], report + b"\0", report[1:], bytes(32) + report, report * 2):
        assert refused(odd, collateral) == "evidence_form"


@pytest.mark.threat("ATT-20")
def test_1_an_azure_container_is_refused(vector: Read) -> None:
    with pytest.raises(EvidenceRefused, match="HCL"):
        verify(vector("snp/az_hcl-report.bin"), at=JUNE, collateral=[vector("snp/az_vcek.pem")])


def test_2_version_and_algorithm(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    for version in (0, 1, 6, 2**32 - 1):
        assert refused(put(report, 0, version.to_bytes(4, "little")), collateral) == "evidence_version"
    for algorithm in (0, 2):
        assert refused(put(report, 0x34, algorithm.to_bytes(4, "little")), collateral) == "evidence_version"
    for version in (2, 4, 5):  # known, and then not what was signed
        assert refused(put(report, 0, version.to_bytes(4, "little")), collateral) == "evidence_signature"


@pytest.mark.threat("ATT-21")
def test_3_what_the_signature_does_not_cover_is_zero(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    spans = (*range(0x2A0 + 48, 0x2E8), *range(0x2E8 + 48, 0x330), *range(0x330, 0x4A0))
    for offset in spans:
        assert refused(put(report, offset, b"\x01"), collateral) == "evidence_unsigned"


def test_4_key_and_issuer(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    assert refused(report, []) == "evidence_key"
    assert refused(report, [collateral[1]]) == "evidence_key"
    assert refused(report, [b"junk"]) == "evidence_key"
    assert refused(report, [*collateral, vector("snp/trustee_test-vcek.der")]) == "evidence_key"
    assert refused(report, [collateral[0]]) == "evidence_issuer"
    assert refused(report, [collateral[0], vector("amd/oak_ask_genoa.pem")]) == "evidence_issuer"
    vlek = put(report, 0x48, (1 << 2).to_bytes(4, "little"))
    assert refused(vlek, collateral) == "evidence_key"
    # A report signed by no key, shown with the certificate of a provider.
    provider = [vector("snp/trustee_test-vlek.der"), vector("amd/cdai_asvk_milan.der")]
    none = put(vector("snp/trustee_test-vlek-report.bin"), 0x48, (7 << 2).to_bytes(4, "little"))
    assert refused(none, provider, 1_748_736_000) == "evidence_key"


@pytest.mark.threat("ATT-3")
def test_5_anchor(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    genoa = bytes.fromhex("4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1")
    assert refused(report, collateral, anchors=[]) == "evidence_anchor"
    assert refused(report, collateral, anchors=[genoa]) == "evidence_anchor"


def test_6_chain(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    assert refused(report, collateral, at=1_600_000_000) == "evidence_chain"
    assert refused(report, collateral, at=2_000_000_000) == "evidence_chain"


def test_7_product(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    for cpuid in (b"\x19\x11", b"\x1a\x02", b"\x00\x00"):
        assert refused(put(report, 0x188, cpuid), collateral) == "evidence_product"


@pytest.mark.threat("ATT-22")
def test_8_certificate_and_report_disagree_on_the_tcb(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    for index in range(8):
        changed = put(report, 0x180 + index, bytes([report[0x180 + index] ^ 1]))
        assert refused(changed, collateral) == "evidence_tcb"
    report, collateral = pieces(vector, "turin")
    for index in range(8):
        changed = put(report, 0x180 + index, bytes([report[0x180 + index] ^ 1]))
        assert refused(changed, collateral) == "evidence_tcb"


@pytest.mark.threat("ATT-22")
def test_9_certificate_and_report_disagree_on_the_chip(vector: Read) -> None:
    """Two machines with the same versions: the VCEK of one, the report of the other."""
    report = vector("snp/trustee_test-report.bin")
    assert refused(report, [vector("snp/az_vcek.pem")]) == "evidence_chip"
    good = [vector("snp/trustee_test-vcek.der"), vector("amd/oak_ask_milan.pem")]
    assert verify(report, at=JUNE, collateral=good).product == "Milan"
    assert refused(put(report, 0x1A0, bytes(64)), good) == "evidence_chip"
    turin, collateral = pieces(vector, "turin")
    assert refused(put(turin, 0x1A8, b"\1"), collateral) == "evidence_chip"


@pytest.mark.parametrize("name", ["legacy", "new"])
def test_forged_certificates_are_refused(vector: Read, name: str) -> None:
    collateral = [vector(f"snp/trustee_test-vcek-invalid-{name}.der"), vector("amd/oak_ask_milan.pem")]
    assert refused(vector("snp/trustee_test-report.bin"), collateral) == "evidence_issuer"


@pytest.mark.threat("ATT-18")
def test_10_signature(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    assert refused(put(report, 0x2A0, bytes(48)), collateral) == "evidence_signature"
    assert refused(put(report, 0x2E8, bytes(48)), collateral) == "evidence_signature"
    assert refused(put(report, 0x2A0, bytes(0x90)), collateral) == "evidence_signature"
    assert refused(put(report, 0x50, b"\1" * 64), collateral) == "evidence_signature"


def _flips(read: Read, positions: range) -> None:
    report, collateral = pieces(read, "milan")
    for position in positions:
        flipped = put(report, position, bytes([report[position] ^ 1 << position % 8]))
        assert refused(flipped, collateral).startswith("evidence_"), position


@pytest.mark.threat("ATT-19")
def test_flipped_bytes_are_refused(vector: Read) -> None:
    _flips(vector, range(0, 1184, 7))


@pytest.mark.slow
@pytest.mark.threat("ATT-19")
def test_every_flipped_byte_is_refused(vector: Read) -> None:
    _flips(vector, range(1184))


def test_every_truncation_is_refused(vector: Read) -> None:
    report, collateral = pieces(vector, "milan")
    for size in range(1, 1184):
        assert refused(report[:size], collateral) == "evidence_form"


def test_the_serial_number_zero_of_a_vcek_is_known(vector: Read) -> None:
    """AMD breaks RFC 5280 here. The day the parser refuses it, this test says so, and not a customer."""
    assert int(cryptography_version.split(".")[0]) >= 49
    pem = vector("snp/ms_milan_vcek.pem")
    with pytest.warns(Warning, match="Parsed a serial number"):
        foreign.load_pem_x509_certificate(pem)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert x509.subject(x509.load(pem)[0]) == "SEV-VCEK"
