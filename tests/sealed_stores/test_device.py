"""device="cuda": staging through pinned buffers. On a real GPU where there is one; its logic with a stand-in."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from isolate import SigningKey, sealed
from isolate.errors import MissingExtra, Tampered, UsageError
from isolate.sealed import device
from isolate.sealed.device import batches, stage


@pytest.mark.parametrize("capacity", [1, 3, 7, 64, 1000])
def test_batches_cover_every_byte_once(capacity: int) -> None:
    sizes = [("a", 10), ("empty", 0), ("b", 1), ("c", 64), ("d", 5)]
    seen: dict[str, int] = {}
    for batch in batches(sizes, capacity):
        used = 0
        for part in batch:
            assert part.start == seen.get(part.name, 0)
            assert part.at == used
            seen[part.name] = part.start + part.length
            used += part.length
        assert 0 < used <= capacity
    assert seen == {name: size for name, size in sizes if size}


class Tensor:
    """As much of a torch tensor as staging uses, over numpy."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array

    def __getitem__(self, index: slice) -> Tensor:
        return Tensor(self.array[index])

    def copy_(self, other: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.array[:] = other.array

    def zero_(self) -> None:
        self.array[:] = 0


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every tensor that the stand-in for torch made: first those of the device, then the two pinned ones."""
    every: list[Tensor] = []

    def empty(size: int, dtype: str, device: str = "cpu", pin_memory: bool = False) -> Tensor:
        assert pin_memory is (device == "cpu")
        every.append(Tensor(np.full(size, 0xEE, np.uint8)))
        return every[-1]

    nothing = SimpleNamespace(synchronize=lambda: None, record=lambda: None)
    cuda = SimpleNamespace(
        Event=lambda: nothing, current_stream=lambda: nothing, device=lambda name: contextlib.nullcontext()
    )
    torch = SimpleNamespace(empty=empty, uint8="uint8", cuda=cuda)
    monkeypatch.setattr(device, "load_torch", lambda: torch)
    monkeypatch.setattr(device, "torch_view", lambda raw, dtype, shape: raw.array.view(np.uint8))
    return every


@pytest.fixture
def stored(tmp_path: Path, owner: SigningKey, identity: Any) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    generator = np.random.default_rng(2)
    tensors = {f"t{i}": generator.integers(0, 255, size, np.uint8) for i, size in enumerate((70_000, 3, 0, 9_000))}
    with sealed.SealedWriter(
        tmp_path / "f", recipients=[identity.recipient], sign=owner, chunk_size=4096
    ) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tmp_path / "f", tensors


def test_what_is_staged_is_what_was_sealed(
    made: list[Tensor], stored: Any, identity: Any, owner: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = stored
    monkeypatch.setattr(device, "BUFFER", 10_000)
    with sealed.SealedReader(path, identity=identity, signed_by=owner.verifying_key) as reader:
        found = stage(reader, list(tensors), "cuda")
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    pinned = made[len(tensors) :]
    assert [tensor.array.size for tensor in pinned] == [10_000, 10_000]
    assert not any(tensor.array.any() for tensor in pinned)


def test_after_a_bad_chunk_nothing_stays_on_the_device(
    made: list[Tensor], stored: Any, identity: Any, owner: SigningKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tensors = stored
    monkeypatch.setattr(device, "BUFFER", 10_000)
    raw = bytearray(path.read_bytes())
    raw[65536 + 60_000] ^= 1
    path.write_bytes(raw)
    with (
        sealed.SealedReader(path, identity=identity, signed_by=owner.verifying_key) as reader,
        pytest.raises(Tampered),
    ):
        stage(reader, list(tensors), "cuda")
    assert not any(tensor.array.any() for tensor in made)


def test_on_a_real_gpu(stored: Any, identity: Any, owner: SigningKey) -> None:
    torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    path, tensors = stored
    found = sealed.load_file(path, identity=identity, signed_by=owner.verifying_key, framework="pt", device="cuda")
    for name, tensor in tensors.items():
        assert found[name].is_cuda
        assert np.array_equal(found[name].cpu().numpy(), tensor)


def test_devices_that_are_not_there(stored: Any, identity: Any, owner: SigningKey) -> None:
    pins = {"identity": identity, "signed_by": owner.verifying_key}
    with pytest.raises(UsageError, match="CPU"):
        sealed.load_file(stored[0], device="cuda", **pins)
    with pytest.raises((MissingExtra, UsageError)):
        sealed.load_file(stored[0], framework="pt", device="no such device", **pins)
