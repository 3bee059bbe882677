"""A canary in the data, and everything that leaves an enclave: none of it has the canary, unless a guard is gone.

What leaves: replies (as the client decrypts them), the enclave's output, what it sends the service and gets from it
(reservations, receipts), the service's lines, log and state, and the files that the operator keeps. Every operation
of the examples and of the demo runs, with good arguments and bad ones, and careless ones that try to give the data
away. Then each guard is taken out, and the same search must find the canary.
"""

from __future__ import annotations

import ast
import base64
import functools
import importlib.util
import itertools
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve, frozen

from isolate.capability.invocation import Invocation, ReplayGuard, hash_arguments
from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, SigningKey
from isolate.enclave import workload as workloads
from isolate.enclave.aggregates import Aggregates, Mean, Rows
from isolate.enclave.operations import Derived, Integer, Label, Operation, Text, Vector, operation
from isolate.enclave.runtime import Server
from isolate.enclave.view import Texts, View, pack_texts
from isolate.errors import CapabilityRefused, IsolateError
from isolate.messages.base import Signed
from isolate.messages.invoke import Invoke, Reply
from isolate.messages.receipts import ReceiptRequest, UseReceipt

ROOT = Path(__file__).parents[2]
BINDING = b"b" * 32
CANARY = "canary" + secrets.token_hex(16)  # of the form that codes have, so that it would pass as one
NUMBERS = np.random.default_rng().uniform(20, 90, 16)
SOUGHT = 4  # of them: whoever gives away the others gives away these
FINE = Mean(0, 2**20, 2**50)


def forms(name: str, secret: bytes) -> Iterator[tuple[str, bytes]]:
    """The bytes in every form in which a careless program could have written them."""
    yield f"{name}, raw", secret
    yield f"{name}, reversed", secret[::-1]
    yield f"{name}, hex", secret.hex().encode()
    yield f"{name}, HEX", secret.hex().upper().encode()
    for shift in range(3):
        # Without the first and last group, which also hold neighbours' bits.
        yield f"{name}, base64", base64.b64encode(bytes(shift) + secret)[4:-4]
        yield f"{name}, base64url", base64.urlsafe_b64encode(bytes(shift) + secret)[4:-4]


@functools.cache
def needles() -> list[tuple[str, bytes]]:
    found = [
        *forms("text", CANARY.encode()),
        *forms("text in UTF-16", CANARY.encode("utf-16-le")),
        *forms("text in big-endian UTF-16", CANARY.encode("utf-16-be")),
        ("text as JSON numbers", json.dumps(list(CANARY.encode()))[1:-1].encode()),
    ]
    for pair in itertools.pairwise(NUMBERS[:SOUGHT]):
        for dtype in ("<f8", ">f8", "<f4", ">f4"):
            found += forms(f"numbers as {dtype}", np.array(pair, dtype).tobytes())
    for number in NUMBERS[:SOUGHT]:
        found += [("number in decimal", repr(float(number)).encode())]
        step = round(number / 2**20 * 2**50)
        found += [("quantised number", cbor.encode(step)), ("quantised number in decimal", str(step).encode())]
    return found


def where(haystacks: dict[str, bytes]) -> set[str]:
    """In what of that which left the canary is."""
    sought = needles()
    return {place for place, bytes_ in haystacks.items() if any(needle in bytes_ for _, needle in sought)}


def data() -> dict[str, Any]:
    """A table, documents and weights with the canary in each."""
    rng = np.random.default_rng(1)
    table = {
        "respondent": np.arange(60), "educ": np.repeat([0, 1, 2, 3, 4, 5], 10), "vote": np.tile([0, 1], 30),
        "age": np.resize(NUMBERS, 60), "TVnews": np.resize(NUMBERS, 60) % 7,
        "department": np.tile([0, 1, 2], 20), "salary": np.resize(NUMBERS, 60) * 1000,
    }  # fmt: skip
    model = {
        "w1": rng.normal(size=(64, 16)), "b1": np.resize(NUMBERS, 16), "w2": np.resize(NUMBERS, (16, 10)),
        "b2": np.resize(NUMBERS, 10), "w": NUMBERS,
    }  # fmt: skip
    texts = [f"document {number}: {CANARY}" for number in range(5)]
    return {**table, **model, **pack_texts("titles", "abcde"), **pack_texts("documents", texts)}


# Operations that would give the data away


@operation(inputs={}, output=Label(10))
def text_for_a_label(view: View) -> Any:
    return CANARY


@operation(inputs={}, output=Text(2))
def text_too_long(view: View) -> Any:
    return view.texts("documents")[0][-len(CANARY) :]


@operation(inputs={}, output=Vector(4, 0, 100, 10))
def bytes_for_a_vector(view: View) -> Any:
    return view["w"].tobytes()


@operation(inputs={}, output=Label(10))
def raising(view: View) -> Any:
    raise CapabilityRefused(CANARY, code=CANARY, hint=view.texts("documents")[0])


@operation(inputs={}, output=Label(10))
def raising_with_numbers(view: View) -> Any:
    raise KeyError(view["w"], view.texts("documents")[:])


@operation(inputs={}, output=Label(10))
def printing(view: View) -> Any:
    print(view, view.texts("documents"), repr(view))
    return 1


@operation(inputs={}, output=Aggregates(("alone",), {"value": FINE}))
def one_person(view: View) -> Any:
    return Rows(np.array([7]), np.array([0]), {"value": view["w"][:1]})


@operation(inputs={}, output=Aggregates(("alone",), {"value": FINE}))
def finished_numbers(view: View) -> Any:
    return [view["w"].tobytes()]


@operation(inputs={"salt": Integer(0, 9)}, output=Derived())
def deriving(view: View, salt: int) -> Any:
    return {"w": view["w"], "documents": view["documents"]}


@operation(inputs={"model": Derived()}, output=Label(10))
def text_of_a_derived_one(view: View, model: View) -> Any:
    return model["documents"].tobytes().decode()[-len(CANARY) :]


CARELESS = [
    text_for_a_label, text_too_long, bytes_for_a_vector, raising, raising_with_numbers, printing, one_person,
    finished_numbers, deriving, text_of_a_derived_one,
]  # fmt: skip


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_operations(monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    search = load(ROOT / "examples" / "confidential_search_app" / "operations.py")

    class Nearest:
        """In the place of the embeddings, whose weights are no part of this test."""

        def nearest(self, question: str, top: int) -> Any:
            return np.arange(top)

    search.LIBRARY.append(Nearest())
    return [
        load(ROOT / "examples" / "enclave_demo.py").mean_salary,
        load(ROOT / "examples" / "clean_aggregates_app" / "operations.py").by_education,
        search.nearest_titles,
        *load(ROOT / "src" / "isolate" / "cli" / "demo" / "apps" / "classifier" / "operations.py").OPERATIONS,
    ]


GOOD: dict[str, dict[str, Any]] = {
    "mean_salary": {"department": 1}, "by_education": {"vote": "Dole"},
    "nearest_titles": {"question": "which?", "top": 2}, "classify": {"image": bytes(range(64))},
    "confidence": {"image": bytes(range(64))}, "deriving": {"salt": 1},
    "adapt": {"images": bytes(range(64)) * 20, "digits": bytes(range(10)) * 2},
}  # fmt: skip
BAD: list[dict[str, Any]] = [
    {}, {"department": 9}, {"vote": "anyone"}, {"question": "x" * 1000, "top": 1}, {"top": 5}, {"image": b""},
    {"image": bytes(64), "more": 1}, {"model": {"asset": "a/b", "digest": bytes(32), "handle": bytes(32)}},
]  # fmt: skip


@frozen
class Left:
    """All that left, by where."""

    realm: Any
    replies: list[bytes]
    carried: list[bytes]
    capture: Any

    def haystacks(self) -> dict[str, bytes]:
        said = self.capture.readouterr()
        files = {
            f"file {path.relative_to(self.realm.folder)}": path.read_bytes()
            for path in self.realm.folder.rglob("*")
            if path.is_file() and path.parent.name != "keys"
        }
        log = {f"log {number}": repr(one).encode() for number, one in enumerate(self.realm.entries())}
        return {
            "replies": b"".join(self.replies), "carried": b"".join(self.carried),
            "output": (said.out + said.err).encode(), **files, **log,
        }  # fmt: skip


@pytest.fixture
def use_everything(
    realm: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, bytes]]:
    """Runs every operation, with ``refusals`` also in every way that is refused, and answers all that left."""

    def run(*, refusals: bool = True) -> dict[str, bytes]:
        monkeypatch.setenv("ISOLATE_ASSETS", str(realm.folder))
        realm.asset()
        left = Left(realm, [], [], capfd)

        def courier(route: str, body: bytes) -> tuple[int, bytes]:
            status, answer = realm.serve(route, body)
            left.carried.extend((body, answer))
            return status, answer  # type: ignore[no-any-return]

        realm.courier = courier
        operations = [*example_operations(monkeypatch), *CARELESS]
        server = Server(realm.enclave(), "a/b", data(), operations)
        holder, counter, guard = SigningKey.generate(), itertools.count(1), ReplayGuard(BINDING)
        granted = {one.name: one.digest for one in operations}
        tokens = [realm.grant(holder, operations=granted, **more) for more in ({}, {"outputs": {}}, {"uses": 0})]

        def ask(token: Any, one: Operation, arguments: dict[str, Any]) -> Reply:
            invocation = Invocation.sign(
                token, holder, operation=one.name, operation_digest=one.digest,
                argument_hash=hash_arguments(cbor.encode(arguments)), channel_binding=BINDING,
                nonce=secrets.token_bytes(16), counter=next(counter),
            )  # fmt: skip
            message = Invoke(token.encode(), invocation.encode(), arguments).padded()
            left.replies.append(server.answer(message, BINDING, guard))
            assert len(left.replies[-1]) == one.reply_size
            return Reply.parse(left.replies[-1])

        named = {one.name: one for one in operations}
        derived, adapted = (ask(tokens[0], named[name], GOOD[name]) for name in ("deriving", "adapt"))
        assert derived.code == adapted.code == ""
        ask(tokens[0], text_of_a_derived_one, {"model": derived.value})
        assert ask(tokens[0], named["classify_with"], {"model": adapted.value, "image": bytes(64)}).code == ""
        codes = {one.name: ask(tokens[0], one, GOOD.get(one.name, {})).code for one in operations}
        assert {name for name, code in codes.items() if not code} >= {*GOOD, "printing"}
        leased = realm.grant(holder, operations=granted, lease=8)
        for one in operations if refusals else ():
            for token in (leased, leased, *tokens[1:]):
                ask(token, one, GOOD.get(one.name, {}))
            for arguments in BAD:
                ask(tokens[0], one, arguments)
        left.replies.append(server.answer(b"not a message", BINDING, guard))
        server._refusals.tell()
        for entry in realm.entries("settled"):
            body, audience = ReceiptRequest(entry["invocation"]).encode(), realm.state.audience
            asked = Signed.make(Purpose.HOLDER_REQUEST, holder, body, bytes(32), audience)
            assert {"kind": "settled", **cbor.decode(realm.ask("receipt", asked, UseReceipt).details)} == entry
        return left.haystacks()

    return run


@pytest.mark.threat("ENC-40")
def test_no_byte_of_the_canary_leaves(realm: Any, use_everything: Callable[..., dict[str, bytes]]) -> None:
    haystacks = use_everything()
    assert len(haystacks["replies"]) > 256 * 200
    kinds = {"use", "settled", "derive", "use refused", "invocation refused", "lease"}
    assert kinds <= {one["kind"] for one in realm.entries()}
    assert where(haystacks) == set()


def test_no_operation_of_an_example_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds one is told here to have it run on the canary, and with what arguments."""
    known = {one.name for one in example_operations(monkeypatch)}
    places = [ROOT / "examples", ROOT / "src" / "isolate" / "cli" / "demo"]
    written = {
        node.name
        for place in places
        for path in place.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(one, ast.Call) and ast.unparse(one.func) == "operation" for one in node.decorator_list)
    }
    assert written == known
    # All but the careless one, and the one that takes what another made, which runs on that.
    assert known - GOOD.keys() == {"weights", "classify_with"}


def test_the_search_finds_each_form() -> None:
    for _, value in needles():
        assert where({"here": b"before" + value + b"after", "there": b""}) == {"here"}


def _without_catching(self: Operation, view: View, decoded: Any, **given: Any) -> Any:
    return self.output.check(self.function(view, **decoded, **given))


def _shown(self: View) -> str:
    return repr({name: tensor.tobytes() for name, tensor in self._tensors.items()})


_CHECK = Aggregates.check


def _lists_as_they_are(self: Aggregates, value: Any) -> Any:
    return value if isinstance(value, list) else _CHECK(self, value)


_SAVE = workloads.sealed.save_file


def _saved_in_the_clear(tensors: Any, path: Any, **options: Any) -> bytes:
    Path(path).with_suffix(".plain").write_bytes(b"".join(tensor.tobytes() for tensor in tensors.values()))
    return _SAVE(tensors, path, **options)


def _as_it_is(self: Any, value: Any) -> Any:
    return value


# Guard -> what to replace by what, and where the canary must be found then.
GUARDS: dict[str, tuple[Any, str, Any, str]] = {
    "a label is a small number": (Label, "check", _as_it_is, "replies"),
    "a text has a length": (Text, "_fits", lambda self, value: True, "replies"),
    "a vector is made of numbers": (Vector, "check", _as_it_is, "replies"),
    "exceptions end in a code": (Operation, "run", _without_catching, "replies"),
    "codes alone are reported": (Operation, "run", _without_catching, "output"),
    "a view shows nothing": (View, "__repr__", _shown, "output"),
    "texts show nothing": (Texts, "__repr__", lambda self: str(list(self)), "output"),
    "small groups are left out": (
        Operation,
        "under",
        lambda self, least: (
            evolve(self, output=evolve(self.output, minimum_group=1)) if self.name == "one_person" else self
        ),
        "replies",
    ),
    "the gate computes the aggregates": (Aggregates, "check", _lists_as_they_are, "replies"),
    "what is derived is sealed": (workloads.sealed, "save_file", _saved_in_the_clear, "file "),
}


@pytest.mark.threat("ENC-40")
@pytest.mark.parametrize("guard", GUARDS)
def test_with_a_guard_removed_it_does_leave(
    guard: str, use_everything: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, without, place = GUARDS[guard]
    monkeypatch.setattr(owner, name, without)
    left = use_everything(refusals=False)
    assert where({one: bytes_ for one, bytes_ in left.items() if one.startswith(place)})


def test_errors_of_ours_carry_no_data_either() -> None:
    for one in CARELESS:
        if one.inputs:
            continue
        try:
            one.run(View(data()), {})
        except IsolateError as error:
            said = f"{error} {error!r} {vars(error)} {error.__cause__!r}"
            assert CANARY not in said
            assert sys.exc_info()[1] is error
