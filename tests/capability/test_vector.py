"""The format stands still: a token and an invocation to the byte, read by a reader made from the specification."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cbor2
import nacl.bindings
import pytest

from isolate.capability import Invocation, Token, hash_arguments, verify, verify_invocation

VECTOR = Path(__file__).parents[1] / "vectors" / "capability" / "chain.json"


@pytest.fixture(scope="module")
def vector() -> Any:
    return json.loads(VECTOR.read_text())


def test_the_token_and_invocation_are_made_to_the_byte(vector: Any, chain: list[Any], call: Any) -> None:
    assert chain[2].encode().hex() == vector["token"]
    assert chain[2].to_text() == vector["text"]
    assert call().encode().hex() == vector["invocation"]


def test_they_are_read_to_the_same_meaning(vector: Any) -> None:
    token = Token.from_text(vector["text"])
    seen = verify(token, bytes.fromhex(vector["owner"]), now=vector["now"])
    assert [one.hex() for one in seen.handles] == vector["handles"]
    assert [one.hex() for one in seen.holders] == vector["holders"]
    assert seen.scope.encode().hex() == vector["scope"]
    invocation = Invocation.parse(bytes.fromhex(vector["invocation"]))
    arguments = hash_arguments(bytes.fromhex(vector["arguments"]))
    assert arguments.hex() == vector["argument_hash"]
    binding = bytes.fromhex(vector["channel_binding"])
    verified = verify_invocation(invocation, seen, channel_binding=binding, argument_hash=arguments)
    assert verified.id.hex() == vector["invocation_id"]


def signed(public: bytes, purpose: str, message: bytes, signature: bytes) -> None:
    framed = b"isolate/v1/" + purpose.encode() + b"\0" + message
    nacl.bindings.crypto_sign_open(signature + framed, public)


def test_a_second_reader_written_from_the_specification_agrees(vector: Any) -> None:
    outer = cbor2.loads(bytes.fromhex(vector["token"]))
    assert outer["version"] == 1
    handle, signer, purpose = bytes(32), bytes.fromhex(vector["owner"]), "capability/grant"
    for number, (block, signature) in enumerate(zip(outer["blocks"], outer["signatures"], strict=True)):
        handle = hashlib.sha256(b"isolate/v1/capability/handle\0" + handle + block).digest()
        assert handle.hex() == vector["handles"][number]
        signed(signer, purpose, handle, signature)
        signer, purpose = cbor2.loads(block)["holder"], "capability/block"
    call = bytes.fromhex(vector["invocation"])
    signature, body = call[:64], call[64:]
    signed(signer, "capability/invocation", body, signature)
    assert body[0] == 1 and body[9:41] == handle
    assert body[73:105].hex() == vector["argument_hash"] and body[105:137].hex() == vector["channel_binding"]
    assert body[153:] == b"classify"
    name = hashlib.sha256(b"isolate/v1/capability/invocation-id\0" + body).hexdigest()
    assert name == vector["invocation_id"]
