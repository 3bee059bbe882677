"""Sealed files in object stores: ranged reads, multipart writes, and a header beside the object after a rewrap.

    >>> is_url("s3://bucket/model.sealed"), is_url("model.sealed")
    (True, False)
    >>> Address.parse("gs://bucket/llm/model.sealed")
    Address(scheme='gs', bucket='bucket', folder='llm', name='model.sealed')

``s3://BUCKET/PATH``, ``gs://BUCKET/PATH``, ``az://CONTAINER/PATH`` and ``memory://NAME/PATH`` (this process only),
through obstore (extra ``stores``). Credentials, region and endpoint come from the environment variables of each
cloud (AWS_*, GOOGLE_*, AZURE_STORAGE_*), never from the URL. docs/spec/sealed-folder.md, section 5.

The store is trusted for nothing but to answer: what it sends is checked as a file from a disk is. Every failure is
a StorageError within a bounded time: an attempt ends after ``timeout`` seconds, none begins after twice that.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, Self

from attrs import define, field, frozen

from isolate.errors import MalformedError, MissingExtra, SealedError, StorageError, UsageError
from isolate.sealed.header import live_slot
from isolate.sealed.layout import HEADER_SIZE

if TYPE_CHECKING:
    from typing_extensions import Buffer

_URL = re.compile(
    r"(?P<scheme>s3|gs|az|memory)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]*)(?:/(?P<path>.*))?", re.DOTALL
)

TIMEOUT = 60.0  # seconds for one request
RETRIES = 4
# Requests are merged up to this size: below it the latency of a store counts more than its bandwidth.
WINDOW = 8 << 20
AHEAD = 3  # windows fetched at once: this much memory, times WINDOW
# What is read when an object is opened: the header area, and enough of the end for most footers.
TAIL = 1 << 20
# A store takes 10,000 parts: objects of up to 156 GiB.
PART = 16 << 20
MAX_PARTS = 10_000
_UPLOADS = 4  # parts under way at once


def is_url(text: object) -> bool:
    """Whether this is the URL of a store rather than a path."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text) is not None


@frozen
class Address:
    """Where an object or a folder of objects is. ``str`` is the URL, which holds no secret."""

    scheme: str
    bucket: str
    folder: str
    name: str

    @classmethod
    def parse(cls, url: str, *, folder: bool = False) -> Self:
        """``folder``: all of the path is one. Raises UsageError."""
        found = _URL.fullmatch(url)
        if found is None:
            raise UsageError("a URL of a store is s3://, gs://, az:// or memory://, a bucket and a path")
        path = (found["path"] or "").rstrip("/") if folder else (found["path"] or "")
        parts = path.split("/") if path else []
        # A store would read %, ? and # in its own way, and dots as names.
        if any(part in ("", ".", "..") for part in parts) or re.search(r"[%?#\\\x00-\x1f]", path):
            raise UsageError("the path of a URL has no empty or dotted part, and none of % ? # \\")
        if not parts and not folder:
            raise UsageError("the URL names a bucket, and no object in it")
        return cls(found["scheme"], found["bucket"], "/".join(parts if folder else parts[:-1]),
                   "" if folder else parts[-1])  # fmt: skip

    def __str__(self) -> str:
        return f"{self.scheme}://" + "/".join(part for part in (self.bucket, self.folder, self.name) if part)


@cache
def _obstore() -> Any:
    try:
        importlib.import_module("obstore.store")
        return importlib.import_module("obstore")
    except ImportError:
        hint = "pip install 'isolate-confidential[stores]'"
        raise MissingExtra("URLs of object stores need obstore", hint=hint) from None


@cache
def _memory(bucket: str) -> Any:
    """One store for each name, as long as the process lives."""
    return _obstore().store.MemoryStore()


def _typed(doing: str, error: BaseException) -> StorageError:
    """No text of the store or of obstore goes into a message: it may quote requests."""
    exceptions = _obstore().exceptions
    if isinstance(error, FileNotFoundError):
        why = "no such object"
    elif isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        why = "the store refuses these credentials"
    elif isinstance(error, exceptions.PreconditionError):
        why = "the object was replaced meanwhile"
    else:
        why = "the store does not answer as it should"
    return StorageError(f"{doing}: {why}")


@contextlib.contextmanager
def _errors(doing: str) -> Iterator[None]:
    try:
        yield
    except (_obstore().exceptions.BaseError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise _typed(doing, error) from None


@define(eq=False)
class ObjectFolder:
    """One folder of one store; names are relative to it. ``timeout`` in seconds for one request."""

    address: Address
    timeout: float = TIMEOUT
    retries: int = RETRIES
    store: Any = field(init=False, repr=False)
    _prefix: str = field(init=False, default="")

    def __attrs_post_init__(self) -> None:
        stores, place = _obstore().store, self.address
        if place.scheme == "memory":
            self.store = _memory(place.bucket)
            self._prefix = f"{place.folder}/" if place.folder else ""
            return
        plain = any(
            os.environ.get(name, "").lower() in ("1", "true")
            for name in ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
        )
        limit = timedelta(seconds=self.timeout)
        options: dict[str, Any] = {
            "prefix": place.folder or None,
            "client_options": {"timeout": limit, "connect_timeout": min(limit, timedelta(seconds=10)),
                               "allow_http": plain},
            "retry_config": {"max_retries": self.retries, "retry_timeout": 2 * limit},
        }  # fmt: skip
        kinds = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
        try:
            self.store = kinds[place.scheme](place.bucket, **options)
        except (_obstore().exceptions.BaseError, ValueError, TypeError):
            why = "the environment does not say enough: account, region, endpoint or credentials"
            raise StorageError(f"cannot reach {place}: {why}") from None

    @classmethod
    def open(cls, url: str, **options: Any) -> Self:
        """The folder at ``url``. Raises UsageError, MissingExtra or StorageError."""
        return cls(Address.parse(url, folder=True), **options)

    def key(self, name: str) -> str:
        return self._prefix + name

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def list(self) -> dict[str, int]:
        """The names right in this folder, with their sizes in bytes; folders end in a slash and have size 0."""
        with _errors(f"cannot list {self.address}"):
            found = _obstore().list_with_delimiter(self.store, self._prefix or None)
            rows = {row["path"]: int(row["size"]) for row in found["objects"]}
            rows |= {path.rstrip("/") + "/": 0 for path in found["common_prefixes"]}
        return {path.removeprefix(self._prefix): size for path, size in rows.items()}

    def get(self, name: str, start: int, end: int, etag: str | None = None) -> Any:
        """Bytes from ``start`` to before ``end``, or an error: never fewer, never others than the store names."""
        doing = f"cannot read {self.url(name)}"
        options: dict[str, Any] = {"range": (start, end)}
        if etag is not None:
            options["if_match"] = etag
        with _errors(doing):
            answer = _obstore().get(self.store, self.key(name), options=options)
            covered = tuple(answer.range)
            data = answer.bytes()
        if covered != (start, end) or len(data) != end - start:
            raise StorageError(f"{doing}: the store sent another range than it was asked for")
        return data

    def find(self, name: str) -> dict[str, Any] | None:
        """Size and etag, or None."""
        with _errors(f"cannot read {self.url(name)}"):
            try:
                return dict(_obstore().head(self.store, self.key(name)))
            except FileNotFoundError:
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write a small object at once."""
        with _errors(f"cannot write {self.url(name)}"):
            _obstore().put(self.store, self.key(name), data, use_multipart=False)

    def delete(self, name: str) -> None:
        with _errors(f"cannot delete {self.url(name)}"):
            _obstore().delete(self.store, self.key(name))

    def source(self, name: str) -> ObjectSource:
        return ObjectSource(self, name)

    def sink(self, name: str) -> ObjectSink:
        return ObjectSink(self, name)


def header_name(name: str, commitment: bytes) -> str:
    """The object that stands in for the header area after a rewrap. It is named after the commitment, so that
    none is taken for a file that was sealed anew under the same name."""
    return f"{name}.{commitment[:16].hex()}.header"


@define(eq=False)
class _Window:
    """Ranges that are fetched by one request. ``left``: bytes of them that nobody has taken yet."""

    start: int
    end: int
    left: int
    data: Future[Any] | None = None


class ObjectSource:
    """An object to read: a Source. Header and tail are fetched at once, the rest as ``plan`` and reads ask for it.

    Every request names the etag that was seen first, so that an object that is replaced meanwhile is an error
    (where the store honours If-Match; where it does not, the file's own digests tell).
    """

    def __init__(self, folder: ObjectFolder, name: str) -> None:
        self._folder, self._name = folder, name
        meta = folder.find(name)
        if meta is None:
            raise StorageError(f"cannot read {folder.url(name)}: no such object")
        self._size, self._etag = int(meta["size"]), meta["e_tag"]
        self._windows: deque[_Window] = deque()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AHEAD, "isolate-fetch")
        self.requests = 0
        try:
            tail = max(0, self._size - TAIL)
            head = self._get(0, min(HEADER_SIZE, self._size)) if self._size else b""
            self._known = [(0, self._header(bytes(head)))]
            if self._size > HEADER_SIZE:
                tail = max(tail, HEADER_SIZE)
                self._known.append((tail, bytes(self._get(tail, self._size))))
        except BaseException:
            self.close()
            raise

    def _header(self, inline: bytes) -> bytes:
        """The header area that counts: the one beside the object, where a rewrap has left one."""
        try:
            name = header_name(self._name, live_slot(inline).commitment)
        except (SealedError, MalformedError):
            return inline
        meta = self._folder.find(name)
        if meta is None:
            return inline
        if meta["size"] != HEADER_SIZE:
            raise MalformedError(f"header: the object beside {self._folder.url(self._name)} is no header area")
        return bytes(self._folder.get(name, 0, HEADER_SIZE, meta["e_tag"]))

    @property
    def size(self) -> int:
        return self._size

    def _get(self, start: int, end: int) -> Any:
        with self._lock:
            self.requests += 1
        return self._folder.get(self._name, start, end, self._etag)

    def plan(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say which (offset, length) will be read soon: neighbours are merged into requests of 8 MiB and more."""
        windows: list[_Window] = []
        for start, length in sorted(ranges):
            last = windows[-1] if windows else None
            if last is not None and last.end == start and last.end - last.start < WINDOW:
                last.end, last.left = start + length, last.left + length
            else:
                windows.append(_Window(start, start + length, length))
        with self._lock:
            self._windows.extend(windows)

    def read_into(self, offset: int, target: Buffer) -> int:
        view = memoryview(target).cast("B")
        end = min(offset + len(view), self._size)
        length = max(0, end - offset)
        if not length:
            return 0
        for start, data in self._known:
            if start <= offset and end <= start + len(data):
                view[:length] = data[offset - start : end - start]
                return length
        window, request = self._planned(offset, end)
        if window is None or request is None:
            view[:length] = memoryview(self._get(offset, end))
            return length
        try:
            fetched = memoryview(request.result())
        except CancelledError:
            raise StorageError(f"cannot read {self._folder.url(self._name)}: it was closed meanwhile") from None
        view[:length] = fetched[offset - window.start : end - window.start]
        with self._lock:
            window.left -= length
            if window.left <= 0 and window in self._windows:
                self._windows.remove(window)
        return length

    def _planned(self, start: int, end: int) -> tuple[_Window | None, Future[Any] | None]:
        """The window that covers this range, with its request; those that follow are asked for as well."""
        with self._lock:
            for index, window in enumerate(self._windows):
                if window.start <= start and end <= window.end:
                    for coming in list(self._windows)[index : index + AHEAD]:
                        if coming.data is None:
                            coming.data = self._pool.submit(self._get, coming.start, coming.end)
                    return window, window.data
        return None, None

    def replace_header(self, commitment: bytes, header: bytes) -> None:
        """Put a header area beside the object: from now on it counts."""
        self._folder.put(header_name(self._name, commitment), header)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._windows.clear()


class _Aborted(Exception):
    """Ends an upload that is not to become an object."""


_END: Any = object()
_ABORT: Any = object()


class ObjectSink:
    """A new object, uploaded in parts while it is written: a Sink. One of that name stays until ``commit``."""

    def __init__(self, folder: ObjectFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._doing = f"cannot write {folder.url(name)}"
        self._queue: Queue[Any] = Queue(maxsize=8)
        self._written = 0
        self._over = False
        self._upload: Future[None] = Future()
        # A daemon: a sink that is forgotten must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="isolate-upload", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        options: dict[str, Any] = {"chunk_size": PART, "max_concurrency": _UPLOADS}
        try:
            _obstore().put(self._folder.store, self._folder.key(self._name), self._parts(), **options)
        except BaseException as error:  # noqa: BLE001 (whatever it is, it belongs to who writes)
            self._upload.set_exception(error)
        else:
            self._upload.set_result(None)

    def _parts(self) -> Iterator[bytes]:
        # When this raises, obstore aborts the upload, and the store forgets its parts.
        while True:
            part = self._queue.get()
            if part is _END:
                return
            if part is _ABORT:
                raise _Aborted
            yield part

    def _send(self, item: Any) -> None:
        """Hand an item to the upload; a failed one takes none any more."""
        while True:
            if self._upload.done():
                self._raise()
            try:
                self._queue.put(item, timeout=0.1)
            except Full:
                continue
            return

    def _raise(self) -> None:
        error = self._upload.exception()
        raise _typed(self._doing, error or OSError())

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        if self._over:
            raise StorageError(f"{self._doing}: this object is finished")
        if self._written + len(view) > PART * MAX_PARTS:
            raise StorageError(f"{self._doing}: it is larger than {PART * MAX_PARTS >> 30} GiB")
        for start in range(0, len(view), PART):
            self._send(bytes(view[start : start + PART]))
        self._written += len(view)

    def commit(self) -> None:
        self._send(_END)
        self._over = True
        error = self._upload.exception()
        if error is not None:
            raise _typed(self._doing, error)
        meta = self._folder.find(self._name)
        if meta is None or meta["size"] != self._written:
            raise StorageError(f"{self._doing}: the store holds another size than was sent")

    def abort(self) -> None:
        if not self._over:
            self._over = True
            with contextlib.suppress(StorageError):
                self._send(_ABORT)
            self._thread.join()


def object_source(url: str, **options: Any) -> ObjectSource:
    """The object at ``url`` as a Source. ``options``: timeout (seconds for a request), retries."""
    place = Address.parse(url)
    return ObjectFolder(Address(place.scheme, place.bucket, place.folder, ""), **options).source(place.name)


def object_sink(url: str, **options: Any) -> ObjectSink:
    """The object at ``url`` as a Sink; ``options`` as in ``object_source``."""
    place = Address.parse(url)
    return ObjectFolder(Address(place.scheme, place.bucket, place.folder, ""), **options).sink(place.name)
