"""The host's side of a platform: start enclaves, read what they print, wait for them.

>>> Enclave.parse_events('{"event": "attested", "rank": 0}\\nno json\\n')
[{'event': 'attested', 'rank': 0}]
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import define, frozen

from isolate.attestation.attesters.simulated import read_frame, write_frame
from isolate.crypto import cbor
from isolate.errors import IsolateError, RefusedError, ServiceUnavailable, StorageError, UsageError
from isolate.messages.http import parse_address

LAUNCH_TIMEOUT = 180.0  # seconds: the first launch copies and compiles the runtime, with torch 600 MB of it
_END = 10.0  # seconds that an enclave which was killed may take to be gone


@frozen
class Enclave:
    """A launched enclave. ``registers`` is what the platform measured (48 bytes each), in so many milliseconds."""

    host: Host
    name: str
    pid: int
    registers: Mapping[str, bytes]
    logs: Path
    milliseconds: int

    def wait(self, timeout: float) -> int | None:
        """The exit status, or None when it still runs after ``timeout`` seconds."""
        answer = self.host.ask({"op": "wait", "name": self.name, "seconds": int(timeout)}, timeout + 5)
        status: int | None = cbor.check(answer, {"status": object})["status"]
        return status

    def kill(self) -> None:
        self.host.ask({"op": "kill", "name": self.name})

    def events(self) -> list[dict[str, Any]]:
        """The JSON lines that it has printed. They are public, and the host can forge them: they prove nothing."""
        try:
            return self.parse_events((self.logs / f"{self.name}.out").read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise StorageError(f"cannot read the output of {self.name}: {error.strerror}") from None

    @staticmethod
    def parse_events(text: str) -> list[dict[str, Any]]:
        found = []
        for line in text.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and "event" in value:
                found.append(value)
        return found

    def event(self, *names: str, timeout: float = 30.0) -> dict[str, Any]:
        """The first event of one of these names; waits for it. Raises RefusedError when it does not come."""
        end, ask = time.monotonic() + timeout, 0.0
        while True:
            over = time.monotonic() > end
            if not over and time.monotonic() > ask:
                over, ask = self.wait(0) is not None, time.monotonic() + 0.5
            for event in self.events():
                if event["event"] in names:
                    return event
            if over:
                status = self.wait(0)
                state = "it still runs" if status is None else f"it ended with status {status}"
                raise RefusedError(
                    f"enclave {self.name} printed none of {', '.join(names)}; {state}", code="no_event"
                )
            time.sleep(0.02)


@define
class Held:
    """A launched enclave that ends when this process does, whatever ends it: its own connection holds it."""

    enclave: Enclave
    _connection: socket.socket
    status: int | None = None

    def wait(self, timeout: float) -> int | None:
        """The exit status, or None when it still runs after ``timeout`` seconds.

        Raises UnavailableError when the platform is gone.
        """
        if self.status is None and select.select([self._connection], [], [], timeout)[0]:
            self.status = cbor.check(read_frame(self._connection), {"status": int})["status"]
        return self.status


class Host:
    """``address``: where the platform listens, ``unix:/path``."""

    def __init__(self, address: str, *, logs: Path) -> None:
        kind, self._path, _ = parse_address(address)
        if kind != "unix":
            raise UsageError("a platform listens on a Unix socket")
        self._logs = logs

    def ask(self, request: dict[str, Any], timeout: float = LAUNCH_TIMEOUT) -> dict[str, Any]:
        """One request to the platform. Raises RefusedError with its code, or ServiceUnavailable."""
        with self._asked(request, timeout) as (_, answer):
            return answer

    @contextlib.contextmanager
    def _asked(self, request: dict[str, Any], timeout: float) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            try:
                connection.connect(self._path)
                write_frame(connection, request)
                answer = read_frame(connection)
            except OSError as error:
                raise ServiceUnavailable(f"the platform does not answer: {type(error).__name__}", hint="") from None
            if "error" in answer:
                refused = cbor.check(answer, {"error": str, "message": str})
                raise RefusedError(refused["message"], code=refused["error"])
            yield connection, answer

    def root_certificate(self) -> bytes:
        """The simulated root's certificate (DER), for the owner's policy."""
        certificate: bytes = cbor.check(self.ask({"op": "root"}), {"certificate": bytes})["certificate"]
        return certificate

    def launch(self, name: str, application: Path, environment: Mapping[str, str]) -> Enclave:
        """Have an enclave measured and started. Raises RefusedError with the platform's code."""
        request = self._launch(name, application, environment)
        return self._enclave(name, self.ask(request))

    @contextlib.contextmanager
    def hold(self, name: str, application: Path, environment: Mapping[str, str]) -> Iterator[Held]:
        """An enclave for as long as this context lasts: it is ended with it, or with this process."""
        request = self._launch(name, application, environment) | {"hold": True}
        with self._asked(request, LAUNCH_TIMEOUT) as (connection, answer):
            held = Held(self._enclave(name, answer), connection)
            try:
                yield held
            finally:
                # Gone before this returns, so that whoever starts the next one finds the place empty.
                if held.status is None:
                    with contextlib.suppress(IsolateError):
                        held.enclave.kill()
                        held.enclave.wait(_END)

    def _launch(self, name: str, application: Path, environment: Mapping[str, str]) -> dict[str, Any]:
        return {
            "op": "launch",
            "name": name,
            "application": str(application.resolve()),
            "environment": dict(environment),
            "logs": str(self._logs.resolve()),
        }

    def _enclave(self, name: str, answer: dict[str, Any]) -> Enclave:
        answer = cbor.check(answer, {"pid": int, "registers": dict, "milliseconds": int})
        return Enclave(self, name, answer["pid"], answer["registers"], self._logs, answer["milliseconds"])
