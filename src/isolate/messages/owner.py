"""What the owner tells the service, each inside a Signed request by the owner's root key, and the log's answers.

    >>> AssetRule(asset="digits/train", readers=["trainer"], writers=[]).encode()[:1].hex()
    'a4'

Spec: docs/spec/service.md, sections 5 and 7.
"""

from __future__ import annotations

from typing import Annotated, Any

from attrs import frozen

from isolate.errors import MalformedError
from isolate.messages.base import Bytes32, Limit, Message

MAX_NAMES = 1024  # measurements in one rule
Names = Annotated[list[str], Limit(0, MAX_NAMES)]
MAX_ASSET = 128  # characters, as in a token


def _check_asset(name: str) -> None:
    if not 1 <= len(name) <= MAX_ASSET or not name.isprintable():
        raise MalformedError(f"an asset has a name of 1 to {MAX_ASSET} printable characters")


@frozen
class PolicyUpdate(Message):
    """``policy`` is a signed policy (docs/spec/evidence.md); its sequence must be higher than the last."""

    TYPE = "policy-update"
    policy: bytes


@frozen
class AssetRule(Message):
    """Which measurements (by their reference name in the policy) may read an asset, and which may write it.

    An asset without a rule is released to nobody.
    """

    TYPE = "asset-rule"
    asset: str
    readers: Names
    writers: Names

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_asset(self.asset)


@frozen
class Revoke(Message):
    """End a handle and everything attenuated from it; ``handle`` is its id (docs/spec/capability.md)."""

    TYPE = "revoke"
    handle: Bytes32


@frozen
class Done(Message):
    TYPE = "done"
    log_index: int


@frozen
class EvidenceRequest(Message):
    """The owner asks for the recorded envelope of an instance."""

    TYPE = "evidence-request"
    instance: bytes


@frozen
class Evidence(Message):
    TYPE = "evidence"
    envelope: bytes


@frozen
class AssetRequest(Message):
    """The owner asks for the newest epoch of an asset; the answer is a Registered, at its place in the log."""

    TYPE = "asset-request"
    asset: str


@frozen
class Rollback(Message):
    """The owner puts an earlier file of an asset back into force; the answer is Registered.

    ``digest`` is the file's, 32 bytes. ``header`` and ``directory`` are empty, or the public parts of a file that
    the service does not know: after a recovery from an old copy, say.
    """

    TYPE = "rollback"
    asset: str
    digest: Bytes32
    header: bytes
    directory: bytes

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        _check_asset(self.asset)


@frozen
class ExplainRequest(Message):
    """The owner asks why a request was refused, by the id that its refusal carried."""

    TYPE = "explain-request"
    request_id: str


@frozen
class Explanation(Message):
    """Why: the numbered checks of that route, in their order. Never a secret, never data.

    Each check is {number: int, name: text, passed: bool or null where it was not reached, expected, found: text}.
    """

    TYPE = "explanation"
    request_id: str
    time: int
    route: str
    code: str
    message: str
    checks: list[dict[str, Any]]


Size = Annotated[int, Limit(0, 2**64 - 1)]  # of a tree, or a place in it


MAX_ENTRIES = 256  # of one answer


@frozen
class EntriesRequest(Message):
    """The owner asks for entries of the log with their details: at most ``most``, from ``start`` on."""

    TYPE = "entries-request"
    start: Size
    most: Annotated[int, Limit(1, MAX_ENTRIES)]


@frozen
class Entries(Message):
    """As many as there are and as fit, at least one if there is one: each {public, salt, details: bytes}."""

    TYPE = "entries"
    entries: list[dict[str, bytes]]


@frozen
class LogRequest(Message):
    """``old_size`` 0 asks for no consistency proof; ``index`` None for no entry."""

    TYPE = "log-request"
    old_size: Size
    index: Size | None


@frozen
class LogAnswer(Message):
    """A signed checkpoint, the proof from ``old_size`` to it, and an entry with its proof. Hashes are 32 bytes."""

    TYPE = "log-answer"
    checkpoint: str
    consistency: list[bytes]
    entry: bytes | None
    inclusion: list[bytes]
