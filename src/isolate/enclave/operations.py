"""Operations: what a handle may name, with typed input and an output of a closed type.

    >>> from isolate.enclave.operations import Array, Label, operation
    >>> @operation(inputs={"image": Array("uint8", (2,))}, output=Label(10))
    ... def brightest(view, image):
    ...     return int(image.argmax())
    >>> brightest.name, brightest.output.check(7)
    ('brightest', 7)

An operation is named by a digest over its name, version, schema and own source text. What it calls is not in that
digest: all the code is in the enclave's measurement, and trusted because of that, not because Python confines it.
The output types are the gate that even a careless operation does not pass. Spec: docs/spec/capability.md.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from attrs import field, frozen

from isolate.crypto import cbor
from isolate.errors import CapabilityRefused, OutputRefused, UsageError

MAX_ELEMENTS = 16 * 1024 * 1024


class Input(Protocol):
    """A type of argument: ``schema`` goes into the digest, ``decode`` refuses what is not of it."""

    def schema(self) -> list[Any]: ...
    def decode(self, value: Any) -> Any: ...


@frozen
class Array:
    """A numpy array of one dtype and shape; on the wire its C-order little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        try:
            plain = self._type.kind in "biufc"
        except TypeError:
            plain = False
        if not plain or any(side < 0 for side in self.shape):
            raise UsageError("an array has a dtype of numbers, and a shape")

    def schema(self) -> list[Any]:
        return ["array", self.dtype, list(self.shape)]

    @property
    def _type(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    def decode(self, value: Any) -> np.ndarray[Any, Any]:
        count = math.prod(self.shape)
        if type(value) is not bytes or count > MAX_ELEMENTS or len(value) != count * self._type.itemsize:
            raise CapabilityRefused("an argument is not of its declared type", code="bad_argument")
        return np.frombuffer(value, self._type).reshape(self.shape)


@frozen
class Integer:
    """An integer from ``low`` to ``high``, both included."""

    low: int
    high: int

    def schema(self) -> list[Any]:
        return ["integer", self.low, self.high]

    def decode(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise CapabilityRefused("an argument is outside its declared range", code="bad_argument")
        return value


class Output(Protocol):
    """A closed type of result: ``check`` answers what may leave, or raises OutputRefused."""

    def schema(self) -> list[Any]: ...
    def check(self, value: Any) -> Any: ...


@frozen
class Label:
    """One of ``count`` classes, as an integer from 0."""

    count: int

    def __attrs_post_init__(self) -> None:
        if self.count < 1:
            raise UsageError("a label has at least one class")

    def schema(self) -> list[Any]:
        return ["label", self.count]

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < self.count:
            raise OutputRefused("the result is not of the operation's declared type")
        return int(value)


@frozen
class Scalar:
    """A number from ``low`` to ``high``, quantised to ``steps`` steps; what leaves is the step's number."""

    low: int
    high: int
    steps: int

    def __attrs_post_init__(self) -> None:
        if self.low >= self.high or self.steps < 1:
            raise UsageError("a scalar goes from low to high, in at least one step")

    def schema(self) -> list[Any]:
        return ["scalar", self.low, self.high, self.steps]

    def check(self, value: Any) -> int:
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or (not isinstance(value, int) and not math.isfinite(value)):
            raise OutputRefused("the result is not of the operation's declared type")
        part = (float(min(max(value, self.low), self.high)) - self.low) / (self.high - self.low)
        return round(part * self.steps)


@frozen
class Operation:
    """A registered function. ``digest`` (32 bytes) is what a scope names."""

    name: str
    version: int
    inputs: Mapping[str, Input]
    output: Output
    digest: bytes
    function: Callable[..., Any] = field(repr=False)

    def run(self, view: Mapping[str, np.ndarray[Any, Any]], arguments: Mapping[str, Any]) -> Any:
        """Decode the arguments, run, and let out what the output type lets out. Raises CapabilityRefused.

        What the function raises becomes the code ``operation_failed``: its own exceptions carry data.
        """
        if set(arguments) != set(self.inputs):
            raise CapabilityRefused("the arguments are not those of the operation", code="bad_argument")
        decoded = {name: self.inputs[name].decode(value) for name, value in arguments.items()}
        try:
            result = self.function(view, **decoded)
        except Exception:  # noqa: BLE001 (the boundary)
            raise CapabilityRefused("the operation failed", code="operation_failed") from None
        return self.output.check(result)


def operation(
    *, inputs: Mapping[str, Input], output: Output, version: int = 1
) -> Callable[[Callable[..., Any]], Operation]:
    """Make an Operation of a function ``f(view, **arguments)``; ``view`` maps tensor names to arrays."""

    def make(function: Callable[..., Any]) -> Operation:
        schema = [{name: kind.schema() for name, kind in inputs.items()}, output.schema()]
        try:
            source = inspect.getsource(function)
        except (OSError, TypeError):
            raise UsageError(f"the source of {function.__name__} is not to be had") from None
        body = cbor.encode([function.__name__, version, schema, source])
        digest = hashlib.sha256(b"isolate/v1/operation\0" + body).digest()
        return Operation(function.__name__, version, dict(inputs), output, digest, function)

    return make
