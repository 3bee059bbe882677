"""What torchrun tells a worker by its environment, and what of it is passed into an enclave.

    >>> places({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "LD_PRELOAD": "/tmp/evil.so"})
    {'ISOLATE_MASTER_ADDR': '10.0.0.1', 'ISOLATE_RANK': '1', 'ISOLATE_WORLD_SIZE': '2'}
    >>> places({"RANK": "1"})
    {}

It only locates. Which rank of which job an enclave is, the slot says that the service gives it, and its measured
configuration. Inside, enclave/boot.py puts these names back where torch looks. Spec: docs/spec/evidence.md, 11.4.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# The same list as in enclave/boot.py, where each is checked again: this side is the operator's.
PASSED = (
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",  # torchrun divides the cores among its workers by it
    "RANK",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    "WORLD_SIZE",
)
# Where the ranks of a group meet: docs/spec/process-group.md. Read as they are, inside.
MEETING = ("ISOLATE_BIND", "ISOLATE_LINKS", "ISOLATE_TRANSPORT")
_STEM = 40  # characters of an application's name that its enclaves keep


def places(environment: Mapping[str, str]) -> dict[str, str]:
    """ISOLATE_* names for an enclave; nothing where no torchrun (or who acts like it) started this process."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return {}
    told = {f"ISOLATE_{name}": environment[name] for name in PASSED if name in environment}
    return told | {name: environment[name] for name in MEETING if name in environment}


def enclave_name(application: str, rank: int) -> str:
    """A name for a worker that no platform has seen: a restarted worker is another enclave.

    >>> enclave_name("my trainer", 3).startswith("my-trainer-3-")
    True
    """
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", application).lstrip("._-")[:_STEM] or "worker"
    return f"{stem}-{rank}-{os.urandom(6).hex()}"
