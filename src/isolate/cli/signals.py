"""How a command ends when it is told to: once, in order, and with a status that says so."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn


def end_once(*numbers: int, status: Callable[[int], int] = lambda _: 0) -> None:
    """Let the first of these signals raise SystemExit, with this status for its number; the others change nothing.

    An exception, so that everything is closed. A second signal would interrupt that; and while Python itself ends,
    which takes it a tenth of a second, it has no handlers any more, so that a process that has closed everything
    would be seen as killed. A supervisor that signals a whole group, and a program that asks twice, do send two.
    """

    def end(number: int, _: Any) -> NoReturn:
        ignore(*numbers)
        raise SystemExit(status(number))

    for number in numbers:
        signal.signal(number, end)


def ignore(*numbers: int) -> None:
    """From now on these signals change nothing; also one that came just now, and has not met its handler yet."""
    # Python finds that it has no handler any more, and says so on stderr.
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, ())  # after which Python looks what came
    finally:
        sys.unraisablehook = hook
