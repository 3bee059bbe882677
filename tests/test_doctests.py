"""The examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
# __main__ runs the program when it is imported; an app of the demo is launched from its own folder, no package.
MODULES = sorted(
    ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
    for file in (SRC / "isolate").rglob("*.py")
    if file.name != "__main__.py" and "apps" not in file.parts
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith("isolate.torch"):
        pytest.importorskip("torch", reason="the extra `torch` is not installed")
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    # As doctest.testmod does, which also spends a debugger on each docstring without an example.
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed = sum(runner.run(test).failed for test in doctest.DocTestFinder().find(module, name) if test.examples)
    assert failed == 0, f"{failed} examples of {name} fail; see the output above"
