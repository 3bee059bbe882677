"""`isolate serve` under requests that are made from its own description: valid, nearly valid, and rubbish.

The schemas of /openapi.json are turned into strategies. What comes of them goes to the running process over HTTP,
some of it properly signed by the owner or an attested enclave, so that it reaches what is behind the signatures.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import socket
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from isolate.attestation.evidence import Envelope, KeyDigests, Runtime, Slot
from isolate.attestation.policy import Policy, Reference
from isolate.cli import cli
from isolate.client.owner import Owner
from isolate.crypto import cbor
from isolate.crypto.kem import Identity
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose, SigningKey
from isolate.launch.root import SimulatedRoot
from isolate.messages.attest import (
    AttestAnswer,
    AttestRequest,
    CertificateRequest,
    Challenge,
    ChallengeRequest,
    ServiceCertificate,
)
from isolate.messages.base import MAX_MESSAGE, Refusal, Signed
from isolate.messages.http import Address, fetch, post

CANARY = "c4n4ry-in-a-request"
JOB = "fuzz/job"


# Twice in the list, drawn twice as often.
HOW = ["valid"] * 6 + ["limit"] * 3 + ["type", "unknown", "missing", "name", "deep", "flip", "cut", "raw"]
ODD = [""] * 12 + ["method", "path", "tail", "header", "log", "huge"]

TEXT = st.one_of(
    st.text(max_size=40), st.just(CANARY), st.sampled_from(["", "a/b", JOB, "x" * 129, "\x00", "\u202e"])
)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=40) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


# From a schema to strategies


class Description:
    """The service's description, and what can be made of it."""

    def __init__(self, told: dict[str, Any], keys: list[bytes], audience: str) -> None:
        self.told, self.keys, self.audience = told, keys, audience
        self.routes = {path: item["post"] for path, item in told["paths"].items() if "post" in item}
        self.files = [path for path, item in told["paths"].items() if "get" in item]

    def schema(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self.routes[path]["requestBody"]["content"]["application/cbor"]["schema"]
        return found

    def inner(self, path: str) -> dict[str, Any]:
        """The schema of the message that the route is about: the body of a signed one."""
        schema = self.schema(path)
        if "allOf" in schema:
            schema = schema["allOf"][1]["properties"]["body"]["contentSchema"]
        return self.resolve(schema)

    def resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in schema:
            found: Any = self.told
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def values(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """Values that the schema admits."""
        schema = self.resolve(schema)
        if "allOf" in schema:
            return self.signed_by_nobody(schema)
        if "const" in schema:
            return st.just(schema["const"])
        if "anyOf" in schema:
            return st.one_of([self.values(part) for part in schema["anyOf"]])
        least, most = schema.get("minLength", 0), schema.get("maxLength", 1300)
        match schema.get("type"):
            case "string" if schema.get("format") == "binary":
                return st.one_of(
                    st.binary(min_size=least, max_size=min(most, max(least, 80))),
                    st.integers(least, min(most, 4000)).map(bytes),
                )
            case "string":
                return TEXT.filter(lambda text: least <= len(text) <= most) if least else TEXT
            case "integer":
                low, high = schema["minimum"], schema["maximum"]
                return st.one_of(st.integers(low, high), st.sampled_from([low, high, min(max(1, low), high)]))
            case "boolean":
                return st.booleans()
            case "null":
                return st.none()
            case "array":
                first = schema.get("minItems", 0)
                return st.lists(self.values(schema["items"]), min_size=first, max_size=max(first, 3))
            case "object" if "properties" in schema:
                return st.fixed_dictionaries({name: self.values(one) for name, one in schema["properties"].items()})
            case "object":
                return st.dictionaries(TEXT, self.values(schema["additionalProperties"]), max_size=4)
        return ANYTHING

    def signed_by_nobody(self, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        """In a name that counts here, with a signature that does not."""
        outer, around = schema["allOf"]
        fields = {
            "body": self.values(around["properties"]["body"]["contentSchema"]).map(cbor.encode),
            "audience": st.sampled_from([self.audience] * 3 + ["svc/2"]),
            "key": st.sampled_from([*self.keys, bytes(64)]),
        }
        made = st.tuples(self.values(outer), st.fixed_dictionaries(fields))
        return made.map(lambda both: both[0] | both[1])

    def off_by_one(self, schema: dict[str, Any]) -> st.SearchStrategy[Any] | None:
        """Values just outside of a limit, where the schema has one."""
        found: list[Any] = []
        if "minLength" in schema:
            sizes = [schema["minLength"] - 1, schema["maxLength"] + 1]
            unit: Any = b"\0" if schema.get("format") == "binary" else "a"
            found = [unit * size for size in sizes if 0 <= size < 5000]
        elif schema.get("type") == "integer":
            found = [one for one in (schema["minimum"] - 1, schema["maximum"] + 1) if -(2**64) <= one < 2**64]
        elif "maxItems" in schema and schema["maxItems"] < 5000:
            found = [[b""] * (schema["maxItems"] + 1), ["a"] * (schema["maxItems"] + 1)]
        return st.sampled_from(found) if found else None

    @property
    def paths(self) -> list[str]:
        return list(self.routes)


def seldom(draw: Any, one_in: int) -> bool:
    return bool(draw(st.sampled_from([False] * (one_in - 1) + [True])))


@st.composite
def encoded(draw: Any, told: Description, schema: dict[str, Any]) -> bytes:
    """A message of this schema, or one that is wrong in one way."""
    message: dict[str, Any] = draw(told.values(schema))
    fields = [name for name in message if name != "type"]
    how = draw(st.sampled_from(HOW))
    if how == "limit":
        properties = told.resolve(schema)["properties"] if "allOf" not in schema else {}
        near = {name: told.off_by_one(told.resolve(one)) for name, one in properties.items()}
        if choices := [name for name, values in near.items() if values is not None]:
            name = draw(st.sampled_from(choices))
            message[name] = draw(near[name])
    elif how == "type" and fields:
        message[draw(st.sampled_from(fields))] = draw(ANYTHING)
    elif how == "unknown":
        message[draw(TEXT)] = draw(ANYTHING)
    elif how == "missing":
        del message[draw(st.sampled_from(list(message)))]
    elif how == "name":
        message["type"] = draw(st.one_of(ANYTHING, st.sampled_from([*told.told["components"]["schemas"]])))
    data = cbor.encode(message)
    if how == "deep":
        depth = draw(st.sampled_from([15, 16, 17, 1000, 100_000]))
        # As the value of one more field, the last one; the count in the head of the map is one higher.
        data = bytes([data[0] + 1]) + data[1:] + b"\x77" + b"z" * 23 + b"\x81" * depth + b"\x00"
    elif how == "flip":
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    elif how == "cut":
        data = data[: draw(st.integers(0, len(data)))] + draw(st.binary(max_size=9))
    elif how == "raw":
        data = draw(st.binary(max_size=200))
    return data


@st.composite
def unsigned(draw: Any, told: Description) -> tuple[str, str, bytes, dict[str, str]]:
    """A request that nobody signed: method, path, body, headers."""
    path = draw(st.sampled_from(told.paths))
    about = draw(st.sampled_from(told.paths)) if seldom(draw, 7) else path
    method, headers = "POST", {"Content-Type": "application/cbor"}
    body = draw(encoded(told, told.schema(about)))
    match draw(st.sampled_from(ODD)):
        case "method":
            method = draw(st.sampled_from(["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "FOO"]))
        case "path":
            path = draw(
                st.sampled_from([*told.files, "/", "/v1", "/v1/", path + "/", "/v1//log", "//", "/log/tile/0/000"])
            )
            method = draw(st.sampled_from(["GET", "GET", "POST"]))
        case "tail":
            path += draw(st.sampled_from(["?a=b", "%00", "%2e%2e/x", "/../x", "?" + "q" * 3000, "%ff", ";a"]))
        case "header":
            name = draw(st.sampled_from(["X-Forwarded-For", "Host", "Accept", "Content-Type", "Upgrade", "Cookie"]))
            headers[name] = draw(st.sampled_from(["", "a" * 5000, "websocket", "127.0.0.1", CANARY, "\t;,="]))
        case "log":
            path = "/log/" + draw(st.text("0123456789x/.ptileneschck", max_size=20))
            method = "GET"
        case "huge" if seldom(draw, 8):
            body += bytes(MAX_MESSAGE)
    return method, path, body, headers


@st.composite
def signed(draw: Any, told: Description, signers: dict[str, tuple[SigningKey, str]]) -> Any:
    """A request that is properly signed, by who may ask or may not, with a body that is well formed or not."""
    path = draw(st.sampled_from([one for one in told.paths if "x-signed-for" in told.routes[one]]))
    about = draw(st.sampled_from(told.paths)) if seldom(draw, 7) else path
    body = draw(encoded(told, told.inner(about)))
    purpose = told.routes[about if seldom(draw, 10) else path].get("x-signed-for", "service/request")
    who = told.routes[path]["x-asked-by"]
    who = draw(st.sampled_from([*signers])) if seldom(draw, 6) else who
    key, token = signers[who]
    if seldom(draw, 10):
        token = draw(TEXT)
    fresh = Secret.generate(32).expose().tobytes()
    nonce = bytes(32) if seldom(draw, 8) else fresh
    made = Signed.make(Purpose(purpose), key, body, nonce, told.audience, token)
    return "POST", path, made.encode(), {"Content-Type": "application/cbor"}


# The running service


class Caller:
    """One connection that is kept alive, and what came back over it."""

    def __init__(self, address: str, secrets: list[bytes]) -> None:
        self._where, self.secrets = Address.parse(address), secrets
        self._connection: http.client.HTTPConnection | None = None
        self.seen: Counter[tuple[int, str]] = Counter()

    def _connect(self) -> http.client.HTTPConnection:
        made = http.client.HTTPConnection("isolate", timeout=30)
        made.sock = socket.socket(socket.AF_UNIX)
        made.sock.settimeout(30)
        made.sock.connect(self._where.host)
        return made

    def send(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        for _ in range(2):
            self._connection = self._connection or self._connect()
            try:
                self._connection.request(method, path, body, headers)
                response = self._connection.getresponse()
                answer = response.read()
                break
            except (ConnectionError, http.client.RemoteDisconnected):
                # It was idle for too long, or the last answer ended it.
                self.close()
        else:
            raise AssertionError("no answer")
        if response.will_close:
            self.close()
        self.check(response.status, method, path, answer)

    def check(self, status: int, method: str, path: str, answer: bytes) -> None:
        code = "ok"
        # The log's files are for readers of tlog-tiles, and have none of our messages; nor has what is no HTTP.
        if path.startswith("/log/") or answer == b"Invalid HTTP request received.":
            code = f"http_{status}"
        elif status != 200 and method != "HEAD":
            refusal = Refusal.parse(answer)
            code = refusal.code
            assert re.fullmatch(r"[a-z0-9_]{1,64}", code)
            assert len(refusal.message) <= 500
        self.seen[status, code] += 1
        assert status < 500, (status, code)
        # Who asks may be told his own words; nobody is told the service's.
        assert b"Traceback" not in answer and b'File "' not in answer
        assert not any(secret in answer for secret in self.secrets)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def attested(service: Any) -> tuple[SigningKey, str]:
    """The key and result of an enclave that the owner's policy admits."""
    root, key = SimulatedRoot.generate(clock=lambda: int(time.time())), SigningKey.generate()
    registers = {index: bytes([index + 1]) * 48 for index in range(3)}
    references = (Reference("reader", "simulated", {f"PCR{index}": value for index, value in registers.items()}),)
    policy = Policy(
        lineage="acme", sequence=1, references=references, simulated_anchors=(root.fingerprint,),
        INSECURE_accept_simulated=True,
    )  # fmt: skip
    Owner(service.owner, service=service.address, lineage="acme").set_policy(policy)
    asked = ChallengeRequest(bytes(32), JOB, 0)
    challenge = post(service.address, "challenge", asked, Challenge)
    keys = {
        "hpke": Identity.generate().recipient.raw, "sign": key.verifying_key.to_bytes(), "channel": bytes(32),
    }  # fmt: skip
    runtime = Runtime(
        kind="simulated", nonce=challenge.nonce, keys_digest=KeyDigests.of(keys).digest, purpose="test",
        slot=Slot(JOB, 0, challenge.generation),
    )  # fmt: skip
    evidence = root.module("module-1").document(registers, runtime.binding(), runtime.nonce)
    request = AttestRequest(Envelope("simulated", evidence, (), runtime).encode(), keys)
    return key, post(service.address, "attest", request, AttestAnswer).token


def content(state: Path) -> dict[str, list[Any]]:
    """Every row of every table."""
    with contextlib.closing(sqlite3.connect(f"file:{state}/state.db?mode=ro", uri=True)) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: sorted(map(repr, database.execute(f"SELECT * FROM {name}"))) for name in names}


def fuzz(serving: Callable[..., Any], requests: int, **how: Any) -> Counter[tuple[int, str]]:
    """Half of the requests unsigned, which change nothing at all; then half of them signed."""
    service = serving(None, "--rate", "0")
    certificate = post(service.address, "certificate", CertificateRequest(), ServiceCertificate)
    enclave = attested(service)
    keys = [one.verifying_key.to_bytes() for one in (service.owner, enclave[0])]
    description = json.loads(fetch(service.address, "/openapi.json", most=1 << 20))
    told = Description(description, keys, certificate.audience)
    signers = {"owner": (service.owner, ""), "enclave": enclave, "holder": (SigningKey.generate(), "")}
    passphrase = (service.folder / "passphrase").read_bytes().strip()
    caller = Caller(service.address, [passphrase, os.fsencode(service.folder)])
    other = itertools.cycle(told.paths)

    def send(method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        """And then the same to another route: a request is for one."""
        caller.send(method, path, body, headers)
        caller.send("POST", next(other), body, headers)

    with contextlib.closing(caller):
        before = content(service.folder / "state")
        options = settings(
            max_examples=requests // 4,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            **how,
        )

        @options
        @given(unsigned(told))
        def by_nobody(request: Any) -> None:
            send(*request)

        @options
        @given(signed(told, signers))
        def by_somebody(request: Any) -> None:
            send(*request)

        by_nobody()
        assert content(service.folder / "state") == before
        by_somebody()
    serves_a_round(service, certificate)
    assert service.end() == 0
    lines = service.errors.read_text()
    for odd in ("Traceback", "request.failed", CANARY, passphrase.decode()):
        assert odd not in lines
    assert all(line.startswith("{") for line in lines.splitlines())
    return caller.seen


def serves_a_round(service: Any, certificate: ServiceCertificate) -> None:
    """Challenge, an owner's request, and a log that holds together."""
    asked = ChallengeRequest(b"c" * 32, "another/job", 1)
    challenge = post(service.address, "challenge", asked, Challenge)
    challenge.verify(service.owner.verifying_key, "acme", asked)
    Owner(service.owner, service=service.address, lineage="acme").set_rule("a/rule")
    words = ["log", "verify", "--owner", str(service.owner.verifying_key), "--lineage", "acme", "--json"]
    words += ["--remember", str(service.folder / "seen"), "--service", service.address]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["kinds"]["rule"] >= 1


# The requests went further than the first parser: who only knocks proves nothing.
SOME = {"ok", "malformed", "bad_signature"}
MANY = SOME | {
    "unknown_route",
    "usage",
    "not_owner",
    "replayed",
    "unknown_method",
    "unknown_asset",
    "wrong_audience",
    "too_large",
}


@pytest.mark.threat("SVC-37")
def test_500_requests_from_its_own_description(serving: Callable[..., Any]) -> None:
    seen = fuzz(serving, 500, derandomize=True)
    assert {code for _, code in seen} >= SOME
    assert sum(seen.values()) >= 490


@pytest.mark.slow
@pytest.mark.threat("SVC-37")
def test_10000_requests_from_its_own_description(serving: Callable[..., Any]) -> None:
    seen = fuzz(serving, 10_000)
    assert {code for _, code in seen} >= MANY
    assert sum(seen.values()) >= 10_000
