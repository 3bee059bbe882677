"""Training on somebody else's machines: torchrun, DDP and FSDP2 as they are, and one line for the network:
dist.init_process_group("isolate").

The owner seals real data, which the workers read row by row. torchrun starts two of them, each a measured enclave
with a slot of its own; one is killed; four go on from the sealed checkpoint, the model now shared among them. The
owner opens what came of it, and compares it with the same program run plainly.

Run it: python examples/training_service.py     (needs the extra "torch"; about a minute)
Mode: workload. The platform is simulated. Several hosts, and what is on the wire: examples/training_hosts.py.
"""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from stage import Stage

HERE = Path(__file__).parent
APP = HERE / "training_service_app"
DATA, MODEL, NAME = "digits/train", "digits/model", "trainer"
HELD_OUT = 360


def digits():
    """Rows to train on, and rows to test with."""
    with gzip.open(HERE / "data" / "digits.csv.gz", "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    rows = rows[np.random.default_rng(5).permutation(len(rows))]
    return [
        {"pixels": part[:, :64].copy(), "digits": part[:, 64].copy()} for part in (rows[HELD_OUT:], rows[:HELD_OUT])
    ]


# The owner ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def owner(folder):
    """Owner's service and operator's platform; the policy names the program, and the data is sealed."""
    with Stage(folder, "digits", NAME) as stage:
        stage.app = stage.application(APP, parameters='needs = ["torch"]\n')  # then torch is measured with it
        stage.admit(stage.app, DATA)
        stage.owner.set_rule(MODEL, readers=[NAME], writers=[NAME])
        stage.seal(DATA, digits()[0])
        yield stage


def opened(stage):
    """The checkpoint that is in force, by the service's word, opened with the owner's offline key."""
    from isolate.torch.checkpoint import SealedStorageReader

    newest = stage.owner.newest(MODEL)
    return loaded(SealedStorageReader(stage.folder / "digits-model", identity=stage.recovery, expect=newest.digest))


def loaded(reader):
    import torch.distributed.checkpoint as dcp

    training = program()
    state = {
        "model": training.model().state_dict(),
        "losses": training.torch.zeros(training.EPOCHS).double(),
        "done": 0,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.load(state, storage_reader=reader)
    return state


def program():
    sys.path.insert(0, str(APP))
    try:
        import training
    finally:
        sys.path.remove(str(APP))
    return training


def accuracy(state, test):
    training = program()
    network = training.model()
    network.load_state_dict(state["model"])
    guessed = network(training.torch.from_numpy(test["pixels"]).float() / 16).argmax(1).numpy()
    return float((guessed == test["digits"]).mean())


# The operator -------------------------------------------------------------------------------------------------


def torchrun(workers, *command, where=("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")):
    """The command of one node."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={workers}", *where, *command]


def launch(stage, app, platform=None):
    """What torchrun starts for each worker: the platform measures it, the service gives it the rank."""
    command = [sys.executable, "-m", "isolate", "launch", str(app), "--assets", str(stage.folder)]
    return [*command, "--service", stage.service, "--platform", platform or stage.platform]


class Job:
    """A torchrun whose workers are enclaves, and what they say in public."""

    def __init__(self, stage, command, **environment):
        self.errors = (stage.folder / "torchrun.err").open("a")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, env={**os.environ, **environment}
        )
        self.seen = []

    def events(self):
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.seen.append(json.loads(line))
                yield self.seen[-1]

    def until(self, name):
        """The next event of that name."""
        for event in self.events():
            if event["event"] == name:
                return event
        raise SystemExit(f"the workers ended without {name}: {self.seen}, see torchrun.err")

    def end(self):
        list(self.events())
        self.errors.close()
        self.process.stdout.close()
        return self.process.wait()


def plainly(folder, workers=2):
    """The program as it was: gloo, and data and checkpoint in plain files. Answers where the checkpoint is."""
    folder.mkdir()
    np.savez(folder / "data.npz", **digits()[0])
    command = torchrun(workers, str(APP / "training.py"), str(folder / "data.npz"), str(folder / "model"))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the plain run failed: {done.stderr[-3000:]}")
    return folder / "model"


def found(folder, *needles):
    """How many files below a folder there are, and how many of them hold one of these bytes."""
    files = [path for path in folder.rglob("*") if path.is_file() and "platform-state" not in path.parts]
    return len(files), sum(any(needle in path.read_bytes() for needle in needles) for path in files)


def story(stage, folder):
    """``folder``: for a plain run. Answers what the owner got of both."""
    import torch.distributed.checkpoint as dcp

    began = time.monotonic()

    def say(text):
        print(f"{time.monotonic() - began:4.0f} s  {text}", flush=True)

    train, test = digits()
    say(f"the owner has sealed {len(train['digits'])} handwritten digits")
    job = Job(stage, torchrun(2, "--no-python", *launch(stage, stage.app)))
    joined = {event["rank"]: event for event in (job.until("joined"), job.until("joined"))}
    say(f"torchrun started {len(joined)} workers, each a measured enclave: ranks {sorted(joined)}")
    while (epoch := job.until("epoch")["epoch"]) < 2:
        pass
    os.kill(joined[1]["pid"], signal.SIGKILL)
    status = job.end()
    said = "".join(
        f", and rank 0 with {one['code']} by rank {one['by']}" for one in job.seen if one["event"] == "over"
    )
    say(f"rank 1 was killed after epoch {epoch}: torchrun ended with status {status}{said}")

    job = Job(stage, torchrun(4, "--no-python", *launch(stage, stage.app)))
    epoch = job.until("resumed")["epoch"]
    status = job.end()
    slots = sorted((one["rank"], one["generation"]) for one in job.seen if one["event"] == "joined")
    say(f"four workers went on from the sealed checkpoint of epoch {epoch}, to the end: status {status}")
    say("rank and generation: " + ", ".join(f"{rank}/{generation}" for rank, generation in slots))
    sealed = opened(stage)
    say(f"the owner opened the model: {accuracy(sealed, test):.1%} of {len(test['digits'])} held out are right")

    plain = loaded(dcp.FileSystemReader(plainly(folder)))
    loss = (sealed["losses"] - plain["losses"]).abs().max()
    weight = max((sealed["model"][name] - plain["model"][name]).abs().max() for name in plain["model"])
    say(f"two plain workers over gloo: each epoch's loss within {loss:.1e}, each weight within {weight:.1e}")
    for whose, where, state in (("the operator", stage.folder, sealed), ("a plain run", folder, plain)):
        weights = state["model"]["0.weight"].numpy().tobytes()
        files, hits = found(where, train["pixels"][7].tobytes(), weights[:64])
        say(f"{whose} has {files} files: {hits} with a row of the data or a weight in it")
    return sealed, plain


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, owner(Path(name)) as one, tempfile.TemporaryDirectory() as two:
        story(one, Path(two, "plain"))
