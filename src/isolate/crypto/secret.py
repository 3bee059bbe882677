"""Secrets as a type: no repr, no pickle, no copy, no ``==``, wiped at the end.

    >>> from isolate.crypto.secret import Secret
    >>> with Secret.generate(32) as key:
    ...     print(key, len(key.expose()))
    Secret(32 bytes, hidden) 32

What cannot be promised: a C library that is given the bytes may keep a copy of its own (a live ``AESGCM``
object does), and the interpreter may have copied a ``bytes`` before it came here. Hand in a ``bytearray``
and wipe it where that matters.
"""

from __future__ import annotations

import hmac
import secrets
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self

from isolate.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Buffer


def wipe(buffer: bytearray | memoryview) -> None:
    """Overwrite a writable buffer of bytes with zeros, in place."""
    view = memoryview(buffer).cast("B")
    view[:] = bytes(len(view))


class Secret:
    """Bytes that are shown to nobody. Subclass it once per purpose, so that a type checker tells keys apart.

    Raises UsageError for a wrong length, a comparison by ``==``, a copy or a pickle, and after ``wipe``.
    """

    __slots__ = ("_buffer", "_wiped")

    size: ClassVar[int | None] = None
    __hash__: ClassVar[None]  # type: ignore[assignment]

    def __init__(self, value: Buffer) -> None:
        self._wiped = False
        self._buffer = bytearray(memoryview(value).cast("B"))
        if self.size is not None and len(self._buffer) != self.size:
            raise UsageError(f"{type(self).__name__} takes {self.size} bytes, not {len(self._buffer)}")

    @classmethod
    def generate(cls, size: int | None = None) -> Self:
        """A new one from the operating system's generator, ``size`` bytes long (or of the class's size)."""
        length = cls.size if size is None else size
        if length is None:
            raise UsageError("a size is needed")
        value = bytearray(secrets.token_bytes(length))
        try:
            return cls(value)
        finally:
            wipe(value)

    def expose(self) -> memoryview:
        """A read-only view of the bytes: hand it to a cipher, keep it nowhere."""
        if self._wiped:
            raise UsageError(f"this {type(self).__name__} was wiped")
        return memoryview(self._buffer).toreadonly()

    def equals(self, other: Secret | Buffer) -> bool:
        """Compare in constant time (for equal lengths)."""
        theirs = other.expose() if isinstance(other, Secret) else memoryview(other).cast("B")
        return hmac.compare_digest(self.expose(), theirs)

    def wipe(self) -> None:
        wipe(self._buffer)
        self._wiped = True

    def __len__(self) -> int:
        return len(self._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.wipe()

    def __del__(self) -> None:
        # An instance whose __init__ raised has no buffer. Shrinking raises BufferError while somebody still
        # holds a view from expose(): wiping under that view would turn a live key into zeros.
        buffer = getattr(self, "_buffer", None)
        if buffer:
            try:
                buffer.pop()
            except BufferError:
                return
            buffer[:] = bytes(len(buffer))

    def __repr__(self) -> str:
        # An instance whose __init__ raised has no buffer, and a traceback with locals shows it.
        return f"{type(self).__name__}({len(getattr(self, '_buffer', b''))} bytes, hidden)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        raise UsageError("secrets are compared with equals()")

    def _refuse(self, *_: object) -> NoReturn:
        raise UsageError(f"a {type(self).__name__} is not copied, pickled or serialised")

    __copy__ = __deepcopy__ = __reduce__ = __getstate__ = _refuse

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse()
