"""The writer: streams, compartments, dtypes, and what it refuses before anything is visible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isolate import Identity, SigningKey, sealed
from isolate.crypto.aead import Suite
from isolate.errors import MalformedError, StorageError, Truncated, UsageError
from isolate.sealed import layout
from isolate.sealed.manifest import DTYPE_BITS, tensor_size
from isolate.sealed.stores import FileSource, MemorySink, MemorySource

Seal = Callable[..., bytes]


def plain_file(path: Path, tensors: dict[str, tuple[str, list[int], bytes]], **metadata: str) -> Path:
    """A safetensors file with any dtype, by hand."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data for _, _, data in tensors.values()))
    return path


@pytest.mark.parametrize("chunk_size", [4096, 8192, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_way_of_writing_gives_the_same_plaintext(
    model: dict[str, Any], seal: Seal, owner: SigningKey, identity: Identity, chunk_size: int, threads: int
) -> None:
    source = MemorySource(seal(model, chunk_size=chunk_size, threads=threads))
    found = sealed.load_file(source, identity=identity, signed_by=owner.verifying_key, threads=threads)
    for name, tensor in model.items():
        np.testing.assert_array_equal(found[name], tensor)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 20_000), max_size=8),
    suite=st.sampled_from(list(Suite)),
    pieces=st.lists(st.integers(1, 9000), min_size=1, max_size=5),
)
def test_any_sizes_come_back(sizes: list[int], suite: Suite, pieces: list[int]) -> None:
    """Tensors of any size, by add() and by add_from(), and read back whole, one by one and by slices."""
    owner, identity, sink = SigningKey.generate(), Identity.generate(), MemorySink()
    tensors = {f"t{i}": np.random.default_rng(i).integers(0, 255, size, np.uint8) for i, size in enumerate(sizes)}
    with sealed.SealedWriter(
        sink, recipients=[identity.recipient], sign=owner, suite=suite, chunk_size=4096, threads=2
    ) as writer:
        for i, (name, tensor) in enumerate(tensors.items()):
            if i % 2:
                writer.add(name, tensor)
            else:
                writer.add_from(name, "U8", tensor.shape, lambda at, view, tensor=tensor: fill(tensor, at, view))
    with sealed.safe_open(MemorySource(sink.data), identity=identity, signed_by=owner.verifying_key) as file:
        whole = file.get_tensors()
        for name, tensor in tensors.items():
            assert whole[name].tobytes() == file.get_tensor(name).tobytes() == tensor.tobytes()
            step = pieces[0]
            assert file.get_slice(name)[::step].tobytes() == tensor[::step].tobytes()
    # Ciphertext is as long as the plaintext, aligned; everything else is small.
    facts = sealed.public_facts(MemorySource(sink.data))
    assert facts.contents.rows[1].length == sum(layout.align(size) for size in sizes)


def fill(tensor: np.ndarray[Any, Any], at: int, view: memoryview) -> None:
    view[:] = tensor[at : at + len(view)].data


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_goes_through_bit_by_bit(
    tmp_path: Path, owner: SigningKey, identity: Identity, dtype: str
) -> None:
    """From a safetensors file and back, and as numpy arrays that are sealed again as what they were."""
    shape = [3, 8]
    data = bytes(np.random.default_rng(3).integers(0, 2, tensor_size(dtype, shape), np.uint8))
    plain = plain_file(tmp_path / "p", {"x": (dtype, shape, data), "empty": (dtype, [0, 8], b"")}, a="b")
    path, back, again = tmp_path / "s", tmp_path / "b", tmp_path / "again"
    pins: dict[str, Any] = {"identity": identity, "signed_by": owner.verifying_key}
    sealed.seal_file(plain, path, recipients=[identity.recipient], sign=owner)
    sealed.unseal_file(path, back, **pins)
    assert back.read_bytes()[-len(data) :] == data
    arrays = sealed.load_file(path, **pins)
    assert arrays["x"].tobytes() == data
    sealed.save_file(arrays, again, recipients=[identity.recipient], sign=owner)
    with sealed.safe_open(again, **pins) as file:
        assert file.get_slice("x").get_dtype() == dtype
        assert file.get_slice("x").get_shape() == shape
        assert file.get_slice("empty").get_shape() == [0, 8]
        assert file.get_slice("x")[1:2].tobytes() == data[len(data) // 3 : 2 * len(data) // 3]


def test_arrays_that_are_not_contiguous_or_little_endian(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    base = np.arange(60).reshape(6, 10)
    tensors = {"t": base.T, "step": base[::2, ::3], "big": base.astype(">i8"), "zero": np.float32(1.5)}
    found = sealed.load_file(MemorySource(seal(tensors)), identity=identity, signed_by=owner.verifying_key)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
        assert found[name].shape == np.shape(tensor)


def test_a_tensor_may_change_once_add_is_back(owner: SigningKey, identity: Identity) -> None:
    """Chunks are sealed from the caller's memory by other threads: add() waits for them."""
    sink, tensor = MemorySink(), np.zeros(1 << 20, np.uint8)
    with sealed.SealedWriter(
        sink, recipients=[identity.recipient], sign=owner, chunk_size=4096, threads=4
    ) as writer:
        for i in range(4):
            tensor[:] = i
            writer.add(f"t{i}", tensor)
            tensor[:] = 255
    found = sealed.load_file(MemorySource(sink.data), identity=identity, signed_by=owner.verifying_key)
    assert [set(found[f"t{i}"].tolist()) for i in range(4)] == [{0}, {1}, {2}, {3}]


def test_compartments_by_glob(model: dict[str, Any], tmp_path: Path, owner: SigningKey, identity: Identity) -> None:
    path = tmp_path / "m"
    globs = {"dec": ["decoder.*"], "rest.1": ["step", "nothing*"]}
    sealed.save_file(model, path, recipients=[identity.recipient], sign=owner, compartments=globs)
    with sealed.SealedReader(path, identity=identity, signed_by=owner.verifying_key) as reader:
        assert reader.facts.compartments == ("dec", "rest.1", "main")
        assert {name: place.compartment for name, place in reader.places.items()} == {
            "decoder.weight": "dec", "decoder.empty": "dec", "step": "rest.1",
            "encoder.weight": "main", "encoder.bias": "main",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compartments": {"a": ["nothing.*"]}}, "no tensor matches"),
        ({"compartments": {"a": ["*"], "b": ["step"]}}, "two compartments"),
        ({"compartments": {"a b": ["*"]}}, "no compartment id"),
        ({"compartments": {"*": ["*"]}}, "no compartment id"),
        ({"compartments": {"a": "step"}}, "list of globs"),
        ({"recipients": []}, "needs a recipient"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": True}, "epoch"),
        ({"previous": b"short"}, "previous"),
        ({"model_id": "m" * 257}, "model id"),
        ({"metadata": {"a": 1}}, "text"),
        ({"metadata": {"a": "\ud800"}}, "surrogate"),
        ({"model_id": "\ud800"}, "surrogate"),
        ({"chunk_size": 1000}, "power of two"),
    ],
)
def test_a_wrong_option_is_refused_and_writes_nothing(
    tmp_path: Path,
    model: dict[str, Any],
    owner: SigningKey,
    identity: Identity,
    options: dict[str, Any],
    message: str,
) -> None:
    path = tmp_path / "m"
    with (
        pytest.raises(UsageError, match=message),
        sealed.SealedWriter(path, **({"recipients": [identity.recipient], "sign": owner} | options)) as writer,
    ):
        for name, tensor in model.items():
            writer.add(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_added_ends_the_writer(tmp_path: Path, owner: SigningKey, identity: Identity) -> None:
    path = tmp_path / "m"

    def writer(**options: Any) -> sealed.SealedWriter:
        return sealed.SealedWriter(path, recipients=[identity.recipient], sign=owner, **options)

    for name, tensor in [
        ("a", [1, 2]), ("a", np.array(["x"])), ("a", np.zeros(3, "datetime64[s]")), ("n" * 5000, np.zeros(1)),
        ("\ud800", np.zeros(1)),
    ]:  # fmt: skip
        failed = writer()
        with pytest.raises(UsageError):
            failed.add(name, tensor)
        failed.abort()
    again = writer()
    again.add("a", np.zeros(1))
    with pytest.raises(UsageError, match="there already"):
        again.add("a", np.zeros(1))
    with pytest.raises(UsageError, match="closed"):
        again.add("b", np.zeros(1))
    back = writer(compartments={"one": ["1*"]})
    back.add("1a", np.zeros(1))
    back.add("b", np.zeros(1))
    with pytest.raises(UsageError, match="one after another"):
        back.add("1c", np.zeros(1))
    short = writer()
    with pytest.raises(MalformedError):
        short.add_from("a", "U8", (5,), fail)
    assert list(tmp_path.iterdir()) == []


def fail(at: int, view: memoryview) -> None:
    raise MalformedError("the source is broken")


def test_an_empty_model_and_one_name_of_every_kind(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    pins: dict[str, Any] = {"identity": identity, "signed_by": owner.verifying_key}
    assert sealed.load_file(MemorySource(seal({})), **pins) == {}
    names = ["", " ", "ä.weight", "a/b", "__metadata__", "*", "\0", "🜁" * 1000]
    found = sealed.load_file(MemorySource(seal({name: np.ones(2) for name in names})), **pins)
    assert list(found) == names


def test_progress_and_digest(model: dict[str, Any], owner: SigningKey, identity: Identity) -> None:
    sink, seen = MemorySink(), []
    with sealed.SealedWriter(
        sink, recipients=[identity.recipient], sign=owner, progress=seen.append, model_id="m", previous=bytes(32)
    ) as writer:
        for name, tensor in model.items():
            writer.add(name, tensor)
    assert seen[-1] == sum(tensor.nbytes for tensor in model.values())
    assert seen == sorted(seen)
    facts = sealed.public_facts(MemorySource(sink.data))
    assert (facts.digest, facts.model_id, facts.previous) == (writer.digest, "m", bytes(32))
    assert sealed.PublicFacts.parse(facts.header, facts.directory) == facts


@pytest.mark.parametrize(
    "data",
    [
        b"", b"short", bytes(8), (10).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b'"aa"', (1 << 60).to_bytes(8, "little") + bytes(100),
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(
    tmp_path: Path, owner: SigningKey, identity: Identity, data: bytes
) -> None:
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(MalformedError, match="safetensors"):
        sealed.seal_file(tmp_path / "p", tmp_path / "s", recipients=[identity.recipient], sign=owner)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "row",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": 4, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        7,
    ],
)
def test_a_safetensors_header_that_lies_is_refused(
    tmp_path: Path, owner: SigningKey, identity: Identity, row: Any
) -> None:
    raw = json.dumps({"a": row}).encode()
    (tmp_path / "p").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(MalformedError, match="safetensors"):
        sealed.seal_file(tmp_path / "p", tmp_path / "s", recipients=[identity.recipient], sign=owner)


PEAK = """
import json, resource, sys
import numpy as np
from pathlib import Path
from isolate import Identity, SigningKey, sealed
plain, target, what = sys.argv[1:]
owner, identity = SigningKey.generate(), Identity.generate()
options = {"recipients": [identity.recipient], "sign": owner}
sealed.save_file({"w": np.zeros(1 << 22, np.uint8)}, target + ".warm", **options)
Path("/proc/self/clear_refs").write_text("5")
status = lambda field: int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])
before = status("VmRSS")
sealed.seal_file(plain, target, **options)
if what == "unseal":
    sealed.unseal_file(target, plain + ".back", identity=identity, signed_by=owner.verifying_key)
print((status("VmHWM") - before) // 1024)
"""


@pytest.mark.parametrize(("what", "limit"), [("seal", 24), ("unseal", 40)])
def test_memory_is_bounded(tmp_path: Path, what: str, limit: int) -> None:
    """A tensor of 96 MiB is sealed from a file in a few chunks, and unsealed in batches of 16 MiB (in MiB)."""
    plain = tmp_path / "p"
    size = 96 << 20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with plain.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(plain), str(tmp_path / "s"), what],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert int(done.stdout) <= limit
    if what == "unseal":
        assert (tmp_path / "p.back").stat().st_size > size


def test_a_reader_serves_many_threads(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    tensors = {f"t{i}": np.full(30_000, i, np.uint8) for i in range(16)}
    wrong: list[str] = []
    with sealed.SealedReader(
        MemorySource(seal(tensors)), identity=identity, signed_by=owner.verifying_key, threads=2
    ) as reader:

        def read(offset: int) -> None:
            for i in range(16):
                name = f"t{(i + offset) % 16}"
                if reader.read(name).tobytes() != tensors[name].tobytes():
                    wrong.append(name)

        workers = [threading.Thread(target=read, args=(offset,)) for offset in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []
    with pytest.raises(UsageError, match="closed"):
        reader.read("t0")


def test_a_file_that_shrinks_after_opening_is_refused(
    tmp_path: Path, owner: SigningKey, identity: Identity
) -> None:
    path = tmp_path / "m"
    sealed.save_file({"w": np.ones(100_000)}, path, recipients=[identity.recipient], sign=owner)
    with sealed.SealedReader(path, identity=identity, signed_by=owner.verifying_key) as reader:
        os.truncate(path, 66_000)
        with pytest.raises(Truncated, match="chunk"):
            reader.read("w")


def test_a_lazy_read_touches_few_chunks(seal: Seal, owner: SigningKey, identity: Identity) -> None:
    """A tensor costs its own chunks; a column of a wide matrix only the chunks that it goes through."""
    tensors = {"a": np.zeros(5000, np.uint8), "wide": np.arange(64 * 16384, dtype=np.uint8).reshape(64, 16384)}
    with sealed.safe_open(MemorySource(seal(tensors)), identity=identity, signed_by=owner.verifying_key) as file:
        reader = file._reader
        before = reader.bytes_read
        np.testing.assert_array_equal(file.get_slice("wide")[:, 5:9], tensors["wide"][:, 5:9])
        assert reader.bytes_read - before == 64 * 4096
        before = reader.bytes_read
        np.testing.assert_array_equal(file.get_slice("wide")[3, ::4096], tensors["wide"][3, ::4096])
        assert reader.bytes_read - before == 4 * 4096
        before = reader.bytes_read
        np.testing.assert_array_equal(file.get_slice("wide")[::-9, 100], tensors["wide"][::-9, 100])
        assert reader.bytes_read - before == 8 * 4096


def test_closing_twice_and_a_source_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"abc")
    source = FileSource(tmp_path / "p")
    assert source.size == 3
    source.close()
    source.close()
    with pytest.raises(StorageError):
        source.read_into(0, bytearray(3))
