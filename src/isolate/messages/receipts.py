"""A receipt's place in the log: that the service did not only sign that it settled a use, but wrote it down.

    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.transparency.checkpoint import sign_checkpoint
    >>> key, store = SigningKey.generate(), merkle.MemoryStore()
    >>> entry = cbor.encode({"kind": "settled", "time": 1_800_000_000, "commitment": bytes(32)})
    >>> note = sign_checkpoint(key, "isolate/demo/1", 1, merkle.append(store, 0, entry))
    >>> receipt = Receipt(bytes(32), 256, "", 0, merkle.leaf_hash(entry), 1_800_000_000).sign(key)
    >>> checkpoint = Checkpoint.verify(note, "isolate/demo/1", key.verifying_key.ed25519)
    >>> verify_receipt(receipt, key.verifying_key, entry, InclusionProof.build(store, 0, 1), checkpoint)

Whoever has a receipt asks for the entry at its index with a proof (route ``log``, or the tiles), and for a
checkpoint that he believes: one that others see too. Spec: docs/spec/service.md, section 6.2.
"""

from __future__ import annotations

from isolate.crypto import cbor, merkle
from isolate.crypto.signing import Purpose, VerifyingKey
from isolate.errors import LogRefused, MalformedError
from isolate.messages.invoke import Receipt
from isolate.transparency.checkpoint import Checkpoint
from isolate.transparency.proof import InclusionProof
from isolate.transparency.tiles import MAX_ENTRY


def verify_receipt(
    receipt: Receipt, release_key: VerifyingKey, entry: bytes, proof: InclusionProof, checkpoint: Checkpoint
) -> None:
    """Raise LogRefused unless the use that this receipt is for stands in the log.

    ``release_key`` is that of the certified service, ``entry`` the public bytes of an entry.

    1. The service signed the receipt.
    2. The entry and its index are those that the receipt names, and the entry is of a use that was settled, not
       after the time of the receipt.
    3. The proof leads from that entry to the checkpoint, which the caller has verified.

    That the entry's details are of this very use, the owner sees, who has their salt.
    """
    if not release_key.verify(Purpose.RECEIPT, receipt.signed(), receipt.signature):  # 1
        raise LogRefused("the receipt is not the service's")
    if merkle.leaf_hash(entry) != receipt.leaf or proof.index != receipt.log_index:  # 2
        raise LogRefused("this entry is not the one that the receipt names")
    kind, time = _facts(entry)
    if kind != "settled" or time > receipt.time:
        raise LogRefused("this entry is not of the use that the receipt is for")
    proof.verify(entry, checkpoint)  # 3


def _facts(entry: bytes) -> tuple[str, int]:
    """Kind and time of an entry. Raises LogRefused for what is none."""
    try:
        value = cbor.record(entry, {"kind": str, "time": int, "commitment": bytes}, max_size=MAX_ENTRY)
    except MalformedError as error:
        raise LogRefused(f"the entry is malformed: {error.message}") from None
    return value["kind"], value["time"]
