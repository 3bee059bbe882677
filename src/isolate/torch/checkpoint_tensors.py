"""Tensors of a checkpoint as the sealed format has them: names of dtypes, shapes, and memory to decrypt into.

    >>> import torch
    >>> from isolate.torch.checkpoint_tensors import dtype_name, span, torch_dtype
    >>> dtype_name(torch.bfloat16), torch_dtype("F8_E4M3")
    ('BF16', torch.float8_e4m3fn)
    >>> span((4, 3), (1, 0), (2, 3)), span((4, 3), (0, 1), (4, 1))
    (3, None)

Shapes are torch's: a packed dtype (F4) counts bytes there, and elements in the sealed format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from isolate.crypto.aead import as_bytes
from isolate.errors import UsageError
from isolate.sealed.dtypes import tensor_bytes, torch_view
from isolate.sealed.reader import Place, SealedReader
from isolate.sealed.safetensors import SealedSlice


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """What the sealed format calls it. Raises UsageError for a dtype that it does not have."""
    try:
        return tensor_bytes(torch.empty((0,), dtype=dtype))[0]
    except (RuntimeError, TypeError, UsageError):
        raise UsageError(
            f"a sealed checkpoint holds no {dtype}", hint="keep it as another dtype (complex128: view_as_real)"
        ) from None


@cache
def torch_dtype(name: str) -> torch.dtype:
    """The dtype for a name of the sealed format. Raises UsageError where this torch has none."""
    found: torch.dtype = torch_view(torch.empty(0, dtype=torch.uint8), name, (0,)).dtype
    return found


def sealed_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape in the sealed format of a tensor with torch's ``shape``."""
    packed = name == "F4" and len(shape) > 0
    return (*shape[:-1], shape[-1] * 2) if packed else tuple(shape)


def check_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a form that has bytes of its own. Raises UsageError for one that has none."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise UsageError(
            "a sealed checkpoint holds dense tensors with data only",
            hint="make a sparse tensor dense, and give a tensor on the meta device its values, before you save it",
        )
    return tensor.detach().resolve_conj().resolve_neg()


def span(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> int | None:
    """Where in a tensor of this shape the box begins, in elements, if it stands there in one piece; else None."""
    partial = False
    for size, length in zip(reversed(shape), reversed(lengths), strict=True):
        if partial and length != 1:
            return None
        partial = partial or length != size
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))


def memory_of(tensor: torch.Tensor) -> memoryview | None:
    """The bytes of a tensor, to be written; None where they are not in one piece, or not in host memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return None
    return as_bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_box(reader: SealedReader, place: Place, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """A box of a stored tensor, decrypted into new memory: only the chunks that it touches are read."""
    index = tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
    raw: np.ndarray[Any, Any] = np.ascontiguousarray(SealedSlice(reader, place, "np", "cpu")[index])
    name = place.entry.dtype
    flat = torch.from_numpy(raw.reshape(-1).view(np.uint8))
    found: torch.Tensor = torch_view(flat, name, sealed_shape(name, lengths))
    return found
