"""The simulated platform: a process of its own that alone holds the simulated root, measures, and launches.

    >>> from isolate.launch.platform import allowed_environment
    >>> allowed_environment({"ISOLATE_SERVICE": "unix:/run/wire", "LD_PRELOAD": "/tmp/evil.so"})
    {'ISOLATE_SERVICE': 'unix:/run/wire'}

It copies the application and the runtime into a snapshot of its own, measures the copy, launches from the copy,
and signs only what arrives on the socket that the child inherited. An enclave never measures itself. It stands
for hardware: whoever controls this process, or is root, can claim anything. Spec: docs/spec/evidence.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import define, field, frozen

from isolate.attestation.attesters.simulated import read_frame, write_frame
from isolate.crypto import cbor
from isolate.errors import IsolateError, MalformedError, StorageError, UnavailableError, UsageError
from isolate.launch.measure import Digests, Measurement, needs, registers, runtime_files, tree
from isolate.launch.root import SimulatedModule, SimulatedRoot
from isolate.messages.http import parse_address

_BOOT = "isolate/enclave/boot.py"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of an enclave, and of its log files
_PATIENCE = 10.0  # seconds for a request to come whole
MAX_WAIT = 3600  # seconds of one request that waits
# Run once by the platform itself, so that launches find compiled code that only the platform wrote.
_WARM = "import sys; sys.path.append(sys.argv[1]); import isolate.enclave.runtime, isolate.sealed, isolate.channel"
# What training loads, some of it only at the first step. An extra's absence from here costs a launch time only.
_WARM_EXTRAS = {
    "torch": """
import compileall
compileall.compile_dir(sys.argv[1] + "/isolate/torch", quiet=2)
import torch, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp, torch.nn.parallel, torch.utils.data
layer = torch.nn.Linear(2, 2)
for optimizer in (torch.optim.SGD(layer.parameters()), torch.optim.AdamW(layer.parameters())):
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
"""
}


def allowed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Only ISOLATE_* gets in: it locates. What decides is in the measured configuration. Raises UsageError."""
    allowed = {name: value for name, value in environment.items() if name.startswith("ISOLATE_")}
    if any(not isinstance(value, str) or "\0" in value for value in allowed.values()):
        raise UsageError("the environment of an enclave is text")
    return allowed


@frozen
class Image:
    """A read-only snapshot and what was measured of it."""

    runtime: Path
    application: Path
    measurement: Measurement


@define
class Child:
    process: subprocess.Popen[bytes]
    socket: socket.socket
    module: SimulatedModule
    image: Image
    record: Path | None
    lock: threading.Lock = field(factory=threading.Lock)


class Platform:
    """``state``: a folder of its own, for snapshots. ``record``: where the bytes of attest sockets are kept."""

    def __init__(self, root: SimulatedRoot, state: Path, record: Path | None = None) -> None:
        self.root = root
        self._state = state.absolute()  # an enclave is started in another folder
        self._record = record
        self._children: dict[str, Child] = {}
        self._lock = threading.Lock()
        self._runtimes: dict[tuple[str, ...], dict[str, Path]] = {}
        self._digests = Digests()

    def image(self, application: Path) -> Image:
        """Copy, then measure the copy. Raises UsageError or StorageError."""
        given = tree(application)
        staged = self._state / f"application-{os.urandom(8).hex()}"
        files = _copy(given, staged)
        extras = needs(files)
        runtime = self._snapshot_runtime(extras)
        return Image(self._place(extras), staged, registers(runtime, files, self._digests))

    def _place(self, extras: tuple[str, ...]) -> Path:
        return self._state / "-".join(("runtime", *extras))

    def _snapshot_runtime(self, extras: tuple[str, ...]) -> dict[str, Path]:
        """One for each set of extras, made when it is first needed: without any there is nothing of them in it."""
        if extras not in self._runtimes:
            place = self._place(extras)
            # What an earlier platform left there would be importable, and not measured.
            shutil.rmtree(place, ignore_errors=True)
            copied = _copy(runtime_files(extras), place)
            warm = "".join((_WARM, *(_WARM_EXTRAS.get(name, "") for name in extras)))
            self._python(["-c", warm, str(place)], check=True)
            self._runtimes[extras] = copied
        return self._runtimes[extras]

    def _python(self, arguments: list[str], *, check: bool) -> None:
        command = [*self._command(writable=True), *arguments]
        done = subprocess.run(command, env={}, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode != 0:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
            raise StorageError(f"the runtime snapshot does not import: {why}", hint="is the installation complete?")

    def _command(self, *, writable: bool = False) -> list[str]:
        # -I -S: no environment, no user site, no .pth files. Compiled code comes from the prefix alone, which
        # only the platform writes: a .pyc beside a source file would run unmeasured.
        command = [sys.executable, "-I", "-S", "-X", f"pycache_prefix={self._state / 'compiled'}"]
        if sys.version_info >= (3, 14):
            command += ["-X", "disable-remote-debug"]
        return command if writable else [*command, "-B"]

    def launch(self, name: str, application: Path, environment: Mapping[str, str], logs: Path) -> Child:
        """Start an enclave. Its output, which is public, goes to ``logs``/NAME.out and NAME.err.

        Raises UsageError for a name that is taken or no file name, or StorageError.
        """
        if not _NAME.fullmatch(name):
            raise UsageError("an enclave's name is 1 to 64 of A-Z a-z 0-9 . _ -")
        passed = allowed_environment(environment)
        # One launch at a time: the runtime is copied once, and a name is taken once.
        with self._lock:
            if name in self._children:
                raise UsageError(f"an enclave named {name} was launched before")
            image = self.image(application)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                process = self._start(
                    image, {**passed, "ISOLATE_ATTEST_FD": str(theirs.fileno())}, theirs, logs / name
                )
            except OSError as error:
                ours.close()
                raise StorageError(f"cannot start an enclave: {error.strerror}") from None
            finally:
                theirs.close()
            record = self._record / f"attest-{name}" if self._record else None
            child = Child(process, ours, self.root.module(name), image, record)
            self._children[name] = child
        threading.Thread(target=self._sign_for, args=(child,), daemon=True).start()
        return child

    def _start(
        self, image: Image, environment: Mapping[str, str], theirs: socket.socket, logs: Path
    ) -> subprocess.Popen[bytes]:
        with (
            logs.with_name(f"{logs.name}.out").open("wb") as out,
            logs.with_name(f"{logs.name}.err").open("wb") as err,
        ):
            return subprocess.Popen(
                [*self._command(), str(image.runtime / _BOOT), str(image.application)],
                env=environment,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[theirs.fileno()],
            )

    def _sign_for(self, child: Child) -> None:
        """Answer the child's requests for evidence, over what was measured at its launch."""
        pcrs = {int(name[3:]): value for name, value in child.image.measurement.registers.items()}
        with contextlib.suppress(OSError, IsolateError):
            while True:
                request = read_frame(child.socket)
                asked = cbor.check(request, {"op": str, "user_data": bytes, "nonce": bytes})
                if asked["op"] != "attest":
                    raise MalformedError("an enclave asks for evidence and nothing else")
                answer = {"evidence": child.module.document(pcrs, asked["user_data"], asked["nonce"])}
                if child.record:
                    with child.record.open("ab") as file:
                        file.write(cbor.encode(request) + cbor.encode(answer))
                write_frame(child.socket, answer)
        # Also after a request that was refused: an enclave that lies on this socket gets no evidence any more.
        child.socket.close()

    def child(self, name: str) -> Child:
        child = self._children.get(name)
        if child is None:
            raise UsageError(f"no enclave named {name} was launched")
        return child

    def stop(self) -> None:
        for child in self._children.values():
            child.process.kill()
            child.process.wait()
            child.socket.close()


def _end(child: Child, holder: socket.socket) -> int:
    """Wait for the enclave's end, and answer its status. When the holder's connection ends first, so does it."""
    process = child.process
    with contextlib.suppress(ProcessLookupError):  # ended, and waited for
        ended = os.pidfd_open(process.pid)
        try:
            ready, _, _ = select.select([ended, holder.fileno()], [], [])
            if ended not in ready:
                process.kill()
        finally:
            os.close(ended)
    return process.wait()


def _copy(files: Mapping[str, Path], target: Path) -> dict[str, Path]:
    copied: dict[str, Path] = {}
    try:
        for name, source in files.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
            path.chmod(0o444)
            copied[name] = path
    except OSError as error:
        raise StorageError(f"cannot make a snapshot: {error.strerror or type(error).__name__}") from None
    return copied


class Control:
    """The platform's socket towards the host: launch, wait, kill, root. Requests and answers are CBOR frames.

    A launch with ``hold`` keeps its connection: the enclave ends with it, and its status follows on it.
    Whoever may connect is obeyed: that is the operator. Only its own user may.
    """

    def __init__(self, platform: Platform, address: str) -> None:
        self._platform = platform
        kind, path, _ = parse_address(address)
        if kind != "unix":
            raise UsageError("the platform listens on a Unix socket")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(path)
            Path(path).chmod(0o600)  # before anybody can connect
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise StorageError(f"cannot listen on {path}: {error.strerror}") from None

    def run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        print(
            json.dumps({"event": "connection.accepted", "peer_pid": struct.unpack("3i", credentials)[0]}),
            flush=True,
        )
        connection.settimeout(_PATIENCE)
        with connection, contextlib.suppress(UnavailableError):
            try:
                request = read_frame(connection)
                answer = self._answer(request)
            except IsolateError as error:
                answer = {"error": error.code, "message": error.message}
            except Exception as error:  # noqa: BLE001 (the boundary: one bad request ends no other)
                answer = {"error": "internal", "message": f"the platform failed: {type(error).__name__}"}
            held = "pid" in answer and request.get("hold") is True
            try:
                write_frame(connection, answer)
                if held:
                    write_frame(connection, {"status": _end(self._platform.child(request["name"]), connection)})
            finally:
                if held:
                    self._platform.child(request["name"]).process.kill()

    def _answer(self, request: Any) -> dict[str, Any]:
        match request:
            case {"op": "root"}:
                return {"certificate": self._platform.root.certificate}
            case {
                "op": "launch",
                "name": str(name),
                "application": str(path),
                "environment": dict(env),
                "logs": str(logs),
            }:
                began = time.monotonic()
                child = self._platform.launch(name, Path(path), env, Path(logs))
                return {
                    "pid": child.process.pid,
                    "registers": dict(child.image.measurement.registers),
                    "milliseconds": int((time.monotonic() - began) * 1000),
                }
            case {"op": "wait", "name": str(name), "seconds": int(seconds)}:
                try:
                    return {"status": self._platform.child(name).process.wait(min(seconds, MAX_WAIT))}
                except subprocess.TimeoutExpired:
                    return {"status": None}
            case {"op": "kill", "name": str(name)}:
                self._platform.child(name).process.kill()
                return {}
        raise MalformedError("no request that the platform knows")


def main() -> None:
    parser = argparse.ArgumentParser(prog="isolate-platform", description="the simulated platform")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = options.state / "root.key"
    if not key.exists():
        SimulatedRoot.generate().save(key)
    platform = Platform(SimulatedRoot.load(key), options.state, options.record)
    control = Control(platform, options.listen)
    print(json.dumps({"event": "ready", "simulated": True}), flush=True)

    def end(*_: object) -> None:
        platform.stop()
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    control.run()


if __name__ == "__main__":
    main()
