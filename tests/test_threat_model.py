"""threat-model.md and the tests agree: every row names a test that proves it, every claim stands in a row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from attrs import frozen

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "threat-model.md"
TESTS = sorted([*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "benchmarks").rglob("test_*.py")])

HEADER = ["id", "attack", "control", "test", "residual"]
ID = re.compile(r"[A-Z]{3,6}-[1-9][0-9]*")
NODE = re.compile(r"((?:tests|benchmarks)/[\w/]+\.py)::(\w+(?:::\w+)?)")


@frozen
class Row:
    cells: list[str]
    section: str

    @property
    def id(self) -> str:
        return self.cells[0]

    @property
    def tests(self) -> list[str]:
        """The test ids of the fourth cell: code spans, apart by a comma or <br>."""
        return [part.strip(" `") for part in re.split(r",|<br>", self.cells[3])]


def rows(text: str) -> list[Row]:
    """The rows of every table with the register's header, from any section."""
    found, section, inside = [], "", False
    for line in text.splitlines():
        if line.startswith("#"):
            section, inside = line.strip("# "), False
        if not line.startswith("|"):
            inside = False
            continue
        # A pipe in a cell is written \|.
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if cells == HEADER:
            inside = True
        elif inside and not all(set(cell) <= set("-: ") for cell in cells):
            found.append(Row(cells, section))
    return found


def marks(decorators: list[ast.expr]) -> dict[str, list[ast.expr]]:
    """pytest.mark.NAME(...) -> its arguments."""
    found: dict[str, list[ast.expr]] = {}
    for node in decorators:
        call = node.func if isinstance(node, ast.Call) else node
        if isinstance(call, ast.Attribute) and ast.unparse(call.value) == "pytest.mark":
            found.setdefault(call.attr, []).extend(node.args if isinstance(node, ast.Call) else [])
    return found


def collected(text: str) -> dict[str, dict[str, list[ast.expr]]]:
    """The tests of a file as pytest collects them (``name`` or ``Class::name``), with their marks."""
    tree = ast.parse(text)
    every: list[ast.expr] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            every += node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
    found = {}

    def add(body: list[ast.stmt], prefix: str, outer: list[ast.expr]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
                found[prefix + node.name] = marks([*node.decorator_list, *outer])
            elif isinstance(node, ast.ClassDef) and node.name.startswith("Test") and not prefix:
                add(node.body, f"{node.name}::", [*node.decorator_list, *outer])

    add(tree.body, "", every)
    return found


def claims(tests: dict[str, dict[str, list[ast.expr]]]) -> dict[str, set[str]]:
    """Test -> the threat ids that it is marked with. An id that is no literal is none."""
    return {
        test: {node.value if isinstance(node, ast.Constant) else "?" for node in found["threat"]}
        for test, found in tests.items()
        if "threat" in found
    }


def faults(text: str, files: dict[str, str]) -> list[str]:
    """Everything in which a register and test files disagree."""
    register = rows(text)
    tests = {
        f"{path}::{test}": found for path, source in files.items() for test, found in collected(source).items()
    }
    marked = claims(tests)
    found = []
    named: dict[str, set[str]] = {}
    for row in register:
        for test in row.tests if len(row.cells) > 3 else ():
            named.setdefault(test, set()).add(row.id)
    for row in register:
        if len(row.cells) != len(HEADER) or not all(row.cells):
            found.append(f"{row.id}: a row has {len(HEADER)} cells that say something")
            continue
        if not ID.fullmatch(row.id):
            found.append(f"{row.id}: no id")
        for test in row.tests:
            if not NODE.fullmatch(test):
                found.append(f"{row.id}: {test} is no test id")
            elif test not in tests:
                found.append(f"{row.id}: {test} does not exist")
            elif row.id not in marked.get(test, set()):
                found.append(f"{row.id}: {test} is not marked with it")
            elif tests[test].keys() & {"skip", "xfail"}:
                found.append(f"{row.id}: {test} proves nothing, it is skipped or expected to fail")
    ids = [row.id for row in register]
    found += [f"{one}: twice" for one in sorted({one for one in ids if ids.count(one) > 1})]
    for test, wanted in marked.items():
        found += [f"{one}: {test} claims it, and no row has it" for one in sorted(wanted - set(ids))]
        listed = named.get(test, set())
        found += [f"{one}: its row does not name {test}" for one in sorted((wanted & set(ids)) - listed)]
    return found


def test_register_and_tests_agree() -> None:
    files = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in TESTS}
    assert faults(MODEL.read_text(encoding="utf-8"), files) == []


def test_the_first_line_says_what_is_simulated() -> None:
    lines = [line for line in MODEL.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert lines[0] == "# Threat model"
    assert "simulat" in lines[1].lower()


ROW = "| id | attack | control | test | residual |\n|---|---|---|---|---|\n"
GOOD = ROW + "| AAA-1 | attack | control | `tests/test_a.py::test_a` | none |\n"
TEST = "import pytest\n@pytest.mark.threat('AAA-1')\ndef test_a(): pass\n"


@pytest.mark.parametrize(
    ("text", "source", "fault"),
    [
        (GOOD, TEST, None),
        (GOOD, "import pytest\npytestmark = [pytest.mark.threat('AAA-1')]\ndef test_a(): pass\n", None),
        (GOOD.replace("control", "a \\| b"), TEST, "header"),
        (ROW + "| AAA-1 | attack | `tests/test_a.py::test_a` | none |\n", TEST, "5 cells"),
        (ROW + "| AAA-1 | attack |  | `tests/test_a.py::test_a` | none |\n", TEST, "5 cells"),
        (GOOD.replace("AAA-1", "first"), TEST, "no id"),
        (GOOD.replace("::test_a", ""), TEST, "no test id"),
        (GOOD.replace("::test_a", "::test_b"), TEST, "does not exist"),
        (GOOD, TEST.replace("def test_a", "def check_a"), "does not exist"),
        (GOOD, TEST.replace("AAA-1", "AAA-2"), "not marked"),
        (GOOD, TEST.replace("'AAA-1'", "'AAA-1', 'AAA-2'"), "no row has it"),
        (GOOD, TEST.replace("'AAA-1'", "NAME"), "not marked"),
        (GOOD, TEST.replace("def", "@pytest.mark.skip\ndef"), "proves nothing"),
        (GOOD, TEST + "@pytest.mark.threat('AAA-1')\ndef test_b(): pass\n", "does not name"),
        (GOOD + GOOD.splitlines()[-1], TEST, "twice"),
    ],
)
def test_the_check_sees(text: str, source: str, fault: str | None) -> None:
    found = faults(text, {"tests/test_a.py": source})
    if fault is None:
        assert found == []
    elif fault == "header":
        # The header itself was changed, so the table is no register and its test stands in no row.
        assert any("no row has it" in one for one in found)
    else:
        assert any(fault in one for one in found), found
