"""Using a handle: what a client sends an enclave over an attested channel, and what the enclave has it charged to.

    >>> len(Invoke(token=b"t", invocation=b"i", arguments={"image": b""}).padded())
    1024

Spec: docs/spec/capability.md, and docs/spec/service.md, section 6.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from attrs import evolve, field, frozen

from isolate.crypto import cbor
from isolate.crypto.signing import Purpose, SigningKey
from isolate.errors import MalformedError, ReleaseRefused, UsageError
from isolate.messages.attest import ServiceCertificate
from isolate.messages.base import Bytes32, Limit, Message


def encode_argument(value: Any) -> Any:
    """How an argument travels: an array as its C-order little-endian bytes, the rest as it is.

    >>> import numpy as np
    >>> encode_argument(np.array([1, 2], "uint16")), encode_argument(3)
    (b'\\x01\\x00\\x02\\x00', 3)

    Raises UsageError for what has no such bytes: Python objects, and tensors that live on a device.
    """
    array = getattr(value, "__array__", None)
    if array is None:
        return value
    import numpy as np

    try:
        numbers = np.ascontiguousarray(array())
    except (TypeError, ValueError, RuntimeError):
        raise UsageError("this argument has no array in memory", hint="bring it to the CPU first") from None
    if numbers.dtype.hasobject:
        raise UsageError("an array of Python objects does not travel")
    return numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).tobytes()


# The limits of a scope that enclave and service enforce. A token with any other is refused, not obeyed less.
ENFORCED = frozenset(
    {
        *("operations", "parameters", "outputs", "minimum_group"),
        *("uses", "bytes_out", "rates", "not_before", "expires", "depth", "lease"),
    }
)

BUCKET = 256  # bytes of a padded reply: its length tells a result from a refusal to nobody
REQUEST_BUCKET = 1024  # bytes: a request has a multiple, which hides the names of operations of one size


def head_size(size: int) -> int:
    """By how many bytes the head of a byte string of this size is longer than that of an empty one."""
    return 0 if size < 24 else 1 if size < 256 else 2 if size < 65536 else 4


def _padding(bare: int, bucket: int) -> int:
    """How many bytes of padding bring an encoding of ``bare`` bytes, with its empty padding, to the bucket."""
    missing = -bare % bucket
    while True:
        # Where the head grows, one total cannot be reached: then the padding goes on to the next bucket.
        for head in (0, 1, 2, 4):
            if head <= missing and head_size(missing - head) == head:
                return missing - head
        missing += bucket


@frozen
class _Padded(Message):
    """A message with a field ``padding`` of zero bytes, which says nothing."""

    BUCKET: ClassVar[int]

    def padded(self) -> bytes:
        """The encoding, with padding up to the next multiple of the message's bucket."""
        bare = evolve(self, padding=b"")  # type: ignore[call-arg]
        return evolve(bare, padding=bytes(_padding(len(bare.encode()), self.BUCKET))).encode()  # type: ignore[call-arg]


@frozen
class Invoke(_Padded):
    TYPE = "invoke"
    BUCKET = REQUEST_BUCKET
    token: bytes = field(repr=False)
    invocation: bytes = field(repr=False)
    arguments: dict[str, Any] = field(repr=False)
    padding: bytes = field(default=b"", repr=False)


@frozen
class Reply(_Padded):
    """The answer to an Invoke: ``code`` is empty for a result, and then ``value`` is of the operation's type.

    >>> [len(Reply("", value, "00" * 8).padded()) for value in (1, "a" * 150, bytes(200))]
    [256, 256, 512]
    """

    TYPE = "reply"
    BUCKET = BUCKET
    code: str
    value: Any = field(repr=False)
    request_id: str
    padding: bytes = field(default=b"", repr=False)


MAX_BYTES_OUT = 2**32  # bytes of one use: an account is a 64-bit integer in the service's database
BytesOut = Annotated[int, Limit(0, MAX_BYTES_OUT)]
_CODE = re.compile(r"[a-z0-9_]{0,64}")


@frozen
class ReserveRequest(Message):
    """Body of a Signed request by an enclave: one use, and its worst case in bytes, before the operation runs."""

    TYPE = "reserve-request"
    token: bytes = field(repr=False)
    invocation: bytes = field(repr=False)
    channel_binding: Bytes32
    argument_hash: Bytes32
    bytes_out: BytesOut


@frozen
class Reservation(Message):
    """The service's signature that this use, at its worst case, is durably spent: now the operation may run."""

    TYPE = "reservation"
    invocation: bytes
    log_index: int
    time: int
    signature: bytes = field(default=b"", repr=False)

    def _signed(self) -> bytes:
        return cbor.encode([self.invocation, self.log_index, self.time])

    @classmethod
    def make(cls, invocation: bytes, log_index: int, time: int, key: SigningKey) -> Reservation:
        unsigned = cls(invocation, log_index, time)
        return evolve(unsigned, signature=key.sign(Purpose.RESERVATION, unsigned._signed()))

    def verify(self, certificate: ServiceCertificate, invocation: bytes) -> None:
        """Raises ReleaseRefused unless the certified service signed it for this invocation (its id)."""
        signed = certificate.release_key.verify(Purpose.RESERVATION, self._signed(), self.signature)
        if self.invocation != invocation or not signed:
            raise ReleaseRefused("the reservation is not the service's, or for another use", code="receipt_refused")


@frozen
class SettleRequest(Message):
    """Body of a Signed request by the instance that reserved: what is about to leave.

    ``invocation`` is its id (32 bytes), ``bytes_out`` the size of the padded reply, at most what was reserved, and
    ``code`` the refusal's, or empty for a result.
    """

    TYPE = "settle-request"
    invocation: Bytes32
    bytes_out: BytesOut
    code: str

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_code(self.code)


def _check_code(code: str) -> None:
    if not _CODE.fullmatch(code):
        raise MalformedError("a code is 0 to 64 of a-z 0-9 _")


@frozen
class RefusalReport(Message):
    """Body of a Signed request by an enclave: it refused invocations by itself, before it asked for anything.

    ``token`` is one whose chain verified, or empty; ``times`` how many there were of this code, for its grant (or
    without one), since the last report.
    """

    TYPE = "refusal-report"
    token: bytes = field(repr=False)
    code: str
    times: Annotated[int, Limit(1, 2**32)]

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_code(self.code)


@frozen
class Noted(Message):
    """How often the service was told of this code, for this grant (or by this instance), by now."""

    TYPE = "noted"
    count: int


@frozen
class Receipt(Message):
    """The service's signature that this use is settled and in its log: now the reply may leave.

    ``leaf`` is the hash of the entry at ``log_index``, by which ``isolate.messages.receipts`` finds it in the log.
    """

    TYPE = "receipt"
    invocation: bytes
    bytes_out: int
    code: str
    log_index: int
    leaf: bytes
    time: int
    signature: bytes = field(default=b"", repr=False)

    def signed(self) -> bytes:
        """What the signature covers."""
        return cbor.encode([self.invocation, self.bytes_out, self.code, self.log_index, self.leaf, self.time])

    def sign(self, key: SigningKey) -> Receipt:
        return evolve(self, signature=key.sign(Purpose.RECEIPT, self.signed()))

    def verify(self, certificate: ServiceCertificate, settled: SettleRequest) -> None:
        """Raises ReleaseRefused unless the certified service signed it for what was asked to be settled."""
        said = (self.invocation, self.bytes_out, self.code)
        same = said == (settled.invocation, settled.bytes_out, settled.code)
        if not same or not certificate.release_key.verify(Purpose.RECEIPT, self.signed(), self.signature):
            raise ReleaseRefused("the receipt is not the service's, or for another use", code="receipt_refused")


@frozen
class BudgetRequest(Message):
    """Body of a Signed request by the holder of a token."""

    TYPE = "budget-request"
    token: bytes = field(repr=False)


@frozen
class Budget(Message):
    """What is left: the least over the handle and its ancestors. None is no limit."""

    TYPE = "budget"
    uses: int | None
    bytes_out: int | None
