"""Operations: what a handle may name, with typed arguments, a result of a closed type, and a price.

    >>> from isolate.enclave.operations import Array, Label, operation
    >>> @operation(inputs={"image": Array("uint8", (2,))}, output=Label(10))
    ... def brightest(view, image):
    ...     return int(image.argmax())
    >>> brightest.name, brightest.output.check(7), brightest.reply_size
    ('brightest', 7, 256)

An operation is named by a digest over its name, version, schema, price and own source text. What it calls is not in
that digest: all the code is in the enclave's measurement, and trusted because of that, not because Python confines
it. The output types are the gate that even a careless operation does not pass. Spec: docs/spec/operations.md.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from attrs import evolve, field, frozen

from isolate.capability.scope import Scope
from isolate.crypto import cbor
from isolate.enclave.aggregates import Aggregates, Count, Mean, Rows, Sum
from isolate.enclave.replies import size_of
from isolate.enclave.values import (
    Array,
    Choice,
    Derived,
    Input,
    Integer,
    Joined,
    Label,
    Output,
    Scalar,
    Text,
    Vector,
)
from isolate.enclave.view import View
from isolate.errors import CapabilityRefused, UsageError
from isolate.messages.invoke import MAX_BYTES_OUT

__all__ = [
    "Aggregates",
    "Array",
    "Choice",
    "Count",
    "Derived",
    "Input",
    "Integer",
    "Joined",
    "Label",
    "Mean",
    "Operation",
    "Output",
    "Rows",
    "Scalar",
    "Sum",
    "Text",
    "Vector",
    "operation",
]


@frozen
class Operation:
    """A registered function. ``digest`` (32 bytes) is what a scope names.

    reply_size  bytes of every reply, results and refusals alike: enough for the longest result of its type
    seeded      whether the function also gets ``seed``, 32 bytes that only the enclave can make
    price       of the decoded arguments, the bytes that a use costs where that is more than its reply
    """

    name: str
    version: int
    inputs: Mapping[str, Input]
    output: Output
    digest: bytes
    function: Callable[..., Any] = field(repr=False)
    seeded: bool = False
    price: Callable[..., int] | None = field(default=None, repr=False)
    reply_size: int = 0

    def __attrs_post_init__(self) -> None:
        # Worked out once, and kept where a minimum group makes another one of it: no group makes a reply longer.
        if not self.reply_size:
            object.__setattr__(self, "reply_size", size_of(self.output))

    def decode(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments as the function takes them. Raises CapabilityRefused, code ``bad_argument``."""
        if set(arguments) != set(self.inputs):
            raise CapabilityRefused("the arguments are not those of the operation", code="bad_argument")
        return {name: self.inputs[name].decode(value) for name, value in arguments.items()}

    def cost(self, decoded: Mapping[str, Any]) -> int:
        """The bytes that a use with these arguments is charged, at the least its whole reply."""
        if self.price is None:
            return self.reply_size
        try:
            price = int(self.price(**decoded))
        except Exception:  # noqa: BLE001 (the boundary: the arguments are the caller's, and stay unsaid)
            raise CapabilityRefused("the operation has no price for these arguments", code="bad_argument") from None
        return min(max(price, self.reply_size), MAX_BYTES_OUT)

    def under(self, minimum_group: int) -> Operation:
        """The same operation where no aggregate may be over fewer distinct entities than this (0: no such limit).

        Raises CapabilityRefused, code ``not_enforced``, for an operation whose results are no aggregates.
        """
        if not minimum_group:
            return self
        if not isinstance(self.output, Aggregates):
            raise CapabilityRefused(
                "this handle asks for a minimum group, and the operation answers no aggregates", code="not_enforced"
            )
        return evolve(self, output=self.output.at_least(minimum_group))

    def run(self, view: View, decoded: Mapping[str, Any], **given: Any) -> Any:
        """Run on decoded arguments, and let out what the output type lets out. Raises CapabilityRefused.

        What the function raises becomes the code ``operation_failed``: its own exceptions carry data.
        """
        try:
            result = self.function(view, **decoded, **given)
        except BaseException:  # noqa: BLE001 (the boundary: also what would end the thread that serves)
            raise CapabilityRefused("the operation failed", code="operation_failed") from None
        return self.output.check(result)


def operation(
    *,
    inputs: Mapping[str, Input],
    output: Output,
    version: int = 1,
    seeded: bool = False,
    price: Callable[..., int] | None = None,
) -> Callable[[Callable[..., Any]], Operation]:
    """Make an Operation of a function ``f(view, **arguments)``; ``view`` is a View of the asset.

    ``seeded``: it also gets ``seed``. ``price``: a function of the arguments, for what tells more than its length.
    """

    def make(function: Callable[..., Any]) -> Operation:
        if seeded and "seed" in inputs:
            raise UsageError("a seeded operation gets its seed from the enclave, and from nobody else")
        if isinstance(output, Derived) and any(isinstance(kind, Joined) for kind in inputs.values()):
            raise UsageError("what is made of several assets would hang on one handle only")
        schema = [{name: kind.schema() for name, kind in inputs.items()}, output.schema()]
        body = cbor.encode(
            [function.__name__, version, schema, _source(function), seeded, "" if price is None else _source(price)]
        )
        digest = hashlib.sha256(b"isolate/v1/operation\0" + body).digest()
        Scope(operations={function.__name__: digest})  # raises for a name that no handle can have
        return Operation(
            function.__name__, version, dict(inputs), output, digest, function, seeded=seeded, price=price
        )

    return make


def _source(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        name = getattr(function, "__name__", "this function")
        raise UsageError(f"the source of {name} is not to be had") from None
