"""Sealed folders: every file comes back, and no shard can be swapped, dropped, added, rolled back or left plain."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file as load_plain
from safetensors.numpy import save_file as save_plain

from isolate import Epoch, Identity, KeyWrapper, SigningKey, sealed
from isolate.cli import cli
from isolate.crypto import cbor
from isolate.crypto.secret import Secret
from isolate.errors import (
    IsolateError,
    MalformedError,
    NoRecipient,
    NotSealed,
    RolledBack,
    StorageError,
    Tampered,
    Truncated,
    UnauthenticatedOrigin,
    UsageError,
)
from isolate.sealed.folder_manifest import FolderManifest, Shard, ShardKey
from isolate.sealed.objects import ObjectFolder
from isolate.sealed.stores import MemorySink

INDEX = "model.safetensors.index.json"
CONFIG = {"architectures": ["SecretArchitecture"], "hidden_size": 64}


def shards(rows: int = 64) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(5)
    return {
        f"model-0000{number}-of-00003.safetensors": {
            f"secret_layer.{number}.weight": generator.standard_normal((rows, 64)).astype(np.float32),
            f"secret_layer.{number}.bias": generator.standard_normal(64).astype(np.float16),
        }
        for number in (1, 2, 3)
    }


def make_plain(root: Path, parts: dict[str, dict[str, np.ndarray[Any, Any]]]) -> Path:
    """A folder as Hugging Face has it, with a subfolder and with files that are left out."""
    (root / "1_Pooling").mkdir(parents=True)
    (root / ".cache").mkdir()
    for name, tensors in parts.items():
        save_plain(tensors, root / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in parts.items() for key in tensors}
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (root / "config.json").write_text(json.dumps(CONFIG))
    (root / "tokenizer.json").write_text('{"model": {"secret_word": 7}}')
    (root / "1_Pooling" / "config.json").write_text("{}")
    (root / "empty.txt").touch()
    (root / ".cache" / "junk").write_text("left out")
    (root / ".gitattributes").write_text("left out")
    return root


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return make_plain(tmp_path / "plain", shards())


@pytest.fixture
def target(plain: Path, tmp_path: Path, owner: SigningKey, identity: Identity) -> Path:
    target = tmp_path / "target"
    sealed.seal_folder(plain, target, recipients=[identity.recipient], sign=owner, model_id="m", epoch=4)
    return target


@pytest.fixture
def whole(identity: Identity, owner: SigningKey) -> Callable[..., dict[str, Any]]:
    """Open a folder and read everything in it."""

    def read(path: Any, **options: Any) -> dict[str, Any]:
        options = {"identity": identity, "signed_by": owner.verifying_key} | options
        with sealed.open_folder(path, **options) as folder:
            for name in folder.files:
                folder.read(name)
            return folder.state_dict()

    return read


def expected() -> dict[str, np.ndarray[Any, Any]]:
    return {key: tensor for part in shards().values() for key, tensor in part.items()}


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_everything_comes_back(plain: Path, target: Path, identity: Identity, owner: SigningKey) -> None:
    names = sorted(path.name for path in target.iterdir())
    assert names == ["folder.sealed", "shard-00001.sealed", "shard-00002.sealed", "shard-00003.sealed"]
    with sealed.open_folder(target, identity=identity, signed_by=owner.verifying_key) as folder:
        assert folder.config == CONFIG
        assert folder.files == ("1_Pooling/config.json", "config.json", "empty.txt", INDEX, "tokenizer.json")
        for name in folder.files:
            assert folder.read(name) == (plain / name).read_bytes()
        assert list(folder.tokenizer) == ["tokenizer.json"]
        assert folder.weights == tuple(shards())
        assert folder.keys() == sorted(expected())
        assert same(folder.state_dict(), expected())
        assert same({name: folder.get_tensor(name) for name in expected()}, expected())
        assert same(dict(folder.tensors()), expected())
        with folder.open_weights("model-00002-of-00003.safetensors") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert (folder.facts.model_id, folder.facts.epoch) == ("m", 4)
        with pytest.raises(UsageError):
            folder.read("absent")
        with pytest.raises(UsageError):
            folder.get_tensor("absent")
        with pytest.raises(UsageError):
            folder.open_weights("absent")
    with pytest.raises(IsolateError):
        folder.state_dict()


@pytest.mark.threat("SEAL-43")
def test_nothing_of_the_plain_folder_is_in_the_clear(target: Path) -> None:
    raw = b"".join(path.read_bytes() for path in target.iterdir())
    for text in (b"secret_", b"Secret", b"config.json", b"tokenizer", b"safetensors", b"hidden_size", b"F32"):
        assert text not in raw


def test_unseal_gives_the_folder_back(
    plain: Path, target: Path, tmp_path: Path, identity: Identity, owner: SigningKey
) -> None:
    out, steps = tmp_path / "out", []
    sealed.unseal_folder(target, out, identity=identity, signed_by=owner.verifying_key, progress=steps.append)
    assert steps == sorted(steps)
    for path in plain.rglob("*"):
        if path.is_file() and not path.relative_to(plain).as_posix().startswith("."):
            copy = out / path.relative_to(plain)
            assert copy.stat().st_mode & 0o777 == 0o600
            if path.suffix == ".safetensors":
                assert same(load_plain(copy), load_plain(path))
            else:
                assert copy.read_bytes() == path.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match="not empty"):
        sealed.unseal_folder(target, out, identity=identity, signed_by=owner.verifying_key)


def test_origin_and_epoch_are_asked_for(target: Path, whole: Any, stranger: SigningKey, other: Identity) -> None:
    digest = sealed.public_facts(target / "folder.sealed").digest
    assert same(whole(target, signed_by=None, expect=digest), expected())
    assert same(whole(target, expect=Epoch(4)), expected())
    for error, options in (
        (UnauthenticatedOrigin, {"signed_by": None}),
        (UnauthenticatedOrigin, {"signed_by": stranger.verifying_key}),
        (RolledBack, {"expect": Epoch(5)}),
        (RolledBack, {"expect": bytes(32)}),
        (NoRecipient, {"identity": other}),
    ):
        with pytest.raises(error):
            whole(target, **options)


def swap(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    first, second = (target / f"shard-0000{n}.sealed" for n in (1, 2))
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def double(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(target / "shard-00001.sealed", target / "shard-00002.sealed")


def drop(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    (target / "shard-00003.sealed").unlink()


def drop_all(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    for path in target.glob("shard-*"):
        path.unlink()


def drop_manifest(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    (target / "folder.sealed").unlink()


def extra(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(target / "shard-00001.sealed", target / "shard-00004.sealed")


def extra_weights(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    (target / "pytorch_model.bin").write_bytes(b"a pickle, say")


def extra_folder(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    (target / "more").mkdir()


def roll_back(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(old / "shard-00002.sealed", target / "shard-00002.sealed")


def roll_back_manifest(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(old / "folder.sealed", target / "folder.sealed")


def strangers(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(stranger / "shard-00002.sealed", target / "shard-00002.sealed")


def strangers_folder(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    for path in stranger.iterdir():
        shutil.copy(path, target)


def plain_shard(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    path = target / "shard-00002.sealed"
    raw = (plain / "model-00002-of-00003.safetensors").read_bytes()
    path.write_bytes(raw.ljust(path.stat().st_size, b"\0"))


def plain_beside(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(plain / "model-00002-of-00003.safetensors", target)


def plain_index(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(plain / INDEX, target)


def cut(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    os.truncate(target / "shard-00002.sealed", 70_000)


def flip(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    path = target / "shard-00003.sealed"
    raw = bytearray(path.read_bytes())
    raw[70_000] ^= 1
    path.write_bytes(raw)


def shard_as_manifest(target: Path, old: Path, stranger: Path, plain: Path) -> None:
    shutil.copy(target / "shard-00001.sealed", target / "folder.sealed")


@pytest.mark.threat("SEAL-44")
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (swap, RolledBack), (double, RolledBack), (drop, Truncated), (drop_all, Truncated),
        (drop_manifest, Truncated), (extra, Tampered), (extra_weights, Tampered), (extra_folder, Tampered),
        (roll_back, RolledBack), (roll_back_manifest, RolledBack), (strangers, UnauthenticatedOrigin),
        (strangers_folder, UnauthenticatedOrigin), (plain_shard, NotSealed), (plain_beside, NotSealed),
        (plain_index, NotSealed), (cut, Truncated), (flip, Tampered), (shard_as_manifest, NoRecipient),
    ],
)  # fmt: skip
def test_a_changed_folder_is_refused(
    change: Callable[..., None], error: type, plain: Path, target: Path, tmp_path: Path, identity: Identity,
    owner: SigningKey, stranger: SigningKey, whole: Any,
) -> None:  # fmt: skip
    old, theirs = tmp_path / "old", tmp_path / "theirs"
    sealed.seal_folder(plain, old, recipients=[identity.recipient], sign=owner, model_id="m", epoch=3)
    sealed.seal_folder(plain, theirs, recipients=[identity.recipient], sign=stranger, model_id="m", epoch=4)
    assert same(whole(target), expected())
    change(target, old, theirs, plain)
    with pytest.raises(error):
        whole(target)


def test_people_may_put_a_readme_beside_it(target: Path, whole: Any) -> None:
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (target / name).write_text("for people")
    (target / ".git").mkdir()
    assert same(whole(target), expected())


@pytest.mark.threat("SEAL-44")
def test_a_shard_opens_with_the_folder_only(target: Path, identity: Identity, owner: SigningKey) -> None:
    with pytest.raises(NoRecipient):
        sealed.load_file(target / "shard-00001.sealed", identity=identity, signed_by=owner.verifying_key)


def test_a_plain_folder_is_no_sealed_one(plain: Path, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(NotSealed, match="plain"):
        whole(plain)
    with pytest.raises(NotSealed):
        whole(tmp_path / "plain" / "1_Pooling")
    with pytest.raises(StorageError):
        whole(tmp_path / "absent")


def test_rewrap_touches_the_manifest_only(target: Path, whole: Any, identity: Identity, other: Identity) -> None:
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    digest = sealed.public_facts(target / "folder.sealed").digest
    sealed.rewrap(target / "folder.sealed", identity=identity, recipients=[other.recipient])
    assert [name for name, raw in before.items() if (target / name).read_bytes() != raw] == ["folder.sealed"]
    assert same(whole(target, identity=other, expect=digest), expected())
    with pytest.raises(NoRecipient):
        whole(target)


def test_files_can_be_released_without_the_weights(target: Path, identity: Identity) -> None:
    """A key release of the compartment ``files`` shows config and tokenizer, and no key of a shard."""

    class Release:
        def unlock(self, facts: sealed.PublicFacts) -> sealed.CompartmentKeys:
            return sealed.compartment_keys(sealed.open_file_key(facts, identity), facts, ["files"])

    with sealed.open_folder(target, identity=Release()) as folder:
        assert folder.config == CONFIG
        assert folder.weights == ()
        with pytest.raises(UsageError):
            folder.state_dict()


def test_one_unwrapping_opens_all_of_it(plain: Path, tmp_path: Path, owner: SigningKey) -> None:
    """A KMS is asked once for each folder, not once for each shard."""
    calls: list[str] = []

    class Counting:
        label, name = "symmetric", "counting"

        def wrap(self, key: Secret, context: bytes) -> bytes:
            calls.append("wrap")
            return bytes(key.expose())

        def unwrap(self, blob: bytes, context: bytes) -> Secret:
            calls.append("unwrap")
            return Secret(blob)

    sealed.seal_folder(plain, tmp_path / "t", recipients=[Counting()], sign=owner)
    with sealed.open_folder(tmp_path / "t", identity=Counting(), signed_by=owner.verifying_key) as folder:
        folder.state_dict()
    assert calls == ["wrap", "unwrap"]


def test_peak_memory_is_one_shard(
    tmp_path: Path, owner: SigningKey, identity: Identity, record_property: Callable[[str, object], None]
) -> None:
    parts = shards(rows=24_000)  # about 6 MB each
    plain = make_plain(tmp_path / "plain", parts)
    size = max(sum(tensor.nbytes for tensor in part.values()) for part in parts.values())
    bounce = 8 << 20  # chunks under way in the threads, and the rest of the library

    def peak(work: Callable[[], None]) -> int:
        tracemalloc.start()
        try:
            work()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def seal() -> None:
        sealed.seal_folder(plain, tmp_path / "t", recipients=[identity.recipient], sign=owner)

    def by_shard() -> None:
        with sealed.open_folder(
            tmp_path / "t", identity=identity, signed_by=owner.verifying_key, threads=2
        ) as folder:
            for part in folder.shards():
                assert part
                part.clear()

    def at_once() -> None:
        with sealed.open_folder(
            tmp_path / "t", identity=identity, signed_by=owner.verifying_key, threads=2
        ) as folder:
            assert len(folder.state_dict()) == 6

    sealing, parted, whole = peak(seal), peak(by_shard), peak(at_once)
    for name, value in (("sealing", sealing), ("by shard", parted), ("state dict", whole), ("shard", size)):
        record_property(name, value)
    assert sealing < size + bounce
    assert parted < size + bounce
    assert whole < 3 * size + bounce


@pytest.mark.parametrize("server", ["memory", "nanio"])
def test_a_folder_in_a_store(
    server: str, request: pytest.FixtureRequest, plain: Path, tmp_path: Path, whole: Any, identity: Identity,
    other: Identity, owner: SigningKey,
) -> None:  # fmt: skip
    url = f"memory://{tmp_path.name}/llm"
    if server == "nanio":
        pytest.importorskip("obstore", reason="obstore is not installed")
        request.getfixturevalue("credentials")(request.getfixturevalue("nanio").url)
        url = f"s3://models/{tmp_path.name}/llm"
    sealed.seal_folder(plain, url, recipients=[identity.recipient], sign=owner)
    store = ObjectFolder.open(url)
    assert len(store.list()) == 4
    assert same(whole(url), expected())
    sealed.rewrap(f"{url}/folder.sealed", identity=identity, recipients=[other.recipient])
    assert same(whole(url, identity=other), expected())
    sealed.unseal_folder(url, tmp_path / "out", identity=other, signed_by=owner.verifying_key)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    with pytest.raises(UsageError, match="not empty"):
        sealed.seal_folder(plain, url, recipients=[identity.recipient], sign=owner)
    store.put("model.safetensors", b"plain")
    with pytest.raises(NotSealed):
        whole(url, identity=other)
    store.delete("model.safetensors")
    store.delete("shard-00002.sealed")
    with pytest.raises(Truncated, match="2 of 3"):
        whole(url, identity=other)


@pytest.mark.parametrize("where", ["path", "memory"])
def test_a_sealing_that_fails_leaves_nothing(where: str, plain: Path, tmp_path: Path, owner: SigningKey) -> None:
    class Broken:
        label, name = "symmetric", "broken"

        def wrap(self, key: Secret, context: bytes) -> bytes:
            raise StorageError("no")

        def unwrap(self, blob: bytes, context: bytes) -> Secret:
            raise StorageError("no")

    assert isinstance(Broken(), KeyWrapper)
    url = f"memory://{tmp_path.name}/broken"
    target: Any = tmp_path / "t" if where == "path" else url
    with pytest.raises(StorageError):
        sealed.seal_folder(plain, target, recipients=[Broken()], sign=owner)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
    if where == "memory":
        assert ObjectFolder.open(url).list() == {}


def test_folders_that_cannot_be_sealed(
    plain: Path, target: Path, tmp_path: Path, owner: Any, identity: Any
) -> None:
    def seal(source: Path, out: str = "x") -> None:
        sealed.seal_folder(source, tmp_path / out, recipients=[identity.recipient], sign=owner)

    (tmp_path / "none").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    for source in (tmp_path / "none", tmp_path / "absent", tmp_path / "bare", target):
        with pytest.raises(UsageError):
            seal(source)
    with pytest.raises(UsageError, match="not empty"):
        seal(plain, "target")
    shutil.copy(target / "shard-00001.sealed", plain / "mixed.sealed")
    with pytest.raises(UsageError, match="sealed already"):
        seal(plain)
    (plain / "mixed.sealed").unlink()
    index = json.loads((plain / INDEX).read_text())
    for change in (
        {"secret_layer.1.bias": "absent.safetensors"},
        {"secret_layer.1.bias": "model-00002-of-00003.safetensors"},
        {"one.more": "model-00002-of-00003.safetensors"},
        {"secret_layer.1.bias": 7},
    ):
        (plain / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | change}))
        with pytest.raises(MalformedError, match="folder"):
            seal(plain)
    for text in ("[]", "{", "{}"):
        (plain / INDEX).write_text(text)
        with pytest.raises(MalformedError, match="folder"):
            seal(plain)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path, whole: Any, owner: Any, identity: Any) -> None:
    source = tmp_path / "one"
    source.mkdir()
    save_plain({"w": np.arange(3)}, source / "model.safetensors")
    sealed.seal_folder(source, tmp_path / "t", recipients=[identity.recipient], sign=owner)
    assert whole(tmp_path / "t")["w"].tolist() == [0, 1, 2]
    save_plain({"v": np.arange(3)}, source / "more.safetensors")
    (source / "model.safetensors").rename(source / "other.safetensors")
    sealed.seal_folder(source, tmp_path / "u", recipients=[identity.recipient], sign=owner)
    with pytest.raises(UsageError, match="index"):
        whole(tmp_path / "u")


ROW = {"name": "model.safetensors", "digest": bytes(32), "epoch": 0, "size": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2}, {"id": bytes(15)}, {"key": bytes(31)}, {"more": 1}, {"shards": [7]},
        {"shards": [ROW | {"digest": bytes(31)}]}, {"shards": [ROW | {"epoch": -1}]},
        {"shards": [ROW | {"size": 0}]}, {"shards": [ROW, ROW]}, {"shards": [ROW | {"more": 1}]},
        {"shards": [ROW | {"name": "../etc/passwd"}]}, {"shards": [ROW | {"name": "/etc/passwd"}]},
        {"shards": [ROW | {"name": "a//b"}]}, {"shards": [ROW | {"name": "a\\b"}]},
        {"shards": [ROW | {"name": ""}]}, {"shards": [ROW | {"name": "a" * 1025}]},
        {"shards": [ROW | {"name": "."}]},
    ],
)  # fmt: skip
def test_malformed_manifests_are_refused(change: dict[str, Any]) -> None:
    body = {"version": 1, "id": bytes(16), "key": bytes(32), "shards": [ROW]}
    assert FolderManifest.parse(cbor.encode(body)).shards == (Shard(**ROW),)
    with pytest.raises(MalformedError, match="folder"):
        FolderManifest.parse(cbor.encode(body | change))


@pytest.mark.threat("SEAL-44")
@pytest.mark.parametrize("name", ["../out.json", "/out.json", "a/../../out.json"])
def test_a_file_name_that_leads_elsewhere_is_refused(
    name: str, tmp_path: Path, owner: SigningKey, identity: Identity
) -> None:
    """Written by an owner's key through the format's own writer: what opens it still refuses the name."""
    target = tmp_path / "t"
    target.mkdir()
    sink = MemorySink()
    with sealed.SealedWriter(sink, recipients=[identity.recipient], sign=owner) as writer:
        writer.add(f"file/{name}", np.zeros(2, np.uint8))
    (target / "folder.sealed").write_bytes(sink.data)
    with pytest.raises(MalformedError, match="path below"):
        sealed.unseal_folder(target, tmp_path / "out", identity=identity, signed_by=owner.verifying_key)


def test_the_key_of_a_folder_is_a_key_wrapper_that_binds_the_context() -> None:
    key = ShardKey(Secret(bytes(32)), bytes(16))
    assert isinstance(key, KeyWrapper)
    box = key.wrap(Secret(b"k" * 32), b"context")
    assert bytes(key.unwrap(box, b"context").expose()) == b"k" * 32
    for blob, context in ((box, b"another"), (box[:-1] + bytes([box[-1] ^ 1]), b"context"), (b"", b"context")):
        with pytest.raises(Tampered):
            key.unwrap(blob, context)


def test_the_command_line_takes_folders(plain: Path, tmp_path: Path, owner: SigningKey, identity: Identity) -> None:
    identity.save(tmp_path / "id.key")
    owner.save(tmp_path / "sign.key")
    target, out = tmp_path / "model.sealed", tmp_path / "out"

    def run(*words: object) -> str:
        done = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    text = run("seal", plain, "-r", identity.recipient, "--sign", tmp_path / "sign.key", "-o", target, "--epoch", 2)
    digest = sealed.public_facts(target / "folder.sealed").digest
    assert digest.hex() in text
    assert digest.hex() in run("inspect", target)
    run("rewrap", target, "-i", tmp_path / "id.key", "-r", identity.recipient)
    run("unseal", target, "-i", tmp_path / "id.key", "--expect", digest.hex(), "-o", out)
    assert same(load_plain(out / "model-00001-of-00003.safetensors"), shards()["model-00001-of-00003.safetensors"])
    url = f"memory://{tmp_path.name}/model"
    run("seal", plain, "-r", identity.recipient, "--sign", tmp_path / "sign.key", "-o", url)
    run("unseal", url, "-i", tmp_path / "id.key", "--signed-by", owner.verifying_key, "-o", tmp_path / "again")
    one = f"memory://{tmp_path.name}/one.sealed"
    shard = plain / "model-00001-of-00003.safetensors"
    run("seal", shard, "-r", identity.recipient, "--sign", tmp_path / "sign.key", "-o", one)
    run("inspect", one)
    run("unseal", one, "-i", tmp_path / "id.key", "--signed-by", owner.verifying_key, "-o", tmp_path / "one")
    assert same(load_plain(tmp_path / "one"), load_plain(shard))
