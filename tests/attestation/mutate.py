"""Remove each numbered check of attestation in turn, in a copy of the tree, and see that a test fails.

    python tests/attestation/mutate.py [--list] [WORD]...

A WORD keeps the mutants whose name contains it; --list only names them. Exit status 1 when a mutant survives.
The checks are found in the code, not listed here: the functions under ``@_numbered(N, ...)`` of the appraisal, and
the calls of ``require(condition, N, ...)`` in verifiers and result. A check of several calls gives several mutants.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOM = Path("isolate/attestation")
WHOLE = -1
# Which tests must notice, by the file that is changed. The plain run of each takes a few seconds.
TESTS = {
    "appraisal.py": "test_appraisal.py",
    "result.py": "test_result.py",
    "verifiers/simulated.py": "test_simulated.py",
    "verifiers/nitro.py": "test_nitro.py",
    "verifiers/sev_snp.py": "test_sev_snp.py",
    "verifiers/tdx.py": "test_tdx.py",
    "verifiers/nvidia.py": "test_nvidia.py",
}


def _number(call: ast.expr, names: tuple[str, ...], position: int) -> int | None:
    """N of a call of one of these names."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in names:
        return None
    argument = call.args[position]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, int) else None


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(name, changed source) for every numbered check in ``source``."""
    for index, (number, _, at) in enumerate(_places(ast.parse(source))):
        tree = ast.parse(source)
        _, body, _ = list(_places(tree))[index]
        line = body[max(at, 0)].lineno
        if at == WHOLE:
            body[:] = ast.parse('return True, "removed", "removed"').body
        else:
            body[at] = ast.Pass()
        yield f"check {number}, line {line}", ast.unparse(ast.fix_missing_locations(tree))


def _places(tree: ast.Module) -> Iterator[tuple[int, list[ast.stmt], int]]:
    """The list of statements, and which of them is the check: WHOLE for the body of a numbered function."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            number = _number(decorator, ("_numbered",), 0)
            if number is not None:
                yield number, node.body, WHOLE
        for at, statement in enumerate(node.body):
            if isinstance(statement, ast.Expr):
                number = _number(statement.value, ("require", "_require"), 1)
                if number is not None:
                    yield number, node.body, at


def survives(file: str, changed: str) -> bool:
    """Whether the tests of ``file`` still pass with it changed so."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "src"
        shutil.copytree(ROOT / "src", tree, ignore=shutil.ignore_patterns("__pycache__"))
        (tree / ROOM / file).write_text(changed, encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        tests = ROOT / "tests" / "attestation" / TESTS[file]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise SystemExit(f"the tests of {file} did not run:\n{done.stdout}{done.stderr}")
        return done.returncode == 0


def chosen(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """(title, file, changed source) of every mutant that the words keep."""
    for file in TESTS:
        source = (ROOT / "src" / ROOM / file).read_text(encoding="utf-8")
        for name, changed in mutants(source):
            if not words or any(word in f"{file}: {name}" for word in words):
                yield f"{file}: {name}", file, changed


def main(words: list[str]) -> int:
    only_list = "--list" in words
    mutations = list(chosen([word for word in words if word != "--list"]))
    if only_list:
        print("\n".join(title for title, _, _ in mutations))
        return 0
    for file in sorted({file for _, file, _ in mutations}):
        # The copy itself must pass, or every mutant would seem noticed.
        if not survives(file, ast.unparse(ast.parse((ROOT / "src" / ROOM / file).read_text(encoding="utf-8")))):
            raise SystemExit(f"the tests of {file} fail without a change")
    alive = []
    with ThreadPoolExecutor(max_workers=2) as pool:
        for (title, _, _), lives in zip(
            mutations, pool.map(lambda one: survives(*one[1:]), mutations), strict=True
        ):
            print(f"{'SURVIVES' if lives else 'noticed '}  {title}", flush=True)
            if lives:
                alive.append(title)
    print(f"{len(mutations)} checks removed in turn, {len(alive)} not noticed")
    return 1 if alive or not mutations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
