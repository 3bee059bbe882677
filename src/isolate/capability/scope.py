"""The lattice of scopes: what a block of a token allows, and the meet of two (docs/spec/capability.md, 2).

    >>> team = Scope(operations={"classify": bytes(32), "score": bytes(32)}, uses=1000)
    >>> meet(team, Scope(operations={"classify": bytes(32)}, uses=5000)) == Scope(
    ...     operations={"classify": bytes(32)}, uses=1000)
    True
    >>> meet(team, Scope()) == team
    True
    >>> Scope(parameters={"score": {"top": Range(1, 10)}}).check_arguments("score", {"top": 11})
    Traceback (most recent call last):
    isolate.errors.ScopeExceeded: the argument top of score is outside what this handle allows

A field that is absent (None) says nothing: it inherits. The meet of two scopes allows what both allow; it never
fails, and is associative, commutative and idempotent, so that a chain of blocks has one meaning. Times are unix
seconds, sizes are bytes, and every number is an integer of 0 to 2**63 - 1 (a parameter's may be negative).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self, TypeAlias, TypeVar

from attrs import Attribute, field, fields, frozen

from isolate.crypto import cbor
from isolate.errors import CapabilityRefused, MalformedError, ScopeExceeded, UsageError

MAX_SCOPE = 4096  # bytes encoded, as a whole token
MAX_NUMBER = 2**63 - 1
DIGEST_SIZE = 32

# What each kind of output is measured by: a handle allows a kind up to these sizes (capability.md, 2.3).
OUTPUT_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "handle": (),
        "label": ("choices",),
        "scalar": ("bits",),
        "text": ("tokens",),
        "vector": ("values", "bits"),
    }
)

_OPERATION = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_PARAMETER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

T = TypeVar("T")


@frozen
class Range:
    """The integers from ``least`` to ``most``, both included."""

    least: int
    most: int

    def __attrs_post_init__(self) -> None:
        if type(self.least) is not int or type(self.most) is not int:
            raise UsageError("the bounds of a range are integers")
        if not -MAX_NUMBER <= self.least <= self.most <= MAX_NUMBER:
            raise UsageError("a range goes from a lesser to a greater integer of 64 bits")

    def permits(self, value: object) -> bool:
        return type(value) is int and self.least <= value <= self.most


def _distinct(values: Iterable[int | str]) -> frozenset[int | str]:
    listed = list(values)
    for value in listed:
        if type(value) is not str and (type(value) is not int or abs(value) > MAX_NUMBER):
            raise UsageError("choices are texts and integers of 64 bits")
    return frozenset(listed)


@frozen
class Choices:
    """These values and no others: integers and texts. Of no values at all, it forbids the parameter any value."""

    values: frozenset[int | str] = field(converter=_distinct)

    def permits(self, value: object) -> bool:
        return type(value) in (int, str) and value in self.values


Constraint: TypeAlias = Range | Choices
Operations: TypeAlias = Mapping[str, bytes]
Parameters: TypeAlias = Mapping[str, Mapping[str, Constraint]]
Outputs: TypeAlias = Mapping[str, tuple[int, ...]]
Rates: TypeAlias = Mapping[int, int]


def _number(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_NUMBER:
        raise UsageError(f"{what} is an integer of 0 to 2**63 - 1")
    return value


def _name(value: object, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise UsageError(f"a name of {what} matches {pattern.pattern}")
    return value


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{what} is a mapping")
    return value


def _operations(value: Operations | None) -> Operations | None:
    if value is None:
        return None
    for name, digest in _mapping(value, "operations").items():
        _name(name, _OPERATION, "an operation")
        if not isinstance(digest, bytes) or len(digest) != DIGEST_SIZE:
            raise UsageError("the digest of an operation is 32 bytes")
    return MappingProxyType(dict(value))


def _parameters(value: Parameters | None) -> Parameters | None:
    if value is None:
        return None
    for operation, limits in _mapping(value, "parameters").items():
        _name(operation, _OPERATION, "an operation")
        for name, constraint in _mapping(limits, "parameters of an operation").items():
            _name(name, _PARAMETER, "a parameter")
            if not isinstance(constraint, Range | Choices):
                raise UsageError("a parameter is limited by a Range or by Choices")
    return MappingProxyType({name: MappingProxyType(dict(limits)) for name, limits in value.items()})


def _outputs(value: Outputs | None) -> Outputs | None:
    if value is None:
        return None
    for kind, sizes in _mapping(value, "outputs").items():
        expected = OUTPUT_KINDS.get(kind)
        if expected is None or not isinstance(sizes, tuple | list) or len(sizes) != len(expected):
            raise UsageError(f"outputs are of {', '.join(OUTPUT_KINDS)}, each with its sizes")
        for size in sizes:
            _number(size, "the size of an output")
    return MappingProxyType({kind: tuple(sizes) for kind, sizes in value.items()})


def _rates(value: Rates | None) -> Rates | None:
    if value is None:
        return None
    for seconds, uses in _mapping(value, "rates").items():
        if _number(seconds, "the window of a rate, in seconds,") == 0:
            raise UsageError("the window of a rate is at least a second")
        _number(uses, "the uses in a window")
    return MappingProxyType(dict(value))


def _limit(_: object, attribute: Attribute[int | None], value: int | None) -> None:
    if value is not None:
        _number(value, attribute.name)


@frozen(kw_only=True)
class Scope:
    """What one block allows. Raises UsageError for what no scope can say.

    operations     name -> digest of the operation, 32 bytes; none other may run
    parameters     operation -> parameter -> Range or Choices that its argument must be in
    outputs        kind -> greatest sizes, as OUTPUT_KINDS names them; no other kind may leave
    uses           invocations in all
    bytes_out      bytes in all that may leave, after encoding and padding
    rates          seconds -> uses in any window of that length
    minimum_group  distinct entities behind each aggregate, at least
    not_before     first second in which it is valid
    expires        first second in which it is no longer valid
    depth          blocks that may follow
    lease          uses in one lease, at most; only where the grant itself has it (VerifiedToken.lease)
    """

    operations: Operations | None = field(default=None, converter=_operations)
    parameters: Parameters | None = field(default=None, converter=_parameters)
    outputs: Outputs | None = field(default=None, converter=_outputs)
    uses: int | None = field(default=None, validator=_limit)
    bytes_out: int | None = field(default=None, validator=_limit)
    rates: Rates | None = field(default=None, converter=_rates)
    minimum_group: int | None = field(default=None, validator=_limit)
    not_before: int | None = field(default=None, validator=_limit)
    expires: int | None = field(default=None, validator=_limit)
    depth: int | None = field(default=None, validator=_limit)
    lease: int | None = field(default=None, validator=_limit)

    def check_operation(self, operation: str, digest: bytes) -> None:
        """Raise ScopeExceeded unless this operation, in exactly this version, may run."""
        if self.operations is None or self.operations.get(operation) != digest:
            raise ScopeExceeded("this operation, in this version, is not among those that this handle allows")

    def check_arguments(self, operation: str, arguments: Mapping[str, object]) -> None:
        """Raise ScopeExceeded unless every argument that is limited is there, and within its limit."""
        for name, constraint in ((self.parameters or {}).get(operation) or {}).items():
            if name not in arguments or not constraint.permits(arguments[name]):
                raise ScopeExceeded(f"the argument {name} of {operation} is outside what this handle allows")

    def check_output(self, kind: str, *sizes: int) -> None:
        """Raise ScopeExceeded unless an output of this kind and these sizes may leave."""
        if kind not in OUTPUT_KINDS or len(sizes) != len(OUTPUT_KINDS[kind]):
            raise UsageError(f"outputs are of {', '.join(OUTPUT_KINDS)}, each with its sizes")
        if self.outputs is None:
            return
        most = self.outputs.get(kind)
        if most is None or any(size > limit for size, limit in zip(sizes, most, strict=True)):
            raise ScopeExceeded(f"an output of this kind and size ({kind}) is not allowed by this handle")

    def check_time(self, now: int) -> None:
        """Raise CapabilityRefused unless not_before <= now < expires; codes ``not_yet_valid``, ``expired``."""
        if self.not_before is not None and now < self.not_before:
            raise CapabilityRefused(
                f"this handle is valid from {self.not_before} (unix seconds) on", code="not_yet_valid", hint=""
            )
        if self.expires is not None and now >= self.expires:
            raise CapabilityRefused(
                f"this handle expired at {self.expires} (unix seconds)", code="expired", hint="ask for a new one"
            )

    def require_enforced(self, enforced: Collection[str]) -> None:
        """Raise CapabilityRefused if a limit is present that the caller does not enforce, by name of the field.

        Whoever decides calls this once with what it does enforce: a limit that is passed over is a widening.

        >>> Scope(uses=1).require_enforced({"uses"})
        >>> Scope(uses=1, minimum_group=10).require_enforced({"uses"})
        Traceback (most recent call last):
        isolate.errors.CapabilityRefused: this handle has limits that are not enforced here: minimum_group
        """
        if missing := [name for name in _LIMITS if name not in enforced and getattr(self, name) is not None]:
            raise CapabilityRefused(
                f"this handle has limits that are not enforced here: {', '.join(sorted(missing))}",
                code="not_enforced",
            )

    def is_within(self, other: Scope) -> bool:
        """Whether this allows nothing that ``other`` does not: the order of the lattice."""
        return meet(self, other) == self

    def to_value(self) -> dict[str, Any]:
        """The map that stands in a block: only the fields that are present."""
        value: dict[str, Any] = {}
        for name in _LIMITS:
            part = getattr(self, name)
            if part is None:
                continue
            if name == "parameters":
                value["parameters"] = {
                    operation: {argument: _constraint_value(one) for argument, one in limits.items()}
                    for operation, limits in part.items()
                }
            elif name == "outputs":
                value["outputs"] = {kind: list(sizes) for kind, sizes in part.items()}
            else:
                value[name] = dict(part) if isinstance(part, Mapping) else part
        return value

    @classmethod
    def from_value(cls, value: object) -> Self:
        """Read such a map. Raises CapabilityRefused for an unknown field or a value that no scope has."""
        if not isinstance(value, dict):
            raise CapabilityRefused("a scope is a map", code="token_malformed")
        if not value.keys() <= set(_LIMITS) or None in value.values():
            raise CapabilityRefused(
                "the scope has a field that is unknown here", code="token_malformed", hint="is this software old?"
            )
        read = dict(value)
        try:
            if "parameters" in read:
                read["parameters"] = {
                    operation: {
                        name: _constraint(one) for name, one in _mapping(limits, "limits of parameters").items()
                    }
                    for operation, limits in _mapping(read["parameters"], "parameters").items()
                }
            return cls(**read)
        except UsageError as error:
            raise CapabilityRefused(f"the scope is malformed: {error.message}", code="token_malformed") from None

    def encode(self) -> bytes:
        """Deterministic CBOR."""
        return cbor.encode(self.to_value())

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read it. Raises CapabilityRefused; what is unknown is refused, never skipped."""
        try:
            value = cbor.decode(data, max_size=MAX_SCOPE)
        except MalformedError as error:
            raise CapabilityRefused(f"the scope is malformed: {error.message}", code="token_malformed") from None
        return cls.from_value(value)


def _constraint_value(constraint: Constraint) -> Any:
    if isinstance(constraint, Range):
        return {"least": constraint.least, "most": constraint.most}
    return sorted(constraint.values, key=cbor.encode)


def _constraint(value: object) -> Constraint:
    if isinstance(value, dict) and set(value) == {"least", "most"}:
        return Range(value["least"], value["most"])
    if isinstance(value, list) and all(type(one) in (int, str) for one in value):
        choices = Choices(value)
        if _constraint_value(choices) == value:
            return choices
    raise UsageError("a parameter is limited by a range, or by sorted and distinct choices")


_LIMITS = tuple(attribute.name for attribute in fields(Scope))


def _both(one: Constraint, other: Constraint) -> Constraint:
    if isinstance(one, Range) and isinstance(other, Range):
        least, most = max(one.least, other.least), min(one.most, other.most)
        return Range(least, most) if least <= most else Choices(())
    if isinstance(one, Choices):
        return Choices(value for value in one.values if other.permits(value))
    return _both(other, one)


def _meet(one: T | None, other: T | None, both: Callable[[T, T], T]) -> T | None:
    """Absent inherits: only what stands on both sides is combined."""
    if one is None:
        return other
    return one if other is None else both(one, other)


def _shared(names: Iterable[str], other: Iterable[str]) -> list[str]:
    return sorted(set(names) & set(other))


def _meet_operations(one: Operations, other: Operations) -> Operations:
    return {name: one[name] for name in _shared(one, other) if one[name] == other[name]}


def _meet_constraints(one: Mapping[str, Constraint], other: Mapping[str, Constraint]) -> Mapping[str, Constraint]:
    return {**one, **other, **{name: _both(one[name], other[name]) for name in _shared(one, other)}}


def _meet_parameters(one: Parameters, other: Parameters) -> Parameters:
    shared = {name: _meet_constraints(one[name], other[name]) for name in _shared(one, other)}
    return {**one, **other, **shared}


def _meet_outputs(one: Outputs, other: Outputs) -> Outputs:
    return {
        kind: tuple(min(pair) for pair in zip(one[kind], other[kind], strict=True)) for kind in _shared(one, other)
    }


def _meet_rates(one: Rates, other: Rates) -> Rates:
    return {
        seconds: min(rates[seconds] for rates in (one, other) if seconds in rates)
        for seconds in sorted({*one, *other})
    }


def meet(one: Scope, other: Scope) -> Scope:
    """The greatest scope within both. It always exists; it may allow nothing."""
    return Scope(
        operations=_meet(one.operations, other.operations, _meet_operations),
        parameters=_meet(one.parameters, other.parameters, _meet_parameters),
        outputs=_meet(one.outputs, other.outputs, _meet_outputs),
        uses=_meet(one.uses, other.uses, min),
        bytes_out=_meet(one.bytes_out, other.bytes_out, min),
        rates=_meet(one.rates, other.rates, _meet_rates),
        minimum_group=_meet(one.minimum_group, other.minimum_group, max),
        not_before=_meet(one.not_before, other.not_before, max),
        expires=_meet(one.expires, other.expires, min),
        depth=_meet(one.depth, other.depth, min),
        lease=_meet(one.lease, other.lease, min),
    )
