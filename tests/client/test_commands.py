"""`isolate grant`, `delegate`, `invoke`, `revoke`, `handle show`, `agent`, `measure --operations`: as typed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog.testing
from attrs import evolve

from isolate.capability.scope import Choices, Range
from isolate.capability.token import Token
from isolate.cli import main
from isolate.client.handle import HandleFile, attach
from isolate.client.signers import AgentSigner
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import RefusedError
from isolate.messages.invoke import Reply

OPERATIONS = "--epoch 1 --operation op=" + "64" * 32
ROOT = Path(__file__).parents[2]


class Shop:
    """A folder with the owner's key, a team's and an analyst's; and a way to run."""

    def __init__(self, house: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.house, self.path, self._capsys = house, folder, capsys
        house.realm.owner.save(folder / "owner.key")
        self.team, self.analyst = SigningKey.generate(), SigningKey.generate()
        self.team.save(folder / "team.key")
        self.analyst.save(folder / "analyst.key")
        self.where = f"--service {house.service} --lineage acme"

    def run(self, line: str, status: int = 0) -> str:
        """Run a command; answers what it printed (on standard error, where it is to fail)."""
        try:
            main(line.split())
            found = 0
        except SystemExit as stop:
            found = int(stop.code or 0)
        captured = self._capsys.readouterr()
        assert found == status, captured.err
        if status == 1:
            assert len(captured.err.splitlines()) == 1
            assert captured.out == ""
        for key in (self.house.realm.owner, self.team, self.analyst):
            assert bytes(key._seed.expose()).hex() not in captured.out + captured.err
        return captured.err if status else captured.out

    def grant(self, more: str = "--uses 9 --bytes-out 4096", output: str = "team.handle") -> str:
        line = f"grant a/b {OPERATIONS} --holder {self.team.verifying_key} --sign owner.key {self.where}"
        line += f" --enclave {self.house.enclave} --job acme/job --INSECURE-accept-simulated {more} -o {output}"
        return self.run(line).split()[-1]


@pytest.fixture
def shop(
    house: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Shop]:
    monkeypatch.chdir(tmp_path)
    # The service of these tests is in this process, and would print between a command's lines.
    with structlog.testing.capture_logs():
        yield Shop(house, tmp_path, capsys)


def test_granting_says_every_limit(shop: Shop) -> None:
    more = (
        "--uses 9 --bytes-out 4096 --rate 60=10 --rate 86400=100 --parameter op.top=1..5 --parameter op.what=3,b "
        "--result label=10 --result vector=8,16 --result handle --minimum-group 12 --not-before 1700000000 "
        "--expires 2100-01-01 --depth 2 --lease 64"
    )
    granted = shop.grant(more)
    token = Token.from_text(HandleFile.load("team.handle").token)
    assert token.id.hex() == granted and token.asset == "a/b" and token.holder == shop.team.verifying_key.ed25519
    scope = token.scope
    assert scope.operations == {"op": b"d" * 32}
    assert (scope.uses, scope.bytes_out, scope.minimum_group, scope.depth, scope.lease) == (9, 4096, 12, 2, 64)
    assert (scope.not_before, scope.expires) == (1_700_000_000, 4_102_444_800)
    assert scope.rates == {60: 10, 86400: 100}
    assert scope.parameters == {"op": {"top": Range(1, 5), "what": Choices([3, "b"])}}
    assert scope.outputs == {"label": (10,), "vector": (8, 16), "handle": ()}
    assert "exists already" in shop.run(
        f"grant a {OPERATIONS} --holder {shop.team.verifying_key} --sign owner.key --service unix:/s "
        "--enclave unix:/e --job j --uses 1 --bytes-out 1 -o team.handle", status=1,
    ).splitlines()[-1]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        "--rate 60", "--rate a=b", "--rate 0=1", "--parameter top=1..5", "--parameter op.top=5..1",
        "--result raw=1", "--result label=x", "--expires soon", "--uses -1", "--depth 8", "--operation op=abc",
        "--result vector=1", "--parameter op.top=", "--uses 99999999999999999999",
    ],
)  # fmt: skip
def test_a_limit_that_is_none_is_used_wrongly(shop: Shop, more: str) -> None:
    line = f"grant a {OPERATIONS} --holder {shop.team.verifying_key} --sign owner.key --service unix:/s --job j"
    shop.run(f"{line} --enclave unix:/e -o f.handle {more}", status=2)
    assert not Path("f.handle").exists()


def test_the_epoch_of_a_grant_is_the_services(shop: Shop) -> None:
    line = f"grant a/b {OPERATIONS} --holder {shop.team.verifying_key} --sign owner.key --enclave unix:/e --job j"
    line += f" --uses 1 --bytes-out 1 {shop.where}"
    shop.run(f"{line} -o one.handle".replace("--epoch 1", ""))
    shop.run(f"{line} -o two.handle".replace("--epoch 1", "--epoch 2"))
    epochs = [json.loads(shop.run(f"handle show {name}.handle --json"))["epoch"] for name in ("one", "two")]
    assert epochs == [1, 2]


def test_a_grant_without_bounds_is_warned_about(shop: Shop) -> None:
    line = f"grant a {OPERATIONS} --holder {shop.team.verifying_key} --sign owner.key --service unix:/s --job j"
    main(f"{line} --enclave unix:/e -o f.handle --uses 3".split())
    assert "warning: without --bytes-out" in shop._capsys.readouterr().err


def test_delegating_narrows_offline(shop: Shop) -> None:
    shop.grant()
    before = len(shop.house.realm.carried)
    line = f"delegate team.handle --signer team.key --holder {shop.analyst.verifying_key}"
    made = shop.run(f"{line} --operations op --uses 2 --expires 30d -o analyst.handle").split()[-1]
    token = Token.from_text(HandleFile.load("analyst.handle").token)
    assert (token.id.hex(), token.scope.uses, token.holder) == (made, 2, shop.analyst.verifying_key.ed25519)
    assert abs((token.scope.expires or 0) - time.time() - 30 * 86400) < 60
    assert shop.run(f"{line} --operations other -o x.handle", status=1).startswith("isolate: scope_exceeded:")
    wrong = "delegate team.handle --signer analyst.key -o x.handle"
    assert shop.run(wrong, status=1).startswith("isolate: holder_refused:")
    assert not Path("x.handle").exists() and len(shop.house.realm.carried) == before
    # Nobody else's without --holder: the same holder's, as for a notebook of one's own.
    shop.run("delegate team.handle --signer team.key --uses 1 -o mine.handle")
    assert Token.from_text(HandleFile.load("mine.handle").token).holder == shop.team.verifying_key.ed25519


def test_invoking(shop: Shop) -> None:
    shop.grant()
    np.save("digit.npy", np.arange(6, dtype=np.uint8))
    Path("raw").write_bytes(b"abcd")
    asked: list[dict[str, Any]] = []

    def echo(request: Any) -> Reply:
        asked.append(request.arguments)
        return shop.house.echo(request)  # type: ignore[no-any-return]

    shop.house.answer = echo
    invoke = "invoke team.handle --signer team.key op"
    assert shop.run(f"{invoke} image=@digit.npy") == "6\n"
    assert shop.run(f"{invoke} image=@raw") == "4\n"
    assert json.loads(shop.run(f"{invoke} number=3 --json")) == {"operation": "op", "result": 3}
    shop.run(f"{invoke} number=-3 text=left other=text:7 operation=x self=y")
    assert asked == [
        {"image": bytes(range(6))}, {"image": b"abcd"}, {"number": 3},
        {"number": -3, "text": "left", "other": "7", "operation": "x", "self": "y"},
    ]  # fmt: skip
    for value, said in (
        (b"\x01\xff", "01ff"),
        ("a\x1b[2Jb\nc", "a?[2Jb?c"),
        ([1, {"k": b"z"}], '[1, {"k": "7a"}]'),
    ):
        shop.house.answer = lambda _, value=value: Reply("", value, "id")
        assert shop.run(invoke) == said + "\n"
    made = {"asset": "a/b/derived/1", "digest": bytes(32), "handle": b"h" * 32}
    shop.house.answer = lambda _: Reply("", made, "id")
    Path("made.json").write_text(shop.run(invoke))
    shop.house.answer = lambda request: Reply("", int(request.arguments["model"] == made), "id")
    assert shop.run(f"{invoke} model=@made.json") == "1\n"
    shop.house.answer = lambda _: Reply("budget_exhausted", None, "request-1")
    assert shop.run(invoke, status=1).startswith("isolate: budget_exhausted: the enclave refused op")
    refused = json.loads(shop.run(f"{invoke} --json", status=1))
    assert (refused["error"], refused["request_id"]) == ("budget_exhausted", "request-1")
    assert shop.run(invoke.replace("op", "none"), status=1).startswith("isolate: scope_exceeded:")
    assert "holder_refused" in shop.run("invoke team.handle --signer analyst.key op", status=1)


def test_a_result_is_shown_whatever_becomes_of_its_receipt(shop: Shop) -> None:
    shop.grant()
    invoke = "invoke team.handle --signer team.key op number=5 --receipt"
    with pytest.raises(SystemExit) as stop:
        main(f"{invoke} use.receipt".split())  # this enclave has nothing charged
    said = shop._capsys.readouterr()
    assert (stop.value.code, said.out) == (1, "5\n") and "unknown_reservation" in said.err
    (use,) = re.findall(r"it is of use ([0-9a-f]{64})", said.err)
    again = f"handle receipt team.handle {use} --signer team.key -o use.receipt"
    assert "unknown_reservation" in shop.run(again, status=1)
    assert "cannot read none" in shop.run(again.replace(use, "none"), status=1)
    assert not Path("use.receipt").exists()
    # No use is made where its receipt could not be kept.
    shop.house.answer = lambda _: pytest.fail("it was asked")
    for name in ("team.handle", "none/use.receipt"):
        assert f"{name} exists already, or cannot be made" in shop.run(f"{invoke} {name}", status=1)


@pytest.mark.parametrize(
    "text",
    [
        "image", "=3", "image=@none", "image=@odd.npy", "image=@objects.npy", "image=@long", "model=@x.json",
        "model=@y.json",
    ],
)  # fmt: skip
def test_an_argument_that_is_none(shop: Shop, text: str) -> None:
    shop.grant()
    Path("odd.npy").write_bytes(b"no array")
    Path("x.json").write_text('{"asset": 1, "digest": "00", "handle": "00"}')
    Path("y.json").write_text("[" * 100_000)
    np.save("objects.npy", np.array([print], dtype=object), allow_pickle=True)
    Path("long").write_bytes(bytes(2**20 + 1))
    shop.run(f"invoke team.handle --signer team.key op {text}", status=1 if text == "image=@none" else 2)


def test_revoking_by_id_and_by_file(shop: Shop) -> None:
    granted = shop.grant()
    assert shop.run(f"revoke {granted} --sign owner.key {shop.where}").startswith(f"revoked {granted}, log entry: ")
    shop.run("revoke team.handle --sign owner.key")
    assert [one["handle"] for one in shop.house.realm.entries("revoke")][:1] == [bytes.fromhex(granted)]
    assert "revoked" in shop.run("handle show team.handle --signer team.key", status=1)
    assert "service_uncertified" in shop.run("revoke team.handle --sign team.key", status=1)
    shop.run(f"revoke {granted} --sign owner.key", status=2)


def test_showing_a_handle(shop: Shop) -> None:
    granted = shop.grant("--uses 9 --bytes-out 4096 --depth 3")
    shop.run(
        f"delegate team.handle --signer team.key --holder {shop.analyst.verifying_key} --uses 5 -o analyst.handle"
    )
    said = shop.run("handle show analyst.handle")
    assert "at most 5 uses" in said and "1 times, 2 more allowed" in said
    assert "good, as far as the file says" in said
    assert f"granted to   {shop.team.verifying_key.ed25519.hex()} handle {granted}" in said
    body = json.loads(shop.run("handle show analyst.handle --signer analyst.key --json"))
    assert body["left"] == {"uses": 5, "bytes_out": 4096}
    assert [link["holder"] for link in body["chain"]] == [
        key.verifying_key.ed25519.hex() for key in (shop.team, shop.analyst)
    ]
    said = shop.run("handle show analyst.handle --signer analyst.key")
    assert "left         5 uses" in said and "standing     good\n" in said
    file = HandleFile.load("team.handle")
    text = file.to_text().replace(file.owner, str(shop.team.verifying_key))
    Path("forged.handle").write_text(text)
    assert "capability_refused" in shop.run("handle show forged.handle")
    assert "expired" in shop.run(f"handle show {expired(shop)}")


@pytest.mark.threat("HND-12")
def test_a_handle_file_moves_no_cursor(shop: Shop) -> None:
    shop.grant("--uses 1 --bytes-out 1 --parameter op.what=\x1b]0;title\x07")
    file = HandleFile.load("team.handle")
    Path("odd.handle").write_text(evolve(file, job="\x1b[2Jj", lineage="a\nb").to_text())
    said = shop.run("handle show odd.handle")
    assert "\x1b" not in said and "?[2Jj" in said and "a?b" in said
    Path("more.handle").write_text(file.to_text() + '"\\u001b[2J" = 1\n')
    assert "\x1b" not in shop.run("handle show more.handle", status=2)
    assert "\x1b" not in repr(file) + repr(attach(file, signer=shop.team))


def expired(shop: Shop) -> str:
    shop.grant("--uses 1 --bytes-out 1 --expires 2020-01-01", "expired.handle")
    return "expired.handle"


# The agent


@contextlib.contextmanager
def agent_process(*words: str, keys: bytes = b"", cwd: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`isolate agent`, and the line that it prints when it is there."""
    command = [sys.executable, "-m", "isolate", "agent", *words]
    with subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(keys)
            process.stdin.close()
            yield process, process.stdout.readline().decode()
        finally:
            process.terminate()


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


def gone(pid: int) -> bool:
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.threat("HND-13")
def test_another_process_of_the_same_user_does_not_read_the_agents_memory(key: SigningKey, tmp_path: Path) -> None:
    key.save(tmp_path / "me.key")
    address = f"unix:{tmp_path / 'agent'}"
    with agent_process("-i", "me.key", "--listen", address, cwd=tmp_path) as (process, line):
        assert line == f"agent at {address} for {key.verifying_key}\n"
        signer = AgentSigner(address)
        assert key.verifying_key.verify(Purpose.BLOCK, b"m", signer.sign(Purpose.BLOCK, b"m"))
        for pid in (process.pid, child_of(process.pid)):
            # What is not dumpable belongs to root in /proc: no other process of its user opens its memory.
            assert Path(f"/proc/{pid}/mem").stat().st_uid == 0
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert "Max core file size        0                    0" in limits
            assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text()
            assert str(key.verifying_key) not in Path(f"/proc/{pid}/cmdline").read_text()
        if os.geteuid():
            with pytest.raises(PermissionError):
                os.open(f"/proc/{child_of(process.pid)}/mem", os.O_RDONLY)
        signer.close()
        # Both, and again and again, as a supervisor that ends a whole group: it ends in order all the same.
        child, end = child_of(process.pid), time.monotonic() + 10
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.001)
        assert process.wait(0) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert not (tmp_path / "agent").exists()


LOOK = """
import json, os, sys
from isolate.cli import agent, main
from isolate.enclave import boot

load = agent._load

def look(path):
    print(json.dumps({"pid": os.getpid(), **boot.capabilities()}), flush=True)
    return load(path)

agent._load = look
main(["agent", *sys.argv[1:]])
"""


@pytest.mark.threat("HND-13")
def test_an_agent_reads_the_key_when_it_is_hardened_and_in_a_child(key: SigningKey, tmp_path: Path) -> None:
    key.save(tmp_path / "me.key")
    command = [sys.executable, "-c", LOOK, "-i", "me.key", "--listen", f"unix:{tmp_path / 'agent'}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        looked = json.loads(process.stdout.readline())
        assert looked.pop("pid") != process.pid
        assert looked and all(looked.values()), looked
        process.terminate()


def test_an_agent_takes_its_key_from_standard_input_and_ends_with_its_parent(
    key: SigningKey, tmp_path: Path
) -> None:
    key.save(tmp_path / "me.key")
    keys, address = (tmp_path / "me.key").read_bytes(), f"unix:{tmp_path / 'agent'}"
    (tmp_path / "me.key").unlink()
    with agent_process("-i", "-", "--listen", address, "--no-delegation", keys=keys, cwd=tmp_path) as (
        process,
        line,
    ):
        assert line.endswith(f"{key.verifying_key}\n")
        signer = AgentSigner(address)
        assert signer.sign(Purpose.INVOCATION, b"m") == key.sign(Purpose.INVOCATION, b"m")
        with pytest.raises(RefusedError):
            signer.sign(Purpose.BLOCK, b"m")
        signer.close()
        child = child_of(process.pid)
        process.kill()
        process.wait(10)
        assert gone(child)


@pytest.mark.parametrize(
    ("words", "keys", "status", "said"),
    [
        (["-i", "none.key", "--listen", "unix:a"], b"", 1, "isolate: storage:"),
        (["-i", "-", "--listen", "unix:a"], b"no key\n", 2, "isolate: key_format:"),
        (["-i", "-", "--listen", "unix:a"], b"", 2, "isolate: key_format:"),
        (["-i", "-"], b"", 2, "isolate: usage: where to listen?"),
    ],
)
def test_an_agent_that_cannot_start_says_so_in_one_line(
    words: list[str], keys: bytes, status: int, said: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    command = [sys.executable, "-m", "isolate", "agent", *words]
    done = subprocess.run(command, cwd=tmp_path, input=keys, capture_output=True, timeout=30, env=environment)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (status, b"", 1)
    assert done.stderr.decode().startswith(said)


def test_a_signer_of_a_command_may_be_an_agent(shop: Shop, agent: Callable[..., Any]) -> None:
    shop.grant()
    address = agent(shop.team).address
    assert shop.run(f"invoke team.handle --signer {address} op number=5") == "5\n"
    away = f"unix:{shop.path / 'nobody'}"
    assert "agent_unavailable" in shop.run(f"invoke team.handle --signer {away} op number=5", status=1)


# Digests of operations

APPLICATION = """
from isolate.enclave.operations import Integer, Label, operation
print("what a file prints is no digest")

@operation(inputs={"number": Integer(0, 9)}, output=Label(10))
def same(view, number):
    return number

@operation(inputs={}, output=Label(2))
def none(view):
    return 0

OPERATIONS = [same, none]
"""


def test_an_owner_learns_the_digests_of_an_application(tmp_path: Path, shop: Shop) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "operations.py").write_text(APPLICATION)
    main(["measure", str(app), "--operations", "operations.py"])
    captured = shop._capsys.readouterr()
    assert captured.err == f"isolate: running {app / 'operations.py'} with your rights, to learn its operations\n"
    spec: dict[str, Any] = {"__name__": "operations"}
    digests = json.loads(shop.run(f"measure {app} --operations operations.py --json"))
    assert [line.split() for line in captured.out.splitlines()] == [list(pair) for pair in digests.items()]
    # What the enclave says of itself is the same: it runs the same text.
    sys.path.insert(0, str(app))
    try:
        exec(compile("import operations; found = operations.OPERATIONS", "test", "exec"), spec)
    finally:
        sys.path.remove(str(app))
        sys.modules.pop("operations", None)
    assert digests == {one.name: one.digest.hex() for one in spec["found"]}


@pytest.mark.threat("HND-14")
def test_measuring_runs_nothing_unless_it_is_told_to(tmp_path: Path, shop: Shop) -> None:
    app = tmp_path / "app"
    app.mkdir()
    mark = tmp_path / "it ran"
    (app / "operations.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (app / "main.py").write_text("import operations\n")
    (app / "isolate.toml").write_text(
        f'[owner]\nroot = "{shop.team.verifying_key}"\nlineage = "acme"\n[enclave]\npurpose = "p"\njob = "j"\n'
    )
    shop.run(f"measure {app}")
    assert not mark.exists()
    assert "running" in last_but_one(lambda: main(["measure", str(app), "--operations", "operations.py"]))
    assert mark.exists()


def last_but_one(attempt: Callable[[], Any]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
        attempt()
    assert stop.value.code == 1 and "operations_unknown" in said.getvalue()
    return said.getvalue().splitlines()[-2]


def test_a_file_of_operations_that_is_none(tmp_path: Path, shop: Shop) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "empty.py").write_text("")
    (app / "raises.py").write_text("raise ValueError('why')\n")
    (tmp_path / "outside.py").write_text(APPLICATION)
    for file, said in (("empty.py", "no operation stands"), ("raises.py", "ValueError: why")):
        assert said in last_line(shop, f"measure {app} --operations {file}")
    for file in ("none.py", "../outside.py", "/etc/passwd"):
        shop.run(f"measure {app} --operations {file}", status=2)


def last_line(shop: Shop, line: str) -> str:
    with pytest.raises(SystemExit):
        main(line.split())
    return shop._capsys.readouterr().err.splitlines()[-1]
