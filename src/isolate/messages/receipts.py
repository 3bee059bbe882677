"""A use's place in the log: that the service did not only sign that it settled the use, but wrote it down.

    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.transparency.checkpoint import sign_checkpoint
    >>> key, store, salt = SigningKey.generate(), merkle.MemoryStore(), bytes(32)
    >>> use = {"asset": "digits", "handle": bytes(32), "invocation": bytes(32), "bytes_out": 256, "code": ""}
    >>> details = cbor.encode(use)
    >>> entry = cbor.encode({"kind": "settled", "time": 1_800_000_000, "commitment": commitment(salt, details)})
    >>> note = sign_checkpoint(key, "isolate/demo/1", 1, merkle.append(store, 0, entry))
    >>> receipt = Receipt(bytes(32), 256, "", 0, merkle.leaf_hash(entry), 1_800_000_000).sign(key)
    >>> checkpoint = Checkpoint.verify(note, "isolate/demo/1", key.verifying_key.ed25519)
    >>> kept = UseReceipt(receipt.encode(), entry, salt, details)
    >>> kept.verify(key.verifying_key, entry, InclusionProof.build(store, 0, 1), checkpoint)
    >>> kept.about["asset"]
    'digits'

Whoever has a receipt asks for the entry at its index with a proof (route ``log``, or the tiles), and for a
checkpoint that he believes: one that others see too. Spec: docs/spec/service.md, section 6.2.
"""

from __future__ import annotations

import hashlib
import os
from hmac import compare_digest
from typing import Annotated, Any, Self

from attrs import field, frozen

from isolate.crypto import cbor, merkle
from isolate.crypto.signing import Purpose, VerifyingKey, read_key_file, write_key_file
from isolate.errors import LogRefused
from isolate.messages.base import Bytes32, Limit, Line, Message
from isolate.messages.invoke import Receipt
from isolate.transparency.checkpoint import Checkpoint
from isolate.transparency.proof import InclusionProof

# Bytes. A receipt takes 285, an entry 85, and the details of an asset with the longest name 698.
MAX_RECEIPT, MAX_ENTRY, MAX_DETAILS = 512, 256, 2048

_ENTRY = {"kind": str, "time": int, "commitment": bytes}
_DETAILS = {"asset": str, "handle": bytes, "invocation": bytes, "bytes_out": int, "code": str}


def commitment(salt: bytes, details: bytes) -> bytes:
    """What an entry of the log shows of its details: 32 bytes (docs/spec/log.md, 2)."""
    return hashlib.sha256(b"isolate/v1/log/entry\0" + salt + details).digest()


@frozen
class ReceiptRequest(Message):
    """Body of a Signed request by a holder of the handle that a use was made through: ``invocation`` is its id."""

    TYPE = "receipt-request"
    invocation: Bytes32


@frozen
class UseReceipt(Line):
    """What a holder keeps, and shows to whoever doubts: a Receipt, the entry that it names, and what opens that.

    ``entry`` is the public half, ``details`` and ``salt`` are those of its commitment. They say which asset, handle
    and use it is about: show it to those only who may know. It holds no key, and nothing of the data.
    """

    TYPE = "use-receipt"
    PREFIX = "isolate-receipt-"
    WHAT = "receipt"
    receipt: Annotated[bytes, Limit(0, MAX_RECEIPT)]
    entry: Annotated[bytes, Limit(0, MAX_ENTRY)]
    salt: Bytes32 = field(repr=False)
    details: Annotated[bytes, Limit(0, MAX_DETAILS)] = field(repr=False)

    @property
    def settled(self) -> Receipt:
        """Invocation, bytes out, code, time and place in the log: as said, not yet verified. MalformedError."""
        return Receipt.parse(self.receipt)

    @property
    def about(self) -> dict[str, Any]:
        """asset (text), handle and invocation (ids), bytes_out, code: as said, not yet verified. MalformedError."""
        return cbor.record(self.details, _DETAILS)

    def check(self, release_key: VerifyingKey) -> Receipt:
        """The receipt, once it says without contradiction that a use was settled; whether that stands in the log
        only ``verify`` says. Raises LogRefused, MalformedError.

        1. The service signed the receipt.
        2. The entry is the one that it names, of a use that was settled, not after the receipt's time.
        3. The entry commits to the details, and they are of the receipt's use.
        """
        said, use = self.settled, self.about
        if not release_key.verify(Purpose.RECEIPT, said.signed(), said.signature):  # 1
            raise LogRefused(
                "the receipt is not the service's", hint="or the service's keys were renewed: ask for it again"
            )
        if merkle.leaf_hash(self.entry) != said.leaf:  # 2
            raise LogRefused("the receipt names another entry than it has")
        entry = cbor.record(self.entry, _ENTRY)
        if entry["kind"] != "settled" or entry["time"] > said.time:
            raise LogRefused("the receipt names no entry of a use that was settled before")
        if not compare_digest(entry["commitment"], commitment(self.salt, self.details)):  # 3
            raise LogRefused("the receipt's entry is about something else")
        if (use["invocation"], use["bytes_out"], use["code"]) != (said.invocation, said.bytes_out, said.code):
            raise LogRefused("the receipt and its entry are of different uses")
        return said

    def verify(
        self, release_key: VerifyingKey, entry: bytes, proof: InclusionProof, checkpoint: Checkpoint
    ) -> None:
        """Raise LogRefused unless this use stands in the log; MalformedError for what is no receipt.

        ``release_key`` is that of the certified service, ``entry`` what the log has at the place that the receipt
        names. The first three are those of ``check``;

        4. the proof leads from that place to the checkpoint, which the caller has verified;
        5. what is there is the receipt's entry. If not, both are signed, and prove it: ``log_inconsistent``.
        """
        said = self.check(release_key)
        if proof.index != said.log_index:  # 4
            raise LogRefused("the proof is for another entry than the receipt names")
        proof.verify(entry, checkpoint)
        if entry != self.entry:  # 5
            raise LogRefused("the log has another entry in the place of this use", code="log_inconsistent")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a new file, mode 0600. Raises StorageError, MalformedError."""
        write_key_file(path, f"isolate receipt for {self.settled.invocation.hex()}", self.to_text())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read such a file. Raises StorageError, KeyFormatError, MalformedError."""
        return cls.from_text(read_key_file(path, cls.WHAT))
