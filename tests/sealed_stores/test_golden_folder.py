"""Version 1 of sealed folders is frozen: the folder in tests/vectors/sealed_folder opens, today's writer makes the
same but for what is random, and the box of a shard follows from the specification alone.

It was made with ``python tests/sealed_stores/test_golden_folder.py``, once.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from safetensors.numpy import save_file as save_plain

from isolate import Identity, SigningKey, sealed
from isolate.crypto.aead import Suite
from isolate.crypto.secret import Secret

GOLDEN = Path(__file__).parents[1] / "vectors" / "sealed_folder"
DIGEST = "135d8d0345e749cb78343ba7df1b5bd1b8634f261f42e073898b327690bd1620"
SIGN, IDENTITY = (
    Secret(hashlib.sha256(f"sealed folder/{what}".encode()).digest()) for what in ("sign", "identity")
)
FILES = {"config.json": b'{"hidden_size": 4}', "1_Pooling/config.json": b"{}", "empty.txt": b""}


def parts() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    return {
        "model-00001-of-00002.safetensors": {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4)},
        "model-00002-of-00002.safetensors": {"b.weight": np.arange(-8, 8, dtype=np.int8), "b.bias": np.array(2.5)},
    }


def seal(target: Path) -> bytes:
    """The same folder, sealed now."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for path, raw in FILES.items():
            (root / path).parent.mkdir(exist_ok=True)
            (root / path).write_bytes(raw)
        for path, tensors in parts().items():
            save_plain(tensors, root / path, metadata={"format": "np"})
        weight_map = {key: path for path, tensors in parts().items() for key in tensors}
        (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        options: dict[str, Any] = {"model_id": "golden", "epoch": 7, "suite": Suite.AEGIS_256}
        recipient = Identity(IDENTITY).recipient
        return sealed.seal_folder(root, target, recipients=[recipient], sign=SigningKey(SIGN), **options)


def read(folder: Path) -> dict[str, Any]:
    pins = {"signed_by": SigningKey(SIGN).verifying_key, "expect": sealed.Epoch(7)}
    with sealed.open_folder(folder, identity=Identity(IDENTITY), **pins) as opened:
        found: dict[str, Any] = {name: opened.read(name) for name in opened.files}
        found |= {name: (t.dtype.str, t.shape, t.tobytes()) for name, t in opened.state_dict().items()}
        return found


def test_the_golden_folder_opens() -> None:
    found = read(GOLDEN)
    for part in parts().values():
        for name, tensor in part.items():
            assert found[name] == (tensor.dtype.str, tensor.shape, tensor.tobytes())
    assert {name: found[name] for name in FILES} == FILES
    assert sealed.public_facts(GOLDEN / "folder.sealed").digest.hex() == DIGEST


def test_today_makes_the_same_but_for_what_is_random(tmp_path: Path) -> None:
    seal(tmp_path / "now")
    assert read(tmp_path / "now") == read(GOLDEN)
    sizes = [{path.name: path.stat().st_size for path in folder.iterdir()} for folder in (tmp_path / "now", GOLDEN)]
    assert sizes[0] == sizes[1]


def test_the_key_of_a_shard_follows_from_the_specification() -> None:
    """docs/spec/sealed-folder.md, sections 2 and 3, with no code of the room but the reader of sealed files."""
    pins = {"signed_by": SigningKey(SIGN).verifying_key}
    tensors = sealed.load_file(GOLDEN / "folder.sealed", identity=Identity(IDENTITY), **pins)
    record = cbor2.loads(tensors["shards"].tobytes())
    assert sorted(record) == ["id", "key", "shards", "version"]
    for number, row in enumerate(record["shards"], 1):
        path = GOLDEN / f"shard-0000{number}.sealed"
        assert path.stat().st_size == row["size"]
        raw = path.read_bytes()
        header = cbor2.loads(raw[16 : 16 + int.from_bytes(raw[12:16], "little")])
        (stanza,) = header["stanzas"]
        assert stanza["key"] == f"isolate-folder:{record['id'].hex()}"
        context = cbor2.dumps(
            ["isolate/v1/sealed/stanza", 1, header["suite"], header["chunk"], header["salt"], header["commitment"]]
        )
        info = cbor2.dumps(["isolate/v1/sealed/folder", context])
        key = HKDF(SHA256(), 32, None, info).derive(record["key"])
        file_key = sealed.FileKey(AESGCM(key).decrypt(bytes(12), stanza["box"], None))
        facts = sealed.public_facts(path)
        assert (facts.digest, facts.epoch) == (row["digest"], row["epoch"])
        keys = sealed.compartment_keys(file_key, facts)

        class Given:
            def __init__(self, keys: sealed.CompartmentKeys) -> None:
                self.keys = keys

            def unlock(self, facts: sealed.PublicFacts) -> sealed.CompartmentKeys:
                return self.keys

        found = sealed.load_file(path, identity=Given(keys))
        assert found.keys() == parts()[row["name"]].keys()


if __name__ == "__main__":
    print(seal(GOLDEN).hex())
