"""PyTorch's own distributed tests (torch.testing._internal.distributed.distributed_test) on the backend "isolate".

    python pytorch_tests.py SIZE [NAME ...]

Says first which tests there are: {"all": [...]}. Forks SIZE ranks for each, which is run as PyTorch runs it for a
backend from outside, and prints one line of JSON: {"test", "outcome": "passed" | "skipped" | "failed" | "hangs",
"why", "seconds"}. What PyTorch skips for every backend but one, which it names, is run all the same.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import sys
import tempfile
import time
import unittest
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
LIMIT = 30.0  # seconds for one test
# These ask for the name of the backend only to know whether the model goes onto a GPU.
ON_CPU = "test_accumulate_gradients_no_sync"


def load() -> Any:
    from torch.testing._internal import common_distributed

    cases = common_distributed.DistTestCases
    # What the tests ask of a backend before they run on it.
    for feature in ("subgroup", "ddp", "plugin"):
        cases.backend_feature.setdefault(feature, set()).add("isolate")
    from torch.testing._internal.distributed import distributed_test

    class Tests(distributed_test.DistributedTest._DistTestBase, distributed_test.TestDistBackend):
        pass

    return distributed_test, Tests


def one(module: Any, tests: Any, name: str, rank: int, size: int, folder: str, ranks: Any) -> tuple[str, str]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Where a test makes the default group anew.
    module.INIT_METHOD = f"file://{folder}/again"
    if name.startswith(ON_CPU):
        module.BACKEND = "gloo"
    test = tests(name)
    test.rank, test.file_name = rank, f"{folder}/store"
    try:
        dist.init_process_group(
            "isolate", init_method=f"file://{folder}/store", rank=rank, world_size=size,
            timeout=datetime.timedelta(seconds=LIMIT / 2), pg_options=ranks.peers(rank),
        )  # fmt: skip
        getattr(test, name)()
        # PyTorch's own, through files, waits in steps of 0.1 s; but some tests end the group.
        test._barrier(timeout=LIMIT / 2) if "timeout" in name else dist.barrier()
        dist.destroy_process_group()
    except unittest.SkipTest as error:
        return "skipped", str(error)
    except SystemExit as error:
        from torch.testing._internal.common_distributed import TEST_SKIPS

        known = [skip.message for skip in TEST_SKIPS.values() if skip.exit_code == error.code]
        return ("skipped", known[0]) if known else ("failed", f"exit {error.code}")
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"[:300]
    return "passed", ""


def run(module: Any, tests: Any, name: str, size: int, ranks: Any) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEMP_DIR"] = folder
        for part in ("barrier", "test_dir", "init_dir"):
            Path(folder, part).mkdir()
        children, pipes, answers = [], [], []
        for rank in range(size):
            read, write = os.pipe()
            if not (pid := os.fork()):
                # The tests print.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                os.write(write, json.dumps(one(module, tests, name, rank, size, folder, ranks)).encode())
                os._exit(0)
            os.close(write)
            children.append(pid)
            pipes.append(read)
        deadline = time.monotonic() + LIMIT
        for read in pipes:
            ready, _, _ = select.select([read], [], [], max(deadline - time.monotonic(), 0))
            text = os.read(read, 65536) if ready else b'["hangs", ""]'
            answers.append(json.loads(text or b'["failed", "it died"]'))
            os.close(read)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for outcome in ("hangs", "failed", "skipped"):
        for answer in answers:
            if answer[0] == outcome:
                return outcome, answer[1]
    return "passed", ""


def main() -> None:
    size = int(sys.argv[1])
    os.environ.update(BACKEND="isolate", WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1")
    os.environ["TEMP_DIR"] = tempfile.gettempdir()
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401

    import isolate.torch  # noqa: F401
    from isolate.cli.bench.ranks import Ranks

    module, tests = load()
    names = sorted(name for name in dir(tests) if name.startswith("test_"))
    print(json.dumps({"all": names}), flush=True)
    for name in sys.argv[2:] or names:
        began = time.monotonic()
        outcome, why = run(module, tests, name, size, Ranks())
        seconds = round(time.monotonic() - began, 2)
        print(json.dumps({"test": name, "outcome": outcome, "why": why, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
