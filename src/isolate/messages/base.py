"""The form of every message: a CBOR map of its type and its fields; signed requests, and signed answers to them.

    >>> from attrs import frozen
    >>> @frozen
    ... class Ping(Message):
    ...     TYPE = "ping"
    ...     number: int
    >>> Ping.parse(Ping(number=7).encode())
    Ping(number=7)

Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import hashlib
import types
from typing import Any, ClassVar, Self, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs
from attrs import field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, Signer, SigningKey, VerifyingKey
from isolate.errors import MalformedError, RefusedError

MAX_MESSAGE = 1024 * 1024  # bytes; a sealed file's header and directory are the largest parts
NONCE_SIZE = 32


def check_size(name: str, value: bytes, *sizes: int) -> None:
    """Raise MalformedError unless the value has one of these lengths."""
    if len(value) not in sizes:
        raise MalformedError(f"{name} is {' or '.join(map(str, sizes))} bytes")


class Message:
    """Base of the messages. Field types are bytes, str, int, bool, list[...], dict[str, ...], and ``| None``."""

    TYPE: ClassVar[str]

    def encode(self) -> bytes:
        values = {name: getattr(self, name) for name in _hints(type(self))}
        return cbor.encode({"type": self.TYPE, **values})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Read exactly this message. Raises MalformedError for anything else."""
        value = cbor.decode(data, max_size=MAX_MESSAGE)
        if not isinstance(value, dict) or value.pop("type", None) != cls.TYPE:
            raise MalformedError(f"no message of type {cls.TYPE}")
        hints = _hints(cls)
        if set(value) != set(hints):
            raise MalformedError(f"message {cls.TYPE} has missing or unknown fields")
        for name, hint in hints.items():
            if not _fits(value[name], hint):
                raise MalformedError(f"field {name} of message {cls.TYPE} is of the wrong type")
        return cls(**value)


_HINTS: dict[Any, dict[str, Any]] = {}


def _hints(cls: Any) -> dict[str, Any]:
    """The types of a message's fields, worked out once a class."""
    if cls in _HINTS:
        return _HINTS[cls]
    hints = get_type_hints(cls)
    names = [a.name for a in attrs.fields(cls)]
    return _HINTS.setdefault(cls, {name: hints[name] for name in names})


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
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
    nonce: bytes
    audience: str
    key: bytes
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

    def __attrs_post_init__(self) -> None:
        check_size("the nonce of a request", self.nonce, NONCE_SIZE)
        check_size("a verifying key", self.key, 64)

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
