"""Tensors of numpy and torch as bytes with a safetensors dtype, and back.

    >>> import numpy as np
    >>> dtype, shape, data = tensor_bytes(np.arange(3, dtype=np.int16))
    >>> dtype, shape, bytes(data).hex()
    ('I16', (3,), '000001000200')
    >>> from_buffer(np.frombuffer(data, np.uint8), dtype, shape, "np").tolist()
    [0, 1, 2]

numpy has no bfloat16 and no 8-bit floats. Where the package ml_dtypes is installed its types are used; elsewhere
such a tensor is an array of raw bits (uint16 or uint8) whose dtype carries the name, ``array.dtype.metadata ==
{"safetensors": "BF16"}``, so that it is sealed again as what it was. F4 and F6 are packed: raw bytes.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from isolate.crypto.aead import as_bytes
from isolate.errors import MissingExtra, UsageError
from isolate.sealed.manifest import DTYPE_BITS, tensor_size

_NUMPY: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16, "F16": np.float16,
    "I32": np.int32, "U32": np.uint32, "F32": np.float32, "C64": np.complex64, "F64": np.float64, "I64": np.int64,
    "U64": np.uint64,
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64",
    "I64": "int64", "U64": "uint64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_TAG = "safetensors"
FRAMEWORKS = {"np": "np", "numpy": "np", "pt": "pt", "torch": "pt", "pytorch": "pt"}


@cache
def _ml_dtypes() -> Any:
    try:
        return importlib.import_module("ml_dtypes")
    except ImportError:
        return None


@cache
def numpy_dtype(name: str) -> Any:
    """The numpy dtype for safetensors' ``name``; raw bits that carry the name where numpy has none."""
    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    known = getattr(_ml_dtypes(), _ML_DTYPES.get(name, ""), None)
    if known is not None:
        return np.dtype(known)
    raw = "u2" if DTYPE_BITS[name] == 16 else "u1"
    return np.dtype(raw, metadata={_TAG: name})


def _numpy_name(dtype: np.dtype[Any]) -> str:
    carried: Mapping[str, Any] = dtype.metadata or {}
    tag = carried.get(_TAG)
    if tag in DTYPE_BITS:
        return str(tag)
    for name, kind in _NUMPY.items():
        if dtype.newbyteorder("=") == kind:
            return name
    for name, kind_name in _ML_DTYPES.items():
        if dtype.name == kind_name:
            return name
    raise UsageError(f"numpy's {dtype} has no form in safetensors")


def storage_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The numpy shape: elements, or for packed dtypes (F4, F6) bytes in the last dimension."""
    bits = DTYPE_BITS[name]
    if bits >= 8 or not shape:
        return tuple(shape)
    last = shape[-1] * bits
    return (*shape[:-1], last // 8) if last % 8 == 0 else (tensor_size(name, shape),)


def tensor_bytes(tensor: Any) -> tuple[str, tuple[int, ...], memoryview]:
    """(dtype, shape, bytes) of a numpy array or torch tensor; a copy only where it is not contiguous, not
    little-endian or not on the CPU. Raises UsageError."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _torch_bytes(torch, tensor)
    if not isinstance(tensor, np.ndarray | np.generic):
        raise UsageError(f"a tensor is a numpy array or a torch tensor, not {type(tensor).__name__}")
    array = np.asarray(tensor)
    name = _numpy_name(array.dtype)
    bits = DTYPE_BITS[name]
    shape = array.shape
    if bits < 8:
        if not shape or shape[-1] * 8 % bits:
            raise UsageError(f"packed {name} needs a last dimension of whole elements")
        shape = (*shape[:-1], shape[-1] * 8 // bits)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # ascontiguousarray would make a scalar one-dimensional, but its bytes are the same.
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return name, tuple(shape), as_bytes(flat.data) if flat.size else memoryview(b"")


def _torch_bytes(torch: Any, tensor: Any) -> tuple[str, tuple[int, ...], memoryview]:
    names = {getattr(torch, kind): name for name, kind in _TORCH.items() if hasattr(torch, kind)}
    if tensor.dtype not in names:
        raise UsageError(f"torch's {tensor.dtype} has no form in safetensors")
    name = names[tensor.dtype]
    shape = tuple(int(n) for n in tensor.shape)
    if name == "F4":
        shape = (*shape[:-1], shape[-1] * 2)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not flat.numel():
        return name, shape, memoryview(b"")
    return name, shape, as_bytes(flat.view(torch.uint8).numpy().data)


def from_buffer(raw: np.ndarray[Any, Any], dtype: str, shape: Sequence[int], framework: str) -> Any:
    """The tensor over ``raw`` (uint8, one-dimensional), without a copy. Raises UsageError or MissingExtra."""
    if framework == "np":
        return raw.view(numpy_dtype(dtype)).reshape(storage_shape(dtype, shape))
    return torch_view(load_torch().from_numpy(raw), dtype, shape)


def torch_view(raw: Any, dtype: str, shape: Sequence[int]) -> Any:
    """The same over a torch tensor (uint8, one-dimensional) on any device. Raises UsageError."""
    torch = load_torch()
    kind = getattr(torch, _TORCH.get(dtype, ""), None)
    if kind is None:
        raise UsageError(f"this torch has no dtype for {dtype}; open it with framework='np'")
    if dtype == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    if not math.prod(shape):
        return torch.empty(tuple(shape), dtype=kind, device=raw.device)
    return raw.view(kind).reshape(tuple(shape))


def load_torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise MissingExtra("framework='pt' needs torch", hint="pip install 'isolate-confidential[torch]'") from None
