"""Real enclave processes on the simulated platform: what is measured, what gets in, and who reads their memory."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from isolate.attestation.attesters.simulated import read_frame, write_frame
from isolate.errors import IsolateError, RefusedError, StorageError, UsageError
from isolate.launch.measure import measure, tree
from isolate.launch.platform import Control, Platform, allowed_environment
from isolate.launch.root import SimulatedRoot
from isolate.launch.supervisor import Host as Supervisor

LOOK = """
import os, sys, time
import isolate, isolate.sealed, isolate.channel, isolate.enclave.runtime, isolate.enclave.workload
from isolate.enclave.boot import capabilities, event

event("looked", modules=sorted(sys.modules), environment=sorted(os.environ), path=sys.path,
      capabilities=capabilities(), flags=[sys.flags.isolated, sys.flags.no_site], pid=os.getpid())
time.sleep(60)
"""

# Run by another user than root: tries a process that may be read, one that may not, and the enclave.
READER = """
import os, subprocess, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
hide = 'import ctypes, sys; ctypes.CDLL(None).prctl(4, int(sys.argv[1]), 0, 0, 0); print(1, flush=True); input()'

def attempt(pid):
    try:
        open(f"/proc/{pid}/mem", "rb").close()
        print("read")
    except PermissionError:
        print("refused")

for dumpable in "10":
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", hide, dumpable], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child.stdout.readline()
    attempt(child.pid)
    child.kill()
attempt(PID)
"""

# The top-level packages beside the standard library that an enclave process holds: the trusted base.
TRUSTED = {
    "_cffi_backend", "_openssl", "_sodium", "attr", "attrs", "blake3", "cbor2", "cffi", "cryptography", "isolate",
    "jwt", "nacl", "numpy", "_cbor2",
}  # fmt: skip
ROOMS = {"crypto", "sealed", "attestation", "capability", "channel", "messages", "enclave", "errors"}


@pytest.fixture(scope="module")
def looked(host: Any, application: Callable[..., Path]) -> dict[str, Any]:
    """One enclave that tells what it sees, and stays."""
    folder = application(LOOK)
    child = host.launch(
        folder, ISOLATE_RANK="0", LD_PRELOAD="/nowhere/evil.so", PYTHONPATH="/nowhere", HOME="/root"
    )
    (event,) = host.events("looked", "failed")
    assert event["event"] == "looked", event
    return {**event, "child": child, "folder": folder, "errors": (host.logs / f"{host.name}.err").read_text()}


@pytest.mark.threat("ENC-19")
def test_an_enclave_process_holds_the_trusted_base_and_no_more(looked: dict[str, Any]) -> None:
    tops = {name.split(".")[0] for name in looked["modules"]} - set(sys.stdlib_module_names)
    ours = {name for name in tops if not name.startswith(("_cython", "__main__", "_isolate", "cython_runtime"))}
    assert ours <= TRUSTED, ours - TRUSTED
    for name in ("starlette", "httpx", "uvicorn", "click", "rich", "structlog", "anyio", "pip", "site"):
        assert name not in looked["modules"]
    assert {name.split(".")[1] for name in looked["modules"] if name.startswith("isolate.")} <= ROOMS
    snapshot = {Path(one).name for one in looked["path"] if "site-packages" in one}
    assert snapshot == set()


@pytest.mark.threat("ENC-20")
def test_the_hosts_environment_stays_outside(looked: dict[str, Any]) -> None:
    assert looked["environment"] == [
        "ISOLATE_APPLICATION",
        "ISOLATE_ATTEST_FD",
        "ISOLATE_RANK",
        "LC_CTYPE",
    ] or looked["environment"] == ["ISOLATE_APPLICATION", "ISOLATE_ATTEST_FD", "ISOLATE_RANK"]
    assert looked["flags"] == [1, 1]
    assert "evil.so" not in looked["errors"]
    for odd in ({"ISOLATE_X": 1}, {"ISOLATE_X": "a\0b"}):
        with pytest.raises(UsageError):
            allowed_environment(odd)  # type: ignore[arg-type]


@pytest.mark.threat("ENC-21")
def test_the_platform_measures_what_is_measured_offline(looked: dict[str, Any]) -> None:
    found = looked["child"].image.measurement.registers
    assert dict(found) == dict(measure(looked["folder"]).registers)
    (looked["folder"] / "main.py").write_text(LOOK + "\n# one line more\n")
    changed = measure(looked["folder"]).registers
    assert changed["PCR1"] == found["PCR1"]
    assert changed["PCR2"] != found["PCR2"]
    assert changed["PCR0"] != found["PCR0"]


@pytest.mark.threat("ENC-22")
def test_another_process_of_the_same_user_does_not_read_its_memory(looked: dict[str, Any], tmp_path: Path) -> None:
    assert looked["capabilities"] == {
        "non_dumpable": True, "no_new_privileges": True, "no_core": True, "not_traced": True,
    }  # fmt: skip
    status = Path(f"/proc/{looked['pid']}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    # The kernel gives the files of a non-dumpable process to root.
    assert Path(f"/proc/{looked['pid']}/mem").stat().st_uid == 0
    if os.getuid() != 0:
        with pytest.raises(PermissionError):
            os.open(f"/proc/{looked['pid']}/mem", os.O_RDONLY)
        return
    # As root one reads everything: the attempt is made in a process that is a plain user, with a twin that may be
    # read, so that the attempt itself is seen to work.
    reader = READER.replace("PID", str(looked["pid"]))
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("no interpreter that another user may run")
    done = subprocess.run([python, "-I", "-c", reader], capture_output=True, text=True, timeout=30, cwd="/")
    if done.returncode != 0:
        pytest.skip(f"another user cannot run here: {done.stderr[-200:]}")
    assert done.stdout.split() == ["read", "refused", "refused"]


@pytest.mark.threat("ENC-23")
def test_an_application_with_a_link_is_refused(host: Any, application: Callable[..., Path], tmp_path: Path) -> None:
    for target in (tmp_path / "secret", tmp_path):
        (tmp_path / "secret").write_text("secret")
        folder = application("pass")
        (folder / "link").symlink_to(target)
        with pytest.raises(UsageError):
            host.launch(folder)
        with pytest.raises(UsageError):
            measure(folder)
    folder = application("pass")
    os.mkfifo(folder / "pipe")
    with pytest.raises(UsageError):
        tree(folder)
    with pytest.raises(UsageError):
        measure(tmp_path / "nothing")


@pytest.mark.threat("ENC-21")
def test_what_changes_after_the_snapshot_does_not_run(host: Any, looked: dict[str, Any]) -> None:
    image = looked["child"].image
    for path in image.application.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o222 == 0
    assert not image.application.is_relative_to(looked["folder"])
    # No compiled code beside the sources, where it would run unmeasured.
    assert not list(image.runtime.rglob("*.pyc"))
    assert not list(image.application.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("main", "code"),
    [
        ("raise ValueError('canary')", "internal"),
        ("import sys; sys.exit('canary')", None),
        (
            "import threading\nt = threading.Thread(target=lambda: 1 / 0, name='canary')\nt.start(); t.join()",
            "internal",
        ),
        (
            "from isolate.errors import Tampered\nfrom isolate.enclave import boot\n"
            "boot.keep_quiet()\nraise Tampered('canary')",
            "tampered",
        ),
        ("class A:\n    def __del__(self): raise ValueError('canary')\nA()", "internal"),
    ],
)
@pytest.mark.threat("ENC-10")
def test_no_text_of_an_exception_leaves(
    host: Any, application: Callable[..., Path], main: str, code: str | None
) -> None:
    child = host.launch(application(main))
    child.process.wait(30)
    out, err = ((host.logs / f"{host.name}.{end}").read_text() for end in ("out", "err"))
    assert "canary" not in out + err
    if code is None:
        assert child.process.returncode == 1
    else:
        assert f'"code": "{code}"' in out


def test_before_keys_the_text_of_a_refusal_helps(host: Any, application: Callable[..., Path]) -> None:
    host.launch(application("import isolate\nisolate.join()"))
    (event,) = host.events("failed")
    assert (event["code"], "ISOLATE_SERVICE" in event["message"]) == ("usage", True)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 65, "a\nb"])
def test_names_that_are_no_file_names(host: Any, application: Callable[..., Path], name: str) -> None:
    with pytest.raises(UsageError):
        host.platform.launch(name, application("pass"), {}, host.logs)


def test_a_launch_that_fails_is_typed(host: Any, application: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        host.platform.launch("nowhere", application("pass"), {}, tmp_path / "nothing")
    host.platform.launch("nowhere", application("pass"), {}, tmp_path)
    with pytest.raises(UsageError):
        host.platform.launch("nowhere", application("pass"), {}, tmp_path)


# The control socket


@pytest.fixture
def control(tmp_path: Path) -> str:
    platform = Platform(SimulatedRoot.generate(), tmp_path / "state")
    control = Control(platform, f"unix:{tmp_path / 'control'}")
    threading.Thread(target=control.run, daemon=True).start()
    return str(tmp_path / "control")


def ask(path: str, request: Any) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        if isinstance(request, bytes):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
        else:
            write_frame(connection, request)
        return read_frame(connection)


@pytest.mark.threat("ENC-24")
def test_the_platform_answers_every_request_and_survives_it(control: str, tmp_path: Path) -> None:
    assert stat.S_IMODE(Path(control).stat().st_mode) == 0o600
    launch = {"op": "launch", "name": "x", "application": "/nowhere", "environment": {}, "logs": str(tmp_path)}
    for request, code in (
        ({"op": "none"}, "malformed"),
        ({}, "malformed"),
        (launch, "usage"),
        ({**launch, "environment": {"ISOLATE_X": 1}}, "usage"),
        ({**launch, "application": "a\0b"}, "usage"),
        ({"op": "wait", "name": "none", "seconds": 2**63}, "usage"),
        ({"op": "kill", "name": "none"}, "usage"),
        (b"\xff\xff\xff\xff", "malformed"),
        (b"\0\0\0\1\xff", "malformed"),
    ):
        assert ask(control, request)["error"] == code, request
    supervisor = Supervisor(f"unix:{control}", logs=tmp_path)
    assert supervisor.root_certificate()
    with pytest.raises(RefusedError):
        supervisor.launch("x", tmp_path / "nothing", {})
    with pytest.raises(IsolateError):
        Supervisor(f"unix:{control}-none", logs=tmp_path).root_certificate()
    with pytest.raises(UsageError):
        Supervisor("tcp:127.0.0.1:1", logs=tmp_path)
