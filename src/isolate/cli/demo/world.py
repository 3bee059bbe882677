"""The demo's cast: folders and processes of owner, service, operator, platform and users.

Every process listens on a Unix socket that only the courier knows; everybody else is told the courier's. Each
listener logs the process id of whoever connects, so a connection past the recorder is seen.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import ServiceUnavailable
from isolate.launch.supervisor import Enclave, Host

APPS = Path(__file__).parent / "apps"
PREFIX = "isolate-demo-"  # of the demo's folder in the machine's temporary folder
MAX_FOREIGN = 64 * 1024 * 1024  # bytes
ROUTES = ("service", "platform", "gradients", "invoke")


def isolate_command(*words: str) -> list[str]:
    """The command line of this very installation."""
    return [sys.executable, "-m", "isolate", *words]


class World:
    """Who has what. ``root``: an empty folder, below which owner, operator, platform and users have their own."""

    def __init__(self, root: Path) -> None:
        self.owner, self.operator, self.platform, self.users = (
            self._folder(root / name) for name in ("owner", "operator", "platform", "users")
        )
        self.assets, self.logs, self.record, self.wire, self.temporary = (
            self._folder(self.operator / name) for name in ("assets", "logs", "record", "wire", "tmp")
        )
        self._root, self._began = root, root.stat().st_mtime
        self._sockets = self._folder(root / "sockets")
        self._processes: list[subprocess.Popen[str]] = []
        self.host = Host(self.address("platform"), logs=self.logs)
        self.key = SigningKey.generate()
        self.key.save(self.owner / "owner.key")
        self.recovery = Identity.generate()
        self.recovery.save(self.owner / "recovery.key")

    @staticmethod
    def _folder(path: Path) -> Path:
        path.mkdir(mode=0o700, parents=True)
        return path

    def address(self, route: str) -> str:
        """Where everybody is told to go: the courier."""
        return f"unix:{self.wire / route}"

    def behind(self, route: str) -> str:
        """Where the listener really is: told to the listener and to the courier only."""
        return f"unix:{self._sockets / route}"

    def _start(self, command: list[str], name: str, ready: str, folder: Path) -> subprocess.Popen[str]:
        errors = (folder / f"{name}.err").open("w", encoding="utf-8")
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
        )
        errors.close()
        self._processes.append(process)
        self._until(_piped(process.stdout), ready, name)
        return process

    @staticmethod
    def _until(lines: IO[str], ready: str, name: str) -> None:
        for line in lines:
            if ready in line:
                return
        raise ServiceUnavailable(f"the {name} did not start", hint="see its log")

    def start_courier(self) -> None:
        """The operator's relay and recorder, between everybody."""
        routes = [f"--route={name}={self.address(name)}>{self.behind(name)}" for name in ROUTES]
        command = [sys.executable, "-m", "isolate.launch.courier", *routes, "--record", str(self.record)]
        self.courier = self._start(command, "courier", "ready", self.logs)

    def tell_courier(self, command: str) -> str:
        """One command, one line of answer."""
        given, answers = _piped(self.courier.stdin), _piped(self.courier.stdout)
        given.write(command + "\n")
        given.flush()
        return answers.readline().strip()

    def start_platform(self) -> None:
        """The simulated hardware. Its output goes to the operator: it is the operator's machine."""
        command = [sys.executable, "-m", "isolate.launch.platform", "--state", str(self.platform)]
        command += ["--listen", self.behind("platform"), "--record", str(self.record)]
        self.platform_process = self._start(command, "platform", "ready", self.logs)

    def start_service(self, lineage: str) -> None:
        """The owner's service, initialised by `isolate serve --init` and listening behind the courier."""
        command = isolate_command(
            "serve", "--state", str(self.owner / "service"), "--listen", self.behind("service")
        )
        command += [
            "--init",
            str(self.owner / "owner.key"),
            "--passphrase-file",
            str(self.owner / "passphrase"),
            "--name",
            "demo",
            "--lineage",
            lineage,
        ]
        self._start([*command, "--recovery", str(self.recovery.recipient)], "service", "serving on", self.owner)

    def application(self, name: str, lineage: str, parameters: str = "") -> Path:
        """The owner's application folder: the code, and the configuration that is measured with it."""
        folder = self.owner / "apps" / name
        shutil.copytree(APPS / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
        configuration = (
            f'[owner]\nroot = "{self.key.verifying_key}"\nlineage = "{lineage}"\n\n'
            f'[enclave]\npurpose = "{name}"\njob = "{lineage}/{name}"\nINSECURE_accept_simulated = true\n'
        )
        (folder / "isolate.toml").write_text(configuration + parameters, encoding="utf-8")
        return folder

    def launch(self, name: str, application: Path, rank: int, **addresses: str) -> Enclave:
        """The operator launches an enclave through the platform, from a copy of its own."""
        copy = self.operator / "apps" / name
        shutil.copytree(application, copy)
        environment = {
            "ISOLATE_SERVICE": self.address("service"),
            "ISOLATE_ASSETS": str(self.assets),
            "ISOLATE_RANK": str(rank),
            **addresses,
        }
        return self.host.launch(name, copy, environment)

    def hand_over(self, path: Path) -> Path:
        """The owner gives the operator a file to keep."""
        return Path(shutil.copyfile(path, self.assets / path.name))

    def traces(self) -> list[Path]:
        """Every file that the operator has, and what anybody made since the demo began in shared memory or in the
        machine's temporary folder.

        Of those two, files over 64 MiB and the folders of demos that run beside this one are left out: this demo
        makes neither, and other programs do.
        """
        found = [path for root in (self.operator, self.platform) for path in _files(root, 0)]
        for root in (Path("/dev/shm"), Path(tempfile.gettempdir())):  # noqa: S108 (searched, not written)
            for path in _files(root, self._began, skip=(PREFIX, self._root.name)):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    if (
                        status.st_mtime >= self._began
                        and status.st_size <= MAX_FOREIGN
                        and os.access(path, os.R_OK)
                    ):
                        found.append(path)
        return found

    def connections(self) -> tuple[dict[str, Any], list[int]]:
        """What the courier carried, and the process ids that the listeners saw."""
        lines: list[str] = []
        for path in [self.owner / "service.err", *self.logs.glob("*.out")]:
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
        lines += self._drain_platform()
        events = Enclave.parse_events("\n".join(lines))
        pids = [event["peer_pid"] for event in events if "peer_pid" in event]
        return json.loads(self.tell_courier("count")), pids

    def _drain_platform(self) -> Iterable[str]:
        self.platform_process.terminate()
        out, _ = self.platform_process.communicate(timeout=10)
        (self.logs / "platform.out").write_text(out, encoding="utf-8")
        return out.splitlines()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            if process.poll() is None:
                process.terminate()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _files(root: Path, since: float, *, skip: tuple[str, ...] = ()) -> list[Path]:
    """The regular files below ``root`` in folders that changed since then, but for folders that begin so."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(skip)]
        with contextlib.suppress(OSError):
            if Path(folder).stat().st_mtime >= since:
                found += [path for name in names if (path := Path(folder, name)).is_file()]
    return found


def _piped(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise ServiceUnavailable("the process has no pipe", hint="")
    return pipe
