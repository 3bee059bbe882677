"""Tensors as host memory that is contiguous: what lies elsewhere is copied there, and back afterwards.

    >>> import torch
    >>> from isolate.torch.staging import Staged
    >>> tensor = torch.arange(6.0).reshape(2, 3).T
    >>> staged = Staged(tensor)
    >>> staged.fetch()
    >>> _ = staged.host.mul_(2)
    >>> staged.store()
    >>> tensor[:, 0].tolist()
    [0.0, 2.0, 4.0]

A channel encrypts on the CPU. So a CUDA tensor goes through pinned memory of the host, both ways, and a job that
used NCCL pays for that: it is told once. NCCL's own traffic, between GPUs and between hosts, is not protected.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from isolate.errors import UsageError

COST = (
    "the backend 'isolate' copies CUDA tensors to the host, encrypts them there and copies them back: expect host "
    "memory and PCIe speed, not NVLink's. NCCL would be faster, and sends everything in the clear"
)
_told: set[str] = set()


class Staged:
    """One tensor of a collective. ``reads``: its content is sent; ``writes``: it is replaced."""

    def __init__(self, tensor: Any, *, reads: bool = True, writes: bool = True) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise UsageError("the backend 'isolate' takes dense tensors")
        self.tensor, self._reads, self._writes = tensor.detach(), reads, writes
        self.host: Any = None
        if tensor.is_complex():
            self.tensor = torch.view_as_real(self.tensor)
        self.dtype = self.tensor.dtype
        self.bytes = self.tensor.numel() * self.tensor.element_size()
        # What the caller's stream still has to do to it comes first.
        self._ready = torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None
        self._direct = is_host(self.tensor) and self.tensor.is_contiguous()
        if self._direct:
            self.host = self.tensor
        elif not is_host(self.tensor) and self.tensor.device.type not in _told:
            _told.add(self.tensor.device.type)
            warnings.warn(COST, stacklevel=4)

    def fetch(self) -> None:
        """Have ``host`` hold the content, where it is read."""
        if self._direct or self.host is not None:
            return
        host = room(self.tensor)
        if self._ready is not None:
            self._ready.synchronize()
        if self._reads:
            host.copy_(self.tensor)
        self.host = host

    def store(self) -> None:
        """Put ``host`` back into the tensor, where it is written, and let go of it."""
        if self._direct:
            return
        if self._writes:
            self.tensor.copy_(self.host)
        self.host = None


def is_host(tensor: Any) -> bool:
    """Whether the CPU works on this memory."""
    return bool(tensor.device.type == "cpu")


def room(tensor: Any) -> Any:
    """Host memory for the content, contiguous; pinned where that makes the copy to a GPU faster."""
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)


def devices_of(staged: Sequence[Staged]) -> list[Any]:
    """The GPUs that tensors of a future lie on."""
    return list({one.tensor.device for one in staged if not is_host(one.tensor)})


def blocks_of(whole: memoryview, sizes: list[int]) -> list[memoryview]:
    """Cut at these numbers of bytes."""
    found, start = [], 0
    for size in sizes:
        found.append(whole[start : start + size])
        start += size
    return found


def same_place(one: Any, other: Any, offset: int) -> bool:
    """Whether a tensor lies at this offset in another: gathered in place."""
    return bool(one.data_ptr() == other.data_ptr() + offset)
