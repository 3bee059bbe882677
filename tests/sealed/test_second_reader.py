"""A second reader, written from docs/spec/sealed-file.md alone: nothing of isolate.sealed is used in it.

It opens the golden files with hashlib, cbor2 and the cryptographic libraries. What it needs to know is what the
specification must say.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import blake3
import cbor2
import nacl.bindings
import nacl.pwhash.argon2id
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from isolate import Identity  # X-Wing through HPKE is not this specification's

FOLDER = Path(__file__).parents[1] / "vectors" / "sealed"
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I8": "<i1"}


def hkdf(key: bytes, salt: bytes, *info: Any) -> bytes:
    """RFC 5869 with SHA-256, 32 bytes; section 3.1: info is the CBOR of the label and what follows."""
    prk = hmac.new(salt or bytes(32), key, "sha256").digest()
    return hmac.new(prk, cbor2.dumps(list(info)) + b"\1", "sha256").digest()


class File:
    """Sections 2 to 8, in order."""

    def __init__(self, data: bytes, about: dict[str, Any]) -> None:
        self.data = data
        self.slot = self.header()
        self.suite, self.chunk, self.salt = (self.slot[name] for name in ("suite", "chunk", "salt"))
        self.context = (1, self.suite, self.chunk)
        self.tag = 32 if self.suite == 1 else 16
        self.directory, self.end = self.read_directory(about["digest"])
        self.key = self.unlock(about)
        self.tensors: dict[str, Any] = {}
        self.metadata: dict[str, str] = {}
        self.compartments()

    def header(self) -> dict[str, Any]:
        area = self.data[:65536]
        slots = [area[:28672], area[28672:57344]]
        word = area[61440:61448]
        if not any(word):
            assert slots[0] == slots[1]
        found = []
        for slot in slots:
            magic, version, zero, length = struct.unpack_from("<8sHHI", slot)
            body, mac = slot[16 : 16 + length], slot[16 + length : 48 + length]
            if hashlib.sha256(slot[: 48 + length]).digest() != slot[48 + length : 80 + length]:
                assert any(word)
                continue
            assert (magic, version, zero) == (b"\x89isolate", 1, 0)
            assert not any(slot[80 + length :])
            found.append(cbor2.loads(body) | {"mac": mac, "authenticated": slot[: 16 + length]})
        return max(found, key=lambda slot: int(slot["generation"]))

    def read_directory(self, digest: str) -> tuple[dict[str, Any], int]:
        length, magic = struct.unpack("<Q8s", self.data[-16:])
        assert magic == b"etalosi\x89"
        whole = self.data[-16 - length : -16]
        raw, signature = whole[:-5325], whole[-5325:]
        assert hashlib.sha256(b"isolate/v1/sealed/digest\0" + raw).hexdigest() == digest
        body: dict[str, Any] = cbor2.loads(raw)
        for name in ("suite", "chunk", "salt", "commitment"):
            assert body[name] == self.slot[name]
        signed = b"isolate/v1/sealed/directory\0" + raw
        nacl.bindings.crypto_sign_open(signature[:64] + signed, body["signer"][:32])
        assert hashlib.sha256(signature[64:2016]).digest() == body["signer"][32:]
        MLDSA65PublicKey.from_public_bytes(signature[64:2016]).verify(signature[2016:], signed)
        return body, len(self.data) - 16 - length

    def unlock(self, about: dict[str, Any]) -> bytes:
        context = cbor2.dumps(["isolate/v1/sealed/stanza", *self.context, self.salt, self.slot["commitment"]])
        (stanza,) = self.slot["stanzas"]
        if stanza["type"] == "argon2id":
            passes, memory = stanza["passes"], stanza["memory"]
            raw = nacl.pwhash.argon2id.kdf(
                32, about["passphrase"].encode(), stanza["salt"], opslimit=passes, memlimit=memory * 1024
            )
            wrap = hkdf(raw, b"", "isolate/v1/sealed/passphrase", context, passes, memory)
            key = AESGCM(wrap).decrypt(bytes(12), stanza["box"], b"")
        else:
            identity = Identity.parse(about["identity"])
            assert (
                stanza["hint"]
                == (hashlib.sha256(b"isolate/v1/sealed/hint\0" + self.salt + identity.recipient.raw).digest()[:8])
            )
            key = bytes(identity.open(stanza["box"], info=context).expose())
        commitment = hkdf(key, self.salt, "isolate/v1/sealed/commitment", *self.context)
        assert commitment == self.slot["commitment"]
        mac_key = hkdf(key, self.salt, "isolate/v1/sealed/header", *self.context)
        assert hmac.new(mac_key, self.slot["authenticated"], "sha256").digest() == self.slot["mac"]
        return key

    def open(self, key: bytes, index: int, sealed: bytes) -> bytes:
        nonce = index.to_bytes(32 if self.suite == 1 else 12, "big")
        if self.suite == 1:
            return nacl.bindings.crypto_aead_aegis256_decrypt(sealed, b"", nonce, key)
        return (AESGCM(key) if self.suite == 2 else ChaCha20Poly1305(key)).decrypt(nonce, sealed, b"")

    def digest(self, data: bytes) -> bytes:
        return hashlib.sha256(data).digest() if self.suite == 2 else blake3.blake3(data).digest()

    def compartments(self) -> None:
        rows = self.directory["compartments"]
        data, footer = 65536, 65536 + sum(row["length"] for row in rows)
        for row in rows:
            name, length = row["id"], row["length"]
            if name == "*":
                key = hkdf(self.key, self.salt, "isolate/v1/sealed/directory", *self.context)
            else:
                key = hkdf(self.key, self.salt, "isolate/v1/sealed/compartment", *self.context, name)
            derived = {
                part: hkdf(key, self.salt, f"isolate/v1/sealed/{part}", *self.context, name)
                for part in ("compartment-commitment", "table", "manifest", "chunks")
            }
            assert derived["compartment-commitment"] == row["commitment"]
            count = -(-length // self.chunk)
            size = count * (self.tag + 32) + self.tag
            table, manifest = self.data[footer : footer + size], self.data[footer + size :][: row["size"]]
            assert (self.digest(table), self.digest(manifest)) == (row["table"], row["manifest"])
            entries = self.open(derived["table"], 0, table)
            section = self.open(derived["manifest"], 0, manifest)
            body = cbor2.loads(section[8 : 8 + int.from_bytes(section[:8], "little")])
            plain = b""
            for index in range(count):
                part = self.data[data + index * self.chunk : data + min(length, (index + 1) * self.chunk)]
                entry = entries[index * (self.tag + 32) :][: self.tag + 32]
                assert self.digest(part) == entry[self.tag :]
                plain += self.open(derived["chunks"], index, part + entry[: self.tag])
            at = 0
            for tensor, dtype, shape in body["tensors"]:
                size_of = prod(shape) * np.dtype(NUMPY[dtype]).itemsize
                self.tensors[tensor] = np.frombuffer(plain[at : at + size_of], NUMPY[dtype]).reshape(shape)
                at += -(-size_of // 4096) * 4096
            assert at == length
            self.metadata |= body["metadata"]
            data, footer = data + length, footer + size + row["size"]
        assert footer == self.end


@pytest.mark.parametrize("name", GOLDEN)
def test_the_second_reader_opens_the_golden_file(name: str) -> None:
    file = File((FOLDER / f"{name}.sealed").read_bytes(), GOLDEN[name])
    assert file.metadata == {"format": "np", "note": "golden"}
    assert list(file.tensors) == ["head.weight", "head.bias", "embed.weight", "empty", "scalar"]
    np.testing.assert_array_equal(
        file.tensors["embed.weight"], np.arange(3000, dtype=np.float32).reshape(30, 100) / 7
    )
    np.testing.assert_array_equal(file.tensors["head.weight"].ravel(), np.arange(-60, 60))
    assert file.tensors["scalar"] == 2.5
    assert file.tensors["empty"].shape == (0, 4)
