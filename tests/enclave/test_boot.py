"""The first code of an enclave: what it lets be printed. Launching is tested in tests/launch."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.threat("ENC-41")
def test_what_an_operation_or_a_library_prints_stays_inside() -> None:
    code = """
import logging, sys, warnings
from isolate.enclave import boot
print("before", flush=True)
boot.only_events()
boot.only_events()
print("canary"); sys.stdout.write("canary"); sys.stderr.write("canary")
warnings.warn("canary"); logging.error("canary")
boot.event("serving")
raise ValueError("canary")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ('before\n{"event": "serving"}\n', "")
