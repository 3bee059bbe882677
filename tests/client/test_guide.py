"""docs/handles.md and the code say the same: commands, options, names, and the numbers of the agent's socket."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

import isolate
from isolate.cli import cli
from isolate.client.agent import MAX_FRAME, MAX_SIGNED, PURPOSES, AgentAnswer, AgentRequest
from isolate.client.held import Held

GUIDE = (Path(__file__).parents[2] / "docs" / "handles.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
LINES = [
    line
    for kind, body in BLOCKS
    if not kind
    for line in body.replace("\\\n", " ").splitlines()
    if line.startswith("isolate ")
]


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_guide_is_one(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "app").mkdir()
    words = shlex.split(line)[1:]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        found = command.get_command(context, words.pop(0))
        assert found is not None, line
        command = found
    # As click reads it, up to the point where it would run.
    command.make_context(command.name, words, resilient_parsing=False)


def test_options_in_the_text_exist() -> None:
    named = set(re.findall(r"`(--[a-z-]+)", GUIDE))
    known: set[str] = set()
    for name in ("agent", "delegate", "grant", "invoke", "measure", "revoke"):
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        known |= {option for parameter in command.params for option in parameter.opts}
    assert named <= known and len(LINES) >= 7


def test_names_in_the_guide_exist() -> None:
    python = "\n".join(body for kind, body in BLOCKS if kind == "python")
    for name in set(re.findall(r"isolate\.(\w+)", python)):
        assert hasattr(isolate, name), name
    for name in set(re.findall(r"handle\.(\w+)", python)) - {"handle"}:
        assert hasattr(isolate.Handle, name), name
    for name in re.findall(r"\b[A-Z]\w+(?:Exceeded|Exhausted|Refused)\b|`Revoked`", GUIDE):
        assert hasattr(isolate.errors, name.strip("`")), name


def test_the_agents_socket_is_as_it_is_written() -> None:
    _, _, section = GUIDE.partition("## The agent's socket")
    assert f"at most {MAX_FRAME}." in section and f"at most {MAX_SIGNED})" in section
    assert set(re.findall(r"`(\w+/[\w-]+)`", section)) - {"spec/crypto"} == {str(one) for one in PURPOSES}
    for kind, names in ((AgentRequest, {"purpose", "message"}), (AgentAnswer, {"key", "signature", "code"})):
        row = next(line for line in section.splitlines() if line.startswith(f"| `{kind.TYPE}`"))
        assert {field.name for field in kind.__attrs_attrs__} == names  # type: ignore[attr-defined]
        assert all(name in row for name in names)


def test_what_the_guide_says_raises_bare_does() -> None:
    sentence = GUIDE.partition("Errors leave ")[2].partition(" without the frames")[0]
    named = set(re.findall(r"`(\w+)`", sentence))
    assert (
        named == {"attach", "invoke", "invoke_joined", "budget", "receipt", "attenuate"}
        and "both signers" in sentence
    )
    aio = isolate.aio.AsyncHandle
    for raises in (
        isolate.attach, isolate.Handle.invoke, isolate.Handle.invoke_joined, isolate.Handle.budget.fget,
        isolate.Handle.receipt,
        isolate.aio.attach, aio.invoke, aio.invoke_joined, aio._ask_budget, aio.receipt, Held.attenuate,
        isolate.FileSigner.__init__, isolate.FileSigner.sign,
        isolate.AgentSigner.verifying_key.fget, isolate.AgentSigner.sign,
    ):  # fmt: skip
        assert hasattr(raises, "__wrapped__")
