"""framework="pt": torch tensors in and out. Where torch is not installed these tests say so and are skipped."""

from __future__ import annotations

from typing import Any

import pytest

from isolate import Identity, SigningKey, sealed
from isolate.sealed.stores import MemorySink, MemorySource

torch = pytest.importorskip("torch", reason="torch is an extra: pip install 'isolate-confidential[torch]'")


def through(tensors: dict[str, Any], owner: SigningKey, identity: Identity) -> dict[str, Any]:
    sink = MemorySink()
    with sealed.SealedWriter(sink, recipients=[identity.recipient], sign=owner) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    pins: dict[str, Any] = {"identity": identity, "signed_by": owner.verifying_key}
    found: dict[str, Any] = sealed.load_file(MemorySource(sink.data), framework="pt", **pins)
    with sealed.safe_open(MemorySource(sink.data), framework="pt", **pins) as file:
        for name, tensor in tensors.items():
            if tensor.ndim and tensor.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
                assert torch.equal(file.get_slice(name)[..., :1], tensor[..., :1])
    return found


def test_every_dtype_of_torch_comes_back(owner: SigningKey, identity: Identity) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randint(0, 2, (6, 8), generator=generator)
    kinds = [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
        torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
    ]  # fmt: skip
    tensors = {str(kind): base.to(kind) for kind in kinds}
    found = through(tensors, owner, identity)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))


def test_views_parameters_and_scalars(owner: SigningKey, identity: Identity) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    tensors = {
        "t": base.t(), "step": base[::2, ::3], "parameter": torch.nn.Parameter(base), "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }  # fmt: skip
    found = through(tensors, owner, identity)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())
        assert found[name].shape == tensor.shape
