"""Sealed files against plain files, safetensors and (where they are) tensorizer with encryption, and a GPU.

One run, 1 GiB in eight tensors, everything in the page cache. Figures named ``a_vs_b`` are ratios of throughput:
above 1 is faster than b. Both sides of a ratio use the same number of threads and fresh memory.

    >>> sorted(minilm_shapes())[:2], len(minilm_shapes())
    (['embeddings.LayerNorm.bias', 'embeddings.LayerNorm.weight'], 104)
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from isolate import sealed
from isolate.cli.bench import Figures, paired
from isolate.crypto.kem import Identity
from isolate.crypto.signing import SigningKey
from isolate.errors import MissingExtra
from isolate.sealed.stores import MemorySink, MemorySource, default_threads

_MIB = 1 << 20
Tensors = dict[str, np.ndarray[Any, Any]]


def run(rounds: int | None, quick: bool) -> tuple[int, Figures]:
    """1 GiB, seven rounds; ``quick``: 32 MiB, three rounds. Raises MissingExtra without safetensors."""
    if find_spec("safetensors") is None:
        raise MissingExtra("this benchmark compares with safetensors", hint="pip install safetensors")
    rounds = rounds or (3 if quick else 7)
    size = (32 if quick else 1024) * _MIB
    with tempfile.TemporaryDirectory(prefix="isolate-bench-") as folder:
        bench = _Bench(Path(folder), size)
        figures = paired(rounds, *bench.against_others())
        figures["peak_memory_vs_tensors"] = bench.peak_memory()
    figures["lazy_tensor_extra_chunks"] = lazy_tensor_extra_chunks()
    return rounds, figures


class _Bench:
    """The same tensors as a sealed file, a safetensors file and plain bytes, in one folder."""

    def __init__(self, folder: Path, size: int) -> None:
        generator = np.random.default_rng(7)
        self.size, self.folder, self.threads = size, folder, default_threads()
        self.tensors: Tensors = {f"layer.{i}": generator.standard_normal(size // 32, np.float32) for i in range(8)}
        self.owner, self.identity = SigningKey.generate(), Identity.generate()
        self.sealed, self.plain, self.theirs = (folder / name for name in ("sealed", "plain", "safetensors"))
        self.digest = self.seal(self.sealed)
        self.save_safetensors()
        with self.plain.open("wb") as file:
            for tensor in self.tensors.values():
                file.write(tensor.data)
        os.sync()

    def against_others(self) -> tuple[dict[str, Callable[[], float]], dict[str, tuple[str, str]]]:
        """What is measured, and which ratios are taken."""
        signed = {"signed_by": self.owner.verifying_key}
        work: dict[str, Callable[[], object]] = {
            "readinto": self.readinto,
            "open": lambda: self.open(expect=self.digest, tags_only=True),
            "open_signed": lambda: self.open(**signed),
            "safetensors": self.open_safetensors,
            "seal": lambda: self.seal(self.folder / "sealed again"),
            "safetensors_save": self.save_safetensors,
        }
        ratios = {
            "open_vs_readinto": ("open", "readinto"),
            "open_signed_vs_readinto": ("open_signed", "readinto"),
            "open_vs_safetensors_clone": ("open", "safetensors"),
            "seal_vs_safetensors_save": ("seal", "safetensors_save"),
        }
        if find_spec("tensorizer") is not None:
            work["tensorizer"] = self.tensorizer()
            ratios["open_vs_tensorizer_encrypted"] = ("open", "tensorizer")
        if _has_gpu():
            work["gpu"], work["safetensors_gpu"] = self.open_to_gpu, self.open_safetensors_to_gpu
            ratios["open_to_gpu_vs_safetensors"] = ("gpu", "safetensors_gpu")
        return {name: lambda one=one: self._rate(one) for name, one in work.items()}, ratios  # type: ignore[misc]

    def _rate(self, work: Callable[[], object]) -> float:
        # Memory that was just given back: in a virtual machine the first touch of a page that its host has not
        # backed yet takes ten times as long, and would fall on whoever happens to get it.
        np.empty(self.size, np.uint8).fill(1)
        start = time.perf_counter()
        kept = work()
        elapsed = time.perf_counter() - start
        del kept  # giving memory back is not part of the figure
        return self.size / elapsed

    def open(self, **how: Any) -> Tensors:
        return sealed.load_file(self.sealed, identity=self.identity, threads=self.threads, **how)

    def seal(self, path: Path) -> bytes:
        """Durable when it answers, as the one below."""
        return sealed.save_file(self.tensors, path, recipients=[self.identity.recipient], sign=self.owner)

    def save_safetensors(self) -> None:
        import_module("safetensors.numpy").save_file(self.tensors, self.theirs)
        with self.theirs.open("rb") as file:
            os.fsync(file.fileno())

    def open_safetensors(self) -> Tensors:
        """With numpy, get_tensor copies out of the mapping: nothing is left unread."""
        with import_module("safetensors").safe_open(self.theirs, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)

    def open_to_gpu(self) -> object:
        """Verified and decrypted, through pinned buffers, until the last byte is there."""
        how: dict[str, Any] = {"signed_by": self.owner.verifying_key, "threads": self.threads}
        kept = sealed.load_file(self.sealed, identity=self.identity, framework="pt", device="cuda", **how)
        import_module("torch").cuda.synchronize()
        return kept

    def open_safetensors_to_gpu(self) -> object:
        kept = import_module("safetensors.torch").load_file(self.theirs, device="cuda")
        import_module("torch").cuda.synchronize()
        return kept

    def readinto(self) -> object:
        """The floor: the same bytes of a plain file into fresh memory, and nothing else."""
        target = np.empty(self.size, np.uint8)
        step = -(-self.size // self.threads)

        def part(start: int) -> None:
            stop = min(self.size, start + step)
            with self.plain.open("rb", buffering=0) as file:
                file.seek(start)
                while start < stop:
                    start += file.readinto(target.data[start : min(stop, start + 8 * _MIB)])

        workers = [Thread(target=part, args=(start,)) for start in range(0, self.size, step)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return target

    def tensorizer(self) -> Callable[[], object]:
        """Seal once with tensorizer's own encryption; answers how to open that."""
        theirs, torch, path = import_module("tensorizer"), import_module("torch"), str(self.folder / "tensorizer")
        key = theirs.EncryptionParams.random()
        serializer = theirs.TensorSerializer(path, encryption=key)
        serializer.write_state_dict({name: torch.from_numpy(array) for name, array in self.tensors.items()})
        serializer.close()

        def opened() -> object:
            decryption = theirs.DecryptionParams.from_key(key.key)
            with theirs.TensorDeserializer(path, device="cpu", encryption=decryption) as file:
                return dict(file.items())

        return opened

    def peak_memory(self) -> float:
        """The most memory that opening takes beyond what was there, in sizes of the tensors (1 is the least)."""
        self.tensors = {}
        # 5 resets the high-water mark of this process (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        kept = self.open(signed_by=self.owner.verifying_key)
        peak = _status("VmHWM") - before
        del kept
        return round(peak / self.size, 4)


def _has_gpu() -> bool:
    return find_spec("torch") is not None and bool(import_module("torch").cuda.is_available())


def _status(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def minilm_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all-MiniLM-L6-v2: 104 tensors, from 1.5 KB to 47 MB."""
    h, wide = 384, 1536
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.LayerNorm.bias": (h,),
        "embeddings.LayerNorm.weight": (h,),
        "embeddings.position_embeddings.weight": (512, h),
        "embeddings.position_ids": (1, 512),
        "embeddings.token_type_embeddings.weight": (2, h),
        "embeddings.word_embeddings.weight": (30522, h),
        "pooler.dense.bias": (h,),
        "pooler.dense.weight": (h, h),
    }
    for layer in range(6):
        base = f"encoder.layer.{layer}."
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"{base}{name}.bias": (h,), f"{base}{name}.weight": (h,)}
        dense = {f"attention.self.{part}": (h, h) for part in ("query", "key", "value")}
        dense |= {"attention.output.dense": (h, h), "intermediate.dense": (wide, h), "output.dense": (h, wide)}
        for name, shape in dense.items():
            shapes |= {f"{base}{name}.bias": shape[:1], f"{base}{name}.weight": shape}
    return shapes


def lazy_tensor_extra_chunks() -> float:
    """Bytes read beyond a tensor, in chunks, when it alone is read: the worst over every tensor of MiniLM."""
    owner, identity, sink = SigningKey.generate(), Identity.generate(), MemorySink()
    with sealed.SealedWriter(sink, recipients=[identity.recipient], sign=owner) as writer:
        for name, shape in minilm_shapes().items():
            writer.add(name, np.zeros(shape, np.int64 if name.endswith("position_ids") else np.float32))
    source, worst = MemorySource(sink.data), 0.0
    with sealed.SealedReader(source, identity=identity, signed_by=owner.verifying_key) as reader:
        for name, entry in reader.entries.items():
            before = reader.bytes_read
            reader.read(name)
            worst = max(worst, (reader.bytes_read - before - entry.size) / reader.chunk_size)
    return round(worst, 4)
