"""The specification lists every message with its fields, and the table of codes every code."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from isolate import errors
from isolate.messages import approve, attest, base, invoke, limits, owner, receipts
from isolate.messages.base import Message

ROOT = Path(__file__).parents[2]
SPEC = (ROOT / "docs" / "spec" / "service.md").read_text(encoding="utf-8")
CODES = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KINDS = [
    kind
    for module in (base, attest, invoke, owner, limits, approve, receipts)
    for kind in vars(module).values()
    if isinstance(kind, type)
    and issubclass(kind, Message)
    and "TYPE" in vars(kind)
    and kind.__module__ == module.__name__
]


def passages(kind: type[Message]) -> list[str]:
    """From each place where a message is named to the end of its table, or of its paragraph."""
    found = []
    for place in re.finditer(rf"`{kind.TYPE}`", SPEC):
        after = SPEC[place.end() :]
        paragraph, _, rest = after.partition("\n\n")
        found.append(paragraph + (rest.partition("\n\n")[0] if rest.startswith("|") else ""))
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.TYPE))
def test_every_message_stands_in_the_specification_with_its_fields(kind: type[Message]) -> None:
    names = [one.name for one in attrs.fields(kind)]  # type: ignore[arg-type]
    assert any(all(re.search(rf"\b{name}\b", part) for name in names) for part in passages(kind)), names


def test_every_code_stands_in_the_table_with_a_next_step() -> None:
    listed = {
        code.strip()
        for line in CODES.splitlines()
        if line.startswith("| ") and len(line.split("|")) == 5 and line.split("|")[3].strip()
        for code in line.split("|")[1].split(",")
    }

    def below(kind: type[errors.IsolateError]) -> set[str]:
        return {kind.default_code}.union(*(below(child) for child in kind.__subclasses__()))

    said = below(errors.IsolateError)
    for room in ("messages", "service", "enclave", "launch", "client"):
        for file in (ROOT / "src" / "isolate" / room).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            for pattern in (
                r'code="([a-z_]+)"',
                r'Refusal\("([a-z_]+)"',
                r'code = "([a-z_]+)"',
                r'else "([a-z_]+_[a-z_]+)"',
            ):
                said |= set(re.findall(pattern, text))
    assert said - listed == set()
