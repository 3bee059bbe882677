"""Tensors straight onto a GPU, through two pinned buffers: one is filled while the other is copied.

    >>> [[(p.name, p.start, p.at, p.length) for p in batch] for batch in batches([("a", 5), ("b", 2)], 4)]
    [[('a', 0, 0, 4)], [('a', 4, 0, 1), ('b', 0, 1, 2)]]

Plaintext passes host memory in these two buffers only, and they are wiped behind it. What stands on the GPU is as
safe as the GPU is: confidential computing of the GPU is attested apart (kind ``nvidia-gpu``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attrs import frozen

from isolate.crypto.secret import wipe
from isolate.errors import UnavailableError, UsageError
from isolate.sealed.dtypes import load_torch, torch_view
from isolate.sealed.reader import Piece, SealedReader

# Bytes of one pinned buffer: enough chunks for every thread, and little beside a shard.
BUFFER = 64 << 20


@frozen
class Part:
    """``length`` bytes of tensor ``name`` from byte ``start``, which stand at ``at`` in the buffer."""

    name: str
    start: int
    at: int
    length: int


def batches(sizes: Iterable[tuple[str, int]], capacity: int) -> Iterator[list[Part]]:
    """Tensors, (name, bytes), cut and packed into buffers of ``capacity`` bytes."""
    batch: list[Part] = []
    used = 0
    for name, size in sizes:
        start = 0
        while start < size:
            length = min(size - start, capacity - used)
            batch.append(Part(name, start, used, length))
            start, used = start + length, used + length
            if used == capacity:
                yield batch
                batch, used = [], 0
    if batch:
        yield batch


def check_device(device: str) -> bool:
    """Whether ``device`` is a CUDA device that can be staged to. Raises UsageError, or UnavailableError."""
    torch = load_torch()
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError, ValueError):
        raise UsageError(f"torch knows no device {str(device)[:40]!r}") from None
    if kind != "cuda":
        return False
    if not torch.cuda.is_available():
        raise UnavailableError("this machine has no CUDA device")
    return True


def stage(reader: SealedReader, names: Sequence[str], device: str) -> dict[str, Any]:
    """{name: tensor on ``device``}. After an error nothing is kept, on either side. Raises what ``fill`` raises."""
    torch = load_torch()
    entries = {name: reader.place(name).entry for name in names}
    sizes = [(name, entry.size) for name, entry in entries.items()]
    capacity = max(1, min(BUFFER, sum(size for _, size in sizes)))
    found = {name: torch.empty(size, dtype=torch.uint8, device=device) for name, size in sizes}
    buffers = [torch.empty(capacity, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    views = [memoryview(buffer.numpy()).cast("B") for buffer in buffers]
    copied = [torch.cuda.Event() for _ in buffers]
    try:
        with torch.cuda.device(device):
            for number, batch in enumerate(batches(sizes, capacity)):
                turn = number % 2
                copied[turn].synchronize()
                _fill(reader, batch, views[turn])
                for part in batch:
                    target = found[part.name][part.start : part.start + part.length]
                    target.copy_(buffers[turn][part.at : part.at + part.length], non_blocking=True)
                copied[turn].record()
            torch.cuda.current_stream().synchronize()
    except BaseException:
        for tensor in found.values():
            tensor.zero_()
        raise
    finally:
        for event, view in zip(copied, views, strict=True):
            event.synchronize()
            wipe(view)
    return {name: torch_view(found[name], entry.dtype, entry.shape) for name, entry in entries.items()}


def _fill(reader: SealedReader, batch: Sequence[Part], view: memoryview) -> None:
    pieces: dict[str, list[Piece]] = {}
    for part in batch:
        place = reader.place(part.name)
        piece = Piece(place.start + part.start, view[part.at : part.at + part.length])
        pieces.setdefault(place.compartment, []).append(piece)
    reader.fill(pieces)
