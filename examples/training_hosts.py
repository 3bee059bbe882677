"""Training on two hosts, with a tap on the wire between them: what it finds of weights, gradients and data.

Each host is a network namespace with a platform of its own; a pair of virtual interfaces is the wire. The same
program runs plainly over gloo first, and the tap finds all of it; then as enclaves, and it finds nothing.

Run it: python examples/training_hosts.py     (as root, with iproute2 and the extra "torch"; about a minute)
Mode: workload. The platforms are simulated.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import training_service as service

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500
WINDOW = 64  # bytes that are looked for: less than the least packet that carries a tensor
_ETH_P_ALL, _SO_RCVBUFFORCE = 0x0003, 33


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def why_not():
    """What this needs and is not there, or None."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and iproute2"
    name = f"isolate-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()[:100]}"
    return None


class Host:
    """A network namespace with one interface."""

    def __init__(self, number):
        self.number, self.address = number, ADDRESSES[number]
        self.name, self.interface = f"isolate-{os.getpid()}-{number}", f"wire{number}"

    def command(self, *words):
        return ["ip", "netns", "exec", self.name, *words]

    def torchrun(self, *command):
        """This host's part of a job of two, one worker on each."""
        where = (
            "--nnodes=2",
            f"--node-rank={self.number}",
            f"--master-addr={ADDRESSES[0]}",
            f"--master-port={PORT}",
        )
        return self.command(*service.torchrun(1, *command, where=where))


@contextlib.contextmanager
def network():
    """Two hosts, and a wire between them."""
    hosts = [Host(number) for number in range(len(ADDRESSES))]
    with contextlib.ExitStack() as undo:
        for host in hosts:
            ip("netns", "add", host.name)
            undo.callback(ip, "netns", "del", host.name)
        one, two = hosts
        wire = ("link", "add", one.interface, "netns", one.name, "type", "veth")
        ip(*wire, "peer", "name", two.interface, "netns", two.name)
        for host in hosts:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                ip("-n", host.name, "link", "set", interface, "up")
        yield hosts


@contextlib.contextmanager
def tapped(host, file):
    """Every frame that passes the host's interface is appended to a file."""
    command = host.command(sys.executable, __file__, "--tap", host.interface, str(file))
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tap:
        try:
            tap.stdout.readline()  # it listens
            yield
        finally:
            tap.terminate()


def tap(interface, file):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as wire:
        wire.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 * 1024 * 1024)
        wire.bind((interface, 0))
        print("listening", flush=True)
        with Path(file).open("ab", 0) as out:
            while True:
                out.write(wire.recv(1 << 18))


@contextlib.contextmanager
def platform(host, stage):
    """The host's own platform, of the same vendor as the stage's: the policy names its root."""
    state, address = stage.folder / f"platform-state-{host.number}", f"unix:{stage.folder}/platform-{host.number}"
    state.mkdir(mode=0o700)
    shutil.copyfile(stage.folder / "platform-state" / "root.key", state / "root.key")
    words = ["-m", "isolate.launch.platform", "--state", str(state), "--listen", address]
    with subprocess.Popen(host.command(sys.executable, *words), stdout=subprocess.PIPE, text=True) as process:
        try:
            if "ready" not in process.stdout.readline():
                raise SystemExit("a platform did not start")
            yield address
        finally:
            process.terminate()


def confidentially(stage, hosts):
    """Both workers as enclaves, by TCP though they are in truth on one machine. The statuses."""
    with contextlib.ExitStack() as undo:
        jobs = []
        for host in hosts:
            launch = service.launch(stage, stage.app, undo.enter_context(platform(host, stage)))
            jobs.append(service.Job(stage, host.torchrun("--no-python", *launch), ISOLATE_TRANSPORT="tcp"))
        statuses = [job.end() for job in jobs]
        for event in (event for job in jobs for event in job.seen if event["event"] == "failed"):
            print(event)
        return statuses


def plainly(hosts, folder):
    """The program as it was, over gloo. The statuses."""
    folder.mkdir()
    np.savez(folder / "data.npz", **service.digits()[0])
    script = [str(service.APP / "training.py"), str(folder / "data.npz"), str(folder / "model")]
    with (folder / "torchrun.err").open("w") as errors:
        running = []
        for host in hosts:
            where = {**os.environ, "GLOO_SOCKET_IFNAME": host.interface}
            running.append(subprocess.Popen(host.torchrun(*script), stdout=errors, stderr=errors, env=where))
        return [process.wait() for process in running]


def secrets_of(train):
    """What crosses the wire up to the first step, as the owner can compute it: name to pieces of WINDOW bytes."""
    training = service.program()
    torch = training.torch
    torch.set_num_threads(1)  # as torchrun has it: the last bits depend on it
    whole = {"data": [train["pixels"][: training.COMPARED]]}
    whole["weights"] = [value.numpy() for value in training.model().state_dict().values()]
    order = np.random.default_rng(0).permutation(len(train["digits"]))[: training.BATCH]
    whole["gradients"] = []
    for rank in range(len(ADDRESSES)):
        network, mine = training.model(), order[rank :: len(ADDRESSES)]
        pixels, digits = (
            torch.from_numpy(train["pixels"][mine]).float() / 16,
            torch.from_numpy(train["digits"][mine]),
        )
        torch.nn.functional.cross_entropy(network(pixels), digits.long()).backward()
        whole["gradients"] += [(value.grad / len(ADDRESSES)).numpy() for value in network.parameters()]
    pieces = {}
    for name, arrays in whole.items():
        raw = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
        cut = [raw[at : at + WINDOW] for at in range(0, len(raw) - WINDOW + 1, WINDOW)]
        # Rows of zeros are found in anything.
        pieces[name] = [piece for piece in cut if len(set(np.frombuffer(piece, np.uint32))) > WINDOW // 8][:500]
    return pieces


def main(folder):
    """For each of both runs: the statuses of the workers, the bytes on the wire, and how many pieces of what."""
    pieces = secrets_of(service.digits()[0])
    seen = {}
    with network() as hosts, service.owner(folder / "operator") as stage:
        for name, run in (
            ("plainly", lambda: plainly(hosts, folder / "plain")),
            ("as enclaves", lambda: confidentially(stage, hosts)),
        ):
            file = folder / f"{name.split()[-1]}.tap"
            with tapped(hosts[0], file):
                statuses = run()
            wire = file.read_bytes()
            counts = {what: sum(piece in wire for piece in sought) for what, sought in pieces.items()}
            seen[name] = {"status": statuses, "bytes": len(wire), **counts}
            found = ", ".join(f"{count} of {len(pieces[what])} pieces of {what}" for what, count in counts.items())
            print(f"{name}: status {statuses}, {len(wire) / 1e6:.1f} MB on the wire, with {found}", flush=True)
    return seen


if __name__ == "__main__":
    if sys.argv[1:2] == ["--tap"]:
        tap(*sys.argv[2:])
    elif reason := why_not():
        raise SystemExit(reason)
    else:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "operator").mkdir()
            main(Path(name))
