"""A receipt's place in the log: that the service did not only sign that it settled a use, but wrote it down.

    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.transparency.checkpoint import sign_checkpoint
    >>> key, store, entry = SigningKey.generate(), merkle.MemoryStore(), cbor.encode({"kind": "settled"})
    >>> note = sign_checkpoint(key, "isolate/demo/1", 1, merkle.append(store, 0, entry))
    >>> receipt = Receipt(bytes(32), 256, "", 0, merkle.leaf_hash(entry), 1_800_000_000).sign(key)
    >>> checkpoint = Checkpoint.verify(note, "isolate/demo/1", key.verifying_key.ed25519)
    >>> verify_receipt(receipt, key.verifying_key, entry, InclusionProof.build(store, 0, 1), checkpoint)

Whoever has a receipt asks for the entry at its index with a proof (route ``log``, or the tiles), and for a
checkpoint that he believes: one that others see too. Spec: docs/spec/service.md, section 6.2.
"""

from __future__ import annotations

from typing import Any

from isolate.crypto import cbor, merkle
from isolate.crypto.signing import Purpose, VerifyingKey
from isolate.errors import LogRefused, MalformedError
from isolate.messages.invoke import Receipt
from isolate.transparency.checkpoint import Checkpoint
from isolate.transparency.proof import InclusionProof


def verify_receipt(
    receipt: Receipt, release_key: VerifyingKey, entry: bytes, proof: InclusionProof, checkpoint: Checkpoint
) -> None:
    """Raise LogRefused unless the use that this receipt is for stands in the log.

    ``release_key`` is that of the certified service, ``entry`` the public bytes of an entry.

    1. The service signed the receipt.
    2. The entry and its index are those that the receipt names, and the entry is of a use that was settled.
    3. The proof leads from that entry to the checkpoint, which the caller has verified.

    That the entry's details are of this very use, the owner sees, who has their salt.
    """
    if not release_key.verify(Purpose.RECEIPT, receipt.signed(), receipt.signature):  # 1
        raise LogRefused("the receipt is not the service's")
    if (
        merkle.leaf_hash(entry) != receipt.leaf or proof.index != receipt.log_index or _kind(entry) != "settled"
    ):  # 2
        raise LogRefused("this entry is not the one that the receipt names")
    proof.verify(entry, checkpoint)  # 3


def _kind(entry: bytes) -> Any:
    try:
        value = cbor.decode(entry)
    except MalformedError:
        return None
    return value.get("kind") if isinstance(value, dict) else None
