"""A use's place in the log: that the service did not only sign that it settled the use, but wrote it down.

    >>> from isolate.crypto.signing import SigningKey
    >>> from isolate.transparency.checkpoint import sign_checkpoint
    >>> key, store, salt = SigningKey.generate(), merkle.MemoryStore(), bytes(32)
    >>> details = cbor.encode({"invocation": bytes(32), "bytes_out": 256, "code": ""})
    >>> entry = cbor.encode({"kind": "settled", "time": 1_800_000_000, "commitment": commitment(salt, details)})
    >>> note = sign_checkpoint(key, "isolate/demo/1", 1, merkle.append(store, 0, entry))
    >>> receipt = Receipt(bytes(32), 256, "", 0, merkle.leaf_hash(entry), 1_800_000_000).sign(key)
    >>> checkpoint = Checkpoint.verify(note, "isolate/demo/1", key.verifying_key.ed25519)
    >>> use = UseReceipt(receipt.encode(), salt, details)
    >>> use.verify(key.verifying_key, entry, InclusionProof.build(store, 0, 1), checkpoint)

Whoever has a receipt asks for the entry at its index with a proof (route ``log``, or the tiles), and for a
checkpoint that he believes: one that others see too. Spec: docs/spec/service.md, section 6.2.
"""

from __future__ import annotations

import hashlib
import os
from hmac import compare_digest
from typing import Annotated, Self

from attrs import field, frozen

from isolate.crypto import cbor, merkle
from isolate.crypto.signing import Purpose, VerifyingKey, read_key_file, write_key_file
from isolate.errors import LogRefused, MalformedError
from isolate.messages.base import Bytes32, Limit, Line, Message
from isolate.messages.invoke import Receipt
from isolate.transparency.checkpoint import Checkpoint
from isolate.transparency.proof import InclusionProof
from isolate.transparency.tiles import MAX_ENTRY

_LIED = "log_inconsistent"  # the receipt and the checkpoint, both signed, prove it together
MAX_DETAILS = 2048  # bytes of a settled use's details, which name an asset, a handle and a use


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
    """What a holder keeps, and shows to whoever doubts: a Receipt, and what opens the entry that it names.

    ``details`` and ``salt`` are those of the entry's commitment. They say which asset, handle and use it is about:
    show it to those only who may know. It holds no key, and nothing of the data.
    """

    TYPE = "use-receipt"
    PREFIX = "isolate-receipt-"
    WHAT = "receipt"
    receipt: Annotated[bytes, Limit(0, 512)]
    salt: Bytes32 = field(repr=False)
    details: Annotated[bytes, Limit(0, MAX_DETAILS)] = field(repr=False)

    @property
    def settled(self) -> Receipt:
        """Invocation, bytes out, code, time and place in the log: as said, not yet verified. MalformedError."""
        return Receipt.parse(self.receipt)

    def check(self, release_key: VerifyingKey) -> Receipt:
        """The receipt, which the service signed, and which is about the very use that the details name.

        Raises LogRefused, MalformedError. Whether that stands in the log only ``verify`` says.
        """
        said = self.settled
        if not release_key.verify(Purpose.RECEIPT, said.signed(), said.signature):
            raise LogRefused(
                "the receipt is not the service's", hint="or the service's keys were renewed: ask for it again"
            )
        details = cbor.decode(self.details, max_size=MAX_DETAILS)
        use = {"invocation": said.invocation, "bytes_out": said.bytes_out, "code": said.code}
        if not isinstance(details, dict) or any(details.get(name) != value for name, value in use.items()):
            raise LogRefused("the receipt and its details are of different uses")
        return said

    def verify(
        self, release_key: VerifyingKey, entry: bytes, proof: InclusionProof, checkpoint: Checkpoint
    ) -> None:
        """Raise LogRefused unless this use stands in the log; MalformedError for what is no receipt.

        ``release_key`` is that of the certified service, ``entry`` the public bytes of an entry.

        1. The service signed the receipt, and the details are of that use.
        2. The entry is the one that the receipt names, of a use that was settled, not after the receipt's time.
        3. It commits to these details.
        4. The proof leads from it to the checkpoint, which the caller has verified.
        """
        said = self.check(release_key)  # 1
        if merkle.leaf_hash(entry) != said.leaf or proof.index != said.log_index:  # 2
            raise LogRefused("this entry is not the one that the receipt names", code=_LIED)
        try:
            value = cbor.record(entry, {"kind": str, "time": int, "commitment": bytes}, max_size=MAX_ENTRY)
        except MalformedError as error:
            raise LogRefused(f"the entry is malformed: {error.message}", code=_LIED) from None
        if value["kind"] != "settled" or value["time"] > said.time:
            raise LogRefused("this entry is not of the use that the receipt is for", code=_LIED)
        if not compare_digest(value["commitment"], commitment(self.salt, self.details)):  # 3
            raise LogRefused("this entry is about something else than the receipt says", code=_LIED)
        proof.verify(entry, checkpoint)  # 4

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a new file, mode 0600. Raises StorageError."""
        write_key_file(path, f"isolate receipt for {self.settled.invocation.hex()}", self.to_text())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read such a file. Raises StorageError, KeyFormatError, MalformedError."""
        return cls.from_text(read_key_file(path, cls.WHAT))
