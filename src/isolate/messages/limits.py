"""What the owner lets all users of an asset take from it together, and each of them.

    >>> AssetLimits("digits", uses=1000, bytes_out=None, holder_uses=100, holder_bytes=None).holder_uses
    100

A handle's own limits bind those who hold it. These bind the asset over its whole life, however many handles there
are: many small ones, and many keys of one person, add up to no more. Spec: docs/spec/service.md, section 6.
"""

from __future__ import annotations

from typing import Annotated

from attrs import frozen

from isolate.errors import MalformedError
from isolate.messages.base import Limit, Message
from isolate.messages.owner import MAX_ASSET

MAX_LIMIT = 2**62  # an account is a 64-bit integer, and one more use must still fit
Most = Annotated[int, Limit(0, MAX_LIMIT)]


@frozen
class AssetLimits(Message):
    """Uses and bytes in all through this asset, and by each holder of it; None is no limit. It replaces the last.

    What was used before counts: a limit below it lets nothing more through, and a higher one goes on from there.
    """

    TYPE = "asset-limits"
    asset: Annotated[str, Limit(1, MAX_ASSET)]
    uses: Most | None
    bytes_out: Most | None
    holder_uses: Most | None
    holder_bytes: Most | None

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if not self.asset.isprintable():
            raise MalformedError("an asset has a name of printable characters")
