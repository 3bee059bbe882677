"""Where bytes come from and go to: local files and memory. A store for objects is another pair of these two.

    >>> source = MemorySource(b"0123456789")
    >>> target = bytearray(4)
    >>> source.read_into(3, target), bytes(target)
    (4, b'3456')

A Source answers a size and reads ranges, from several threads at once. A Sink takes bytes in order and makes
nothing visible before ``commit``; ``abort`` leaves nothing behind. Every failure is a StorageError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from isolate.errors import StorageError, Truncated
from isolate.sealed import objects

if TYPE_CHECKING:
    from typing_extensions import Buffer

PathLike = str | os.PathLike[str]

_SYNC_EVERY = 16 << 20  # bytes


def default_threads() -> int:
    """One for each CPU that this process may use, eight at most."""
    return min(8, len(os.sched_getaffinity(0)))


def storage_error(doing: str, error: OSError) -> StorageError:
    return StorageError(f"{doing}: {error.strerror or 'input/output error'}")


class Source(Protocol):
    """Bytes to read, by range. Several threads may read at once."""

    @property
    def size(self) -> int: ...

    def read_into(self, offset: int, target: Buffer) -> int:
        """Fill ``target`` from ``offset``; answers how many bytes there were. Raises StorageError."""
        ...

    def close(self) -> None: ...


class Sink(Protocol):
    """A new object, written front to back."""

    def write(self, data: Buffer) -> None: ...

    def commit(self) -> None:
        """Make it durable, then visible under its name, all at once."""
        ...

    def abort(self) -> None:
        """Forget it; calling this after ``commit`` changes nothing."""
        ...


@runtime_checkable
class PlannedSource(Protocol):
    """A source that does better when it knows what will be read soon."""

    def plan(self, ranges: Iterable[tuple[int, int]]) -> None:
        """(offset, length) of each read to come, as they will be made."""
        ...


def read_exactly(source: Source, offset: int, length: int, stage: str) -> bytes:
    """``length`` bytes. Raises Truncated when the source has fewer."""
    data = bytearray(length)
    if source.read_into(offset, data) != length:
        raise Truncated(f"{stage}: the file is shorter than its directory says")
    return bytes(data)


class MemorySource:
    """A source over bytes."""

    def __init__(self, data: Buffer) -> None:
        self._data = memoryview(data).cast("B")

    @property
    def size(self) -> int:
        return len(self._data)

    def read_into(self, offset: int, target: Buffer) -> int:
        view = memoryview(target).cast("B")
        part = self._data[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def close(self) -> None:
        pass


class MemorySink:
    """A sink into memory: ``data`` after ``commit``."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.data = b""

    def write(self, data: Buffer) -> None:
        self.parts.append(bytes(data))

    def commit(self) -> None:
        self.data, self.parts = b"".join(self.parts), []

    def abort(self) -> None:
        self.parts = []


class FileSource:
    """A local file, read with ``preadv`` into the caller's memory."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        try:
            # A FIFO would block for ever; a directory opens and then fails oddly.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise storage_error(f"cannot read {self.path}", error) from None
        try:
            self._size = os.fstat(self._fd).st_size
        except OSError as error:
            os.close(self._fd)
            raise storage_error(f"cannot read {self.path}", error) from None

    @property
    def size(self) -> int:
        return self._size

    def read_into(self, offset: int, target: Buffer) -> int:
        view = memoryview(target).cast("B")
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise storage_error(f"cannot read {self.path}", error) from None
        return done

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FileSink:
    """A local file that appears complete or not at all: unnamed while written, then linked, renamed and synced.

    Where the file system has no unnamed files, a hidden temporary beside the target takes their place, and a kill
    may leave it behind. ``mode``: permissions before the umask; 0600 for plaintext. What is written is synced in
    the background all along, while the next chunks are encrypted: for 1 GiB that took 1.1 s instead of 1.6.
    """

    def __init__(self, path: PathLike, *, mode: int = 0o666) -> None:
        self.path = Path(path)
        self._folder = self.path.parent
        self._temporary = self._folder / f".{self.path.name[:64]}.{secrets.token_hex(6)}.partial"
        self._named = False
        self._unsynced = 0
        self._syncing: Future[None] | None = None
        self._fd = -1
        try:
            self._fd = self._open(mode)
        except OSError as error:
            raise storage_error(f"cannot write {self.path}", error) from None
        self._syncer = ThreadPoolExecutor(1, "isolate-sync")

    def _open(self, mode: int) -> int:
        try:
            return os.open(self._folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, mode)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        descriptor = os.open(
            self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode
        )
        self._named = True
        return descriptor

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        try:
            while len(view):
                count = os.write(self._fd, view)
                view = view[count:]
                self._unsynced += count
            if self._unsynced >= _SYNC_EVERY and (self._syncing is None or self._syncing.done()):
                self._settle()
                self._unsynced, self._syncing = 0, self._syncer.submit(os.fdatasync, self._fd)
        except OSError as error:
            raise storage_error(f"cannot write {self.path}", error) from None

    def _settle(self) -> None:
        """Wait for the sync under way. An error is reported to one sync only, so none may be passed over."""
        if self._syncing is not None:
            self._syncing.result()

    def commit(self) -> None:
        try:
            self._settle()
            os.fsync(self._fd)
            if not self._named:
                # Python follows the link of /proc only where a directory descriptor makes it call linkat().
                folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.link(f"/proc/self/fd/{self._fd}", self._temporary, src_dir_fd=folder, follow_symlinks=True)
                finally:
                    os.close(folder)
                self._named = True
            os.replace(self._temporary, self.path)  # noqa: PTH105 (through the one module that tests replace)
            self._named = False
            sync_folder(self._folder)
        except OSError as error:
            raise storage_error(f"cannot write {self.path}", error) from None
        finally:
            self.abort()

    def abort(self) -> None:
        self._syncer.shutdown()  # before the descriptor may mean another file
        if self._named:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._named = False
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_source(source: PathLike | Source) -> Source:
    """A path or a URL as a source; a source as it is."""
    if isinstance(source, str) and objects.is_url(source):
        return objects.object_source(source)
    return FileSource(source) if isinstance(source, str | os.PathLike) else source


def open_sink(target: PathLike | Sink, *, mode: int = 0o666) -> Sink:
    """A path or a URL as a sink; a sink as it is."""
    if isinstance(target, str) and objects.is_url(target):
        return objects.object_sink(target)
    return FileSink(target, mode=mode) if isinstance(target, str | os.PathLike) else target


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
