"""The form of every message: a CBOR map of its type and its fields; signed requests, and signed answers to them.

    >>> from attrs import frozen
    >>> @frozen
    ... class Ping(Message):
    ...     TYPE = "ping"
    ...     number: Annotated[int, Limit(0, 9)]
    >>> Ping.parse(Ping(number=7).encode())
    Ping(number=7)
    >>> Ping(number=10)
    Traceback (most recent call last):
    isolate.errors.MalformedError: number of message ping is 0 to 9

Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, Signer, SigningKey, VerifyingKey, from_text, to_text
from isolate.errors import MalformedError, RefusedError

MAX_MESSAGE = 1024 * 1024  # bytes; a sealed file's header and directory are the largest parts
MAX_LINE = 4096  # bytes encoded, of a message that is a line of text
NONCE_SIZE = 32


@frozen
class Limit:
    """How long a field's bytes, text, list or map is, or how large its number: both ends are allowed.

    It stands in the field's type, ``Annotated[bytes, Limit(32, 32)]``, is checked whenever the message is made, and
    is what the service's OpenAPI description says of that field.
    """

    least: int
    most: int

    def admits(self, value: Any) -> bool:
        return self.least <= (value if type(value) is int else len(value)) <= self.most

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most}"


Bytes32 = Annotated[bytes, Limit(32, 32)]  # a hash, an id, a nonce
Bytes64 = Annotated[bytes, Limit(64, 64)]  # a verifying key


def check_size(name: str, value: bytes, *sizes: int) -> None:
    """Raise MalformedError unless the value has one of these lengths."""
    if len(value) not in sizes:
        raise MalformedError(f"{name} is {' or '.join(map(str, sizes))} bytes")


class Message:
    """Base of the messages. Field types are bytes, str, int, bool, list[...], dict[str, ...], and ``| None``.

    A class with an ``__attrs_post_init__`` of its own calls that of this one first.
    """

    TYPE: ClassVar[str]

    def __attrs_post_init__(self) -> None:
        for name, breaks in _limited(type(self)):
            if found := breaks(getattr(self, name)):
                value, limit = found
                unit = " bytes" if type(value) is bytes else "" if type(value) is int else " long"
                raise MalformedError(f"{name} of message {self.TYPE} is {limit}{unit}")

    def encode(self) -> bytes:
        values = {name: getattr(self, name) for name in hints(type(self))}
        return cbor.encode({"type": self.TYPE, **values})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read exactly this message. Raises MalformedError for anything else."""
        value = cbor.decode(data, max_size=MAX_MESSAGE)
        if not isinstance(value, dict) or value.pop("type", None) != cls.TYPE:
            raise MalformedError(f"no message of type {cls.TYPE}")
        fields = _checks(cls)
        if value.keys() != fields.keys():
            raise MalformedError(f"message {cls.TYPE} has missing or unknown fields")
        for name, fits in fields.items():
            if not fits(value[name]):
                raise MalformedError(f"field {name} of message {cls.TYPE} is of the wrong type")
        return cls(**value)


class Line(Message):
    """A message that travels as one line of a file: ``PREFIX``, then the encoding in base64url with a checksum."""

    PREFIX: ClassVar[str]
    WHAT: ClassVar[str]  # how an error calls it

    def to_text(self) -> str:
        return to_text(self.PREFIX, self.encode())

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read such a line. Raises MalformedError or KeyFormatError."""
        text = text.strip()
        size = (len(text) - len(cls.PREFIX)) * 3 // 4 - 4
        if not 0 < size <= MAX_LINE:
            raise MalformedError(f"this is no {cls.WHAT}: the text is too short or too long")
        return cls.parse(from_text(cls.PREFIX, text, size, cls.WHAT))


_Check = Callable[[Any], bool]
_Breaks = Callable[[Any], tuple[Any, Limit] | None]

_HINTS: dict[Any, dict[str, Any]] = {}
_CHECKS: dict[Any, dict[str, _Check]] = {}
_LIMITED: dict[Any, tuple[tuple[str, _Breaks], ...]] = {}


def hints(cls: Any) -> dict[str, Any]:
    """The types of a message's fields, with their limits; worked out once a class."""
    if cls in _HINTS:
        return _HINTS[cls]
    found = get_type_hints(cls, include_extras=True)
    return _HINTS.setdefault(cls, {one.name: found[one.name] for one in attrs.fields(cls)})


def _checks(cls: Any) -> dict[str, _Check]:
    """For each of a message's fields, whether a value is of its type."""
    if cls in _CHECKS:
        return _CHECKS[cls]
    return _CHECKS.setdefault(cls, {name: _check(hint) for name, hint in hints(cls).items()})


def _limited(cls: Any) -> tuple[tuple[str, _Breaks], ...]:
    """Those of a message's fields that have a limit somewhere, and what finds a part of a value that breaks one."""
    if cls in _LIMITED:
        return _LIMITED[cls]
    found = tuple((name, _breaks(hint)) for name, hint in hints(cls).items() if _has_limit(hint))
    return _LIMITED.setdefault(cls, found)


def _has_limit(hint: Any) -> bool:
    return isinstance(hint, Limit) or any(_has_limit(part) for part in get_args(hint))


def _breaks(hint: Any) -> _Breaks:
    """What finds a part of a value that breaks its limit, with that limit. What is of another type has none here.

    Both this and ``_check`` look at the type once, and not at every message again.
    """
    if not _has_limit(hint):
        return lambda value: None
    origin, given = get_origin(hint), get_args(hint)
    if origin is Annotated:
        own = [_outside(_check(given[0]), note) for note in given[1:] if isinstance(note, Limit)]
        return _first(*own, *([_breaks(given[0])] if _has_limit(given[0]) else []))
    if origin in (Union, types.UnionType):
        return _first(*map(_breaks, given))
    if origin is list:
        item = _breaks(given[0])
        return lambda value: next(filter(None, map(item, value)), None) if isinstance(value, list) else None
    if origin is dict:
        key, part = map(_breaks, given)
        return lambda value: (
            next((found for pair in value.items() if (found := key(pair[0]) or part(pair[1]))), None)
            if isinstance(value, dict)
            else None
        )
    return lambda value: None


def _outside(fits: _Check, limit: Limit) -> _Breaks:
    return lambda value: (value, limit) if fits(value) and not limit.admits(value) else None


def _first(*several: _Breaks) -> _Breaks:
    if len(several) == 1:
        return several[0]
    return lambda value: next((found for breaks in several if (found := breaks(value))), None)


def _check(hint: Any) -> _Check:
    """What says whether a value is of this type."""
    origin, given = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _check(given[0])
    if origin in (Union, types.UnionType):
        several = tuple(map(_check, given))
        return lambda value: any(fits(value) for fits in several)
    if hint is type(None):
        return lambda value: value is None
    if origin is list:
        item = _check(given[0])
        return lambda value: isinstance(value, list) and all(map(item, value))
    if origin is dict:
        key, part = map(_check, given)
        return lambda value: isinstance(value, dict) and all(map(key, value)) and all(map(part, value.values()))
    if hint is Any:
        return lambda value: True
    # bool is an int to isinstance, never to us.
    return lambda value: type(value) is hint


@frozen
class Signed(Message):
    """A request by the holder of a key: ``body`` is the encoded request, ``nonce`` is used once.

    ``key`` is the whole verifying key (64 bytes); ``token`` is an attestation result, or empty when the owner
    signs. Who may ask what is the service's to decide; this only says who asked.
    """

    TYPE = "signed"
    body: bytes
    nonce: Bytes32
    audience: str
    key: Bytes64
    token: str
    signature: bytes = field(repr=False)

    @classmethod
    def make(
        cls, purpose: Purpose, signer: Signer, body: bytes, nonce: bytes, audience: str, token: str = ""
    ) -> Self:
        key = signer.verifying_key.to_bytes()
        signature = signer.sign(purpose, cls._signed(body, nonce, audience, key, token))
        return cls(body, nonce, audience, key, token, signature)

    @staticmethod
    def _signed(body: bytes, nonce: bytes, audience: str, key: bytes, token: str) -> bytes:
        return cbor.encode([body, nonce, audience, key, token])

    @property
    def digest(self) -> bytes:
        """SHA-256 of the encoding, 32 bytes: what its answer names."""
        return hashlib.sha256(self.encode()).digest()

    def verify(self, purpose: Purpose, audience: str) -> VerifyingKey:
        """Who signed it. Raises RefusedError when the signature or the audience is wrong."""
        if self.audience != audience:
            raise RefusedError("this request was made for somebody else", code="wrong_audience")
        key = VerifyingKey.from_bytes(self.key)
        signed = self._signed(self.body, self.nonce, self.audience, self.key, self.token)
        if not key.verify(purpose, signed, self.signature):
            raise RefusedError("the signature of this request does not verify", code="bad_signature")
        return key


M = TypeVar("M", bound=Message)


@frozen
class Answer(Message):
    """The service's answer to one Signed request: whoever carries it can make none up, and swap no two.

    Refusals are not signed: who carries can refuse in any case, by carrying nothing.
    """

    TYPE = "answer"
    request: bytes
    body: bytes
    signature: bytes = field(repr=False)

    @classmethod
    def make(cls, request: Signed, answer: Message, key: SigningKey) -> Self:
        body = answer.encode()
        return cls(request.digest, body, key.sign(Purpose.ANSWER, cbor.encode([request.digest, body])))

    def open(self, request: Signed, key: VerifyingKey, kind: type[M]) -> M:
        """What was answered to ``request``. Raises RefusedError for another's answer, or one to something else."""
        signed = cbor.encode([self.request, self.body])
        if self.request != request.digest or not key.verify(Purpose.ANSWER, signed, self.signature):
            raise RefusedError("the answer is not the service's to this request", code="forged_answer")
        return kind.parse(self.body)


@frozen
class Refusal(Message):
    """What a refused caller is told: a code, one line that carries no data, and the number of the request.

    ``kind`` is the default code of the error's class, where ``code`` says more than that.
    """

    TYPE = "refusal"
    code: str
    message: str
    hint: str
    request_id: str
    kind: str = ""
