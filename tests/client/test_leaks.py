"""What a handle and a signer give away: to copies, to printers, to tracebacks, and to a walk over objects."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import gc
import json
import logging
import pickle
import pprint
import subprocess
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import attrs
import cloudpickle
import pytest
from attrs import evolve

from isolate import channel
from isolate.client.aio import AsyncHandle
from isolate.client.aio import attach as attach_async
from isolate.client.handle import Handle, HandleFile, attach
from isolate.client.signers import AgentSigner, FileSigner
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import HandshakeRefused, IsolateError, KeyFormatError, UsageError
from isolate.messages.base import Answer, Signed
from isolate.messages.invoke import Budget, Reply

KINDS = ["handle", "handle of an agent", "async handle", "file signer"]
CANARY = "canary-5f1c0b7e-of-an-argument"


def needles(key: SigningKey) -> list[bytes]:
    """The key in every form that a text of ours could have."""
    seed = bytes(key._seed.expose())
    return [seed, seed.hex().encode(), base64.urlsafe_b64encode(seed)[:40], repr(seed)[2:-1].encode()]


def shows(text: object, key: SigningKey) -> bool:
    body = text if isinstance(text, bytes) else str(text).encode()
    return any(needle in body for needle in needles(key))


@pytest.fixture
def path(key: SigningKey, tmp_path: Path) -> Path:
    key.save(tmp_path / "me.key")
    return tmp_path / "me.key"


@pytest.fixture
def things(file: HandleFile, key: SigningKey, path: Path, agent: Any) -> dict[str, Any]:
    signer = FileSigner(path)
    return {
        "handle": attach(file, signer=signer),
        "handle of an agent": attach(file, signer=AgentSigner(agent(key).address)),
        "async handle": asyncio.run(attach_async(file, signer=signer)),
        "file signer": signer,
    }


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "deepcopy within": lambda thing: copy.deepcopy({"here": [thing]}),
    **{f"pickle {number}": lambda thing, number=number: pickle.dumps(thing, number) for number in range(6)},
    "pickle within": lambda thing: pickle.dumps({"here": [thing]}),
    "cloudpickle": cloudpickle.dumps,
    "cloudpickle of a closure": lambda thing: cloudpickle.dumps(lambda: thing),
    "to a worker": ForkingPickler.dumps,
    "__reduce__": lambda thing: thing.__reduce__(),
    "__reduce_ex__": lambda thing: thing.__reduce_ex__(4),
    "__getstate__": lambda thing: thing.__getstate__(),
    "__copy__": lambda thing: thing.__copy__(),
    "__replace__": lambda thing: thing.__replace__(),
    **{f"object's, {n}": lambda thing, n=n: object.__reduce_ex__(thing, n) for n in range(5)},
}


@pytest.mark.threat("HND-1")
@pytest.mark.parametrize("kind", KINDS)
def test_no_way_of_copying_copies_a_handle_or_a_key(kind: str, things: dict[str, Any]) -> None:
    for name, way in COPIES.items():
        with pytest.raises(UsageError, match="not copied or pickled"):
            way(things[kind])
            pytest.fail(name)


def printed(thing: Any) -> Iterator[Any]:
    """Everything that ordinary ways of looking at an object show."""
    yield from (repr(thing), str(thing), f"{thing}", f"{thing:}", ascii(thing), pprint.pformat({"a": [thing]}))
    yield json.dumps({"a": thing}, default=repr)
    record = logging.LogRecord("l", logging.INFO, "f", 1, "%s %r", (thing, thing), None)
    yield logging.Formatter().format(record)
    # What stands in the slots, by way of object's own method: a signer at most, which shows no key either.
    yield object.__getstate__(thing)
    yield {name: getattr(type(thing), name, None) for name in dir(thing)}

    def user() -> None:
        holds = thing  # noqa: F841 (a local of a frame that is printed)
        raise KeyError("x")

    try:
        user()
    except KeyError as error:
        yield "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())


def refused(thing: Any) -> Iterator[Callable[[], Any]]:
    """Ways that find nothing to show."""
    yield lambda: vars(thing)
    yield lambda: thing.__dict__
    yield lambda: attrs.asdict(thing)
    yield lambda: attrs.astuple(thing)
    yield lambda: attrs.evolve(thing)
    yield lambda: dataclasses.asdict(thing)
    yield lambda: dataclasses.replace(thing)
    yield lambda: json.dumps(thing)
    yield lambda: json.dumps(thing, default=vars)


@pytest.mark.threat("HND-2")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_prints_a_handle_prints_a_key(kind: str, things: dict[str, Any], key: SigningKey) -> None:
    thing = things[kind]
    for text in printed(thing):
        assert not shows(text, key)
        assert "isolate-token-" not in str(text)
    for number, way in enumerate(refused(thing)):
        with pytest.raises((TypeError, AttributeError, attrs.exceptions.NotAnAttrsClassError)) as nothing:
            way()
            pytest.fail(str(number))
        assert not shows(nothing.value.args, key)


class Notebook:
    """What IPython asks of an object when it is the last line of a cell."""

    METHODS = ("_repr_html_", "_repr_markdown_", "_repr_svg_", "_repr_png_", "_repr_json_", "_repr_latex_")

    def __init__(self) -> None:
        self.texts: list[str] = []

    def text(self, text: str) -> None:
        self.texts.append(text)

    def show(self, thing: Any) -> str:
        # IPython asks for this name first, to find objects that answer to everything.
        assert getattr(thing, "_ipython_canary_method_should_not_exist_", None) is None
        said = [thing._repr_mimebundle_(include=None, exclude=None)]
        said += [getattr(thing, name)() for name in self.METHODS if hasattr(thing, name)]
        thing._repr_pretty_(self, False)
        return str([said, self.texts])


@pytest.mark.threat("HND-2")
@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_notebook_shows_scope_and_no_key(kind: str, things: dict[str, Any], key: SigningKey) -> None:
    said = Notebook().show(things[kind])
    assert "a/b" in said and "at most 9 uses" in said
    assert not shows(said, key) and "isolate-token-" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_ipython_itself_shows_no_key(kind: str, things: dict[str, Any], key: SigningKey) -> None:
    """A cell's result, `handle?`, and a traceback with the locals (%xmode Verbose), as its own code makes them."""
    formatters = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed")
    from IPython.core.oinspect import Inspector
    from IPython.core.ultratb import VerboseTB

    thing = things[kind]
    data, _ = formatters.DisplayFormatter().format(thing)
    said = [str(data), str(Inspector(theme_name="nocolor").info(thing, detail_level=1))]
    if kind != "file signer":
        assert data.keys() == {"text/plain", "text/html"} and "at most 9 uses" in data["text/html"]

    def user() -> None:
        holds = [thing]
        raise KeyError(len(holds))

    error = caught(user, KeyError)
    said.append(VerboseTB().text(type(error), error, error.__traceback__))
    assert "holds" in said[-1] and type(thing).__name__ in said[-1]
    assert not any(shows(one, key) or "isolate-token-" in one for one in said)


def test_a_key_without_its_seed_signs_and_is_not_saved(path: Path, key: SigningKey, tmp_path: Path) -> None:
    loaded = SigningKey.load(path)
    loaded.forget_seed()
    assert loaded.sign(Purpose.BLOCK, b"m") == key.sign(Purpose.BLOCK, b"m")
    with pytest.raises(UsageError):
        loaded.save(tmp_path / "again.key")
    assert not (tmp_path / "again.key").exists()


# Tracebacks


def frames(error: BaseException) -> Iterator[types.FrameType]:
    """The frames of ours in an error, and in those that it came from."""
    ours = str(Path(channel.__file__).parents[1])
    seen: list[BaseException] = [error]
    for one in seen:
        seen += [other for other in (one.__cause__, one.__context__) if other is not None and other not in seen]
        trace = one.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith(ours):
                yield trace.tb_frame
            trace = trace.tb_next


def kept(error: BaseException) -> str:
    """All that an error keeps: its own attributes, and the locals of our frames, as far as a walk finds."""
    said = [repr(error), str(error), repr(error.args), repr(vars(error))]
    for frame in frames(error):
        said += [repr(blob) for local in frame.f_locals.values() for blob in blobs(local)]
        said.append(repr(frame.f_locals))
    return "\n".join(said)


def blobs(root: Any) -> Iterator[bytes]:
    """The bytes and texts that can be reached from an object, classes and modules and running code aside."""
    closed = (
        type,
        types.ModuleType,
        types.FrameType,
        types.FunctionType,
        types.BuiltinFunctionType,
        types.CodeType,
    )
    seen, todo = {id(root)}, [root]
    while todo:
        one = todo.pop()
        if isinstance(one, bytes | bytearray | memoryview):
            yield bytes(one)
        elif isinstance(one, str):
            yield one.encode(errors="replace")
        for other in gc.get_referents(one):
            if id(other) not in seen and not isinstance(other, closed):
                seen.add(id(other))
                todo.append(other)


def caught(attempt: Callable[[], Any], kind: type[BaseException]) -> BaseException:
    try:
        attempt()
    except kind as error:
        return error
    raise AssertionError("it was allowed")


@pytest.mark.threat("HND-3")
def test_a_damaged_key_file_is_not_quoted_by_its_error(path: Path) -> None:
    text = path.read_text()
    line = text.splitlines()[-1]
    damaged = line[:-1] + ("A" if line[-1] != "A" else "B")
    path.write_text(text.replace(line, damaged))
    error = caught(lambda: FileSigner(path), KeyFormatError)
    assert damaged[:-1] not in kept(error)
    path.write_text(f"{line}\n{line}\n")
    assert line not in kept(caught(lambda: FileSigner(path), KeyFormatError))
    path.write_text(text.replace("ISOLATE-SIGNING-KEY-", "ISOLATE-SIGNING-KEY-é"))
    assert line[25:60] not in kept(caught(lambda: FileSigner(path), KeyFormatError))


@pytest.mark.threat("HND-3")
def test_the_traceback_of_a_refused_use_holds_no_argument_and_no_answer(
    things: dict[str, Any], wires: list[Any], key: SigningKey
) -> None:
    handle, answer = things["handle"], CANARY.replace("argument", "answer")
    for reply, kind in (
        (Reply("budget_exhausted", answer, "id"), IsolateError),
        (Reply("operation_failed", None, "id"), IsolateError),
        (HandshakeRefused("the peer is another"), HandshakeRefused),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        wires[0].answer = lambda _, reply=reply: reply
        handle.close()
        error = caught(lambda: handle.invoke("op", text=CANARY), kind)
        assert CANARY not in kept(error) and answer not in kept(error) and not shows(kept(error), key)
        assert error.__context__ is None and error.__cause__ is None
        assert len(list(frames(error))) == 1
    error = caught(lambda: handle.invoke("none", text=CANARY), IsolateError)
    assert CANARY not in kept(error)
    error = caught(lambda: handle.invoke("op", text=CANARY, number=1.5), IsolateError)
    assert CANARY not in kept(error)
    error = caught(lambda: asyncio.run(things["async handle"].invoke("none", text=CANARY)), IsolateError)
    assert CANARY not in kept(error)


@pytest.mark.threat("HND-3")
def test_the_traceback_of_a_failed_handshake_holds_no_key(
    house: Any, key: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a real handshake fails: with ephemeral keys and a transcript in the locals of its frames."""
    handle = attach(evolve(house.grant(key), job="another/job"), signer=key)
    error = caught(lambda: handle.invoke("op", text=CANARY), HandshakeRefused)
    assert [frame.f_code.co_filename.split("/")[-1] for frame in frames(error)] == ["boundary.py"]
    assert CANARY not in kept(error)
    other = asyncio.run(attach_async(handle.export(), signer=key))
    error = caught(lambda: asyncio.run(other.invoke("op", text=CANARY)), HandshakeRefused)
    assert [frame.f_code.co_filename.split("/")[-1] for frame in frames(error)] == ["boundary.py"]
    assert CANARY not in kept(error)


@pytest.mark.threat("HND-3")
def test_an_error_brings_no_earlier_one_along(things: dict[str, Any], realm: Any) -> None:
    """``raise X from None`` hides the first error and keeps it: whoever looks at __context__ finds its data."""

    def forge(route: str, body: bytes) -> tuple[int, bytes]:
        if route != "budget":
            return realm.serve(route, body)  # type: ignore[no-any-return]
        return 200, Answer.make(Signed.parse(body), Budget(999, None), SigningKey.generate()).encode()

    realm.courier = forge
    error = caught(lambda: things["handle"].budget, IsolateError)
    assert (error.__context__, error.__cause__, len(list(frames(error)))) == (None, None, 1)
    error = caught(lambda: attach("/nonexistent", signer=things["file signer"]), IsolateError)
    assert (error.__context__, error.__cause__, len(list(frames(error)))) == (None, None, 1)


@pytest.mark.threat("HND-3")
@pytest.mark.parametrize("use", ["invoke_joined", "budget"])
@pytest.mark.parametrize("kind", KINDS[1:3])
def test_every_way_to_ask_raises_without_its_frames(
    use: str, kind: str, things: dict[str, Any], realm: Any
) -> None:
    def away(*_: Any) -> Any:
        raise IsolateError("away")

    realm.courier = away
    handle = things[kind]

    def attempt() -> Any:
        asked = handle.budget if use == "budget" else handle.invoke_joined("op", {"other": handle}, text=CANARY)
        return asyncio.run(asked) if kind == "async handle" else asked

    error = caught(attempt, IsolateError)
    assert [frame.f_code.co_filename.split("/")[-1] for frame in frames(error)] == ["boundary.py"]
    assert CANARY not in kept(error)


@pytest.mark.threat("HND-3")
def test_what_a_signer_of_the_users_own_raises_brings_nothing_along(
    things: dict[str, Any], key: SigningKey
) -> None:
    """Also a group of errors, and one that names its cause."""

    def inner() -> None:
        text = CANARY
        try:
            raise KeyError(text)
        except KeyError as error:
            raise RuntimeError("of the HSM") from error

    class Signer:
        verifying_key = key.verifying_key

        def sign(self, purpose: Purpose, message: bytes) -> bytes:
            with contextlib.suppress(ValueError):
                try:
                    inner()
                except RuntimeError as error:
                    raise ExceptionGroup("two of them", [error, RuntimeError("x")]) from error
            raise AssertionError

    handle = attach(things["handle"].export(), signer=Signer())
    for attempt in (lambda: handle.budget, lambda: handle.attenuate(uses=1)):
        group = caught(attempt, ExceptionGroup)
        assert isinstance(group, ExceptionGroup)
        for one in (group, *group.exceptions):
            assert (one.__cause__, one.__context__) == (None, None)
            assert one is group or one.__traceback__ is None
        assert CANARY not in kept(group)


@pytest.mark.threat("HND-3")
def test_what_a_signer_fails_to_sign_is_in_no_frame(things: dict[str, Any]) -> None:
    away = AgentSigner("unix:/nonexistent/agent")
    for attempt, kind in (
        (lambda: things["file signer"].sign(Purpose.BLOCK, CANARY), TypeError),
        (lambda: away.sign(Purpose.BLOCK, CANARY.encode()), IsolateError),
        (lambda: away.verifying_key, IsolateError),
    ):
        error = caught(attempt, kind)
        assert [frame.f_code.co_filename.split("/")[-1] for frame in frames(error)] == ["boundary.py"]
        assert CANARY not in kept(error)


def test_a_traceback_shows_what_was_not_finished(things: dict[str, Any], path: Path) -> None:
    """traceback calls repr without a net: an object that has none yet would end whoever prints the error."""
    wiped = Secret(bytes(32))
    wiped.wipe()
    bad = evolve(things["handle"].export(), token="isolate-token-")
    for attempt, kind in (
        (lambda: SigningKey(wiped), UsageError),
        (lambda: Secret(3), TypeError),  # type: ignore[arg-type]
        (lambda: Handle(bad, things["file signer"]), IsolateError),
        (lambda: AsyncHandle(bad, things["file signer"]), IsolateError),
        (lambda: AgentSigner("tcp:host:1"), UsageError),
        (lambda: FileSigner(path.parent), IsolateError),
    ):
        error = caught(attempt, kind)
        assert traceback.TracebackException.from_exception(error, capture_locals=True).stack
    for unfinished in (Handle, AsyncHandle):
        assert "not attached" in repr(unfinished.__new__(unfinished))


# Memory


def test_the_walk_sees_a_key_that_is_there(key: SigningKey, path: Path) -> None:
    assert any(shows(blob, key) for blob in blobs([key]))
    assert any(shows(blob, key) for blob in blobs([SigningKey.load(path)]))


@pytest.mark.threat("HND-4")
@pytest.mark.parametrize("kind", KINDS)
def test_no_object_that_can_be_reached_holds_the_key(kind: str, things: dict[str, Any], key: SigningKey) -> None:
    assert not any(shows(blob, key) for blob in blobs([things[kind]]))


@pytest.mark.threat("HND-4")
def test_after_a_use_a_handle_keeps_neither_argument_nor_answer(house: Any, key: SigningKey, path: Path) -> None:
    answer = CANARY.replace("argument", "answer")
    house.answer = lambda _: Reply("", answer, "id")
    handle = attach(house.grant(key), signer=FileSigner(path))
    with handle:
        assert handle.invoke("op", text=CANARY) == answer
        found = list(blobs([handle]))
    assert not any(CANARY.encode() in blob or answer.encode() in blob or shows(blob, key) for blob in found)

    async def use() -> list[bytes]:
        async with await attach_async(handle.export(), signer=FileSigner(path)) as other:
            assert await other.invoke("op", text=CANARY) == answer
            return list(blobs([other._channel, other._token, other._signer, other._file]))

    found = asyncio.run(use())
    assert not any(CANARY.encode() in blob or answer.encode() in blob or shows(blob, key) for blob in found)


SCAN = """
import re, sys
from isolate.client.handle import HandleFile, attach
from isolate.client.signers import open_signer
from isolate.crypto.signing import Purpose

signer = open_signer(sys.argv[1])
handle = attach(HandleFile.load(sys.argv[2]), signer=signer)
handle.attenuate(uses=1)
signer.sign(Purpose.INVOCATION, b"m")
# The needle is turned over, so that it is not itself found.
needle, turn = bytes.fromhex(sys.argv[3]), bytes(255 - byte for byte in range(256))
found = 0
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps.read().splitlines():
        start, end, rights = re.match(r"(\\w+)-(\\w+) (\\S+)", line).groups()
        if not rights.startswith("rw") or "[v" in line:
            continue
        at, end = int(start, 16), int(end, 16)
        while at < end:
            memory.seek(at)
            part = memory.read(min(1 << 20, end - at))
            found += part.translate(turn).count(needle)
            at += 1 << 20
print(found)
"""


@pytest.mark.threat("HND-5")
def test_with_an_agent_the_key_is_nowhere_in_the_clients_memory(
    file: HandleFile, key: SigningKey, path: Path, agent: Any, tmp_path: Path
) -> None:
    file.save(tmp_path / "team.handle")
    turned = bytes(255 - byte for byte in key._seed.expose()).hex()

    def found(signer: str) -> int:
        command = [sys.executable, "-c", SCAN, signer, str(tmp_path / "team.handle"), turned]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    server = agent(key)
    assert found(server.address) == 0
    # The same look finds a key that is there: that of a process which loads the file, and keeps the seed.
    loads = SCAN.replace("signer = open_signer(sys.argv[1])", "signer = SigningKey.load(sys.argv[1])")
    loads = loads.replace("import Purpose", "import Purpose, SigningKey")
    command = [sys.executable, "-c", loads, str(path), str(tmp_path / "team.handle"), turned]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) > 0, done.stderr
