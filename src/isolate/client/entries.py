"""The log as its owner sees it: every entry with its details, and none that the public log does not have.

    >>> from isolate.crypto import merkle
    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.messages.receipts import commitment
    >>> from isolate.transparency.checkpoint import sign_checkpoint
    >>> key, store, details = SigningKey.generate(), merkle.MemoryStore(), cbor.encode({"asset": "digits"})
    >>> public = cbor.encode({"kind": "use", "time": 7, "commitment": commitment(bytes(32), details)})
    >>> note = sign_checkpoint(key, "isolate/demo/1", 1, merkle.append(store, 0, public))
    >>> at = Checkpoint.verify(note, "isolate/demo/1", key.verifying_key.ed25519)
    >>> opened({"public": public, "salt": bytes(32), "details": details}, 0, store, at)
    LogEntry(index=0, kind='use', time=7, details={'asset': 'digits'})

The service keeps what opens the entries, and could leave some out, or tell of others: so each is found in the log
that everybody sees. That it is the same log for everybody, witnesses and comparing show (docs/spec/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from hmac import compare_digest
from typing import Any

from attrs import frozen

from isolate.crypto import cbor, merkle
from isolate.errors import LogRefused, MalformedError
from isolate.messages.attest import ServiceCertificate
from isolate.messages.owner import MAX_ENTRIES, Entries, EntriesRequest
from isolate.messages.receipts import commitment
from isolate.transparency.checkpoint import MAX_NOTE, Checkpoint
from isolate.transparency.proof import InclusionProof
from isolate.transparency.tiles import MAX_ENTRY, WIDTH, TileStore

_LIED = "log_inconsistent"


@frozen
class LogEntry:
    """``details`` are those of docs/spec/service.md, 7.2; ``time`` is Unix seconds."""

    index: int
    kind: str
    time: int
    details: Mapping[str, Any]


def opened(entry: Mapping[str, bytes], index: int, store: merkle.TreeStore, at: Checkpoint) -> LogEntry:
    """What the service says of an entry, if the log has it at this place. Raises LogRefused."""
    if entry.keys() != {"public", "salt", "details"}:
        raise LogRefused(f"the service does not open entry {index}", code=_LIED)
    try:
        public = cbor.record(entry["public"], {"kind": str, "time": int, "commitment": bytes}, max_size=MAX_ENTRY)
        details = cbor.decode(entry["details"])
    except MalformedError as error:
        raise LogRefused(f"entry {index} is malformed: {error.message}", code=_LIED) from None
    hidden = compare_digest(public["commitment"], commitment(entry["salt"], entry["details"]))
    if not hidden or not isinstance(details, dict):
        raise LogRefused(f"the service tells other details of entry {index} than the log commits to", code=_LIED)
    # A tile that somebody on the way garbled fails here too: log_refused, and no word against the service.
    InclusionProof.build(store, index, at.size).verify(entry["public"], at)
    return LogEntry(index, public["kind"], public["time"], details)


def read(
    ask: Callable[[EntriesRequest], Entries],
    fetch: Callable[[str, int], bytes],
    certificate: ServiceCertificate,
    start: int,
) -> Iterator[LogEntry]:
    """The entries from ``start`` on, up to a checkpoint of now. ``ask`` sends the owner's request, ``fetch``
    answers the log's file at a path, of at most so many bytes. Raises LogRefused, and what these two raise."""
    at = Checkpoint.verify(fetch("checkpoint", MAX_NOTE), certificate.origin, certificate.log_key.ed25519)
    store = TileStore(lambda path: fetch(path, WIDTH * merkle.HASH_SIZE), at.size)
    while start < at.size:
        told = ask(EntriesRequest(start, min(MAX_ENTRIES, at.size - start))).entries
        if not told or len(told) > at.size - start:
            raise LogRefused(f"the service does not open entry {start}", code=_LIED)
        for entry in told:
            yield opened(entry, start, store, at)
            start += 1
