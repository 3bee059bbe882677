"""Open a sealed file: check who sealed it, unlock what the identity may see, decrypt what is asked for.

    >>> import numpy as np
    >>> from isolate import Identity, SigningKey
    >>> from isolate.sealed.stores import MemorySink, MemorySource
    >>> from isolate.sealed.writer import SealedWriter
    >>> owner, identity, sink = SigningKey.generate(), Identity.generate(), MemorySink()
    >>> with SealedWriter(sink, recipients=[identity.recipient], sign=owner) as writer:
    ...     writer.add("w", np.arange(4, dtype=np.uint8))
    >>> with SealedReader(MemorySource(sink.data), identity=identity, signed_by=owner.verifying_key) as reader:
    ...     list(reader.entries), reader.read("w").tolist()
    (['w'], [0, 1, 2, 3])

docs/spec/sealed-file.md, section 8, has these steps under the same numbers:

1. header: the live slot of the header area
2. trailer and directory: sizes, the directory's own consistency and signature, agreement with header and file size
3. origin: signer, digest, epoch and generation against ``signed_by=`` and ``expect=``
4. unlock: a stanza gives the file key, commitment and header MAC fit it; or a release gives compartment keys
5. manifest: digest and tag of each table and manifest that a key is there for; its tensors fill their extent
6. chunk: digest and tag of each chunk that is read

No step begins before the one above it has succeeded. After a failure in step 6 the destination is wiped, and every
later read fails as well.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from attrs import frozen

from isolate.crypto.aead import Cipher
from isolate.crypto.digest import bulk_digest
from isolate.crypto.kdf import Label
from isolate.crypto.secret import Secret, wipe
from isolate.crypto.signing import VerifyingKey
from isolate.errors import (
    IsolateError,
    MalformedError,
    RolledBack,
    Tampered,
    Truncated,
    UnauthenticatedOrigin,
    UnavailableError,
    UsageError,
)
from isolate.sealed.directory import Epoch, Extent, PublicFacts, parse_trailer
from isolate.sealed.header import live_slot
from isolate.sealed.keys import nonce, part_cipher
from isolate.sealed.layout import DIRECTORY_ID, HASH_SIZE, HEADER_SIZE, TRAILER_SIZE, Params
from isolate.sealed.manifest import Entry, Manifest
from isolate.sealed.recipients import AnyIdentity, unlock
from isolate.sealed.stores import PathLike, PlannedSource, Source, default_threads, open_source, read_exactly

# A read of fewer chunks than this stays in the caller's thread.
_PARALLEL_FROM = 4


def read_facts(source: Source) -> PublicFacts:
    """Steps 1 and 2. Raises NotSealed, Truncated, MalformedError or Tampered."""
    header = bytearray(min(source.size, HEADER_SIZE))
    source.read_into(0, header)
    slot = live_slot(bytes(header))
    if source.size < HEADER_SIZE + TRAILER_SIZE:
        raise Truncated("trailer: the file ends behind its header")
    length = parse_trailer(read_exactly(source, source.size - TRAILER_SIZE, TRAILER_SIZE, "trailer"), source.size)
    directory = read_exactly(source, source.size - TRAILER_SIZE - length, length, "directory")
    facts = PublicFacts.parse(slot.raw, directory)
    if facts.contents.file_size() != source.size:
        raise Truncated("directory: the file is shorter or longer than its directory says")
    return facts


def public_facts(path: PathLike | Source) -> PublicFacts:
    """What anyone can read of the file at ``path``. Raises StorageError and what ``read_facts`` raises."""
    source = open_source(path)
    try:
        return read_facts(source)
    finally:
        if source is not path:
            source.close()


def check_origin(facts: PublicFacts, signed_by: VerifyingKey | str | None, expect: bytes | Epoch | None) -> bool:
    """Step 3. Answers whether the origin is known now: a signer or a digest was given, and is the right one.

    Raises UnauthenticatedOrigin for another signer, RolledBack for another digest or an older epoch.
    """
    stage = "origin"
    if signed_by is not None:
        key = VerifyingKey.parse(signed_by) if isinstance(signed_by, str) else signed_by
        if key != facts.signer:
            raise UnauthenticatedOrigin(f"{stage}: somebody else has sealed this file", hint="")
    if isinstance(expect, Epoch):
        if facts.epoch < expect.least:
            raise RolledBack(f"{stage}: epoch {facts.epoch}, where at least {expect.least} is expected")
        if facts.generation < expect.generation:
            raise RolledBack(f"{stage}: header generation {facts.generation}, expected {expect.generation} or more")
    elif expect is not None:
        if not isinstance(expect, bytes) or len(expect) != HASH_SIZE:
            raise UsageError("expect= takes a file digest of 32 bytes, or an Epoch")
        if not hmac.compare_digest(expect, facts.digest):
            raise RolledBack(f"{stage}: another file than expected: its digest differs")
    return signed_by is not None or isinstance(expect, bytes)


@frozen
class Place:
    """Where a tensor stands: its manifest entry, compartment and offset there in bytes."""

    entry: Entry
    compartment: str
    start: int


@frozen(eq=False)
class _Compartment:
    extent: Extent
    cipher: Cipher
    table: bytes


@frozen(eq=False)
class Piece:
    """A range of a compartment, from byte ``start``, that goes into ``target``."""

    start: int
    target: memoryview


class SealedReader:
    """A sealed file that has passed steps 1 to 5. Threads may share one.

    ``signed_by``: the owner's verifying key, or its text. ``expect``: a file digest, or an Epoch beside
    ``signed_by``. ``tags_only``: skip the digest of each chunk, which is what binds it against those who hold the
    key: only where nobody who holds the key can write to the file. ``INSECURE_any_origin``: take a file whoever
    sealed it. Raises what the steps raise, StorageError, and UsageError.
    """

    def __init__(
        self,
        source: PathLike | Source,
        *,
        identity: AnyIdentity,
        signed_by: VerifyingKey | str | None = None,
        expect: bytes | Epoch | None = None,
        tags_only: bool = False,
        threads: int | None = None,
        INSECURE_any_origin: bool = False,
    ) -> None:
        self._source: Source = open_source(source)
        self._threads = threads or default_threads()
        self._tags_only = tags_only
        self._failure: type[IsolateError] | None = None
        self._closed = False
        self._compartments: dict[str, _Compartment] = {}
        self.places: dict[str, Place] = {}
        self.metadata: Mapping[str, str] = {}
        self.bytes_read = 0
        self._count = threading.Lock()
        try:
            self.facts = read_facts(self._source)
            known = check_origin(self.facts, signed_by, expect) or INSECURE_any_origin
            self._params: Params = self.facts.contents.params
            self._digest_of = bulk_digest(self._params.suite)
            keys = unlock(self.facts, identity, origin_known=known)
            for extent in self.facts.contents.extents():
                if extent.row.id in keys.keys:
                    self._open(extent, keys.keys[extent.row.id])
        except BaseException:
            self.close()
            raise

    @property
    def chunk_size(self) -> int:
        return self._params.chunk_size

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The tensors that can be read, in file order."""
        return {name: place.entry for name, place in self.places.items()}

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """The bytes of one tensor, as a new array of uint8."""
        return self.read_many([name])[name]

    def read_many(self, names: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
        """The bytes of several tensors; a chunk that they share is decrypted once."""
        found: dict[str, np.ndarray[Any, Any]] = {}
        pieces: dict[str, list[Piece]] = {}
        for name in names:
            place = self.place(name)
            try:
                found[name] = np.empty(place.entry.size, np.uint8)
            except MemoryError:
                raise UnavailableError(f"there is no memory for the {place.entry.size} bytes of a tensor") from None
            if place.entry.size:
                pieces.setdefault(place.compartment, []).append(Piece(place.start, found[name].data))
        self.fill(pieces)
        return found

    def place(self, name: str) -> Place:
        try:
            return self.places[name]
        except KeyError:
            raise UsageError(f"no tensor {name[:80]!r} in what this identity can open") from None

    def fill(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """Step 6 for every chunk that the pieces (by compartment) touch.

        Raises Tampered or StorageError; then every target is wiped, and this reader refuses from there on.
        """
        if self._closed:
            raise UsageError("this file was closed")
        if self._failure is not None:
            raise self._failure("chunk: an earlier read of this file failed; nothing more is read from it")
        try:
            for name, parts in pieces.items():
                self._fill(self._compartments[name], parts)
        except BaseException as error:
            for parts in pieces.values():
                for piece in parts:
                    wipe(piece.target)
            if isinstance(error, IsolateError):
                self._failure = type(error)
            raise

    def close(self) -> None:
        """Forget the keys and close the source."""
        for compartment in self._compartments.values():
            compartment.cipher.wipe()
        self._closed = True
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, extent: Extent, key: Secret) -> None:
        """Step 5 for one compartment."""
        row = extent.row
        table = self._section(extent.table, extent.table_length, row.table, key, row.id, Label.SEALED_TABLE)
        plain = self._section(
            extent.manifest, row.manifest_length, row.manifest, key, row.id, Label.SEALED_MANIFEST
        )
        manifest = Manifest.parse(plain)
        if manifest.data_size != row.length:
            raise MalformedError("manifest: its tensors do not fill the compartment")
        if row.id == DIRECTORY_ID:
            if manifest.entries:
                raise MalformedError("manifest: a tensor stands in the file's own section")
            self.metadata = dict(manifest.metadata)
        elif manifest.metadata:
            raise MalformedError("manifest: metadata stands in a compartment")
        for entry, start in manifest.places():
            if entry.name in self.places:
                raise MalformedError("manifest: a name stands in two compartments")
            self.places[entry.name] = Place(entry, row.id, start)
        cipher = part_cipher(key, self._params, row.id, Label.SEALED_CHUNKS)
        self._compartments[row.id] = _Compartment(extent, cipher, table)

    def _section(self, offset: int, length: int, digest: bytes, key: Secret, name: str, label: Label) -> bytes:
        sealed = read_exactly(self._source, offset, length, "manifest")
        if not hmac.compare_digest(self._digest_of(sealed), digest):
            raise Tampered("manifest: a section of the footer does not match its digest")
        cipher = part_cipher(key, self._params, name, label)
        plain = cipher.open(sealed, nonce(self._params, 0))
        cipher.wipe()
        if plain is None:
            raise Tampered("manifest: a section of the footer does not authenticate")
        return plain

    def _fill(self, compartment: _Compartment, pieces: Sequence[Piece]) -> None:
        jobs = list(_by_chunk(pieces, self._params.chunk_size).items())
        if isinstance(self._source, PlannedSource):
            size, extent = self._params.chunk_size, compartment.extent
            ranges = [(i * size, min(size, extent.row.length - i * size)) for i, _ in jobs]
            self._source.plan((extent.data + start, length) for start, length in ranges)
        if len(jobs) < _PARALLEL_FROM or self._threads == 1:
            self._work(compartment, jobs, lambda: False)
            return
        stop = threading.Event()

        def work(part: int) -> None:
            try:
                self._work(compartment, jobs[part :: self._threads], stop.is_set)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self._threads, "isolate-open") as pool:
            # Every worker has ended when this block is left, so nothing writes behind the wiping.
            results = [pool.submit(work, part) for part in range(self._threads)]
        for result in results:
            result.result()

    def _work(self, compartment: _Compartment, jobs: Sequence[_Job], stopped: Callable[[], bool]) -> None:
        """Decrypt some chunks. A chunk is read into a bounce buffer that stays in the cache: the kernel's copy is
        cheap there, the tag can be put behind it, and the destination is touched once, by the cipher."""
        size, tag = self._params.chunk_size, self._params.suite.tag_size
        bounce = bytearray(size + tag)
        view = memoryview(bounce)
        extent, entry = compartment.extent, self._params.entry_size
        done = 0
        try:
            for index, parts in jobs:
                if stopped():
                    return
                length = min(size, extent.row.length - index * size)
                if self._source.read_into(extent.data + index * size, view[:length]) != length:
                    raise Truncated("chunk: the file has become shorter")
                done += length
                row = compartment.table[index * entry : (index + 1) * entry]
                if not self._tags_only and not hmac.compare_digest(self._digest_of(view[:length]), row[tag:]):
                    raise Tampered(f"chunk: chunk {index} of {extent.row.id} does not match its digest")
                view[length : length + tag] = row[:tag]
                whole = parts[0][1] if len(parts[0][1]) == length else view[:length]
                if not compartment.cipher.open_into(whole, view[: length + tag], nonce(self._params, index)):
                    raise Tampered(f"chunk: chunk {index} of {extent.row.id} does not authenticate")
                if whole is not parts[0][1]:
                    for start, target in parts:
                        target[:] = view[start : start + len(target)]
        finally:
            wipe(bounce)
            with self._count:
                self.bytes_read += done


# A chunk's index, and what of it goes where: (offset in the chunk, destination).
_Job = tuple[int, list[tuple[int, memoryview]]]


def _by_chunk(pieces: Iterable[Piece], size: int) -> dict[int, list[tuple[int, memoryview]]]:
    """The chunks that the pieces touch, and the parts of each."""
    chunks: dict[int, list[tuple[int, memoryview]]] = {}
    for piece in pieces:
        done = 0
        while done < len(piece.target):
            index, offset = divmod(piece.start + done, size)
            part = min(size - offset, len(piece.target) - done)
            chunks.setdefault(index, []).append((offset, piece.target[done : done + part]))
            done += part
    return chunks
