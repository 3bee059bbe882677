"""Write a sealed file front to back, a few chunks of memory at a time.

    >>> import numpy as np
    >>> from isolate import Identity, SigningKey
    >>> from isolate.sealed.stores import MemorySink
    >>> sink = MemorySink()
    >>> with SealedWriter(sink, recipients=[Identity.generate().recipient], sign=SigningKey.generate()) as writer:
    ...     writer.add("layer.weight", np.ones((4, 4), np.float32))
    >>> len(sink.data) > 65536, len(writer.digest)
    (True, 32)

docs/spec/sealed-file.md, sections 4 and 7. The tensors of one compartment come one after another: a compartment is
one extent, and no chunk straddles two. Nothing is visible at the target before ``close``.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from attrs import define, field

from isolate.crypto import cbor
from isolate.crypto.aead import Cipher, Suite, preferred_suite
from isolate.crypto.digest import bulk_digest
from isolate.crypto.kdf import Label
from isolate.crypto.secret import wipe
from isolate.crypto.signing import SigningKey
from isolate.errors import UsageError
from isolate.sealed.directory import Compartment, Directory, encode_trailer
from isolate.sealed.dtypes import tensor_bytes
from isolate.sealed.header import Slot, encode_header
from isolate.sealed.keys import (
    CompartmentKey,
    FileKey,
    commitment,
    compartment_commitment,
    compartment_key,
    header_mac,
    nonce,
    part_cipher,
)
from isolate.sealed.layout import (
    CHUNK_SIZE,
    DIRECTORY_ID,
    HASH_SIZE,
    MAX_CHUNK,
    MAX_COMPARTMENTS,
    MAX_MODEL_ID,
    MAX_NUMBER,
    MIN_CHUNK,
    SALT_SIZE,
    Params,
    align,
    check_compartment_id,
)
from isolate.sealed.manifest import Entry, Manifest
from isolate.sealed.recipients import AnyRecipient, wrap
from isolate.sealed.stores import PathLike, Sink, default_threads, open_sink

if TYPE_CHECKING:
    pass

DEFAULT_COMPARTMENT = "main"

# Called with the bytes of tensors sealed so far.
Progress = Callable[[int], None]


class Compartments:
    """Which compartment a tensor belongs to: by shell-style globs, or ``main``."""

    def __init__(self, globs: Mapping[str, Sequence[str]] | None) -> None:
        self._globs = {check_compartment_id(name): list(patterns) for name, patterns in (globs or {}).items()}
        if any(isinstance(patterns, str) for patterns in (globs or {}).values()):
            raise UsageError("compartments= maps an id to a list of globs")
        self._used: set[str] = set()

    def of(self, name: str) -> str:
        """Raises UsageError for a name that two compartments claim."""
        found = [key for key, globs in self._globs.items() if any(fnmatchcase(name, glob) for glob in globs)]
        if len(found) > 1:
            raise UsageError(f"a tensor belongs to two compartments, {found[0]} and {found[1]}")
        self._used.update(found)
        return found[0] if found else DEFAULT_COMPARTMENT

    def order(self, names: Sequence[str]) -> list[str]:
        """The names grouped by compartment, in the order of the compartments and then as they came."""
        rank = {key: index for index, key in enumerate(self._globs)}
        return sorted(names, key=lambda name: rank.get(self.of(name), len(rank)))

    def check_used(self) -> None:
        """A glob that matches nothing is a slip that would put its tensors into another compartment."""
        for key in self._globs:
            if key not in self._used:
                raise UsageError(f"no tensor matches the globs of compartment {key}")


@define
class _Open:
    """The compartment that is being written."""

    id: str
    key: CompartmentKey
    cipher: Cipher
    entries: list[Entry] = field(factory=list)
    table: bytearray = field(factory=bytearray)
    chunks: int = 0
    length: int = 0


class SealedWriter:
    """Seals tensors one by one into ``target``, a path or a Sink. Use it as a context manager, or ``close`` it.

    ``sign``: the owner's key. ``recipients``: who can open it. ``compartments``: {id: globs}; what matches none is
    in ``main``. ``previous``: digest of the file that this one follows. ``suite``: chosen by the CPU where None.
    After any error the target is as it was before. Raises UsageError, StorageError, and what a KeyWrapper raises.
    """

    def __init__(
        self,
        target: PathLike | Sink,
        *,
        recipients: Sequence[AnyRecipient],
        sign: SigningKey,
        metadata: Mapping[str, str] | None = None,
        model_id: str = "",
        epoch: int = 0,
        previous: bytes | None = None,
        suite: Suite | None = None,
        compartments: Mapping[str, Sequence[str]] | None = None,
        chunk_size: int = CHUNK_SIZE,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        _check_facts(metadata, model_id, epoch, previous, chunk_size)
        self._params = Params(suite or preferred_suite(), chunk_size, secrets.token_bytes(SALT_SIZE))
        self._sign, self._metadata, self._progress = sign, dict(metadata or {}), progress
        self._facts: dict[str, Any] = {"model_id": model_id, "epoch": epoch, "previous": previous}
        self._globs = Compartments(compartments)
        self._digest_of = bulk_digest(self._params.suite)
        self._file_key = FileKey.generate()
        self._commitment = commitment(self._file_key, self._params)
        stanzas = wrap(self._file_key, recipients, self._params, self._commitment)
        slot = Slot.unauthenticated(1, self._params, self._commitment, stanzas)
        header = encode_header(Slot.finish(slot, header_mac(self._file_key, self._params, slot)))
        self._names: set[str] = set()
        self._done: list[tuple[Compartment, bytes, bytes]] = []
        self._open: _Open | None = None
        self._fill = bytearray(chunk_size + self._params.suite.tag_size)
        self._filled = self._sealed = 0
        self._window = threads or default_threads()
        self._pool = ThreadPoolExecutor(self._window, "isolate-seal")
        self._tasks: deque[tuple[Future[bytes], bytearray, int]] = deque()
        self._spare: list[bytearray] = []
        self.digest: bytes | None = None
        self._sink: Sink | None = open_sink(target)
        with self._undone():
            self._sink.write(header)

    def add(self, name: str, tensor: Any, *, steady: bool = False) -> None:
        """Seal one tensor: a numpy array, or a torch tensor where torch is loaded. Raises UsageError.

        ``steady``: the caller leaves the tensor as it is until ``close``. Then the next one is begun at once, while
        chunks of this one are still being encrypted.
        """
        dtype, shape, data = tensor_bytes(tensor)
        with self._undone():
            size = self._begin(Entry(name, dtype, shape))
            if size != len(data):
                raise UsageError(f"tensor {name[:80]!r} has {len(data)} bytes, its shape says {size}")
            self._feed(data)
            if not steady:
                # The caller may change its tensor once add() is back.
                self._drain(0)
            self._end(size)

    def add_from(
        self, name: str, dtype: str, shape: Sequence[int], read: Callable[[int, memoryview], None]
    ) -> None:
        """Seal one tensor without holding it: ``read(offset, view)`` fills a writable view from byte ``offset``.

        ``dtype`` is safetensors' name (F32, BF16, F8_E4M3 ...), ``shape`` in elements, little-endian, C order.
        """
        with self._undone():
            size = self._begin(Entry(name, dtype, tuple(shape)))
            done = 0
            while done < size:
                part = min(size - done, self._params.chunk_size - self._filled)
                read(done, memoryview(self._fill)[self._filled : self._filled + part])
                self._filled += part
                done += part
                self._flush_if_full()
                if self._progress is not None:
                    self._progress(self._sealed + done)
            self._end(size)

    def close(self) -> bytes:
        """Write the footer, make the file durable and visible; answers the file digest (32 bytes)."""
        if self.digest is not None:
            return self.digest
        with self._undone() as sink:
            if self._open is None and not self._done:
                self._enter(DEFAULT_COMPARTMENT)
            self._leave()
            self._globs.check_used()
            for part in self._footer():
                sink.write(part)
            sink.commit()
            self._release()
        return self.digest  # type: ignore[return-value]  # _footer has set it

    def abort(self) -> None:
        """Forget everything; the target stays as it was."""
        sink, self._sink = self._sink, None
        self._release()
        if sink is not None and self.digest is None:
            sink.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _undone(self) -> _Undone:
        return _Undone(self)

    def _release(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._tasks.clear()
        wipe(self._fill)
        self._spare.clear()
        self._file_key.wipe()
        if self._open is not None:
            self._open.key.wipe()
            self._open.cipher.wipe()

    def _enter(self, name: str) -> _Open:
        if any(row.id == name for row, _, _ in self._done):
            raise UsageError(
                f"compartment {name} is finished: seal the tensors of one compartment one after another"
            )
        if len(self._done) >= MAX_COMPARTMENTS:
            raise UsageError(f"more than {MAX_COMPARTMENTS} compartments")
        key = compartment_key(self._file_key, self._params, name)
        self._open = _Open(name, key, part_cipher(key, self._params, name, Label.SEALED_CHUNKS))
        return self._open

    def _begin(self, entry: Entry) -> int:
        if entry.name in self._names:
            raise UsageError(f"tensor {entry.name[:80]!r} is there already")
        name = self._globs.of(entry.name)
        if self._open is not None and self._open.id != name:
            self._leave()
        current = self._open or self._enter(name)
        self._names.add(entry.name)
        current.entries.append(entry)
        return entry.size

    def _end(self, size: int) -> None:
        self._pad(align(size) - size)
        self._sealed += size
        if self._progress is not None:
            self._progress(self._sealed)

    def _pad(self, size: int) -> None:
        # Chunks are multiples of the alignment, so padding never crosses into the next one.
        if size:
            self._fill[self._filled : self._filled + size] = bytes(size)
            self._filled += size
            self._flush_if_full()

    def _feed(self, data: memoryview) -> None:
        """Seal straight from the caller's memory where a whole chunk is there, by way of ``_fill`` elsewhere."""
        chunk = self._params.chunk_size
        while len(data):
            if not self._filled and len(data) >= chunk:
                self._submit(data[:chunk], self._buffer(), chunk)
                data = data[chunk:]
                continue
            part = min(len(data), chunk - self._filled)
            self._fill[self._filled : self._filled + part] = data[:part]
            self._filled += part
            data = data[part:]
            self._flush_if_full()

    def _buffer(self) -> bytearray:
        return (
            self._spare.pop() if self._spare else bytearray(self._params.chunk_size + self._params.suite.tag_size)
        )

    def _flush_if_full(self) -> None:
        if self._filled == self._params.chunk_size:
            self._flush()

    def _flush(self) -> None:
        full, size = self._fill, self._filled
        self._fill, self._filled = self._buffer(), 0
        self._submit(memoryview(full)[:size], full, size)

    def _submit(self, plain: memoryview, sealed: bytearray, size: int) -> None:
        current = self._open
        if current is None:
            raise UsageError("no compartment is open")
        index, current.chunks = current.chunks, current.chunks + 1
        current.length += size
        self._tasks.append((self._pool.submit(self._seal, current.cipher, index, plain, sealed), sealed, size))
        self._drain(self._window + 1)

    def _seal(self, cipher: Cipher, index: int, plain: memoryview, sealed: bytearray) -> bytes:
        """One chunk, in a worker: answers its row of the table."""
        size = len(plain)
        whole = memoryview(sealed)[: size + cipher.tag_size]
        cipher.seal_into(whole, plain, nonce(self._params, index))
        return bytes(whole[size:]) + self._digest_of(whole[:size])

    def _drain(self, left: int) -> None:
        """Write finished chunks in order until ``left`` are under way."""
        while len(self._tasks) > left:
            task, sealed, size = self._tasks.popleft()
            row = task.result()
            if self._open is None or self._sink is None:
                raise UsageError("this writer is closed")
            self._open.table += row
            self._sink.write(memoryview(sealed)[:size])
            self._spare.append(sealed)

    def _leave(self) -> None:
        """Finish the open compartment: its last chunk, its table and its manifest."""
        current = self._open
        if current is None:
            return
        if self._filled:
            self._flush()
        self._drain(0)
        self._open = None
        self._done.append(
            self._sections(current.id, current.key, current.length, bytes(current.table), current.entries)
        )
        current.key.wipe()
        current.cipher.wipe()

    def _sections(
        self, name: str, key: CompartmentKey, length: int, table: bytes, entries: Sequence[Entry]
    ) -> tuple[Compartment, bytes, bytes]:
        metadata = self._metadata if name == DIRECTORY_ID else {}
        sealed = []
        for label, plain in (
            (Label.SEALED_TABLE, table),
            (Label.SEALED_MANIFEST, Manifest(tuple(entries), metadata).encode()),
        ):
            cipher = part_cipher(key, self._params, name, label)
            sealed.append(cipher.seal(plain, nonce(self._params, 0)))
            cipher.wipe()
        digests = [self._digest_of(section) for section in sealed]
        committed = compartment_commitment(key, self._params, name)
        row = Compartment(name, length, committed, digests[0], len(sealed[1]), digests[1])
        return row, sealed[0], sealed[1]

    def _footer(self) -> list[bytes]:
        with compartment_key(self._file_key, self._params, DIRECTORY_ID) as key:
            parts = [self._sections(DIRECTORY_ID, key, 0, b"", ()), *self._done]
        rows = [row for row, _, _ in parts]
        directory = Directory.make(self._params, self._commitment, rows, sign=self._sign, **self._facts)
        self.digest = directory.digest
        encoded = directory.encode()
        return [*(section for _, *pair in parts for section in pair), encoded, encode_trailer(len(encoded))]


class _Undone:
    """Whatever fails inside, the writer is over and its target as it was."""

    def __init__(self, writer: SealedWriter) -> None:
        self._writer = writer

    def __enter__(self) -> Sink:
        sink = self._writer._sink
        if sink is None or self._writer.digest is not None:
            raise UsageError("this writer is closed")
        return sink

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.digest = None
            self._writer.abort()


def _check_facts(
    metadata: Mapping[str, str] | None, model_id: str, epoch: int, previous: bytes | None, chunk_size: int
) -> None:
    pairs = (metadata or {}).items()
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in pairs):
        raise UsageError("metadata= maps text to text")
    # What does not fit, or is no text in UTF-8, is refused now and not after hours of sealing.
    Manifest((), metadata or {}).encode()
    cbor.encode(model_id)
    if len(model_id.encode()) > MAX_MODEL_ID:
        raise UsageError(f"a model id is at most {MAX_MODEL_ID} bytes")
    if type(epoch) is not int or not 0 <= epoch < MAX_NUMBER:
        raise UsageError("an epoch is a number from 0 to 2^63 - 1")
    if previous is not None and len(previous) != HASH_SIZE:
        raise UsageError("previous= takes the digest of a file, 32 bytes")
    if not MIN_CHUNK <= chunk_size <= MAX_CHUNK or chunk_size & (chunk_size - 1):
        raise UsageError("a chunk is a power of two between 4 KiB and 16 MiB")
