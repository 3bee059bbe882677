"""A worker of torchrun as an enclave: what gets in of its environment, and how the two end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isolate.attestation.attesters.simulated import write_frame
from isolate.cli.signals import end_once
from isolate.enclave import boot
from isolate.errors import RefusedError, UnavailableError
from isolate.launch import torchrun
from isolate.launch.platform import Control
from isolate.launch.supervisor import Host

TOLD = {
    "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500",
    "OMP_NUM_THREADS": "1", "RANK": "3", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "4",
}  # fmt: skip
LOOK = """
import os, signal, sys, time
from isolate.enclave.boot import event
signal.signal(signal.SIGUSR1, lambda *_: event("last words"))
event("looked", environment=dict(os.environ), pid=os.getpid())
code = os.environ.get("ISOLATE_CODE")
time.sleep(0 if code else 60)
sys.exit(int(code or 0))
"""


@pytest.fixture
def platform(host: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    address = f"unix:{tmp_path / 'platform'}"
    control = Control(host.platform, address)
    threading.Thread(target=control.run, daemon=True).start()
    return address


class Worker:
    """`isolate launch` as torchrun starts it."""

    def __init__(self, application: Path, platform: str, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "isolate", "launch", str(application), "--service", "unix:/nowhere"]
        clean = {name: value for name, value in os.environ.items() if name not in TOLD}
        self.process = subprocess.Popen(
            [*command, "--platform", platform, *options], env=clean | environment, stdout=subprocess.PIPE, text=True
        )

    def event(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def worker(application: Callable[..., Path], platform: str) -> Iterator[Callable[..., Worker]]:
    started = []

    def start(*options: str, **environment: str) -> Worker:
        started.append(Worker(application(LOOK), platform, *options, **environment))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()
        assert one.process.stdout is not None
        one.process.stdout.close()


def gone(pid: int, within: float) -> bool:
    """Whether it ended; somebody may still have to fetch its status."""
    end, last = time.monotonic() + within, False
    while not last:
        # Once more after that time: this process too may not have run meanwhile.
        last = time.monotonic() > end
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def test_both_sides_know_the_same_names() -> None:
    assert set(boot._TORCHRUN) == set(torchrun.PASSED) == set(TOLD)
    assert all(boot._TORCHRUN[name].fullmatch(value) for name, value in TOLD.items())


@pytest.mark.threat("LAUNCH-3")
def test_what_torchrun_tells_gets_in_and_nothing_else(worker: Callable[..., Worker]) -> None:
    hostile = {"LD_PRELOAD": "", "PYTHONSTARTUP": "/nowhere", "TORCH_LOGS": "all", "GLOO_SOCKET_IFNAME": "lo"}
    one = worker(**TOLD, **hostile, ISOLATE_TRANSPORT="tcp", ISOLATE_APPLICATION="/nowhere")
    inside = one.event()["environment"]
    assert inside["ISOLATE_APPLICATION"] != "/nowhere"
    known = {"ISOLATE_APPLICATION", "ISOLATE_ATTEST_FD", "ISOLATE_SERVICE", "ISOLATE_TRANSPORT", "LC_CTYPE"}
    assert {name: value for name, value in inside.items() if name in TOLD} == TOLD
    assert set(inside) - known == {*TOLD, *(f"ISOLATE_{name}" for name in TOLD)}
    assert one.end(signal.SIGTERM) == 128 + signal.SIGTERM


@pytest.mark.threat("LAUNCH-3")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "two"), ("WORLD_SIZE", "-1"), ("RANK", "1e3"), ("RANK", "9" * 10), ("MASTER_PORT", "٣"),
        ("MASTER_ADDR", "a b"), ("MASTER_ADDR", "a\nLD_PRELOAD=x"), ("MASTER_ADDR", "a" * 256),
        ("TORCHELASTIC_USE_AGENT_STORE", "1"), ("TORCHELASTIC_RUN_ID", "../x/y"),
    ],
)  # fmt: skip
def test_what_is_neither_number_nor_place_is_refused_inside(
    host: Any, application: Callable[..., Path], name: str, value: str
) -> None:
    host.launch(application(LOOK), **{f"ISOLATE_{one}": said for one, said in {**TOLD, name: value}.items()})
    (event,) = host.events("failed", "looked")
    assert (event["event"], event["code"]) == ("failed", "usage")
    assert name in event["message"]


def test_without_torchrun_nothing_of_it_is_set(worker: Callable[..., Worker]) -> None:
    inside = worker(LOCAL_RANK="1", RANK="5", ISOLATE_CODE="0").event()["environment"]
    assert inside["ISOLATE_RANK"] == "0"
    assert not set(TOLD) & set(inside)


@pytest.mark.threat("LAUNCH-4")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_an_enclave_ends_with_what_launched_it(worker: Callable[..., Worker], number: int) -> None:
    one = worker(**TOLD)
    pid = one.event()["pid"]
    status = one.end(number)
    assert status != 0
    # Whoever could react has waited: torchrun starts the next worker as soon as this one is gone.
    assert gone(pid, within=10 if number == signal.SIGKILL else 0.5)


@pytest.mark.threat("LAUNCH-4")
def test_a_second_signal_does_not_cut_the_end_short(worker: Callable[..., Worker]) -> None:
    one = worker(**TOLD)
    pid, end = one.event()["pid"], time.monotonic() + 20
    while one.process.poll() is None and time.monotonic() < end:
        one.process.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert one.process.wait(0) == 128 + signal.SIGTERM
    assert gone(pid, within=0.5)


def test_a_signal_that_comes_while_handlers_are_taken_away_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python finds it without a handler then, and calls this hook: a few in a million, so the test does it."""
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    hook, real = sys.unraisablehook, signal.signal

    def take_away(number: int, handler: Any) -> Any:
        sys.unraisablehook(OSError(f"Signal {number} ignored due to race condition"))  # type: ignore[arg-type]
        return real(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    end_once(*before, status=lambda number: 128 + number)
    try:
        monkeypatch.setattr(signal, "signal", take_away)
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 128 + signal.SIGTERM
        assert [signal.getsignal(one) for one in before] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in before.items():
            real(number, handler)
    assert (said, sys.unraisablehook) == ([], hook)


@pytest.mark.threat("LAUNCH-4")
def test_an_enclave_whose_launcher_is_gone_before_it_starts_ends_at_once(
    host: Any, application: Callable[..., Path], platform: str
) -> None:
    name, folder = f"left-{os.urandom(4).hex()}", application(LOOK)
    request = {"op": "launch", "name": name, "application": str(folder), "environment": {}, "hold": True}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(platform.removeprefix("unix:"))
        write_frame(connection, request | {"logs": str(host.logs)})
    end = time.monotonic() + 20
    while name not in host.platform._children and time.monotonic() < end:
        time.sleep(0.02)
    assert host.platform.child(name).process.wait(20) == -signal.SIGKILL


def test_what_was_said_last_is_shown_also_when_torchrun_ends_it(
    worker: Callable[..., Worker], tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    one = worker("--logs", str(logs), **TOLD)
    pid = one.event()["pid"]
    os.kill(one.process.pid, signal.SIGSTOP)  # it looks no more, while the enclave goes on
    os.kill(pid, signal.SIGUSR1)
    end = time.monotonic() + 20
    while not any("last words" in path.read_text() for path in logs.iterdir()) and time.monotonic() < end:
        time.sleep(0.01)
    one.process.send_signal(signal.SIGTERM)
    one.process.send_signal(signal.SIGCONT)
    assert one.process.wait(20) == 128 + signal.SIGTERM
    assert one.event()["event"] == "last words"


def test_an_enclave_that_dies_fails_its_worker(worker: Callable[..., Worker]) -> None:
    one = worker(**TOLD)
    os.kill(one.event()["pid"], signal.SIGKILL)
    assert one.process.wait(20) == 128 + signal.SIGKILL


def test_the_status_is_the_enclaves(host: Any, application: Callable[..., Path], platform: str) -> None:
    for code in (0, 3):
        with Host(platform, logs=host.logs).hold(
            f"ends-{code}", application(LOOK), {"ISOLATE_CODE": str(code)}
        ) as one:
            while one.wait(1) is None:
                pass
            assert one.wait(0) == code
    with pytest.raises(RefusedError), Host(platform, logs=host.logs).hold("ends-0", application(LOOK), {}):
        pass


def test_a_platform_that_goes_away_is_said(
    host: Any, application: Callable[..., Path], platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(UnavailableError),
        Host(platform, logs=host.logs).hold(f"left-{os.urandom(4).hex()}", application(LOOK), {}) as one,
    ):
        one._connection.shutdown(2)
        one.wait(1)


def test_a_rank_that_is_none(worker: Callable[..., Worker]) -> None:
    assert worker(**TOLD | {"RANK": "65536"}).process.wait(20) == 2
    assert worker("--rank", "1", **TOLD).event()["environment"]["RANK"] == "1"
