"""The face of safetensors over sealed files: the same names, with who may read and who must have written.

    >>> import numpy as np, tempfile, pathlib
    >>> from isolate import Identity, SigningKey
    >>> owner, identity = SigningKey.generate(), Identity.generate()
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.sealed"
    >>> digest = save_file({"w": np.eye(2)}, path, recipients=[identity.recipient], sign=owner)
    >>> load_file(path, identity=identity, signed_by=owner.verifying_key)["w"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    >>> with safe_open(path, identity=identity, expect=digest) as file:
    ...     file.keys(), file.get_slice("w")[0, :].tolist()
    (['w'], [1.0, 0.0])

Both modes of isolate use this: an enclave opens files with keys that were released to it, an owner with its own.
``load_file`` reads everything; ``safe_open`` reads nothing but the header and footer until a tensor is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from isolate.crypto.aead import Suite
from isolate.crypto.secret import wipe
from isolate.crypto.signing import SigningKey, VerifyingKey
from isolate.errors import MalformedError, UsageError
from isolate.sealed.device import check_device, stage
from isolate.sealed.directory import Epoch
from isolate.sealed.dtypes import FRAMEWORKS, from_buffer, load_torch, numpy_dtype, storage_shape
from isolate.sealed.plain import PlainFile, write_header
from isolate.sealed.reader import Piece, Place, SealedReader
from isolate.sealed.recipients import AnyIdentity, AnyRecipient
from isolate.sealed.stores import FileSource, PathLike, Sink, Source, open_sink
from isolate.sealed.writer import Compartments, Progress, SealedWriter

# unseal holds at most so much plaintext at once, in bytes.
_BATCH = 16 << 20


def save_file(
    tensors: Mapping[str, Any],
    path: PathLike | Sink,
    *,
    recipients: Sequence[AnyRecipient],
    sign: SigningKey,
    metadata: Mapping[str, str] | None = None,
    model_id: str = "",
    epoch: int = 0,
    previous: bytes | None = None,
    suite: Suite | None = None,
    compartments: Mapping[str, Sequence[str]] | None = None,
) -> bytes:
    """Seal tensors (numpy arrays or torch tensors) into a file; answers its digest (32 bytes), for ``expect=``."""
    writer = SealedWriter(
        path, recipients=recipients, sign=sign, metadata=metadata, model_id=model_id, epoch=epoch,
        previous=previous, suite=suite, compartments=compartments,
    )  # fmt: skip
    with writer:
        for name in Compartments(compartments).order(list(tensors)):
            writer.add(name, tensors[name])
    return writer.close()


def load_file(
    path: PathLike | Source,
    *,
    identity: AnyIdentity,
    signed_by: VerifyingKey | str | None = None,
    expect: bytes | Epoch | None = None,
    framework: str = "np",
    device: str = "cpu",
    **options: Any,
) -> dict[str, Any]:
    """Every tensor that the identity can open, as {name: array}. ``options`` as in ``safe_open``."""
    file = safe_open(path, framework, device, identity=identity, signed_by=signed_by, expect=expect, **options)
    with file:
        return file.get_tensors()


class safe_open:
    """A sealed file, read lazily. ``framework``: np or pt. See SealedReader for the options and what is raised."""

    def __init__(
        self,
        filename: PathLike | Source,
        framework: str = "np",
        device: str = "cpu",
        *,
        identity: AnyIdentity,
        signed_by: VerifyingKey | str | None = None,
        expect: bytes | Epoch | None = None,
        tags_only: bool = False,
        threads: int | None = None,
        INSECURE_any_origin: bool = False,
    ) -> None:
        if framework not in FRAMEWORKS:
            raise UsageError(f"framework= is one of {', '.join(FRAMEWORKS)}")
        self._framework = FRAMEWORKS[framework]
        self._device, self._staged = device, False
        if self._framework == "pt":
            load_torch()
            self._staged = check_device(device)
        elif device != "cpu":
            raise UsageError("numpy arrays stand on the CPU; device= goes with framework='pt'")
        self._reader = SealedReader(
            filename, identity=identity, signed_by=signed_by, expect=expect, tags_only=tags_only, threads=threads,
            INSECURE_any_origin=INSECURE_any_origin,
        )  # fmt: skip

    @property
    def facts(self) -> Any:
        """The PublicFacts of the file."""
        return self._reader.facts

    def keys(self) -> list[str]:
        """The names that this identity can open, sorted."""
        return sorted(self._reader.places)

    def offset_keys(self) -> list[str]:
        """The same in the order in which they stand in the file."""
        return list(self._reader.places)

    def metadata(self) -> dict[str, str] | None:
        """The file's metadata, or None where there is none (or no key for it was released)."""
        return dict(self._reader.metadata) or None

    def get_tensor(self, name: str) -> Any:
        """Read one tensor. Raises UsageError for an unknown name, Tampered, StorageError."""
        return self.get_tensors([name])[name]

    def get_tensors(self, names: Iterable[str] | None = None) -> dict[str, Any]:
        """Read several, or all: a chunk that they share is decrypted once."""
        wanted = self.offset_keys() if names is None else list(names)
        if self._staged:
            return stage(self._reader, wanted, self._device)
        raw = self._reader.read_many(wanted)
        return {name: self._finish(raw[name], self._reader.place(name)) for name in wanted}

    def get_slice(self, name: str) -> SealedSlice:
        """A tensor that is read where it is indexed."""
        return SealedSlice(self._reader, self._reader.place(name), self._framework, self._device)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finish(self, raw: np.ndarray[Any, Any], place: Place) -> Any:
        tensor = from_buffer(raw, place.entry.dtype, place.entry.shape, self._framework)
        return tensor if self._device == "cpu" else tensor.to(self._device)


class SealedSlice:
    """``[...]`` with numpy's basic indexing (numbers, slices, Ellipsis, None) reads only the chunks it covers."""

    def __init__(self, reader: SealedReader, place: Place, framework: str, device: str) -> None:
        self._reader, self._place, self._framework, self._device = reader, place, framework, device

    def get_shape(self) -> list[int]:
        return list(self._place.entry.shape)

    def get_dtype(self) -> str:
        return self._place.entry.dtype

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        allowed = int | np.integer | slice | type(None) | type(Ellipsis)
        if any(not isinstance(part, allowed) or isinstance(part, bool) for part in parts):
            raise UsageError("a slice of a sealed tensor takes numbers, slices, ... and None")
        # With an Ellipsis numpy answers a view also where every dimension is given a number: nothing is touched.
        parts = parts if any(part is Ellipsis for part in parts) else (*parts, ...)
        entry = self._place.entry
        dtype, shape = numpy_dtype(entry.dtype), storage_shape(entry.dtype, entry.shape)
        strides = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        # All elements of this array lie outside its memory but one: indexing it is arithmetic, no read.
        ghost = np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, strides)
        try:
            view = ghost[parts]
        except (IndexError, ValueError):
            raise UsageError("the index does not fit the tensor's shape") from None
        found = (
            np.empty(view.shape, dtype) if not view.size else self._read(view, view.ctypes.data - ghost.ctypes.data)
        )
        if self._framework == "np":
            return found
        flat = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
        tensor = from_buffer(flat, entry.dtype, found.shape, self._framework)
        return tensor if self._device == "cpu" else tensor.to(self._device)

    def _read(self, view: np.ndarray[Any, Any], offset: int) -> np.ndarray[Any, Any]:
        """``view``: shape and strides of the answer, ``offset``: of its first element in the tensor, in bytes."""
        low = offset + sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True) if step < 0)
        steps = sorted((abs(step), n) for n, step in zip(view.shape, view.strides, strict=True) if n > 1)
        # Steps of at most a chunk skip none: their whole span is read. Longer ones are walked one by one.
        size, starts = view.itemsize, [0]
        for step, n in steps:
            if step <= self._reader.chunk_size:
                size += (n - 1) * step
            else:
                starts = [start + i * step for i in range(n) for start in starts]
        end = max(starts) + size
        # Chunks that are skipped stay untouched pages of this buffer: they take address space, no memory.
        buffer = np.empty(end, np.uint8)
        pieces, reached = [], 0
        for start in sorted(starts):
            start, stop = max(start, reached), start + size
            if stop > start:
                pieces.append(Piece(self._place.start + low + start, buffer.data[start:stop]))
                reached = stop
        self._reader.fill({self._place.compartment: pieces})
        return np.ndarray(view.shape, view.dtype, buffer.data, offset - low, view.strides).copy()


def seal_file(
    source: PathLike,
    target: PathLike | Sink,
    *,
    compartments: Mapping[str, Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> bytes:
    """Seal a plain safetensors file tensor by tensor, a few chunks in memory; answers the file digest.

    ``options`` as in SealedWriter; the file's own metadata are kept unless ``metadata`` is given. Raises
    MalformedError when ``source`` is no safetensors file.
    """
    with FileSource(source) as plain_source:
        plain = PlainFile(plain_source)
        kept = (plain.metadata or {}) if metadata is None else metadata
        with SealedWriter(target, compartments=compartments, metadata=kept, progress=progress, **options) as writer:
            for name in Compartments(compartments).order(list(plain.tensors)):
                tensor = plain.tensors[name]
                writer.add_from(name, tensor.dtype, tensor.shape, _reading(plain_source, tensor.offset))
        return writer.close()


def _reading(source: Source, offset: int) -> Callable[[int, memoryview], None]:
    def read(position: int, view: memoryview) -> None:
        if source.read_into(offset + position, view) != len(view):
            raise MalformedError("the safetensors file became shorter while it was read")

    return read


def unseal_file(
    source: PathLike | Source, target: PathLike | Sink, *, progress: Progress | None = None, **options: Any
) -> None:
    """Write what the identity can open as a plain safetensors file (mode 0600), complete or not at all.

    ``options`` as in SealedReader: identity, signed_by, expect ... Plaintext on a disk is what sealing is there to
    avoid: this is for owners who take a model home.
    """
    with SealedReader(source, **options) as reader:
        rows = {name: (entry.dtype, entry.shape, entry.size) for name, entry in reader.entries.items()}
        sink = open_sink(target, mode=0o600)
        try:
            sink.write(write_header(rows, reader.metadata))
            done, batch = 0, memoryview(bytearray(_BATCH))
            for place in reader.places.values():
                for start in range(0, place.entry.size, _BATCH):
                    part = batch[: min(_BATCH, place.entry.size - start)]
                    reader.fill({place.compartment: [Piece(place.start + start, part)]})
                    sink.write(part)
                    done += len(part)
                    if progress is not None:
                        progress(done)
            wipe(batch)
            sink.commit()
        except BaseException:
            sink.abort()
            raise
