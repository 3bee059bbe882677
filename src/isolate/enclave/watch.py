"""Whether the peers of open channels still stand: asked of the service in the background, about all at once.

    >>> from types import SimpleNamespace
    >>> peer = SimpleNamespace(result=SimpleNamespace(instance=bytes(32), expires=100))
    >>> watch = Watch(lambda instances: PeerStandings(["slot_retired"], 3600, 0), now=lambda: 0, background=False)
    >>> watch.recheck(peer)
    Traceback (most recent call last):
    ...
    isolate.errors.ResultRefused: the peer no longer stands with the service

A channel asks ``recheck`` while it is used, and never waits for the service: what it hears is what the last answer
said. So a measurement that was revoked, or an instance whose slot a later one took, has no open channel after twice
``EVERY`` and the time of an answer. While the service is away, channels go on until the peer's last result is older
than the policy's ``max_stale``. Spec: docs/spec/service.md, section 4.1.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from isolate.errors import IsolateError, ResultRefused, UnavailableError
from isolate.messages.attest import MAX_INSTANCES, PeerStandings

if TYPE_CHECKING:
    from isolate.channel import AttestedPeer

EVERY = 10.0  # seconds between two looks of a channel, and between two questions to the service
FORGET = 600.0  # seconds after which a peer that no channel asks about is asked about no more


class Watch:
    """``ask`` answers for a list of instances, or raises an error of ours; ``now`` is the service's Unix time."""

    def __init__(
        self,
        ask: Callable[[list[bytes]], PeerStandings],
        *,
        now: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
        background: bool = True,
    ) -> None:
        self._ask, self._now, self._clock, self._background = ask, now, clock, background
        self._turn = threading.Lock()
        self._wanted: dict[bytes, float] = {}  # instance -> when a channel last asked
        self._codes: dict[bytes, str] = {}
        self._max_stale = 0  # of the policy; until it is known, the least
        self._away = False
        self._ended: IsolateError | None = None  # we ourselves are refused
        self._next = 0.0
        self._asking = False

    def recheck(self, peer: AttestedPeer) -> None:
        """Raises ResultRefused when the peer, or this enclave itself, no longer stands. Does not wait."""
        instance, begin = peer.result.instance, False
        with self._turn:
            now = self._clock()
            self._wanted[instance] = now
            if not self._asking and now >= self._next:
                self._asking = begin = True
                self._next = now + EVERY
        if begin and self._background:
            try:
                threading.Thread(target=self._look, name="isolate-watch", daemon=True).start()
            except RuntimeError:  # no more threads
                self._heard(away=True)
        elif begin:
            self._look()
        with self._turn:
            code, ended, stale = self._codes.get(instance, ""), self._ended, self._max_stale
            away = self._away and self._now() > peer.result.expires + stale
        if ended is not None:
            raise ResultRefused("this enclave is no longer admitted by the service", code=ended.code)
        if code:
            raise ResultRefused("the peer no longer stands with the service", code=code)
        if away:
            raise ResultRefused("the service is away for longer than the policy allows", code="attestation_stale")

    def _look(self) -> None:
        with self._turn:
            now = self._clock()
            self._wanted = {one: at for one, at in self._wanted.items() if now - at < FORGET}
            instances = sorted(self._wanted)[:MAX_INSTANCES]
        answer, ended = None, None
        try:
            answer = self._ask(instances)
        except UnavailableError:
            pass
        except IsolateError as error:
            ended = error
        finally:
            # Whatever happens, the next look asks again.
            self._heard(away=answer is None and ended is None, ended=ended)
        if answer is not None:
            with self._turn:
                self._codes = dict(zip(instances, answer.codes, strict=False))
                self._max_stale = answer.max_stale

    def _heard(self, *, away: bool, ended: IsolateError | None = None) -> None:
        with self._turn:
            self._asking, self._away, self._ended = False, away, ended
