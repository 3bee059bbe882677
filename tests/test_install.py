"""The project installs on a machine that has Python and pip, and nothing to compile with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILERS = (
    "cc",
    "gcc",
    "g++",
    "c++",
    "clang",
    "tcc",
    "ld",
    "as",
    "make",
    "cmake",
    "ninja",
    "rustc",
    "cargo",
    "go",
)


@pytest.mark.slow
def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """Wheels only for what others made; the project itself is built from a copy of the tree.

    The PATH holds the new environment's programs and nothing else, and CC is a program that fails.
    """
    tree, place = tmp_path / "tree", tmp_path / "venv"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "examples"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif source.exists():
            shutil.copy(source, tree / name)
    subprocess.run([sys.executable, "-m", "venv", place], check=True, timeout=120)
    programs = place / "bin"
    assert [name for name in COMPILERS if shutil.which(name, path=str(programs))] == []
    # Where pip finds its index and certificates, and no more of the caller's environment.
    kept = ("HOME", "PIP_", "SSL_", "REQUESTS_", "HTTP", "http", "NO_PROXY", "no_proxy", "ALL_PROXY")
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment |= {"PATH": str(programs), "CC": "/bin/false", "CXX": "/bin/false", "RUSTC": "/bin/false"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{command} -> {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    extras = f"{tree}[service,stores,pkcs11,kms]"
    run(programs / "python", "-m", "pip", "install", "-q", "--only-binary", ":all:", extras)
    assert run(programs / "isolate", "--version").startswith("isolate ")
    assert "isolate-recipient-" in run(programs / "isolate", "keygen", "-o", tmp_path / "id.key")
    assert (tmp_path / "id.key").exists()
    # Nothing was left behind in the tree, and the package came from the environment.
    where = run(programs / "python", "-c", "import isolate; print(isolate.__file__)").strip()
    assert Path(where).is_relative_to(place)
    # README's first line, with no tree at hand: the data of the demo is inside the wheel.
    story = json.loads(run(programs / "isolate", "demo", "--json"))
    assert story["held"] is True
    assert story["seconds"] < 60
