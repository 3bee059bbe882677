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
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, Signer, SigningKey, VerifyingKey
from isolate.errors import MalformedError, RefusedError

MAX_MESSAGE = 1024 * 1024  # bytes; a sealed file's header and directory are the largest parts
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
        for name, hint in _limited(type(self)).items():
            for value, limit in _measured(getattr(self, name), hint):
                if not limit.admits(value):
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
        fields = hints(cls)
        if set(value) != set(fields):
            raise MalformedError(f"message {cls.TYPE} has missing or unknown fields")
        for name, hint in fields.items():
            if not _fits(value[name], hint):
                raise MalformedError(f"field {name} of message {cls.TYPE} is of the wrong type")
        return cls(**value)


_HINTS: dict[Any, dict[str, Any]] = {}
_LIMITED: dict[Any, dict[str, Any]] = {}


def hints(cls: Any) -> dict[str, Any]:
    """The types of a message's fields, with their limits; worked out once a class."""
    if cls in _HINTS:
        return _HINTS[cls]
    found = get_type_hints(cls, include_extras=True)
    return _HINTS.setdefault(cls, {one.name: found[one.name] for one in attrs.fields(cls)})


def _limited(cls: Any) -> dict[str, Any]:
    """Those of a message's fields that have a limit somewhere."""
    if cls in _LIMITED:
        return _LIMITED[cls]
    return _LIMITED.setdefault(cls, {name: hint for name, hint in hints(cls).items() if _has_limit(hint)})


def _has_limit(hint: Any) -> bool:
    return isinstance(hint, Limit) or any(_has_limit(part) for part in get_args(hint))


def _measured(value: Any, hint: Any) -> Iterator[tuple[Any, Limit]]:
    """Every part of a value that has a limit, with its limit. What is of another type has none here."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *notes = get_args(hint)
        if _fits(value, inner):
            yield from ((value, note) for note in notes if isinstance(note, Limit))
        yield from _measured(value, inner)
    elif origin in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _measured(value, part)
    elif origin is list and isinstance(value, list):
        for part in value:
            yield from _measured(part, get_args(hint)[0])
    elif origin is dict and isinstance(value, dict):
        for key, part in value.items():
            yield from _measured(key, get_args(hint)[0])
            yield from _measured(part, get_args(hint)[1])


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Annotated:
        return _fits(value, get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if hint is type(None):
        return value is None
    if origin is list:
        (item,) = get_args(hint)
        return isinstance(value, list) and all(_fits(part, item) for part in value)
    if origin is dict:
        key, item = get_args(hint)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    # bool is an int to isinstance, never to us.
    return hint is Any or type(value) is hint


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
