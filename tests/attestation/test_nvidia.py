"""NVIDIA reports: chain, signature, nonce, and every byte accounted for."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest

from isolate.attestation.verifiers.nvidia import verify
from isolate.crypto import x509
from isolate.errors import EvidenceRefused

JUNE = 1_780_272_000
Read = Callable[[str], bytes]


def refused(evidence: bytes, collateral: Any = (), at: int = JUNE, **changes: Any) -> str:
    with pytest.raises(EvidenceRefused) as error:
        verify(evidence, at=at, collateral=collateral, **changes)
    return error.value.code


def parts(read: Read) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(read("nvidia/hopper_evidence.json"))[0]
    return value


def wrap(value: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps([value | changes]).encode()


def report(value: dict[str, Any], change: Callable[[bytes], bytes]) -> dict[str, str]:
    return {"evidence": base64.b64encode(change(base64.b64decode(value["evidence"]))).decode()}


@pytest.mark.parametrize("name", ["hopper_evidence", "hopper_evidence_cert_hold"])
def test_real_evidence(vector: Read, name: str) -> None:
    evidence = vector(f"nvidia/{name}.json")
    claims = verify(evidence, at=JUNE)
    assert (claims.kind, claims.tier, claims.product) == ("nvidia-gpu", "hardware", "GH100")
    assert claims.binding.hex() == json.loads(evidence)[0]["nonce"]
    assert len(claims.measurements) == 64 and {len(one) for one in claims.measurements.values()} == {48}
    assert any("firmware" in one for one in claims.not_checked) and any("OCSP" in one for one in claims.not_checked)
    assert verify(json.dumps(json.loads(evidence)[0]).encode(), at=JUNE).binding == claims.binding


@pytest.mark.parametrize(
    ("name", "chain", "product"),
    [
        ("hopperAttestationReport", "hopperCertChain", "GH100"),
        ("hopperAttestationReportExpired", "hopperCertChainExpired", "GH100"),
        ("blackwellAttestationReport", "blackwellCertChain", "GB100"),
    ],
)
def test_bare_reports_with_their_chain(vector: Read, name: str, chain: str, product: str) -> None:
    raw = bytes.fromhex(vector(f"nvidia/{name}.txt").decode())
    claims = verify(raw, at=JUNE, collateral=[vector(f"nvidia/{chain}.txt")])
    assert claims.product == product and claims.binding == raw[4:36]
    assert ("fwid" in claims.signers) != any("states none" in one for one in claims.not_checked)


def test_a_bad_signature_of_the_vendor_s_own(vector: Read) -> None:
    raw = bytes.fromhex(vector("nvidia/hopperAttestationReportInvalidSignature.txt").decode())
    assert refused(raw, [vector("nvidia/hopperCertChain.txt")]) == "evidence_signature"


def test_1_form(vector: Read) -> None:
    value = parts(vector)
    for odd in (
        b"[]", b"{}", b"null", b"[1]", b"junk", b"\xff", b"[" * 50_000, vector("nvidia/hopper_evidence.json")[:-2],
        json.dumps([value, value]).encode(), wrap(value, evidence="*"), wrap(value, certificate="*"),
        wrap(value, nonce=7), wrap(value, certificate=""), wrap(value, evidence=value["evidence"] + "\n"),
        vector("nvidia/hopperClaimsv3_detached_eat.json"),
    ):  # fmt: skip
        assert refused(odd) == "evidence_form"
    assert refused(base64.b64decode(value["evidence"])) == "evidence_form"


@pytest.mark.threat("ATT-21")
def test_2_every_byte_of_a_report_is_accounted_for(vector: Read) -> None:
    value = parts(vector)
    changes: list[Callable[[bytes], bytes]] = [
        lambda r: r + b"\0", lambda r: r[:-1], lambda r: r[:40], lambda r: b"", lambda r: b"\x12" + r[1:],
        lambda r: r[:37] + b"\x12" + r[38:], lambda r: r[:41] + b"\x3f" + r[42:],
        lambda r: r[:46] + b"\x02" + r[47:], lambda r: r[:45] + r[100:101] + r[46:],
    ]  # fmt: skip
    for change in changes:
        assert refused(wrap(value, **report(value, change))) == "evidence_report"


@pytest.mark.threat("ATT-3")
def test_3_anchor(vector: Read) -> None:
    value = parts(vector)
    assert refused(wrap(value), anchors=[]) == "evidence_anchor"
    chain = x509.load(base64.b64decode(value["certificate"]))
    cut = base64.b64encode(b"".join(x509.pem(x509.der(one)) for one in chain[:-1])).decode()
    assert refused(wrap(value, certificate=cut)) == "evidence_anchor"
    key = x509.P384Key.generate()
    own = key.self_signed("NVIDIA Device Identity CA", not_before=0, not_after=2**32)
    leaf = key.issue(own, "GH100 x", key, not_before=0, not_after=2**32)
    theirs = base64.b64encode(x509.pem(leaf) + x509.pem(own)).decode()
    assert refused(wrap(value, certificate=theirs)) == "evidence_anchor"


def test_4_chain(vector: Read) -> None:
    value = parts(vector)
    assert refused(wrap(value), at=1_500_000_000) == "evidence_chain"
    chain = [x509.pem(x509.der(one)) for one in x509.load(base64.b64decode(value["certificate"]))]
    for odd in (chain[1:], [chain[0], *chain[2:]], [chain[1], chain[0], *chain[2:]], [chain[0], chain[-1]]):
        text = base64.b64encode(b"".join(odd)).decode()
        assert refused(wrap(value, certificate=text)) in ("evidence_chain", "evidence_signature")
    assert refused(wrap(value, certificate=base64.b64encode(b"".join([chain[0], *chain[2:]])).decode())) == (
        "evidence_chain"
    )


@pytest.mark.threat("ATT-18")
def test_5_signature(vector: Read) -> None:
    value = parts(vector)
    changes: list[Callable[[bytes], bytes]] = [
        lambda r: r[:-96] + bytes(96), lambda r: r[:60] + bytes([r[60] ^ 1]) + r[61:],
        lambda r: r[:4] + b"\0" * 32 + r[36:], lambda r: r[:36] + b"\1" + r[37:],
    ]  # fmt: skip
    for change in changes:
        assert refused(wrap(value, **report(value, change))) == "evidence_signature"


@pytest.mark.threat("ATT-22")
def test_6_the_wrapper_states_another_nonce_or_architecture(vector: Read) -> None:
    value = parts(vector)
    for change in ({"nonce": "00" * 32}, {"nonce": ""}, {"arch": "BLACKWELL"}, {"arch": "VOLTA"}):
        assert refused(wrap(value, **change)) == "evidence_nonce"
    assert verify(wrap(value, nonce=value["nonce"].upper()), at=JUNE).product == "GH100"


def test_7_firmware_id(vector: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    """No real pair disagrees, so the certificate is made to state another one."""
    real = x509.extension

    def other(certificate: Any, oid: str) -> bytes | None:
        value = real(certificate, oid)
        return None if value is None else bytes(len(value))

    monkeypatch.setattr(x509, "extension", other)
    assert refused(wrap(parts(vector))) == "evidence_firmware_id"


@pytest.mark.threat("ATT-19")
def test_flipped_bytes_of_a_report_are_refused(vector: Read) -> None:
    value = parts(vector)
    for position in range(0, len(base64.b64decode(value["evidence"])), 29):
        changed = report(value, lambda r, at=position: r[:at] + bytes([r[at] ^ 1 << at % 8]) + r[at + 1 :])
        assert refused(wrap(value, **changed)).startswith("evidence_"), position
