"""What an operation sees of the asset: its tensors and texts, read-only, for as long as it runs.

    >>> import numpy as np
    >>> view = View({"w": np.arange(3), **pack_texts("title", ["one", "two"])})
    >>> view, int(view["w"][2]), view.texts("title")[1]
    (<View of 3 tensors, not shown>, 2, 'two')
    >>> view["w"][0] = 7
    Traceback (most recent call last):
    ...
    ValueError: assignment destination is read-only

A convenience, not a wall: it keeps an operation from changing or printing the asset by mistake. Operation code is
trusted because it is measured; Python could not confine it. Spec: docs/spec/operations.md, 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Self, overload

import numpy as np

from isolate.errors import UsageError

ENDS = ".ends"  # after the name of packed texts: where each of them ends


def pack_texts(name: str, texts: Iterable[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Two tensors that hold texts in a sealed file: the UTF-8 of all of them, and where each ends."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(one) for one in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), name + ENDS: ends}


class Texts(Sequence[str]):
    """Packed texts, decoded one by one when they are asked for."""

    __slots__ = ("_bytes", "_ends")

    def __init__(self, encoded: np.ndarray[Any, Any], ends: np.ndarray[Any, Any]) -> None:
        self._bytes, self._ends = encoded, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = int(self._ends[number - 1]) if number else 0
        return self._bytes[start : int(self._ends[number])].tobytes().decode()

    def __repr__(self) -> str:
        return f"<{len(self)} texts, not shown>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("what an enclave sees is not copied or pickled")


class View(Mapping[str, np.ndarray[Any, Any]]):
    """A read-only mapping of names to arrays, whose repr shows none of them."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._tensors = {name: _read_only(tensor) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def texts(self, name: str) -> Texts:
        """The texts that ``pack_texts`` packed under this name."""
        return Texts(self[name], self[name + ENDS])

    def lent(self) -> Self:
        """A view for one invocation, to be used with ``with``: at its end, what the operation kept of it is empty.

        Arrays that it took out of the view are its own to forget.
        """
        lent = self.__class__({})
        lent._tensors.update(self._tensors)  # read-only already: a model of 200 tensors has them seen to once
        return lent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the references. What they led to is freed where nothing else holds it; Python wipes nothing."""
        self._tensors.clear()

    def __repr__(self) -> str:
        return f"<View of {len(self)} tensors, not shown>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("what an enclave sees is not copied or pickled")


def _read_only(tensor: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    seen = tensor.view()
    seen.flags.writeable = False
    return seen
