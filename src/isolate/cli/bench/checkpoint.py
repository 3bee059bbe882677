"""Sealed checkpoints against torch.distributed.checkpoint's own files, in plaintext: saved and loaded.

One process, 256 MiB in tensors of 32 MiB and less, durable when it answers. Both sides use the same number of
threads to write, and load into memory that is there. Figures are ratios of throughput: above 1 is faster.

    >>> from isolate.cli.bench.checkpoint import RATIOS
    >>> sorted(RATIOS)
    ['checkpoint_load_vs_dcp', 'checkpoint_save_vs_dcp']
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from isolate.cli.bench import Figures, paired
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import MissingExtra
from isolate.sealed.stores import default_threads

_MIB = 1 << 20
RATIOS = {
    "checkpoint_save_vs_dcp": ("save", "dcp_save"),
    "checkpoint_load_vs_dcp": ("load", "dcp_load"),
}


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """256 MiB, seven rounds; ``quick``: 32 MiB, three rounds. Raises MissingExtra without torch."""
    if find_spec("torch") is None:
        raise MissingExtra("this benchmark needs torch", hint="pip install 'isolate-confidential[torch]'")
    rounds = rounds or (3 if quick else 7)
    with tempfile.TemporaryDirectory(prefix="isolate-bench-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that this is a single process
        bench = _Bench(Path(folder), (32 if quick else 256) * _MIB)
        work = {"save": bench.save, "dcp_save": bench.dcp_save, "load": bench.load, "dcp_load": bench.dcp_load}
        figures = paired(rounds, {name: lambda one=one: bench.rate(one) for name, one in work.items()}, RATIOS)  # type: ignore[misc]
    return rounds, figures


class _Bench:
    """The same state dict as a sealed checkpoint and as torch writes it."""

    def __init__(self, folder: Path, size: int) -> None:
        self._torch = import_module("torch")
        self._dcp = import_module("torch.distributed.checkpoint")
        self._ours = import_module("isolate.torch.checkpoint")
        self._owner, self._identity = SigningKey.generate(), Identity.generate()
        self._folder, self.size, self._count = folder, size, 0
        # Half of it in large matrices, half in ones of 1 MiB, as a transformer's; and its small vectors.
        large, small = size // 8, _MIB
        shapes = [large] * 4 + [small] * (size // 2 // small)
        generator = self._torch.Generator().manual_seed(7)
        self._state = {
            f"layer.{i}.weight": self._torch.rand(n // 4, generator=generator).reshape(-1, 1024)
            for i, n in enumerate(shapes)
        }
        self._state |= {f"layer.{i}.bias": self._torch.rand(1024, generator=generator) for i in range(32)}
        self._into = {name: self._torch.zeros_like(tensor) for name, tensor in self._state.items()}
        self._saved, self._dcp_saved = self.save(), self.dcp_save()

    def rate(self, work: Callable[[], object]) -> float:
        """Bytes per second. What the one before left to write is written first."""
        os.sync()
        start = time.perf_counter()
        made = work()
        elapsed = time.perf_counter() - start
        if isinstance(made, Path) and made not in (self._saved, self._dcp_saved):
            shutil.rmtree(made)
        return self.size / elapsed

    def _fresh(self) -> Path:
        self._count += 1
        return self._folder / str(self._count)

    def save(self) -> Path:
        path = self._fresh()
        writer = self._ours.SealedStorageWriter(path, recipients=[self._identity.recipient], sign=self._owner)
        self._dcp.save(self._state, storage_writer=writer)
        return path

    def dcp_save(self) -> Path:
        path = self._fresh()
        writer = self._dcp.FileSystemWriter(path, thread_count=default_threads())
        self._dcp.save(self._state, storage_writer=writer)
        return path

    def load(self) -> None:
        pins: dict[str, Any] = {"identity": self._identity, "signed_by": self._owner.verifying_key}
        self._dcp.load(self._into, storage_reader=self._ours.SealedStorageReader(self._saved, **pins))

    def dcp_load(self) -> None:
        self._dcp.load(self._into, storage_reader=self._dcp.FileSystemReader(self._dcp_saved))
