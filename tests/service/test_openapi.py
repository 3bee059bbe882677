"""The service's description says what the service does: every route, and every limit that a parser enforces."""

from __future__ import annotations

import json
from typing import Any, get_args, get_origin

import pytest
from click.testing import CliRunner

from isolate.cli import cli
from isolate.crypto import cbor
from isolate.errors import IsolateError, MalformedError
from isolate.messages.base import Answer, Limit, Message, Refusal, Signed, hints
from isolate.service.app import Application
from isolate.service.openapi import FILES, REFUSALS, description, message_schema
from isolate.service.routes import ROUTES

KINDS = sorted(
    {Signed, Answer, Refusal} | {kind for route in ROUTES.values() for kind in (route.request, route.answer)},
    key=lambda kind: kind.TYPE,
)


def test_every_route_and_message_is_described_and_nothing_else() -> None:
    told = description()
    assert set(told["paths"]) == {f"/v1/{name}" for name in ROUTES} | set(FILES)
    assert set(told["components"]["schemas"]) == {kind.TYPE for kind in KINDS}
    for name, route in ROUTES.items():
        operation = told["paths"][f"/v1/{name}"]["post"]
        asked = json.dumps(operation["requestBody"])
        assert f'"#/components/schemas/{route.request.TYPE}"' in asked
        assert (
            ('"#/components/schemas/signed"' in asked) is ("x-signed-for" in operation) is (route.who != "anyone")
        )
        assert f'"#/components/schemas/{route.answer.TYPE}"' in json.dumps(operation["responses"]["200"])
        assert set(operation["responses"]) == {"200"} | {str(status) for status in REFUSALS}


def test_every_reference_leads_somewhere_and_names_are_used_once() -> None:
    told = description()

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            if "$ref" in part:
                found: Any = told
                for name in part["$ref"].removeprefix("#/").split("/"):
                    found = found[name]
            for one in part.values():
                walk(one)
        elif isinstance(part, list):
            for one in part:
                walk(one)

    walk(told)
    names = [operation["operationId"] for item in told["paths"].values() for operation in item.values()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.TYPE))
def test_a_message_has_exactly_the_fields_of_its_schema(kind: type[Message]) -> None:
    schema = message_schema(kind)
    assert schema["properties"].pop("type") == {"const": kind.TYPE}
    assert schema["required"] == ["type", *schema["properties"]] == ["type", *hints(kind)]
    assert schema["additionalProperties"] is False


def limits() -> list[Any]:
    found = []
    for kind in KINDS:
        for name, hint in hints(kind).items():
            parts = [part for part in get_args(hint) if isinstance(part, Limit)]
            found += [pytest.param(kind, name, part, id=f"{kind.TYPE}-{name}") for part in parts]
    return found


def sample(hint: Any) -> Any:
    """The least value that a type with its limits admits."""
    notes = [part for part in get_args(hint) if isinstance(part, Limit)]
    if notes:
        return of_size(get_args(hint)[0], notes[0].least)
    if get_origin(hint) in (list, dict):
        return get_origin(hint)()
    if get_args(hint):
        return sample(get_args(hint)[0])
    return {bytes: b"", str: "", int: 0, bool: False}.get(hint)


def of_size(inner: Any, size: int) -> Any:
    if inner is int:
        return size
    if get_origin(inner) is list:
        return [sample(get_args(inner)[0])] * size
    return b"\0" * size if inner is bytes else "a" * size


@pytest.mark.parametrize(("kind", "name", "limit"), limits())
def test_what_the_schema_says_of_a_size_is_what_the_parser_refuses(
    kind: type[Message], name: str, limit: Limit
) -> None:
    """One less and one more are refused, also by a class that has checks of its own and could forget its base's."""
    schema = message_schema(kind)["properties"][name]
    ends = [schema[key] for key in schema if key.startswith(("min", "max"))]
    assert ends == [limit.least, limit.most]
    inner = get_args(hints(kind)[name])[0]
    fields = {field: sample(hint) for field, hint in hints(kind).items()}
    for size in (limit.least - 1, limit.most + 1):
        if (size < 0 and inner is not int) or not -(2**64) <= size < 2**64:
            continue
        raw = cbor.encode({"type": kind.TYPE, **fields, name: of_size(inner, size)})
        with pytest.raises(MalformedError) as refused:
            kind.parse(raw)
        assert str(refused.value).startswith(f"{name} of message {kind.TYPE} is {limit}")


def test_limits_inside_of_lists_are_described_too() -> None:
    recovery = message_schema(ROUTES["certificate"].answer)["properties"]["recovery"]
    assert recovery["items"] == {"type": "string", "format": "binary", "minLength": 1216, "maxLength": 1216}
    assert (recovery["minItems"], recovery["maxItems"]) == (0, 16)


def test_the_paths_that_are_read_are_those_of_the_application(realm: Any) -> None:
    served = {route.path for route in Application(realm.service)._app.routes}  # type: ignore[attr-defined]
    assert {path.replace("{path}", "{path:path}") for path in FILES} | {"/v1/{route:path}"} == served


def test_the_command_prints_it_without_a_state() -> None:
    done = CliRunner().invoke(cli, ["serve", "--openapi"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout) == description()


def test_a_type_that_has_no_schema_is_no_field() -> None:
    from attrs import frozen

    @frozen
    class Odd(Message):
        TYPE = "odd"
        value: float

    with pytest.raises((KeyError, IsolateError)):
        message_schema(Odd)
