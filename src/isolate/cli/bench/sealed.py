"""Sealed files against plain files, safetensors and tensorizer, in throughput.

>>> "open_vs_readinto" in run(1, quick=True)[1]
True
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np

from isolate import sealed
from isolate.cli.bench import Figures, paired
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.sealed.stores import default_threads

_MIB = 1 << 20


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """1 GiB in eight tensors, seven rounds; ``quick``: 32 MiB, three rounds."""
    rounds = rounds or (3 if quick else 7)
    size = (32 if quick else 1024) * _MIB
    with tempfile.TemporaryDirectory(prefix="isolate-bench-") as folder:
        return rounds, _measure(Path(folder), size, rounds)


def _rate(size: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    kept = work()
    elapsed = time.perf_counter() - start
    del kept
    return size / elapsed


def _readinto(path: Path, size: int, threads: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The floor: a plain file into fresh memory, nothing else."""
    target = np.empty(size, np.uint8)
    view = target.data

    def part(start: int, stop: int) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while start < stop:
                start += os.preadv(descriptor, [view[start:stop]], start)
        finally:
            os.close(descriptor)

    step = -(-size // threads)
    workers = [Thread(target=part, args=(at, min(size, at + step))) for at in range(0, size, step)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return target


def _measure(folder: Path, size: int, rounds: int) -> Figures:
    owner, identity = SigningKey.generate(), Identity.generate()
    generator = np.random.default_rng(7)
    tensors = {f"layer.{i}": generator.standard_normal(size // 32, np.float32) for i in range(8)}
    path, plain = folder / "model.sealed", folder / "plain"
    digest = sealed.save_file(tensors, path, recipients=[identity.recipient], sign=owner)
    with plain.open("wb") as file:
        for tensor in tensors.values():
            file.write(tensor.data)
    del tensors
    threads = default_threads()

    def opened(**how: object) -> Callable[[], float]:
        return lambda: _rate(size, lambda: sealed.load_file(path, identity=identity, threads=threads, **how))  # type: ignore[arg-type]

    measures = {
        "readinto": lambda: _rate(size, lambda: _readinto(plain, size, threads)),
        "open": opened(expect=digest, tags_only=True),
        "open_signed": opened(signed_by=owner.verifying_key),
    }
    ratios = {
        "open_vs_readinto": ("open", "readinto"),
        "open_signed_vs_readinto": ("open_signed", "readinto"),
    }
    return paired(rounds, measures, ratios)
