"""The training service as a reader runs it, and what it refuses. All of it needs torch."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed: the extra 'torch'"),
]

TRUSTED = {
    "__main__", "__mp_main__", "_cffi_backend", "_openssl", "_sodium", "attr", "attrs", "blake3", "cbor2", "_cbor2",
    "cffi", "cryptography", "isolate", "jwt", "nacl", "numpy", "functorch", "mpmath", "sympy", "torch", "torchgen",
    "typing_extensions", "_remote_module_non_scriptable",
}  # fmt: skip

# In place of the training: join, meet, add up, and say how it went, by code where it went wrong.
MEET = """
from datetime import timedelta
import isolate
with isolate.join() as workload:
    rank = workload.slot.rank
    workload.report("attested", rank=rank, generation=workload.slot.generation)
    import torch, torch.distributed as dist
    import isolate.torch
    try:
        dist.init_process_group("isolate", pg_options=workload, timeout=timedelta(seconds=30))
        total = torch.full((4,), float(rank + 1))
        dist.all_reduce(total)
        # Row by row, through a worker that has the keys released to it.
        data = isolate.torch.SealedDataset(workload.locate("digits/train"), identity=workload)
        batches = isolate.torch.SealedDataLoader(data, batch_size=500, num_workers=1)
        read = [int(digit) for batch in batches for digit in batch["digits"]]
        import sys
        tops = sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
        workload.report("added", rank=rank, total=total[0].item(), rows=len(read), sum=sum(read), modules=tops)
        dist.destroy_process_group()
    except isolate.errors.IsolateError as error:
        workload.report("refused", rank=rank, code=error.code, text=str(error))
"""
# No torch inside: rank 1 is killed the first time, while rank 0 waits for it.
ELASTIC = """
import os, time
import isolate
with isolate.join() as workload:
    slot, restarts = workload.slot, os.environ["TORCHELASTIC_RESTART_COUNT"]
    told = {"instance": workload.result.instance.hex(), "restarts": restarts, "pid": os.getpid()}
    workload.report("here", rank=slot.rank, generation=slot.generation, **told)
    if restarts == "0":
        time.sleep(60)
"""


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    sys.path.insert(0, str(EXAMPLES))
    yield load("training_service")
    sys.path.remove(str(EXAMPLES))
    for name in ("stage", "training", "training_service"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def stage(example: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One owner and one platform for all of it: torch is copied, measured and compiled once."""
    with example.owner(tmp_path_factory.mktemp("service")) as stage:
        yield stage


def admit(stage: Any, *, sequence: int, **apps: Path) -> None:
    """The owner's policy from now on."""
    from isolate.attestation.policy import Policy, Reference
    from isolate.crypto import x509
    from isolate.launch.measure import measure

    policy = Policy(
        lineage="digits",
        sequence=sequence,
        references=tuple(Reference(name, "simulated", measure(app).registers) for name, app in apps.items()),
        simulated_anchors=(x509.fingerprint(stage.host.root_certificate()),),
        INSECURE_accept_simulated=True,
    )
    stage.owner.set_policy(policy)


@pytest.fixture(scope="module")
def apps(stage: Any) -> dict[str, Path]:
    """Two more programs that the owner admits; the second is of another job."""
    apps = {name: stage.folder / f"app-{name}" for name in ("meet", "other")}
    for folder in apps.values():
        shutil.copytree(stage.app, folder)
        (folder / "main.py").write_text(MEET)
    configuration = apps["other"] / "isolate.toml"
    configuration.write_text(configuration.read_text().replace('job = "digits/', 'job = "digits/other-'))
    admit(stage, sequence=2, **apps)
    stage.owner.set_rule("digits/train", readers=list(apps))
    return apps


def free_port() -> int:
    """One that the kernel gives to nobody by itself: rank 0 takes it seconds later, and much runs meanwhile."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def run(example: Any, stage: Any, *apps: Path) -> list[dict[str, Any]]:
    """A worker of each, started as torchrun does; the operator chooses what a rank runs. All that they say."""
    port = str(free_port())
    told = {"WORLD_SIZE": str(len(apps)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    jobs = [
        example.Job(stage, example.launch(stage, app), **told, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, app in enumerate(apps)
    ]
    for job in jobs:
        job.end()
    return [event for job in jobs for event in job.seen]


def test_the_story_of_torch_training_is_as_it_promises(
    example: Any, stage: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    example.story(stage, tmp_path / "plain")
    said = capfd.readouterr().out
    # torchrun may end rank 0 before it has said by whom the group was ended.
    assert re.search(
        r"rank 1 was killed after epoch \d: torchrun ended with status 1(, .* by rank 1)?$", said, re.M
    )
    assert re.search(r"four workers went on from the sealed checkpoint of epoch [2-7], to the end: status 0", said)
    assert "rank and generation: 0/2, 1/2, 2/1, 3/1" in said
    right = re.search(r"the owner opened the model: ([\d.]+)% of 360", said)
    assert right and float(right[1]) > 90
    close = re.search(r"each epoch's loss within (\S+), each weight within (\S+)", said)
    assert close and float(close[1]) < 1e-6 and float(close[2]) < 1e-5
    assert re.search(r"the operator has \d+ files: 0 with a row", said)
    assert re.search(r"a plain run has \d+ files: [1-9]\d* with a row", said)


@pytest.mark.threat("LAUNCH-5")
def test_a_changed_torch_script_gets_no_rank(example: Any, stage: Any, apps: dict[str, Path]) -> None:
    changed = stage.folder / "app-changed"
    shutil.copytree(apps["meet"], changed)
    with (changed / "main.py").open("a") as file:
        file.write("# one line more\n")
    (said,) = run(example, stage, changed)
    assert (said["event"], said["code"]) == ("failed", "appraisal_measurement")
    assert "PCR2" in said["message"]


@pytest.mark.threat("LAUNCH-6")
def test_a_torch_worker_of_another_job_takes_no_rank_of_this_one(
    example: Any, stage: Any, apps: dict[str, Path]
) -> None:
    seen = run(example, stage, apps["meet"], apps["meet"])
    assert [one["total"] for one in seen if one["event"] == "added"] == [3.0, 3.0]
    digits = example.digits()[0]["digits"]
    assert {(one["rows"], one["sum"]) for one in seen if one["event"] == "added"} == {(1437, int(digits.sum()))}
    # The trusted base of a worker is that of any enclave, and torch with what it loads.
    loaded = {name for one in seen if one["event"] == "added" for name in one["modules"]}
    assert {name for name in loaded if not name.startswith(("_cython", "cython_runtime", "_sysconfig"))} <= TRUSTED
    # Attested, of the same owner, asking for the rank that is missing; and of another job.
    seen = run(example, stage, apps["meet"], apps["other"])
    assert [one["rank"] for one in seen if one["event"] == "attested"] == [0, 1]
    assert not [one for one in seen if one["event"] == "added"]
    refused = {one["rank"]: one for one in seen if one["event"] == "refused"}
    assert refused[0]["code"] == "wrong_terms"
    assert "rank 1 failed" in refused[0]["text"]
    assert "rank 0 failed" in refused[1]["text"]


def test_torch_elastic_starts_a_failed_worker_again_in_the_next_generation(example: Any, stage: Any) -> None:
    app = stage.folder / "app-elastic"
    shutil.copytree(stage.app, app)
    (app / "main.py").write_text(ELASTIC)
    admit(stage, sequence=3, elastic=app)
    options = ("--max-restarts=1", "--no-python")
    job = example.Job(stage, example.torchrun(2, *options, *example.launch(stage, app)))
    first = {one["rank"]: one["pid"] for one in (job.until("here"), job.until("here"))}
    os.kill(first[1], signal.SIGKILL)
    assert job.end() == 0
    here = {(one["rank"], one["restarts"]): one["generation"] for one in job.seen if one["event"] == "here"}
    assert set(here) == {(0, "0"), (0, "1"), (1, "0"), (1, "1")}
    assert all(here[rank, "1"] == here[rank, "0"] + 1 for rank in (0, 1))
    assert len({one["instance"] for one in job.seen}) == 4


@pytest.mark.threat("LAUNCH-8")
def test_a_tap_between_two_hosts_finds_nothing_of_torch_training(example: Any, tmp_path: Path) -> None:
    hosts = load("training_hosts")
    if reason := hosts.why_not():
        pytest.skip(reason)
    (tmp_path / "operator").mkdir()
    seen = hosts.main(tmp_path)
    plain, sealed = seen["plainly"], seen["as enclaves"]
    assert (plain["status"], sealed["status"]) == ([0, 0], [0, 0])
    # The tap works: what a plain run sends is in it, and as much was sent the other time.
    assert all(plain[what] > 100 for what in ("data", "weights", "gradients"))
    assert sealed["bytes"] > plain["bytes"] / 2
    assert [sealed[what] for what in ("data", "weights", "gradients")] == [0, 0, 0]


@pytest.mark.threat("LAUNCH-7")
def test_an_unattested_process_does_not_join_a_torch_group() -> None:
    code = """
import json, torch.distributed as dist, isolate.torch
from isolate.errors import ControlMissing
try:
    dist.init_process_group("isolate", store=dist.HashStore(), rank=0, world_size=1)
except ControlMissing as error:
    print(json.dumps([error.code, str(error)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    with contextlib.suppress(ValueError):
        said = json.loads(done.stdout)
        assert said[0] == "control_missing"
        assert "isolate launch" in said[1]
        return
    pytest.fail(done.stdout + done.stderr)
