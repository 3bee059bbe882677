"""Ranks as processes (program.py): torch.distributed, DDP, FSDP2, and ranks that are killed or stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="the extra `torch` is not installed")

PROGRAM = Path(__file__).with_name("program.py")
TIMEOUT = 3  # seconds: of the groups whose ranks fail
AT_ONCE = 8  # of the cases that mostly wait for it


def run(size: int, timeout: float, *cases: str, at_once: int = 1) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(size), str(timeout), str(at_once), *cases],
        capture_output=True, text=True, check=False, timeout=60 + 30 * len(cases),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {one["case"]: one for one in found}


def good(case: dict[str, Any]) -> list[Any]:
    for rank in case["ranks"]:
        assert "value" in rank, rank["error"]
    return [rank["value"] for rank in case["ranks"]]


def check_failed(case: dict[str, Any], who: int) -> None:
    """Every other rank ended in time, and named the one that failed."""
    for rank, answer in enumerate(case["ranks"]):
        if rank == who:
            continue
        assert answer["type"] in ("RankFailed", "RuntimeError"), answer
        assert f"rank {who} failed" in answer["error"] and answer["rank"] in (who, None), answer
        # The limit, and the word of the others.
        assert answer["seconds"] < 3 * TIMEOUT + 6, answer


@pytest.mark.threat("DIST-5")
def test_the_interface_ddp_fsdp_and_failures_of_two_and_three_ranks() -> None:
    """One program for all of it, since starting torch takes seconds."""
    killed, stopped = "failing:all_reduce:SIGKILL:1", "failing:send_recv:SIGSTOP:2"
    found = run(3, TIMEOUT, "everything", "ddp", killed, stopped)
    assert good(found["everything"]) == ["done"] * 3
    assert max(good(found["ddp"])) < 1e-7
    check_failed(found[killed], 1)
    check_failed(found[stopped], 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_functional_collectives_ddp_and_fsdp2(size: int) -> None:
    found = run(size, 60, "everything", "functional", "ddp", "fsdp")
    good(found["everything"]), good(found["functional"])
    assert max(good(found["ddp"])) < 1e-7 and max(good(found["fsdp"])) < 1e-7


COLLECTIVES = [
    "all_reduce", "small_all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all_single", "all_to_all", "reduce", "gather", "scatter", "barrier",
    "monitored_barrier", "all_gather_object", "send_recv", "recv_anysource", "sub_group", "ddp",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.threat("DIST-5")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_every_collective_with_a_rank_killed_or_stopped(how: str) -> None:
    cases = {f"failing:{name}:{how}:{who}": who for who in (0, 1, 2) for name in COLLECTIVES}
    found = run(3, TIMEOUT, *cases, at_once=AT_ONCE)
    wrong = []
    for case, who in cases.items():
        try:
            check_failed(found[case], who)
        except AssertionError as error:
            wrong.append(f"{case}: {str(error)[:300]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_a_rank_that_sleeps_is_named_and_told() -> None:
    case = run(3, TIMEOUT, "absent:2")["absent:2"]
    assert all("rank 2 failed" in rank["error"] for rank in case["ranks"])
