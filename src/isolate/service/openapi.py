"""The service's description in OpenAPI 3.1, made from the table of routes and the classes of the messages.

    >>> told = description()
    >>> told["components"]["schemas"]["challenge-request"]["properties"]["client_nonce"]
    {'type': 'string', 'format': 'binary', 'minLength': 32, 'maxLength': 32}

Bodies are deterministic CBOR, and the schemas describe the decoded value: a string of format ``binary`` is a byte
string, whose lengths count bytes; any other string is text. Nothing here is written by hand that a class says: what
the parser refuses and what the description says is one and the same. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from isolate.crypto.signing import Purpose
from isolate.messages.base import MAX_MESSAGE, Answer, Limit, Message, Refusal, Signed, hints
from isolate.service.routes import ROUTES, Route

MEDIA_TYPE = "application/cbor"
REFUSALS = {
    400: "The bytes are no message, or no such message",
    403: "Refused",
    404: "No such route",
    405: "No such method",
    408: "The body did not come whole in time",
    413: "The body is too large",
    429: "Too many requests from this peer: nothing was done",
    500: "Unforeseen",
    503: "The service cannot do it now; with code `busy` nothing was done",
}
# What is read with GET: path, media type, and a line about it.
FILES = {
    "/health": ("text/plain", "Whether the process serves"),
    "/metrics": ("text/plain", "Figures in the text form of Prometheus"),
    "/openapi.json": ("application/json", "This description"),
    "/log/{path}": (
        "application/octet-stream",
        "Checkpoint, tiles and entries of the log, as C2SP tlog-tiles has them",
    ),
}

_PURPOSES = {
    "enclave": Purpose.ENCLAVE_REQUEST,
    "holder": Purpose.HOLDER_REQUEST,
    "owner": Purpose.OWNER_REQUEST,
}
_TYPES: dict[Any, dict[str, Any]] = {
    bytes: {"type": "string", "format": "binary"},
    str: {"type": "string"},
    int: {"type": "integer", "minimum": -(2**64), "maximum": 2**64 - 1},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    Any: {},
}


def _schema(hint: Any) -> dict[str, Any]:
    """The schema of a field's type."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *notes = get_args(hint)
        found = _schema(inner)
        for limit in notes:
            if isinstance(limit, Limit):
                found |= _bounds(found["type"], limit)
        return found
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(part) for part in get_args(hint)]}
    if origin is list:
        return {"type": "array", "items": _schema(get_args(hint)[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(get_args(hint)[1])}
    return dict(_TYPES[hint])


def _bounds(kind: str, limit: Limit) -> dict[str, int]:
    least, most = {
        "integer": ("minimum", "maximum"),
        "string": ("minLength", "maxLength"),
        "array": ("minItems", "maxItems"),
        "object": ("minProperties", "maxProperties"),
    }[kind]
    return {least: limit.least, most: limit.most}


def _line(cls: Any) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split())


def message_schema(kind: type[Message]) -> dict[str, Any]:
    """The schema of a message: its type and exactly its fields."""
    fields = {name: _schema(hint) for name, hint in hints(kind).items()}
    return {
        "type": "object",
        "description": _line(kind),
        "properties": {"type": {"const": kind.TYPE}, **fields},
        "required": ["type", *fields],
        "additionalProperties": False,
    }


def _reference(kind: type[Message]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.TYPE}"}


def _around(outer: type[Message], inner: type[Message]) -> dict[str, Any]:
    """A signed message with another one, encoded, in its field ``body``."""
    body = {"contentMediaType": MEDIA_TYPE, "contentSchema": _reference(inner)}
    return {"allOf": [_reference(outer), {"properties": {"body": body}}]}


def _content(schema: dict[str, Any], media_type: str = MEDIA_TYPE) -> dict[str, Any]:
    return {media_type: {"schema": schema}}


def _operation(name: str, route: Route) -> dict[str, Any]:
    signed = route.who != "anyone"
    request = _around(Signed, route.request) if signed else _reference(route.request)
    answer = _around(Answer, route.answer) if signed else _reference(route.answer)
    found: dict[str, Any] = {
        "operationId": name.replace("/", "-"),
        "summary": _line(route.request) or route.request.TYPE,
        "x-asked-by": route.who,
        "requestBody": {"required": True, "content": _content(request)},
        "responses": {
            "200": {"description": "The answer", "content": _content(answer)},
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in REFUSALS},
        },
    }
    if signed:
        found["x-signed-for"] = str(_PURPOSES[route.who].value)
    return {"post": found}


def _file(path: str, media_type: str, said: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": path.strip("/").replace("/{path}", "-file").replace(".", "-"),
        "summary": said,
        "responses": {"200": {"description": said, "content": _content({"type": "string"}, media_type)}},
    }
    if "{path}" in path:
        found["parameters"] = [{"name": "path", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {"get": found}


@cache
def description() -> dict[str, Any]:
    """The whole description, as JSON has it."""
    kinds: list[type[Message]] = [Signed, Answer, Refusal]
    for route in ROUTES.values():
        kinds += [kind for kind in (route.request, route.answer) if kind not in kinds]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "The attestation service of isolate",
            "version": "1",
            "description": (
                "Bodies are deterministic CBOR (RFC 8949, 4.2.1); a schema is of the decoded value. A string of "
                f"format binary is a byte string, its lengths are bytes. A body has at most {MAX_MESSAGE} bytes."
            ),
        },
        "paths": {
            **{f"/v1/{name}": _operation(name, route) for name, route in ROUTES.items()},
            **{path: _file(path, *said) for path, said in FILES.items()},
        },
        "components": {
            "schemas": {kind.TYPE: message_schema(kind) for kind in sorted(kinds, key=lambda one: one.TYPE)},
            "responses": {
                str(status): {"description": said, "content": _content(_reference(Refusal))}
                for status, said in REFUSALS.items()
            },
        },
    }
