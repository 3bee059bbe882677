"""What does not leave with an object or an error: keys, data, and the frames that hold them.

    >>> @bare
    ... def fail(secret):
    ...     kept = secret * 2
    ...     raise UsageError("refused")
    >>> try:
    ...     fail("canary")
    ... except UsageError as error:
    ...     trace = error.__traceback__.tb_next
    >>> "canary" in str(trace.tb_frame.f_locals), trace.tb_next is None
    (False, True)

A traceback keeps every frame that an error passed, and each frame its locals: keys of a handshake, a key file's
line, an answer. Debuggers, notebooks and error trackers print them. So what a client calls raises without the
frames below it, and without the errors before it. This is against leaks by mistake; code in the same process that
means to can read all of its memory.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, NoReturn, ParamSpec, Protocol, TypeVar

from isolate.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")


def _stripped(error: BaseException) -> BaseException:
    error.__cause__ = error.__context__ = error.__traceback__ = None
    if isinstance(error, BaseExceptionGroup):  # of a signer of the user's own
        for one in error.exceptions:
            _stripped(one)
    return error


def bare(function: Callable[P, R]) -> Callable[P, R]:
    """Let errors leave ``function`` without the frames below it: the locals of those never reach the caller."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 (raised again below, outside of this clause)
            caught = _stripped(error)
        del args, kwargs
        try:
            raise caught
        finally:
            del caught

    return call


def bare_async(function: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """``bare`` for a coroutine function."""

    @functools.wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 (raised again below)
            caught = _stripped(error)
        del args, kwargs
        try:
            raise caught
        finally:
            del caught

    return call


class NotCopied:
    """Base of what is neither copied nor serialised. Subclasses have slots only, so that vars() shows nothing."""

    __slots__ = ()

    WHY: ClassVar[str] = "this is not copied or pickled"
    INSTEAD: ClassVar[str] = ""

    def _refuse(self, *_: object) -> NoReturn:
        raise UsageError(self.WHY, hint=self.INSTEAD)

    # __reduce_ex__ is object's, which asks these; __getstate__ alone would be a way round them.
    __copy__ = __deepcopy__ = __reduce__ = __getstate__ = __replace__ = _refuse


class Forks(Protocol):
    """What has a connection that a forked child must not share."""

    def _after_fork(self) -> None: ...


_LIVE: weakref.WeakSet[Any] = weakref.WeakSet()


def forks(one: Forks) -> None:
    """From now on ``one._after_fork()`` is called in every child that is forked, before anything else uses it."""
    _LIVE.add(one)


def _in_child() -> None:
    for one in list(_LIVE):
        one._after_fork()


os.register_at_fork(after_in_child=_in_child)
