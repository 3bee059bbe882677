"""Registering what an operation made of an asset: a new one, which nobody may use without a handle on the first.

    >>> derived_name("digits/model", bytes(32))
    'digits/model/derived/00000000000000000000000000000000'

Spec: docs/spec/operations.md, section 6.
"""

from __future__ import annotations

from typing import Annotated

from attrs import field, frozen

from isolate.messages.base import Bytes32, Limit, Message
from isolate.messages.owner import MAX_ASSET

_BETWEEN = "/derived/"


def derived_name(asset: str, invocation: bytes) -> str:
    """What the asset is called that this invocation (its id) makes of another: nobody chooses it."""
    return f"{asset}{_BETWEEN}{invocation.hex()[:32]}"


def is_derived_of(name: str, asset: str) -> bool:
    """Whether a name is one of those, for this asset.

    >>> is_derived_of("a/derived/" + "0" * 32, "a"), is_derived_of("a/derived/../b", "a"), is_derived_of("b", "a")
    (True, False, False)
    """
    head, between, number = name.rpartition(_BETWEEN)
    return head == asset and bool(between) and len(number) == 32 and set(number) <= set("0123456789abcdef")


@frozen
class DeriveRequest(Message):
    """Body of a Signed request by the instance that has reserved the invocation with this id, and not settled it.

    ``asset`` is the new name; ``header`` and ``directory`` are the public parts of the sealed file. Of which asset
    and through which handles it was made stands in the reservation: the enclave cannot say otherwise.
    """

    TYPE = "derive-request"
    invocation: Bytes32
    asset: Annotated[str, Limit(1, MAX_ASSET)]
    header: bytes = field(repr=False)
    directory: bytes = field(repr=False)
