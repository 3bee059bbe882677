"""Replies of one length: results, errors and refusals of an operation, padded to what its longest result takes.

    >>> from isolate.enclave.values import Label, Text
    >>> size_of(Label(10)), size_of(Text(100))
    (256, 512)
    >>> size = size_of(Text(100))
    >>> {len(fit(code, value, "00" * 8, size)) for code, value in (("", "x" * 400), ("", "x"), ("revoked", None))}
    {512}

The size is a multiple of 256 bytes, and follows from the declared type alone: never from a result.
Spec: docs/spec/operations.md, 4.
"""

from __future__ import annotations

from typing import Any

from isolate.enclave.values import Output
from isolate.errors import OutputRefused, UsageError
from isolate.messages.base import MAX_MESSAGE
from isolate.messages.invoke import BUCKET, Reply, head_size

REQUEST_ID = 16  # hex digits
MAX_CODE = 64  # characters
_SPARE = 8  # bytes, so that the longest result still leaves room for the head of its padding


def size_of(output: Output) -> int:
    """Bytes of every reply of an operation of this type. Raises UsageError for a type beyond 1 MiB."""
    longest = Reply("", output.longest(), "0" * REQUEST_ID)
    refusal = Reply("x" * MAX_CODE, None, "0" * REQUEST_ID)
    needed = max(len(longest.encode()), len(refusal.encode())) + _SPARE
    size = -(-needed // BUCKET) * BUCKET
    if size > MAX_MESSAGE:
        raise UsageError(f"a result takes at most {MAX_MESSAGE} bytes")
    return size


def fit(code: str, value: Any, request_id: str, size: int) -> bytes:
    """The reply in exactly ``size`` bytes. Raises OutputRefused for what is longer."""
    # Because of its head, a padding of some sizes does not exist. A request id that is a digit or two shorter
    # brings such a reply to another size of padding, and says nothing.
    for digits in range(REQUEST_ID, REQUEST_ID - 3, -1):
        missing = size - len(Reply(code, value, request_id[:digits]).encode())
        for head in (0, 1, 2, 4):
            if head <= missing and head_size(missing - head) == head:
                return Reply(code, value, request_id[:digits], bytes(missing - head)).encode()
    raise OutputRefused("the result is longer than the reply that was charged")
