"""The service's clock: the machine's time at the start, and from then on what has passed since.

    >>> wall = [1000.0, 1000.0, 1030.0]  # at the start, and at two looks
    >>> clock = SteadyClock(wall=lambda: wall.pop(0), elapsed=lambda: 7.0)
    >>> clock(), round(clock.skew())
    (1000, 30)

Somebody who sets the machine's clock back would bring back what has expired; set ahead, it would end results,
grants and certificates before their time. So a jump while the service runs changes nothing, and is told in the logs
and metrics; a restart takes the machine's time again, and refuses one that is behind the log (State).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

JUMP = 60  # seconds between our time and the machine's that are worth a line

log = structlog.get_logger("isolate.service")

# Time that also passes while the machine is suspended, where there is such a clock.
_BOOT = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _elapsed() -> float:
    return time.clock_gettime(_BOOT)


class SteadyClock:
    """Answers Unix seconds. ``wall`` and ``elapsed`` answer seconds, for tests to hand in."""

    def __init__(self, wall: Callable[[], float] = time.time, elapsed: Callable[[], float] = _elapsed) -> None:
        self._wall, self._elapsed = wall, elapsed
        self._begin = wall() - elapsed()
        self._told = False

    def __call__(self) -> int:
        self.skew()
        return int(self._begin + self._elapsed())

    def skew(self) -> float:
        """By how many seconds the machine's clock is ahead of this one. A jump is told once, in the logs."""
        found = self._wall() - self._begin - self._elapsed()
        if (abs(found) > JUMP) is not self._told:
            self._told = not self._told
            log.warning("clock.jumped" if self._told else "clock.back", seconds=round(found))
        return found
