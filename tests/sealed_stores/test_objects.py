"""Sealed files in object stores, over HTTP: nanio is a real server, moto's is a mock; faults by a proxy between."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from attrs import define

from isolate import SigningKey, sealed
from isolate.errors import (
    MalformedError,
    MissingExtra,
    NoRecipient,
    NotSealed,
    RolledBack,
    StorageError,
    Tampered,
    UsageError,
)
from isolate.sealed import objects
from isolate.sealed.layout import HEADER_SIZE
from isolate.sealed.objects import Address, ObjectFolder, object_sink, object_source

obstore = pytest.importorskip("obstore", reason="obstore is not installed")
boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")

MIB = 1 << 20


@define
class Bucket:
    """One folder of a bucket, empty at first. ``client``: boto3's, for looking at it from outside."""

    server: Any
    url: str
    client: Any
    prefix: str

    def names(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket="models", Prefix=self.prefix).get("Contents", [])
        return [row["Key"].removeprefix(self.prefix) for row in found]

    def uploads(self) -> int:
        found = self.client.list_multipart_uploads(Bucket="models").get("Uploads", [])
        return len([row for row in found if row["Key"].startswith(self.prefix)])


_count = iter(range(1000))


@pytest.fixture(params=["nanio", pytest.param("moto", marks=pytest.mark.slow)])
def bucket(request: pytest.FixtureRequest, credentials: Callable[[str], None]) -> Bucket:
    server = request.getfixturevalue("nanio" if request.param == "nanio" else "aws")
    credentials(server.url)
    client = boto3.client("s3", endpoint_url=server.url, region_name="us-east-1")
    if server.kind == "moto":
        client.create_bucket(Bucket="models")
    prefix = f"t{next(_count)}/"
    return Bucket(server, f"s3://models/{prefix.rstrip('/')}", client, prefix)


@pytest.fixture(scope="session")
def shared_file(owner: SigningKey, identity: Any, model: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("shared") / "model.sealed"
    sealed.save_file(model, path, recipients=[identity.recipient], sign=owner)
    return path.read_bytes()


@pytest.fixture
def stored(bucket: Bucket, shared_file: bytes) -> str:
    """The model, sealed, as an object."""
    ObjectFolder.open(bucket.url).put("model.sealed", shared_file)
    return f"{bucket.url}/model.sealed"


_kept: set[str] = set()


@pytest.fixture
def kept(bucket: Bucket, shared_file: bytes) -> str:
    """The model, sealed, as an object that is only read: stored once on each server."""
    if bucket.server.url not in _kept:
        ObjectFolder.open("s3://models/kept").put("model.sealed", shared_file)
        _kept.add(bucket.server.url)
    return "s3://models/kept/model.sealed"


def same(found: dict[str, Any], model: dict[str, Any]) -> bool:
    return found.keys() == model.keys() and all(np.array_equal(found[name], model[name]) for name in model)


def test_seal_open_and_unseal_by_url(
    bucket: Bucket, owner: SigningKey, identity: Any, model: Any, tmp_path: Path
) -> None:
    url, signer = f"{bucket.url}/new.sealed", owner.verifying_key
    digest = sealed.save_file(model, url, recipients=[identity.recipient], sign=owner)
    assert bucket.names() == ["new.sealed"]
    assert bucket.uploads() == 0
    assert sealed.public_facts(url).digest == digest
    assert same(sealed.load_file(url, identity=identity, signed_by=signer), model)
    sealed.unseal_file(url, tmp_path / "plain.safetensors", identity=identity, signed_by=signer)
    sealed.seal_file(
        tmp_path / "plain.safetensors", f"{bucket.url}/again.sealed", recipients=[identity.recipient], sign=owner
    )
    assert same(sealed.load_file(f"{bucket.url}/again.sealed", identity=identity, signed_by=signer), model)


def test_memory_is_one_store_for_each_name(owner: SigningKey, identity: Any) -> None:
    url = "memory://a-name/folder/model.sealed"
    sealed.save_file({"w": np.arange(4)}, url, recipients=[identity.recipient], sign=owner)
    assert sealed.load_file(url, identity=identity, signed_by=owner.verifying_key)["w"].tolist() == [0, 1, 2, 3]
    assert list(ObjectFolder.open("memory://a-name/folder").list()) == ["model.sealed"]
    assert ObjectFolder.open("memory://a-name").list() == {"folder/": 0}
    with pytest.raises(StorageError, match="no such object"):
        sealed.public_facts("memory://another-name/folder/model.sealed")


def test_reads_are_merged(
    bucket: Bucket, kept: str, proxied: Any, credentials: Any, identity: Any, owner: Any, model: Any
) -> None:
    """All of the data in requests of 8 MiB and more but the last, and nothing twice."""
    proxy = proxied(bucket.server)
    credentials(proxy.url)
    assert same(sealed.load_file(kept, identity=identity, signed_by=owner.verifying_key), model)
    lengths = [last - first + 1 for first, last in proxy.ranges()]
    assert lengths[:2] == [HEADER_SIZE, MIB]  # header and tail, when it is opened
    assert sorted(lengths[2:])[1:] == [8 * MIB] * 3
    data = sum(-(-tensor.nbytes // 4096) * 4096 for tensor in model.values())
    assert data - MIB <= sum(lengths[2:]) <= data


def test_a_slice_reads_what_it_covers(
    bucket: Bucket, kept: str, proxied: Any, credentials: Any, identity: Any, owner: Any, model: Any
) -> None:
    proxy = proxied(bucket.server)
    credentials(proxy.url)
    with sealed.safe_open(kept, identity=identity, signed_by=owner.verifying_key) as file:
        proxy.heads.clear()
        part = file.get_slice("layer.1.weight")[100:200]
    assert np.array_equal(part, model["layer.1.weight"][100:200])
    assert sum(last - first + 1 for first, last in proxy.ranges()) == MIB


@pytest.mark.parametrize("fault", ["503", "cut", "slow"])
def test_a_fault_that_passes_is_tried_again(
    bucket: Bucket, kept: str, proxied: Any, credentials: Any, identity: Any, owner: Any, model: Any, fault: str
) -> None:
    proxy = proxied(bucket.server, fault=fault, times=1, delay=3.0)
    credentials(proxy.url)
    source = object_source(kept, timeout=1.5)
    assert same(sealed.load_file(source, identity=identity, signed_by=owner.verifying_key), model)
    source.close()
    assert proxy.broken == 1


def wide(head: str) -> bool:
    """Whether a request is for data rather than for header or tail."""
    found = re.search(r"(?im)^range: bytes=(\d+)-", head)
    return found is not None and HEADER_SIZE <= int(found[1]) < 20 * MIB


@pytest.mark.threat("SEAL-41")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("503", StorageError),
        ("cut", StorageError),
        ("slow", StorageError),
        ("range", StorageError),
        ("lie", Tampered),
    ],
)
@pytest.mark.parametrize("when", ["opening", "data"])
def test_a_fault_that_stays_is_a_typed_error_and_never_wrong_bytes(
    bucket: Bucket, kept: str, proxied: Any, credentials: Any, identity: Any, owner: Any, fault: str, error: type,
    when: str,
) -> None:  # fmt: skip
    proxy = proxied(bucket.server, fault=fault, delay=1.5)
    if when == "data":
        proxy.chosen = wide
    credentials(proxy.url)
    begin = time.monotonic()
    # What comes in place of a header is no header; which check sees that depends on the bytes.
    expected = (NotSealed, Tampered, MalformedError) if (fault, when) == ("lie", "opening") else error
    with pytest.raises(expected):
        source = object_source(kept, timeout=0.5 if fault == "slow" else 10.0, retries=1)
        sealed.load_file(source, identity=identity, signed_by=owner.verifying_key)
    assert proxy.broken
    assert time.monotonic() - begin < 8
    if when == "data":
        source.close()


@pytest.mark.parametrize(("covered", "data"), [((1, 5), b"abcd"), ((0, 4), b"abc"), ((0, 3), b"abc")])
def test_a_library_that_lets_another_range_through(
    covered: tuple[int, int], data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """obstore refuses such answers itself; this check stands behind it."""
    answer = SimpleNamespace(range=covered, bytes=lambda: data)
    monkeypatch.setattr(obstore, "get", lambda *args, **options: answer)
    with pytest.raises(StorageError, match="another range"):
        ObjectFolder.open("memory://ranges").get("name", 0, 4)


@pytest.mark.threat("SEAL-41")
def test_an_object_that_is_replaced_while_it_is_read(
    bucket: Bucket, stored: str, identity: Any, owner: Any, model: Any
) -> None:
    """moto honours If-Match; nanio does not, and the file's digests tell."""
    changed = {name: tensor[::-1].copy() for name, tensor in model.items()}
    with sealed.safe_open(stored, identity=identity, signed_by=owner.verifying_key) as file:
        sealed.save_file(changed, stored, recipients=[identity.recipient], sign=owner)
        with pytest.raises(StorageError if bucket.server.kind == "moto" else Tampered):
            file.get_tensor("layer.0.weight")
        with pytest.raises((StorageError, Tampered)):
            file.get_tensor("layer.3.weight")


def test_no_object_before_commit_and_none_after_abort(bucket: Bucket) -> None:
    sink = object_sink(f"{bucket.url}/thing")
    for _ in range(3):
        sink.write(bytes(10 * MIB))
    assert bucket.names() == []
    sink.abort()
    sink.abort()
    assert (bucket.names(), bucket.uploads()) == ([], 0)
    with pytest.raises(StorageError, match="finished"):
        sink.write(b"more")


def test_a_writer_that_fails_leaves_the_old_object(
    bucket: Bucket, stored: str, owner: SigningKey, identity: Any, model: Any
) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        sealed.SealedWriter(stored, recipients=[identity.recipient], sign=owner) as writer,
    ):
        writer.add("w", np.zeros(20 * MIB, np.uint8))
        _ = 1 // 0
    assert bucket.uploads() == 0
    assert same(sealed.load_file(stored, identity=identity, signed_by=owner.verifying_key), model)


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_an_upload_that_fails_is_a_typed_error(
    bucket: Bucket, proxied: Any, credentials: Any, owner: SigningKey, identity: Any, fault: str
) -> None:
    proxy = proxied(bucket.server, fault=fault, chosen=lambda head: head.startswith("PUT"))
    credentials(proxy.url)
    sink = object_sink(f"{bucket.url}/thing", timeout=2.0, retries=1)
    with pytest.raises(StorageError, match="cannot write"):
        sealed.save_file({"w": np.zeros(60 * MIB, np.uint8)}, sink, recipients=[identity.recipient], sign=owner)
    assert proxy.broken
    assert bucket.names() == []


def test_a_passing_503_costs_an_upload_nothing(
    bucket: Bucket, proxied: Any, credentials: Any, owner: SigningKey, identity: Any, model: Any
) -> None:
    proxy = proxied(bucket.server, fault="503", times=1, chosen=lambda head: head.startswith("PUT"))
    credentials(proxy.url)
    sealed.save_file(model, f"{bucket.url}/thing", recipients=[identity.recipient], sign=owner)
    assert proxy.broken == 1
    credentials(bucket.server.url)
    assert same(sealed.load_file(f"{bucket.url}/thing", identity=identity, signed_by=owner.verifying_key), model)


def test_wrong_credentials(nanio: Any, credentials: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials(nanio.url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-one-that-must-not-be-shown")
    with pytest.raises(StorageError, match="credentials") as caught:
        sealed.public_facts("s3://models/model.sealed")
    assert caught.value.__cause__ is None
    assert "must-not" not in str(caught.value)


def test_an_environment_that_says_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StorageError, match="environment"):
        sealed.public_facts("az://container/model.sealed")


@pytest.mark.threat("SEAL-42")
def test_rewrap_puts_a_header_beside_the_object(
    bucket: Bucket, stored: str, shared_file: bytes, owner: SigningKey, identity: Any, other: Any, model: Any
) -> None:
    signer, before = owner.verifying_key, sealed.public_facts(stored)
    sealed.rewrap(stored, identity=identity, recipients=[other.recipient])
    beside = objects.header_name("model.sealed", before.slot.commitment)
    assert sorted(bucket.names()) == ["model.sealed", beside]
    after = sealed.public_facts(stored)
    assert (after.digest, after.generation) == (before.digest, before.generation + 1)
    assert same(sealed.load_file(stored, identity=other, signed_by=signer), model)
    with pytest.raises(NoRecipient):
        sealed.load_file(stored, identity=identity, signed_by=signer)
    # Once more, from the header that counts now.
    sealed.rewrap(stored, identity=other, recipients=[identity.recipient])
    assert sealed.public_facts(stored).generation == before.generation + 2

    folder = ObjectFolder.open(bucket.url)
    raw = bytearray(folder.get(beside, 0, HEADER_SIZE))
    for bad, error in (
        (raw[:100], MalformedError),
        (raw + b"x", MalformedError),
        (bytes(HEADER_SIZE), NotSealed),
        (raw[:20] + b"\xff" + raw[21:], Tampered),
    ):
        folder.put(beside, bytes(bad))
        with pytest.raises(error):
            sealed.load_file(stored, identity=identity, signed_by=signer)
    # Sealed anew under the same name: the old header beside it belongs to no file any more.
    sealed.save_file(model, stored, recipients=[other.recipient], sign=owner)
    assert same(sealed.load_file(stored, identity=other, signed_by=signer), model)


@pytest.mark.threat("SEAL-42")
def test_a_rolled_back_header_beside_an_object_is_seen_by_its_generation(
    bucket: Bucket, stored: str, owner: SigningKey, identity: Any, other: Any
) -> None:
    before = sealed.public_facts(stored)
    sealed.rewrap(stored, identity=identity, recipients=[other.recipient])
    ObjectFolder.open(bucket.url).delete(objects.header_name("model.sealed", before.slot.commitment))
    expect = sealed.Epoch(0, generation=before.generation + 1)
    with pytest.raises(RolledBack, match="generation"):
        sealed.load_file(stored, identity=identity, signed_by=owner.verifying_key, expect=expect)


@pytest.mark.parametrize(
    "url",
    [
        "s3://", "s3://bucket", "s3://bucket/", "ftp://host/file", "https://host/file", "file:///etc/passwd",
        "s3://bucket/a/../b", "s3://bucket//b/./c", "s3://bucket/a?b=c", "s3://bucket/a#b", "s3://bucket/a%20b",
        "s3://user:password@bucket/a", "s3://bucket/a//b", "s3://bucket/a\nb",
    ],
)  # fmt: skip
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        sealed.public_facts(url)
    assert "password" not in str(caught.value)


def test_an_address_shows_itself() -> None:
    assert str(Address.parse("az://models/llm/a.sealed")) == "az://models/llm/a.sealed"
    assert str(Address.parse("gs://models", folder=True)) == "gs://models"


@pytest.fixture
def without_obstore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    objects._obstore.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    yield
    objects._obstore.cache_clear()


def test_without_the_extra(without_obstore: None) -> None:
    with pytest.raises(MissingExtra, match="stores"):
        sealed.public_facts("s3://bucket/model.sealed")
