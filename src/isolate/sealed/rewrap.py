"""Change who can open a sealed file, in place: neither the data nor the digest nor any pin is touched.

    >>> import numpy as np, tempfile, pathlib
    >>> from isolate import Identity, SigningKey
    >>> from isolate.sealed.reader import public_facts
    >>> from isolate.sealed.safetensors import save_file
    >>> old, new = Identity.generate(), Identity.generate()
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.sealed"
    >>> digest = save_file({"w": np.eye(2)}, path, recipients=[old.recipient], sign=SigningKey.generate())
    >>> rewrap(path, identity=old, recipients=[new.recipient])
    >>> facts = public_facts(path)
    >>> facts.digest == digest, facts.generation
    (True, 2)

docs/spec/sealed-file.md, section 2.4. The journal word is set, then the slots are written one after the other, then
the word is cleared, each synced before the next: a kill at any point leaves a slot that counts. Who held the file
key before still holds it: only sealing anew, into a new file, shuts somebody out.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from isolate.errors import StorageError, UsageError
from isolate.sealed.directory import PublicFacts
from isolate.sealed.header import Slot, encode_header, live_slot
from isolate.sealed.keys import header_mac
from isolate.sealed.layout import HEADER_SIZE, JOURNAL, JOURNAL_OFFSET, SLOT_OFFSETS, SLOT_SIZE
from isolate.sealed.objects import is_url, object_source
from isolate.sealed.reader import read_facts
from isolate.sealed.recipients import AnyIdentity, AnyRecipient, file_key, wrap
from isolate.sealed.stores import FileSource, PathLike, read_exactly, storage_error


def plan(header: bytes, slot: bytes) -> Iterator[tuple[int, bytes]]:
    """The writes (offset, bytes) that put ``slot`` into a header area; each must be durable before the next.

    The slot that counts now is written last, so that there always is one.
    """
    live = live_slot(header).raw
    last = next(offset for offset in reversed(SLOT_OFFSETS) if header[offset : offset + len(live)] == live)
    padded = slot.ljust(SLOT_SIZE, b"\0")
    yield JOURNAL_OFFSET, JOURNAL
    for offset in sorted(SLOT_OFFSETS, key=lambda offset: offset == last):
        yield offset, padded
    yield JOURNAL_OFFSET, bytes(len(JOURNAL))


def rewrap(path: PathLike, *, identity: AnyIdentity, recipients: Sequence[AnyRecipient]) -> None:
    """Replace the recipients of the file at ``path`` by ``recipients``, opening its key with ``identity``.

    Raises NoRecipient, Tampered, UsageError (none, double, labels that do not mix, or too many), StorageError.
    """
    if not recipients:
        raise UsageError("a file needs a recipient, or nobody could open it")
    if isinstance(path, str) and is_url(path):
        _beside(path, identity, recipients)
        return
    with _locked(Path(path)) as descriptor:
        # Through the descriptor: what is read, locked and written is one file, whatever the name means by then.
        with FileSource(f"/proc/self/fd/{descriptor}") as source:
            facts = read_facts(source)
            header = read_exactly(source, 0, HEADER_SIZE, "header")
        slot = _next_slot(facts, identity, recipients)
        try:
            for offset, data in plan(header, slot):
                done = 0
                while done < len(data):
                    done += os.pwrite(descriptor, data[done:], offset + done)
                os.fsync(descriptor)
        except OSError as error:
            raise storage_error(f"cannot write {path}", error) from None


def _next_slot(facts: PublicFacts, identity: AnyIdentity, recipients: Sequence[AnyRecipient]) -> bytes:
    params, commitment = facts.slot.params, facts.slot.commitment
    with file_key(facts, identity) as key:
        stanzas = wrap(key, recipients, params, commitment)
        authenticated = Slot.unauthenticated(facts.slot.generation + 1, params, commitment, stanzas)
        return Slot.finish(authenticated, header_mac(key, params, authenticated))


def _beside(url: str, identity: AnyIdentity, recipients: Sequence[AnyRecipient]) -> None:
    """An object cannot be changed in place: the new header area becomes an object beside it, written at once."""
    source = object_source(url)
    try:
        facts = read_facts(source)
        source.replace_header(facts.slot.commitment, encode_header(_next_slot(facts, identity, recipients)))
    finally:
        source.close()


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """The file, open for writing and held against another rewrap."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise storage_error(f"cannot write {path}", error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StorageError(f"{path} is being rewrapped by somebody else") from None
        yield descriptor
    finally:
        os.close(descriptor)
