"""The courier: what it records is what was sent, and what it changes is the one bit it was told to."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isolate.errors import UsageError
from isolate.launch.courier import Route


class Echo:
    """Takes connections, keeps what came, and answers with it reversed once the other end is done."""

    def __init__(self, path: Path) -> None:
        self.got: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                got = b""
                while data := connection.recv(65536):
                    got += data
                self.got.append(got)
                connection.sendall(got[::-1])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Wire:
    def __init__(self, folder: Path) -> None:
        self.folder, self.echo = folder, Echo(folder / "far")
        (folder / "record").mkdir()
        command = [sys.executable, "-m", "isolate.launch.courier", "--record", str(folder / "record")]
        self.process = subprocess.Popen(
            [*command, f"--route=a=unix:{folder / 'near'}>unix:{folder / 'far'}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.line()

    def send(self, data: bytes) -> bytes:
        """Send, close our half, and read the answer to its end."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.folder / "near"))
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while part := connection.recv(65536):
                answer += part
            return answer

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    wire = Wire(tmp_path)
    yield wire
    for pipe in (wire.process.stdin, wire.process.stdout):
        if pipe is not None:
            pipe.close()
    wire.process.wait(10)
    wire.echo.close()


def test_it_records_exactly_and_flips_exactly_the_bit_asked(wire: Wire, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4000
    assert wire.tell("flip a 1 600001") == "armed"
    for number in range(3):
        expected = bytearray(data)
        if number == 1:
            expected[600001] ^= 1
        assert wire.send(data) == bytes(expected[::-1])
        assert wire.echo.got[number] == expected
        # What came in on each side, before the fault.
        assert (tmp_path / "record" / f"a-{number}.up").read_bytes() == data
        assert (tmp_path / "record" / f"a-{number}.down").read_bytes() == expected[::-1]
    assert json.loads(wire.tell("count")) == {"pid": wire.process.pid, "connections": {"a": 3}}


def test_connections_leave_nothing_open(wire: Wire) -> None:
    wire.send(b"first")
    before = wire.descriptors()
    for _ in range(30):
        wire.send(b"more")
    with socket.socket(socket.AF_UNIX) as connection:  # one that just goes away
        connection.connect(str(wire.folder / "near"))
    wire.send(b"last")
    # Who has the whole answer may be before the courier's own end of it.
    end = time.monotonic() + 20
    while wire.descriptors() > before + 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert wire.descriptors() <= before + 2


def test_what_it_does_not_understand(wire: Wire) -> None:
    for odd in ("", "flip a 1", "flip none 1 1", "flip a x 1", "flip a 1 ²", "flip a 1 " + "9" * 40, "quit"):
        assert wire.tell(odd) == "unknown command"
    assert wire.send(b"still here") == b"ereh llits"


@pytest.mark.parametrize("text", ["", "a", "a=unix:/x", "=unix:/x>unix:/y", "a=x>unix:/y", "a=unix:/x>y"])
def test_what_is_no_route(text: str) -> None:
    with pytest.raises(UsageError):
        Route.parse(text)


def test_an_address_that_is_taken_ends_it_with_a_line(tmp_path: Path) -> None:
    arguments: list[Any] = [
        sys.executable,
        "-m",
        "isolate.launch.courier",
        f"--route=a=unix:{tmp_path}/no/x>unix:/y",
    ]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "the courier ended" in process.stderr.readline()
        assert process.wait(10) == 1
