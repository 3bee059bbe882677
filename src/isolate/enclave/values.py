"""The closed types of arguments and results: what may go in, and in which few forms anything may come out.

    >>> Scalar(0, 1, 100).check(0.257), Scalar(0, 1, 100).read(26)
    (26, 0.26)
    >>> Text(5).check("nearest document")
    'nearest document'
    >>> Text(5).check("a text of more than twenty bytes")
    Traceback (most recent call last):
    ...
    isolate.errors.OutputRefused: the result is not of the operation's declared type

An input's ``decode`` refuses what is not of its type. An output's ``check`` is the gate: it answers the one form in
which a result may leave, or raises OutputRefused; ``read`` is how its receiver understands that form. Numbers leave
as the number of a step, never as floats, whose last digits could carry anything. Spec: docs/spec/operations.md, 2.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np
from attrs import frozen

from isolate.errors import CapabilityRefused, OutputRefused, UsageError

MAX_ELEMENTS = 16 * 1024 * 1024
MAX_STEPS = 2**53  # what a double tells apart
MAX_BOUND = 2**53  # of a number: beyond, a double is not its own, and a step could be one too many
MAX_VALUES = 65536  # numbers in one vector: more is a tensor, and no result
MAX_TOKENS = 65536
TOKEN = 4  # bytes of UTF-8 that count as one token of text, whatever a tokenizer would say


class Input(Protocol):
    """A type of argument: ``schema`` goes into the digest, ``decode`` refuses what is not of it."""

    def schema(self) -> list[Any]: ...
    def decode(self, value: Any) -> Any: ...


class Output(Protocol):
    """A closed type of result.

    ``kind`` and ``sizes`` are what a scope's ``outputs`` limits (docs/spec/capability.md, 2.3); ``longest`` is a
    value that takes as many bytes as any that ``check`` lets out.
    """

    kind: ClassVar[str]

    def schema(self) -> list[Any]: ...
    def sizes(self) -> tuple[int, ...]: ...
    def check(self, value: Any) -> Any: ...
    def longest(self) -> Any: ...


def _bad(what: str = "is not of its declared type") -> CapabilityRefused:
    return CapabilityRefused(f"an argument {what}", code="bad_argument")


def refused() -> OutputRefused:
    """Says nothing of the result, which is what was not to leave."""
    return OutputRefused("the result is not of the operation's declared type")


def bits(count: int) -> int:
    """Bits that tell ``count`` values apart.

    >>> bits(1), bits(2), bits(101)
    (0, 1, 7)
    """
    return (count - 1).bit_length()


@frozen
class Array:
    """A numpy array of one dtype and shape; on the wire its C-order little-endian bytes. For arguments only."""

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
            raise _bad()
        return np.frombuffer(value, self._type).reshape(self.shape)


@frozen
class Integer:
    """An integer from ``low`` to ``high``, both included. For arguments only; as a result take a Scalar."""

    low: int
    high: int

    def schema(self) -> list[Any]:
        return ["integer", self.low, self.high]

    def decode(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise _bad("is outside its declared range")
        return value


@frozen
class Choice:
    """One of these texts, as argument or result."""

    kind: ClassVar[str] = "label"
    values: tuple[str, ...]

    def __attrs_post_init__(self) -> None:
        texts = all(type(value) is str for value in self.values)
        if not self.values or not texts or len(set(self.values)) != len(self.values):
            raise UsageError("a choice is between different texts, at least one")

    def schema(self) -> list[Any]:
        return ["choice", list(self.values)]

    def sizes(self) -> tuple[int, ...]:
        return (len(self.values),)

    def decode(self, value: Any) -> str:
        if type(value) is not str or value not in self.values:
            raise _bad()
        return value

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.values:
            raise refused()
        return self.values[self.values.index(value)]

    def longest(self) -> str:
        return max(self.values, key=lambda value: len(value.encode()))


@frozen
class Label:
    """One of ``count`` classes, as an integer from 0. For results."""

    kind: ClassVar[str] = "label"
    count: int

    def __attrs_post_init__(self) -> None:
        if self.count < 1:
            raise UsageError("a label has at least one class")

    def schema(self) -> list[Any]:
        return ["label", self.count]

    def sizes(self) -> tuple[int, ...]:
        return (self.count,)

    def check(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise refused()
        number = int(value)
        if not 0 <= number < self.count:
            raise refused()
        return number

    def longest(self) -> int:
        return self.count - 1


def _step(value: Any, low: int, high: int, steps: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise refused()
    number = int(value) if isinstance(value, int | np.integer) else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        raise refused()
    part = (float(min(max(number, low), high)) - low) / (high - low)
    return round(part * steps)


def _check_steps(low: int, high: int, steps: int) -> None:
    if not -MAX_BOUND <= low < high <= MAX_BOUND or not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"a number goes from low to high, within +-2**53, in 1 to {MAX_STEPS} steps")


@frozen
class Scalar:
    """A number from ``low`` to ``high``, quantised to ``steps`` steps; what travels is the step's number."""

    kind: ClassVar[str] = "scalar"
    low: int
    high: int
    steps: int

    def __attrs_post_init__(self) -> None:
        _check_steps(self.low, self.high, self.steps)

    def schema(self) -> list[Any]:
        return ["scalar", self.low, self.high, self.steps]

    def sizes(self) -> tuple[int, ...]:
        return (bits(self.steps + 1),)

    def check(self, value: Any) -> int:
        return _step(value, self.low, self.high, self.steps)

    def longest(self) -> int:
        return self.steps

    def read(self, step: int) -> float:
        """The number that a step stands for."""
        return self.low + (self.high - self.low) * step / self.steps

    def decode(self, value: Any) -> float:
        if type(value) is not int or not 0 <= value <= self.steps:
            raise _bad("is outside its declared range")
        return self.read(value)


@frozen
class Vector:
    """``count`` numbers from ``low`` to ``high``, each quantised to ``steps`` steps. For results.

    It lets out ``count`` times what a Scalar does: a wide one is a way to distil a model. Prefer labels.
    """

    kind: ClassVar[str] = "vector"
    count: int
    low: int
    high: int
    steps: int

    def __attrs_post_init__(self) -> None:
        _check_steps(self.low, self.high, self.steps)
        if not 1 <= self.count <= MAX_VALUES:
            raise UsageError(f"a vector has 1 to {MAX_VALUES} numbers")

    def schema(self) -> list[Any]:
        return ["vector", self.count, self.low, self.high, self.steps]

    def sizes(self) -> tuple[int, ...]:
        return (self.count, bits(self.steps + 1))

    def check(self, value: Any) -> list[int]:
        if isinstance(value, np.ndarray):
            value = value.tolist() if value.ndim == 1 and value.dtype.kind in "iuf" else None
        if not isinstance(value, list | tuple) or len(value) != self.count:
            raise refused()
        return [_step(one, self.low, self.high, self.steps) for one in value]

    def longest(self) -> list[int]:
        return [self.steps] * self.count

    def read(self, steps: list[int]) -> list[float]:
        """The numbers that the steps stand for."""
        return [self.low + (self.high - self.low) * step / self.steps for step in steps]


@frozen
class Text:
    """Text of at most ``tokens`` tokens, as argument or result. A token is 4 bytes of UTF-8, begun or full.

    As a result it has no control characters but the line feed: somebody prints it on a terminal.
    """

    kind: ClassVar[str] = "text"
    tokens: int

    def __attrs_post_init__(self) -> None:
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise UsageError(f"a text has 1 to {MAX_TOKENS} tokens")

    def schema(self) -> list[Any]:
        return ["text", self.tokens]

    def sizes(self) -> tuple[int, ...]:
        return (self.tokens,)

    def _fits(self, value: str) -> bool:
        try:
            return len(value.encode()) <= TOKEN * self.tokens
        except UnicodeEncodeError:
            return False

    def decode(self, value: Any) -> str:
        if type(value) is not str or not self._fits(value):
            raise _bad()
        return value

    def check(self, value: Any) -> str:
        if not isinstance(value, str):
            raise refused()
        # What is checked is what leaves: a text of an enumeration, say, is another one to str().
        text = str.__str__(value)
        if not self._fits(text) or any(unicodedata.category(one)[0] == "C" and one != "\n" for one in text):
            raise refused()
        return text

    def longest(self) -> str:
        return "x" * (TOKEN * self.tokens)


@frozen
class Derived:
    """A new asset. As a result: tensors, which the enclave seals, and of which only a reference leaves. As an
    argument: such a reference, and the operation gets a View of the tensors (docs/spec/operations.md, 6)."""

    kind: ClassVar[str] = "handle"

    def schema(self) -> list[Any]:
        return ["derived"]

    def sizes(self) -> tuple[int, ...]:
        return ()

    def decode(self, value: Any) -> dict[str, Any]:
        kinds = {"asset": str, "digest": bytes, "handle": bytes}
        if type(value) is not dict or {name: type(part) for name, part in value.items()} != kinds:
            raise _bad()
        if len(value["digest"]) != 32 or len(value["handle"]) != 32:
            raise _bad()
        return value

    def check(self, value: Any) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors: what the enclave seals. They leave in no other form."""
        if not isinstance(value, Mapping) or not value:
            raise refused()
        for name, tensor in value.items():
            if type(name) is not str or not isinstance(tensor, np.ndarray) or tensor.dtype.kind not in "biuf":
                raise refused()
        return dict(value)

    def longest(self) -> dict[str, Any]:
        return {"asset": "x" * 128, "digest": bytes(32), "handle": bytes(32)}


@frozen
class Joined:
    """Another asset, as an argument: a handle on it, used once, and the operation gets a View of its tensors.

    On the wire a token on that asset and an invocation under it (docs/spec/operations.md, 7).
    """

    asset: str

    def schema(self) -> list[Any]:
        return ["joined", self.asset]

    def decode(self, value: Any) -> dict[str, bytes]:
        if type(value) is not dict or {name: type(part) for name, part in value.items()} != _JOINED:
            raise _bad()
        return value


_JOINED = {"token": bytes, "invocation": bytes}
