"""Every piece of real evidence gets its verdict from `isolate verify`, as a user would ask for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isolate.attestation.policy import Policy, Reference, Rules
from isolate.cli import cli

VECTORS = Path(__file__).parents[1] / "vectors" / "attestation"
FIELDS = ["verified", "kind", "at", "measurements", "debug", "tcb", "not_checked", "reasons"]
MILAN, JUNE = "amd/oak_ask_milan.pem", "2026-06-01"
TDX = ["tdx/dcapqvl_tdx_quote_collateral.json"]

# file, kind, collateral, at, verified, a word of the reason (refused) or debug (verified)
VERDICTS: list[tuple[str, str, list[str], str | None, bool, Any]] = [
    ("nitro/blocky_prod_2024-09-07.b64", "nitro", [], "evidence", True, False),
    ("nitro/blocky_prod_2024-09-07.b64", "nitro", [], None, False, "not valid at the time"),
    ("nitro/blocky_debug_2024-09-07.b64", "nitro", [], "evidence", True, True),
    ("nitro/blocky_selfsigned_NEGATIVE.b64", "nitro", [], "evidence", False, "check 1"),
    ("nitro/evervault_valid.bin", "nitro", [], "evidence", True, False),
    ("nitro/evervault_debug.bin", "nitro", [], "evidence", True, True),
    ("nitro/eternis_invalid_NEGATIVE.b64", "nitro", [], "evidence", False, "signature"),
    ("nitro/cape_2022.bin", "nitro", [], "evidence", True, False),
    *(
        (
            f"snp/ms_{one}_report.bin", "sev-snp", [f"snp/ms_{one}_vcek.pem", f"snp/ms_{one}_ask.pem"],
            JUNE, True, False,
        )
        for one in ("milan", "genoa", "turin")
    ),
    ("snp/trustee_test-report.bin", "sev-snp", ["snp/trustee_test-vcek.der", MILAN], JUNE, True, False),
    *(
        (
            "snp/trustee_test-report.bin", "sev-snp", [f"snp/trustee_test-vcek-invalid-{one}.der", MILAN],
            JUNE, False, "VCEK",
        )
        for one in ("legacy", "new")
    ),
    # The VLEK ended on 2025-12-10, so that it verifies before, and is refused in June 2026.
    (
        "snp/trustee_test-vlek-report.bin", "sev-snp", ["snp/trustee_test-vlek.der", "amd/cdai_asvk_milan.der"],
        "2025-06-01", True, False,
    ),
    (
        "snp/trustee_test-vlek-report.bin", "sev-snp", ["snp/trustee_test-vlek.der", "amd/cdai_asvk_milan.der"],
        JUNE, False, "2025-12-10",
    ),
    ("snp/gosev_attestation.bin", "sev-snp", ["snp/gosev_vcek.testcer", MILAN], JUNE, True, True),
    ("snp/az_hcl-report.bin", "sev-snp", ["snp/az_vcek.pem"], None, False, "HCL"),
    ("tdx/dcapqvl_tdx_quote", "tdx", TDX, "2025-06-20", True, False),
    ("tdx/dcapqvl_tdx_quote", "tdx", TDX, None, False, "expired"),
    ("tdx/trustee_tdx_quote_4.dat", "tdx", TDX, "2025-06-20", False, "debug TD"),
    ("tdx/dcapqvl_sgx_quote", "tdx", ["tdx/dcapqvl_sgx_quote_collateral.json"], None, False, "SGX"),
    ("nvidia/hopper_evidence.json", "nvidia-gpu", [], JUNE, True, False),
    ("nvidia/hopper_evidence_cert_hold.json", "nvidia-gpu", [], JUNE, True, False),
    ("nvidia/hopperAttestationReport.txt", "nvidia-gpu", ["nvidia/hopperCertChain.txt"], JUNE, True, False),
    ("nvidia/blackwellAttestationReport.txt", "nvidia-gpu", ["nvidia/blackwellCertChain.txt"], JUNE, True, False),
    (
        "nvidia/hopperAttestationReportInvalidSignature.txt", "nvidia-gpu", ["nvidia/hopperCertChain.txt"],
        JUNE, False, "signature",
    ),
    ("nvidia/hopperClaimsv3_detached_eat.json", "nvidia-gpu", [], JUNE, False, "no evidence"),
]  # fmt: skip


def run(*words: str) -> tuple[int, str]:
    outcome = CliRunner().invoke(cli, ["verify", *words])
    return outcome.exit_code, outcome.stdout


def ask(file: str, kind: str, collateral: list[str], at: str | None, *more: str) -> tuple[int, dict[str, Any]]:
    words = [str(VECTORS / file), "--kind", kind, "--json", *more]
    for one in collateral:
        words += ["--collateral", str(VECTORS / one)]
    status, output = run(*words, *(["--at", at] if at else []))
    return status, json.loads(output)


@pytest.mark.parametrize(("file", "kind", "collateral", "at", "verified", "detail"), VERDICTS)
def test_verdicts(file: str, kind: str, collateral: list[str], at: str | None, verified: bool, detail: Any) -> None:
    if kind == "tdx":
        pytest.importorskip("dcap_qvl", reason="the extra `tdx` is not installed")
    status, body = ask(file, kind, collateral, at)
    assert list(body) == FIELDS and body["kind"] == kind
    assert (status, body["verified"]) == (0 if verified else 1, verified), body["reasons"]
    if verified:
        assert body["debug"] is detail and body["measurements"] and body["not_checked"]
        assert body["reasons"] == ["authentic, not appraised: no policy was given"]
    else:
        assert detail in " ".join(body["reasons"]) and body["measurements"] == {} and body["debug"] is None


def test_every_fixture_has_a_verdict() -> None:
    """A file that is added without one is seen."""
    evidence = {
        str(file.relative_to(VECTORS))
        for folder in ("nitro", "snp", "tdx", "nvidia")
        for file in (VECTORS / folder).iterdir()
        if "vcek" not in file.name and "vlek.der" not in file.name and "_ask" not in file.name
        and "collateral" not in file.name and "CertChain" not in file.name
    }  # fmt: skip
    elsewhere = {"tdx/dcapqvl_tdx_quote_outdated", "nvidia/hopperAttestationReportExpired.txt"}
    assert evidence - elsewhere == {one[0] for one in VERDICTS}


def policy(tmp_path: Path, rules: Rules, registers: dict[str, bytes], kind: str) -> str:
    path = tmp_path / "policy.toml"
    reference = Reference("r", kind, registers)
    path.write_text(Policy(lineage="x", sequence=1, references=(reference,), rules={kind: rules}).to_toml())
    return str(path)


@pytest.mark.threat("ATT-8")
@pytest.mark.parametrize(
    ("file", "kind", "collateral", "at"),
    [
        ("nitro/blocky_debug_2024-09-07.b64", "nitro", [], "evidence"),
        ("nitro/evervault_debug.bin", "nitro", [], "evidence"),
        ("snp/gosev_attestation.bin", "sev-snp", ["snp/gosev_vcek.testcer", MILAN], JUNE),
    ],
)
def test_debug_evidence_is_denied_by_a_default_policy(
    tmp_path: Path, file: str, kind: str, collateral: list[str], at: str
) -> None:
    """Even one that names its measurement."""
    _, body = ask(file, kind, collateral, at)
    registers = {name: bytes.fromhex(value) for name, value in body["measurements"].items()}
    default = policy(tmp_path, Rules(allow_smt=True), registers, kind)
    status, denied = ask(file, kind, collateral, at, "--policy", default)
    assert status == 1 and not denied["verified"] and denied["debug"]
    assert len(denied["reasons"]) == 1 and "debug" in denied["reasons"][0]
    allowing = policy(tmp_path, Rules(allow_debug=True, allow_smt=True), registers, kind)
    status, admitted = ask(file, kind, collateral, at, "--policy", allowing)
    assert status == 0 and admitted["verified"] and "admitted by policy x" in admitted["reasons"][0]
    assert any("runtime map" in one for one in admitted["not_checked"])


def test_a_policy_of_nothing_denies(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text(Policy(lineage="x", sequence=1).to_toml())
    status, body = ask("nitro/evervault_valid.bin", "nitro", [], "evidence", "--policy", str(path))
    assert status == 1 and "measurement" in body["reasons"][0] and body["measurements"]


def test_words_for_people() -> None:
    real = str(VECTORS / "nitro/evervault_valid.bin")
    status, output = run(real, "--kind", "nitro", "--at", "evidence")
    assert status == 0 and output.startswith("authentic, not appraised") and "not checked: " in output


def test_the_same_evidence_in_binary_base64_and_hex(tmp_path: Path) -> None:
    import base64

    raw = (VECTORS / "nitro/evervault_valid.bin").read_bytes()
    lines = base64.encodebytes(raw)
    for name, data in (
        ("hex", raw.hex().encode()), ("HEX", b"0x" + raw.hex().upper().encode() + b"\n"), ("b64", lines),
        ("url", base64.urlsafe_b64encode(raw).rstrip(b"=")), ("bin", raw),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        status, output = run(str(tmp_path / name), "--kind", "nitro", "--at", "evidence", "--json")
        assert status == 0 and json.loads(output)["at"] == "2022-10-13T08:58:02Z"


def test_times(tmp_path: Path) -> None:
    real = str(VECTORS / "nitro/evervault_valid.bin")
    for at in ("2022-10-13T09:00:00Z", "2022-10-13T11:00:00+02:00", "2022-10-13 09:00:00", "1665651600"):
        assert run(real, "--kind", "nitro", "--at", at)[0] == 0
    assert run(real, "--kind", "nitro", "--at", "2022-10-14")[0] == 1


@pytest.mark.parametrize(
    "words",
    [
        [], ["--kind", "nitro", "--at", "yesterday"], ["--kind", "nitro", "--at", "99999999999999"],
        ["--kind", "sgx"],
        ["--kind", "sev-snp", "--at", "evidence"], ["--kind", "nitro", "--collateral", "/none"],
        ["--kind", "nitro", *["--collateral", str(VECTORS / MILAN)] * 17],
    ],
    ids=lambda words: " ".join(words)[:40],
)  # fmt: skip
def test_used_wrongly(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from isolate.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["verify", str(VECTORS / "nitro/evervault_valid.bin"), *words])
    assert stop.value.code == 2


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from isolate.cli import main

    (tmp_path / "empty").touch()
    (tmp_path / "large").write_bytes(bytes(300_000))
    (tmp_path / "policy").write_text("no policy")
    real = str(VECTORS / "nitro/evervault_valid.bin")
    for words in (
        [str(tmp_path / "empty"), "--kind", "nitro"],
        [str(tmp_path / "large"), "--kind", "nitro"],
        [str(tmp_path / "empty"), "--kind", "nitro", "--at", "evidence"],
        [real, "--kind", "nitro", "--policy", str(tmp_path / "policy")],
        [real, "--kind", "simulated"],
        [real, "--kind", "nitro"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(["verify", *words])
        captured = capsys.readouterr()
        assert stop.value.code == 1 and captured.out == "" and len(captured.err.splitlines()) == 1
        assert captured.err.startswith("isolate: ")


def test_the_vectors_are_those_of_their_provenance() -> None:
    rows = [line.split(" | ") for line in (VECTORS / "README.md").read_text(encoding="utf-8").splitlines()]
    listed = {row[0]: (int(row[4]), row[5]) for row in rows if len(row) == 7 and row[4].isdecimal()}
    found = {str(file.relative_to(VECTORS)): file.read_bytes() for file in VECTORS.glob("*/*")}
    assert {name: (len(data), hashlib.sha256(data).hexdigest()[:16]) for name, data in found.items()} == listed
