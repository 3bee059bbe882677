"""A handle's whole life on command lines: a real service, platform and enclave, users with key files and agents.

What each command does by itself is in test_commands.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve

import isolate
from isolate.attestation.policy import Policy, Reference
from isolate.cli import main
from isolate.client.owner import Owner
from isolate.crypto import x509
from isolate.errors import CapabilityRefused, Revoked
from isolate.launch.measure import measure
from isolate.launch.supervisor import Host
from isolate.messages.receipts import UseReceipt

OPERATIONS = """
from isolate.enclave.operations import Array, Label, Scalar, operation

@operation(inputs={"image": Array("uint8", (4,))}, output=Label(10))
def nearest(view, image):
    return int(abs(view["images"].astype(int) - image).sum(axis=1).argmin())

@operation(inputs={}, output=Scalar(0, 255, 255))
def brightest(view):
    return int(view["images"].max())

OPERATIONS = [nearest, brightest]
"""
MAIN = """
import isolate
from operations import OPERATIONS
from isolate.enclave.runtime import Server

with isolate.join() as workload:
    images = isolate.sealed.load_file(workload.locate("acme/images"), identity=workload)
    Server(workload, "acme/images", images, OPERATIONS).run()
"""


class Town:
    """One folder for everybody; the enclave serves handles on the asset acme/images."""

    def __init__(self, folder: Path, undo: contextlib.ExitStack) -> None:
        self.folder, self._undo = folder, undo
        self.service, self.enclave, platform = (
            f"unix:{folder / name}" for name in ("service", "enclave", "platform")
        )
        self.key, recovery = isolate.SigningKey.generate(), isolate.Identity.generate()
        self.key.save(folder / "owner.key")
        self.app = folder / "app"
        self.app.mkdir()
        (self.app / "main.py").write_text(MAIN)
        (self.app / "operations.py").write_text(OPERATIONS)
        (self.app / "isolate.toml").write_text(
            f'[owner]\nroot = "{self.key.verifying_key}"\nlineage = "acme"\n'
            '[enclave]\npurpose = "images"\njob = "acme/images"\nINSECURE_accept_simulated = true\n'
        )
        serve = f"serve --state state --listen {self.service} --init owner.key --passphrase-file passphrase"
        self.start(
            "serving on", "isolate", *serve.split(), "--lineage", "acme", "--recovery", str(recovery.recipient)
        )
        self.start("ready", "isolate.launch.platform", "--state", f"{folder}/platform-state", "--listen", platform)
        host = Host(platform, logs=folder)
        owner = Owner(self.key, service=self.service, lineage="acme")
        reference = Reference("images", "simulated", measure(self.app).registers)
        policy = Policy(
            lineage="acme", sequence=1, references=(reference,), INSECURE_accept_simulated=True,
            simulated_anchors=(x509.fingerprint(host.root_certificate()),),
        )  # fmt: skip
        owner.set_policy(policy)
        owner.set_rule("acme/images", readers=["images"])
        self.images = np.random.default_rng(1).integers(0, 256, (10, 4)).astype(np.uint8)
        path = folder / "acme-images.sealed"
        recipients = [owner.certificate.sealing_recipient(), recovery.recipient]
        isolate.sealed.save_file(
            {"images": self.images}, path, recipients=recipients, sign=self.key, model_id="acme/images"
        )
        owner.register(path)
        places = {"ISOLATE_SERVICE": self.service, "ISOLATE_ASSETS": str(folder), "ISOLATE_LISTEN": self.enclave}
        assert host.launch("images", self.app, places).event("serving", "failed", timeout=60)["event"] == "serving"

    def start(self, ready: str, *command: str) -> str:
        """A process that runs until the end; answers the line in which it says that it is there."""
        process = self._undo.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", *command], cwd=self.folder, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )
        )  # fmt: skip
        self._undo.callback(process.terminate)
        assert process.stdout is not None
        for line in process.stdout:
            if ready in line:
                return line
        raise AssertionError(f"{command[0]} did not start")

    def run(self, line: str, status: int = 0) -> str:
        """A command as it is typed; answers what it printed, and for a refusal the one line of it."""
        said, complained, found = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
            try:
                main(line.split())
            except SystemExit as stop:
                found = int(stop.code or 0)
        assert found == status, complained.getvalue()
        if status:
            assert len(complained.getvalue().splitlines()) == 1
        return (complained if status else said).getvalue()


@pytest.fixture
def town(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Town]:
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as undo:
        yield Town(tmp_path, undo)


@pytest.mark.slow
def test_a_handles_whole_life(town: Town) -> None:
    team, analyst = (town.run(f"keygen --signing -o {name}.key").split()[-1] for name in ("team", "analyst"))
    digests = json.loads(town.run("measure app --operations operations.py --json"))
    allowed = " ".join(f"--operation {name}={digest}" for name, digest in digests.items())
    granted = town.run(
        f"grant acme/images {allowed} --holder {team} --uses 50 --bytes-out 65536 --expires 1d --rate 60=40 "
        f"--sign owner.key --service {town.service} --lineage acme --enclave {town.enclave} --job acme/images "
        "--INSECURE-accept-simulated -o team.handle"
    ).split()[-1]
    agent = f"unix:{town.folder / 'agent'}"
    assert team in town.start("agent at", "isolate", "agent", "-i", "team.key", "--listen", agent)
    town.run(
        f"delegate team.handle --signer {agent} --holder {analyst} --operations nearest --uses 2 -o analyst.handle"
    )
    np.save(town.folder / "digit.npy", town.images[7])
    use = "invoke analyst.handle --signer analyst.key nearest image=@digit.npy"
    assert town.run(f"{use} --receipt use.receipt") == "7\n"
    assert json.loads(town.run("handle show analyst.handle --signer analyst.key --json"))["left"]["uses"] == 1
    assert town.run(f"{use} --json") == '{"operation": "nearest", "result": 7}\n'
    assert town.run(use, status=1).startswith("isolate: budget_exhausted:")
    assert town.run(use.replace("nearest image", "brightest image"), status=1).startswith(
        "isolate: scope_exceeded:"
    )

    async def together() -> list[Any]:
        signer = isolate.AgentSigner(agent)
        async with await isolate.aio.attach(town.folder / "team.handle", signer=signer) as handle:
            found = await asyncio.gather(*(handle.invoke("nearest", image=image) for image in town.images[:3]))
            # The analyst's two and these three are all charged to the team.
            assert (await handle.budget).uses == 50 - 2 - 3
            with pytest.raises(CapabilityRefused) as refused:
                await handle.invoke("nearest", image=3)
            assert refused.value.code == "bad_argument"
            town.run(f"revoke {granted} --sign owner.key --service {town.service} --lineage acme")
            with pytest.raises(Revoked):
                await handle.invoke("nearest", image=town.images[0])
            return found

    assert asyncio.run(together()) == [0, 1, 2]
    assert town.run(f"invoke team.handle --signer {agent} brightest", status=1).startswith("isolate: revoked:")
    assert town.run("handle show analyst.handle --signer analyst.key", status=1).startswith("isolate: revoked:")
    # What was used stays proved: to the analyst, to the team, and to whoever is shown the receipt.
    receipt = UseReceipt.load("use.receipt")
    number = receipt.settled.invocation
    with isolate.attach("team.handle", signer=isolate.AgentSigner(agent)) as handle:
        assert handle.receipt(number).details == receipt.details
    look = f"log verify --service {town.service} --lineage acme --owner {town.key.verifying_key}"
    index, use = receipt.settled.log_index, receipt.about
    size = use["bytes_out"]
    found = f"use.receipt: entry {index}, a use of acme/images: {size} bytes, a result\n"
    assert found in town.run(f"{look} --receipt use.receipt")
    assert json.loads(town.run(f"{look} --receipt use.receipt --json"))["receipts"] == {
        "use.receipt": {
            "entry": index, "asset": "acme/images", "handle": use["handle"].hex(),
            "invocation": number.hex(), "bytes_out": size, "code": "",
        }
    }  # fmt: skip
    # The team asks for it by its id, and the analyst once more by what there was.
    for handle, signer, what in (("team", agent, number.hex()), ("analyst", "analyst.key", "use.receipt")):
        town.run(f"handle receipt {handle}.handle {what} --signer {signer} -o {handle}.receipt")
        assert UseReceipt.load(f"{handle}.receipt").about == use
    # What was changed, or is of another service, is no proof against this one.
    evolve(receipt, salt=bytes(32)).save("false.receipt")
    told = town.run(f"{look} --remember log --receipt use.receipt --receipt false.receipt", status=1)
    assert told.startswith("isolate: log_refused: false.receipt: the receipt's entry is about something else")
    assert not Path("log").exists() and not Path("log.refused").exists()
    # And the owner reads who did what, and what was refused: the enclave's word for it is in the log too.
    owned = town.run(f"owner log --sign owner.key --service {town.service} --lineage acme --json").splitlines()
    said = [json.loads(line) for line in owned]
    refused = [one["details"] for one in said if one["kind"] == "invocation refused"]
    assert [(one["code"], one["handle"], one["count"]) for one in refused] == [("bad_argument", granted, 1)]
    assert said[index]["details"]["invocation"] == number.hex()
