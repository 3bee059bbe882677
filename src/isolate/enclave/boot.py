"""The first code of an enclave process. The platform runs it as a script, from the measured snapshot.

Order matters: non-dumpable, no core, no new privileges, then a fork. A descriptor on /proc/PID/mem that somebody
opened before the first call would still read this process afterwards, so keys are made only in the child, whose
memory never was dumpable. Neither is any protection from root. Spec: docs/spec/evidence.md, section on launch.

    >>> event("ready", rank=0)
    {"event": "ready", "rank": 0}
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_GET_DUMPABLE = 3
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39


# What torchrun tells its workers, and the launcher passes on: only here does it become a number or a place again.
_NUMBER, _PLACE = re.compile(r"[0-9]{1,9}"), re.compile(r"[A-Za-z0-9_.:\[\]-]{1,255}")
_TORCHRUN = {
    "LOCAL_RANK": _NUMBER,
    "LOCAL_WORLD_SIZE": _NUMBER,
    "MASTER_ADDR": _PLACE,
    "MASTER_PORT": _NUMBER,
    "OMP_NUM_THREADS": _NUMBER,
    "RANK": _NUMBER,
    "TORCHELASTIC_RESTART_COUNT": _NUMBER,
    "TORCHELASTIC_RUN_ID": _PLACE,
    "TORCHELASTIC_USE_AGENT_STORE": re.compile("True|False"),
    "WORLD_SIZE": _NUMBER,
}

_quiet = False


def keep_quiet() -> None:
    """From now on errors are told by their code alone. Called before the first key is opened."""
    global _quiet
    _quiet = True


def event(name: str, **facts: Any) -> None:
    """Print one line of JSON. Everything that an enclave prints is public: the operator reads it.

    One write a line, so that threads do not mix theirs. An operator whose disk is full learns nothing, and ends
    nothing.
    """
    # By an attribute and not by its class: this file runs as a script too, and is then another copy of it.
    out = getattr(sys.stdout, "events", sys.stdout)
    with contextlib.suppress(OSError, ValueError):
        out.write(json.dumps({"event": name, **facts}) + "\n")
        out.flush()


class _Silence(io.TextIOBase):
    """In the place of standard output and error: takes everything, and passes nothing on."""

    def __init__(self, events: Any) -> None:
        self.events = events

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def only_events() -> None:
    """From now on Python prints nothing but events: what an operation or a library prints could be data.

    It is no wall: code that writes to the descriptor itself still does.
    """
    if not hasattr(sys.stdout, "events"):
        sys.stdout.flush()
        sys.stdout = sys.stderr = _Silence(sys.stdout)


def _prctl(option: int, argument: int = 0) -> int:
    # All five arguments: the kernel refuses PR_SET_NO_NEW_PRIVS unless the rest are zero.
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(argument), 0, 0, 0)
    return result


def harden() -> None:
    """Make this process, and what it forks, unreadable for other processes of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def capabilities() -> dict[str, bool]:
    """Which controls hold in this process now: asked of the kernel, not remembered."""
    return {
        "non_dumpable": _prctl(_PR_GET_DUMPABLE) == 0,
        "no_new_privileges": _prctl(_PR_GET_NO_NEW_PRIVS) == 1,
        "no_core": resource.getrlimit(resource.RLIMIT_CORE) == (0, 0),
        "not_traced": _tracer() == 0,
    }


def _tracer() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("TracerPid:"):
            return int(line.split()[1])
    return 0


def _tell_no_more(_: Any) -> None:
    """For exceptions that nobody caught, in a thread or a destructor: the interpreter would print their text."""
    event("failed", code="internal")


def _places_for_torch() -> None:
    """Put the places that torchrun told back under the names that torch looks for. Raises UsageError.

    They locate, and no more: which rank of which job this is, the service says in the slot.
    """
    from isolate.errors import UsageError

    told = {name: os.environ.get(f"ISOLATE_{name}") for name in _TORCHRUN}
    if told["WORLD_SIZE"] is None:
        return
    for name, value in told.items():
        if value is not None and not _TORCHRUN[name].fullmatch(value):
            raise UsageError(f"{name} of the launcher is neither number nor place")
        if value is not None:
            os.environ[name] = value


def run(application: str) -> int:
    """Run the application's main.py; answer the exit status. No traceback leaves: it would carry data."""
    # This file runs as a script. What the application imports is another copy of it, which knows whether there is
    # anything to hide yet.
    from isolate.enclave import boot
    from isolate.errors import IsolateError

    threading.excepthook = sys.unraisablehook = _tell_no_more
    # Set here, over whatever the host passed: where the measured configuration lies is no choice of the host's.
    os.environ["ISOLATE_APPLICATION"] = application
    try:
        _places_for_torch()
        runpy.run_path(str(Path(application, "main.py")), run_name="__main__")
    except IsolateError as error:
        # Before a key was released the text helps whoever launched this; afterwards it could name what is inside.
        event("failed", code=error.code, message="" if boot._quiet else str(error))
        return 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException as error:  # noqa: BLE001 (the boundary: a type's name is all that leaves)
        event("failed", code="internal", kind=type(error).__name__)
        return 1
    return 0


def main(application: str) -> int:
    harden()
    if not all(capabilities().values()):
        event("failed", code="control_missing", message="this process could not be hardened, or is traced")
        return 1
    parent = os.getpid()
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code  # of a signal, as shells say it
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A parent that died before that call sends no signal any more.
    if os.getppid() != parent or not all(capabilities().values()):
        os._exit(1)
    status = run(application)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    # boot.py lies at RUNTIME/isolate/enclave/boot.py. With -I -S the path holds the standard library alone.
    sys.path += [str(Path(__file__).resolve().parents[2]), sys.argv[1]]
    sys.exit(main(sys.argv[1]))
