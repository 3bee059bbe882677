"""Every numbered check is there for something: without it, a test fails. mutate.py takes them out, one by one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "mutate.py"
# File -> the numbers that its docstring lists and `require` carries. A typed parser refuses where one is missing.
NUMBERS = {
    "appraisal.py": range(1, 22),
    "result.py": range(1, 8),
    "verifiers/simulated.py": range(1, 8),
    "verifiers/nitro.py": range(1, 8),
    "verifiers/sev_snp.py": range(1, 11),
    "verifiers/tdx.py": range(1, 9),
    "verifiers/nvidia.py": range(1, 8),
}
SOURCE = Path(__file__).parents[2] / "src" / "isolate" / "attestation"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)


def test_every_number_of_every_list_is_taken_out() -> None:
    found: dict[str, set[int]] = {}
    for line in run("--list").stdout.splitlines():
        file, number = re.fullmatch(r"(.*): check (\d+), line \d+", line).groups()  # type: ignore[union-attr]
        found.setdefault(file, set()).add(int(number))
    assert found == {file: set(numbers) for file, numbers in NUMBERS.items()}
    for file, numbers in NUMBERS.items():
        text = (SOURCE / file).read_text(encoding="utf-8").split('"""')[1]
        listed = [int(one) for one in re.findall(r"^ ?(\d+)[.] ", text, re.MULTILINE)]
        assert listed == list(numbers), file


@pytest.mark.slow
def test_every_removed_check_is_noticed() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
