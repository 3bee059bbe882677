"""Tensors as bytes and as arrays: what travels, and what is added up.

    >>> import torch
    >>> from isolate.torch.dtypes import Reduction, flat_bytes
    >>> one, other = torch.ones(4, dtype=torch.bfloat16), torch.full((4,), 2.0, dtype=torch.bfloat16)
    >>> reduction = Reduction.of(torch.distributed.ReduceOp.SUM, one.dtype)
    >>> reduction.into(flat_bytes(one), flat_bytes(other))
    >>> one.tolist()
    [3.0, 3.0, 3.0, 3.0]

numpy adds what it knows (one thread, no lock held); torch adds bfloat16, float16 and bool. Every rank adds the same
two operands in each step, so that all end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from attrs import frozen

from isolate.errors import UsageError

# The number is what stands in a header (docs/spec/process-group.md, 4).
NUMBERS: dict[Any, int] = {
    torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4,
    torch.int8: 5, torch.uint8: 6, torch.int16: 7, torch.int32: 8, torch.int64: 9, torch.bool: 10,
}  # fmt: skip
_NUMPY: dict[Any, Any] = {
    torch.float32: np.float32, torch.float64: np.float64, torch.int8: np.int8, torch.uint8: np.uint8,
    torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64,
}  # fmt: skip
# The number is that of torch's RedOpType, and stands in a header too, plus one: zero is "no reduction".
_NAMES = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
_WITH_NUMPY: dict[str, Any] = {
    "SUM": np.add, "AVG": np.add, "PRODUCT": np.multiply, "MIN": np.minimum, "MAX": np.maximum,
    "BAND": np.bitwise_and, "BOR": np.bitwise_or, "BXOR": np.bitwise_xor,
}  # fmt: skip
_WITH_TORCH: dict[str, Any] = {
    "SUM": torch.add, "AVG": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
    "BAND": torch.bitwise_and, "BOR": torch.bitwise_or, "BXOR": torch.bitwise_xor,
}  # fmt: skip


def flat_bytes(tensor: Any) -> memoryview:
    """A writable view in bytes of a contiguous CPU tensor of any dtype."""
    if not tensor.numel():
        return memoryview(bytearray())
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


@frozen
class Reduction:
    """How two buffers of one dtype become one. ``number`` and ``dtype`` are what the header says of it."""

    name: str
    number: int
    dtype: int
    item: int  # bytes of an element
    into: Callable[[memoryview, memoryview], None]  # target <- target (op) other
    both: Callable[[memoryview, memoryview, memoryview], None]  # target <- one (op) other
    finish: Callable[[memoryview], None] | None  # what a fully reduced part still needs; takes the number of ranks

    @classmethod
    def of(cls, op: Any, dtype: Any, size: int = 1) -> Reduction:
        """``op`` is torch's ReduceOp, ``size`` how many ranks AVG divides by.

        Raises UsageError for what cannot be reduced: PREMUL_SUM, bits of floats, the average of integers.
        """
        # ReduceOp is no enum: it has == and no hash.
        name = next((name for name in _NAMES if op == getattr(dist.ReduceOp, name)), None)
        number = NUMBERS.get(dtype)
        floating = dtype.is_floating_point
        if name is None or number is None:
            raise UsageError(f"the backend 'isolate' does not reduce {dtype} by {op}")
        if (name == "AVG" and not floating) or (name in ("BAND", "BOR", "BXOR") and floating):
            raise UsageError(f"{name} does not go with {dtype}")
        known = _NUMPY.get(dtype)
        view = _numpy_view(known) if known is not None else _torch_view(dtype)
        combine = (_WITH_NUMPY if known is not None else _WITH_TORCH)[name]

        def into(target: memoryview, other: memoryview) -> None:
            seen = view(target)
            combine(seen, view(other), out=seen)

        def both(target: memoryview, one: memoryview, other: memoryview) -> None:
            combine(view(one), view(other), out=view(target))

        def divide(target: memoryview) -> None:
            seen = view(target)
            seen /= size

        finish = divide if name == "AVG" and size > 1 else None
        return cls(name, _NAMES.index(name) + 1, number, dtype.itemsize, into, both, finish)


def _numpy_view(dtype: Any) -> Callable[[memoryview], Any]:
    return lambda data: np.frombuffer(data, dtype=dtype)


def _torch_view(dtype: Any) -> Callable[[memoryview], Any]:
    return lambda data: torch.from_numpy(np.frombuffer(data, dtype=np.uint8)).view(dtype)
