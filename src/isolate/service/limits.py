"""How much one peer, and all of them together, get from the service: requests, connections, and room to wait in.

    >>> now = 0.0
    >>> limits = Limits(rate=2, burst=2, clock=lambda: now)
    >>> [limits.rate.take("10.0.0.1") for _ in range(3)], limits.rate.take("10.0.0.2")
    ([0.0, 0.0, 0.5], 0.0)

They keep one peer from taking everything, and a slow disk from piling requests up. They are no protection from
many peers: whoever has enough addresses can still make others wait. Spec: docs/spec/service.md, section 1.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import Callable

RATE = 200.0  # requests a second of one peer: a courier brings those of all enclaves of its host
BURST = 2  # seconds' worth of requests that may come at once after a pause
MAX_PEERS = 4096  # whose rates are kept; about 1 MiB
MAX_CONNECTIONS = 512  # at once; more are answered with ``busy``
MAX_OF_PEER = 384  # of these for one peer, so that the next one finds a place
MAX_UNSEATED = 256  # connections beyond these; more are closed at once. A process has 1024 descriptors by default
MAX_BEGUN = 128  # requests in a worker or waiting for one: at 50 ms a commit the last waits 6 s of a client's 30


def peer_of_address(host: str) -> str:
    """Whom an address counts as: IPv6 by its /64, since one host has them all.

    >>> peer_of_address("10.0.0.1"), peer_of_address("2001:db8::1:2"), peer_of_address("::ffff:10.0.0.1")
    ('10.0.0.1', '2001:db8::/64', '10.0.0.1')
    """
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found) >> 64 << 64, 64)))


class Rate:
    """A token bucket for each peer. ``rate`` in requests a second, 0 for no limit; ``clock`` in seconds, monotonic.

    The table is bounded. A bucket that is full again says nothing and is dropped; while there are none to drop, all
    newcomers share one bucket, so that nobody gets rid of an empty one by filling the table.
    """

    def __init__(self, rate: float, burst: float, *, clock: Callable[[], float], most: int = MAX_PEERS) -> None:
        self._rate, self._burst, self._clock, self._most = rate, burst, clock, most
        # Oldest use first; a value is the tokens left, and when that was.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, peer: str) -> float:
        """0.0 when a request may begin; else the seconds until the next may."""
        if not self._rate:
            return 0.0
        now = self._clock()
        if peer not in self._buckets and not self._room(now):
            peer = "others"
        tokens, at = self._buckets.get(peer, (self._burst, now))
        tokens = min(self._burst, tokens + max(0.0, now - at) * self._rate)
        wait = max(0.0, 1 - tokens) / self._rate
        self._buckets[peer] = (tokens if wait else tokens - 1, now)
        self._buckets.move_to_end(peer)
        return wait

    def _room(self, now: float) -> bool:
        while len(self._buckets) >= self._most:
            peer, (tokens, at) = next(iter(self._buckets.items()))
            if tokens + (now - at) * self._rate < self._burst:
                return False
            del self._buckets[peer]
        return True

    def __len__(self) -> int:
        return len(self._buckets)


class Seats:
    """Places that are taken and given back: ``most`` in all, ``each`` for one holder."""

    def __init__(self, most: int, each: int | None = None) -> None:
        self._most, self._each = most, most if each is None else each
        self._held: Counter[str] = Counter()
        self.taken = 0

    def take(self, holder: str = "") -> bool:
        if self.taken >= self._most or self._held[holder] >= self._each:
            return False
        self._held[holder] += 1
        self.taken += 1
        return True

    def leave(self, holder: str = "") -> None:
        self.taken -= 1
        self._held[holder] -= 1
        if not self._held[holder]:
            del self._held[holder]


class Limits:
    """All limits of one service. ``rate`` and ``burst`` as ``Rate`` has them."""

    def __init__(
        self, *, rate: float = RATE, burst: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rate = Rate(rate, max(1.0, rate * BURST) if burst is None else burst, clock=clock)
        self.connections = Seats(MAX_CONNECTIONS, MAX_OF_PEER)
        self.unseated = Seats(MAX_UNSEATED)
        self.begun = Seats(MAX_BEGUN)
