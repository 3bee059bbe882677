"""What the tests of sealed files share: keys, a small model, and files in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attrs import define, field

from isolate import Identity, SigningKey, sealed
from isolate.crypto import cbor
from isolate.crypto.aead import Suite
from isolate.crypto.digest import bulk_digest
from isolate.crypto.kdf import Label
from isolate.crypto.secret import Secret
from isolate.crypto.signing import Purpose
from isolate.sealed import header, keys, layout
from isolate.sealed.directory import encode_trailer
from isolate.sealed.dtypes import tensor_bytes
from isolate.sealed.recipients import AnyRecipient, wrap
from isolate.sealed.stores import MemorySink


@pytest.fixture(scope="session")
def owner() -> SigningKey:
    return SigningKey(Secret(b"owner".ljust(32, b".")))


@pytest.fixture(scope="session")
def stranger() -> SigningKey:
    return SigningKey(Secret(b"stranger".ljust(32, b".")))


@pytest.fixture(scope="session")
def identity() -> Identity:
    return Identity(Secret(b"identity".ljust(32, b".")))


@pytest.fixture(scope="session")
def other() -> Identity:
    return Identity(Secret(b"other".ljust(32, b".")))


@pytest.fixture(scope="session")
def model() -> dict[str, np.ndarray[Any, Any]]:
    """Five tensors, the first and third of several 4 KiB chunks."""
    generator = np.random.default_rng(1)
    return {
        "encoder.weight": generator.standard_normal((50, 64)).astype(np.float32),
        "encoder.bias": generator.standard_normal(64).astype(np.float16),
        "decoder.weight": generator.integers(-9, 9, (7, 11, 40)).astype(np.int64),
        "decoder.empty": np.zeros((0, 3), np.float64),
        "step": np.array(17, np.int32),
    }


@pytest.fixture(scope="session")
def seal(owner: SigningKey, identity: Identity) -> Callable[..., bytes]:
    """Seal into memory with 4 KiB chunks; keyword arguments as in SealedWriter."""

    def sealed_bytes(tensors: dict[str, np.ndarray[Any, Any]], **options: Any) -> bytes:
        sink = MemorySink()
        options = {"recipients": [identity.recipient], "sign": owner, "chunk_size": 4096, "threads": 1} | options
        with sealed.SealedWriter(sink, **options) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
        return sink.data

    return sealed_bytes


Change = Callable[[Any], Any]
_LENGTH = 8


@define
class Assembly:
    """A sealed file put together step by step, as its specification says; every step can be made to go wrong.

    ``change`` names a step: what it made goes through the function, and everything after it is made from the
    result, with valid keys, tags, digests and signature. So one fault is all that is wrong with the file.
    """

    compartments: dict[str, dict[str, np.ndarray[Any, Any]]]
    sign: SigningKey
    recipients: list[AnyRecipient]
    suite: Suite = Suite.AEGIS_256
    seed: bytes = b"kit"
    metadata: dict[str, str] = field(factory=lambda: {"format": "np"})
    epoch: int = 5
    change: dict[str, Change] = field(factory=dict)
    marks: dict[str, int] = field(factory=dict)

    def _do(self, step: str, value: Any) -> Any:
        return self.change[step](value) if step in self.change else value

    def _random(self, what: bytes) -> bytes:
        return hashlib.sha256(self.seed + what).digest()

    @property
    def params(self) -> layout.Params:
        return layout.Params(self.suite, 4096, self._random(b"salt"))

    @property
    def file_key(self) -> keys.FileKey:
        return keys.FileKey(self._random(b"file key"))

    def build(self) -> bytes:
        """The bytes of the file; ``marks`` then says where each part begins."""
        params, file_key = self.params, self.file_key
        digest, committed = bulk_digest(params.suite), keys.commitment(file_key, params)
        area = self._header(params, file_key, committed)
        data, footer, rows = b"", [], []
        for name, tensors in {"*": {}, **self.compartments}.items():
            key = keys.compartment_key(file_key, params, name)
            cipher = keys.part_cipher(key, params, name, Label.SEALED_CHUNKS)
            plain, entries = b"", []
            for tensor_name, tensor in tensors.items():
                dtype, shape, raw = tensor_bytes(tensor)
                entries.append([tensor_name, dtype, list(shape)])
                plain += bytes(raw).ljust(layout.align(len(raw)), b"\0")
            plain = self._do(f"plain {name}", plain)
            chunks, table = [], []
            for index in range(params.chunks(len(plain))):
                part = plain[index * params.chunk_size : (index + 1) * params.chunk_size]
                sealed_part = cipher.seal(part, keys.nonce(params, index))
                chunks.append(sealed_part[: len(part)])
                table.append(sealed_part[len(part) :] + digest(sealed_part[: len(part)]))
            chunks, table = self._do(f"chunks {name}", (chunks, table))
            body = self._do(
                f"manifest {name}", {"tensors": entries, "metadata": {} if name != "*" else self.metadata}
            )
            encoded = self._do(f"manifest cbor {name}", body if isinstance(body, bytes) else cbor.encode(body))
            section = (len(encoded).to_bytes(_LENGTH, "little") + encoded).ljust(
                layout.align(_LENGTH + len(encoded)), b"\0"
            )
            section = self._do(f"manifest section {name}", section)
            sealed_table = keys.part_cipher(key, params, name, Label.SEALED_TABLE).seal(
                b"".join(table), keys.nonce(params, 0)
            )
            sealed_manifest = keys.part_cipher(key, params, name, Label.SEALED_MANIFEST).seal(
                section, keys.nonce(params, 0)
            )
            self.marks[f"data {name}"] = layout.HEADER_SIZE + len(data)
            data += b"".join(chunks)
            sealed_table, sealed_manifest = self._do(f"sections {name}", (sealed_table, sealed_manifest))
            footer.append((name, sealed_table, sealed_manifest))
            row = {
                "id": name,
                "length": sum(map(len, chunks)),
                "commitment": keys.compartment_commitment(key, params, name),
                "table": digest(sealed_table),
                "manifest": digest(sealed_manifest),
                "size": len(sealed_manifest),
            }
            rows.append(self._do(f"row {name}", row))
        raw = area + data
        for name, sealed_table, sealed_manifest in footer:
            self.marks[f"table {name}"] = len(raw)
            raw += sealed_table
            self.marks[f"manifest {name}"] = len(raw)
            raw += sealed_manifest
        self.marks["directory"] = len(raw)
        directory = self._directory(params, committed, rows)
        raw += directory
        self.marks["trailer"] = len(raw)
        raw += self._do("trailer", encode_trailer(len(directory)))
        self.marks["end"] = len(raw)
        return bytes(self._do("file", raw))

    def _header(self, params: layout.Params, file_key: keys.FileKey, committed: bytes) -> bytes:
        stanzas = [dict(stanza.fields) for stanza in wrap(file_key, self.recipients, params, committed)]
        body = self._do(
            "slot",
            {
                "generation": 1,
                "suite": int(params.suite),
                "chunk": params.chunk_size,
                "salt": params.salt,
                "commitment": committed,
                "stanzas": stanzas,
            },
        )
        encoded = self._do("slot cbor", body if isinstance(body, bytes) else cbor.encode(body))
        authenticated = b"\x89isolate" + b"\1\0\0\0" + len(encoded).to_bytes(4, "little") + encoded
        authenticated = self._do("slot prefix", authenticated)
        mac = self._do("mac", keys.header_mac(file_key, params, authenticated))
        slot = self._do("slot raw", header.Slot.finish(authenticated, mac))
        return bytes(self._do("header", header.encode_header(slot)))

    def _directory(self, params: layout.Params, committed: bytes, rows: list[Any]) -> bytes:
        body = self._do(
            "directory",
            {
                "version": 1,
                "suite": int(params.suite),
                "chunk": params.chunk_size,
                "salt": params.salt,
                "commitment": committed,
                "model": "kit",
                "epoch": self.epoch,
                "previous": b"",
                "signer": self.sign.verifying_key.to_bytes(),
                "compartments": rows,
            },
        )
        encoded = self._do("directory cbor", body if isinstance(body, bytes) else cbor.encode(body))
        signature = self._do("signature", self.sign.sign_hybrid(Purpose.SEALED_DIRECTORY, encoded))
        return bytes(self._do("directory raw", encoded + signature))


@pytest.fixture(scope="session")
def assemble(owner: SigningKey, identity: Identity, model: dict[str, Any]) -> Callable[..., Assembly]:
    """An Assembly of the model in two compartments; keyword arguments as its fields."""

    def make(**options: Any) -> Assembly:
        groups = {
            "encoder": {name: tensor for name, tensor in model.items() if name.startswith("encoder")},
            "main": {name: tensor for name, tensor in model.items() if not name.startswith("encoder")},
        }
        return Assembly(**({"compartments": groups, "sign": owner, "recipients": [identity.recipient]} | options))

    return make
