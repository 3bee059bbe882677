"""COSE_Sign1 with ES384, as Nitro and simulated documents use it (RFC 9052, 4.2 and 4.4).

    >>> from isolate.attestation.verifiers.cose import signed_bytes
    >>> signed_bytes(b"", b"payload")[2:12]
    b'Signature1'

What is verified is made of the raw bytes of header and payload, never of a second encoding of what was read.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import cbor2

from isolate.crypto import cbor
from isolate.errors import MalformedError

ES384 = -35  # RFC 9053, 2.1
ALGORITHM, CRITICAL, CONTENT_TYPE = 1, 2, 3  # header labels, RFC 9052, 3.1
SIGN1_TAG = 18
_MAX_DEPTH = 8


def signed_bytes(protected: bytes, payload: bytes) -> bytes:
    """The Sig_structure: what an ES384 signature of COSE_Sign1 is made over."""
    return cbor.encode(["Signature1", protected, b"", payload])


def decode_lenient(data: bytes, *, tag: int | None = None) -> Any:
    """Foreign CBOR: any length form and map order, but one item, no trailing bytes and no key twice.

    ``tag`` (6 to 23) may stand in front of it, once, in its one-byte form. Raises MalformedError.
    """
    if tag is not None and data[:1] == bytes([0xC0 | tag]):
        data = data[1:]
    stream = BytesIO(data)
    try:
        value = cbor2.CBORDecoder(stream, max_depth=_MAX_DEPTH, allow_duplicate_keys=False).decode()
    # cbor2 raises several unrelated types on hostile input.
    except Exception:  # noqa: BLE001
        raise MalformedError("not CBOR, or a map with a key twice") from None
    if stream.tell() != len(data):
        raise MalformedError("bytes follow the CBOR item")
    return value
