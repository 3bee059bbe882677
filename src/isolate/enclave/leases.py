"""The leases that one enclave holds: uses that the service has charged, and that are spent here (service.md, 6.7).

    >>> from types import SimpleNamespace
    >>> Leases(SimpleNamespace(now=lambda: 0)).take((b"handle", "echo", 256)) is None
    True

A lease is good for one handle, one operation and one size, until its end by the service's time. It is in this
process's memory and nowhere else, so that whoever starts the enclave anew has none; what is left of it is lost.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeAlias

from attrs import define

from isolate.errors import BudgetExhausted
from isolate.messages.invoke import ReserveRequest
from isolate.messages.lease import MAX_LEASE, MAX_LEASED, LeaseRequest

if TYPE_CHECKING:
    from isolate.enclave.workload import Workload

Key: TypeAlias = tuple[bytes, str, int]  # the handle's id, the operation's name, the bytes of a use


@define
class _Held:
    """``left`` uses until ``expires``; while ``waiting`` no other is asked for."""

    left: int
    expires: int
    waiting: bool = False


class Leases:
    """Safe to share between threads; nobody waits here while another asks the service."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._held: dict[Key, _Held] = {}
        self._lock = threading.Lock()

    def good(self, expires: int) -> bool:
        """Whether a lease with this end is still good: before a use is spent, and again before its reply leaves."""
        return self._workload.now() < expires

    def take(self, key: Key) -> int | None:
        """Spend one use; the end of its lease. None where there is no lease, or nothing is left of it."""
        with self._lock:
            held = self._held.get(key)
            if held is None or held.left < 1 or not self.good(held.expires):
                return None
            held.left -= 1
            return held.expires

    def open(self, key: Key, request: ReserveRequest, number: bytes, uses: int) -> bool:
        """Ask for a lease that begins with this use (``number`` is its invocation's id): whether there is one now.

        It is reserved then. False where the budget has not so much at once, for a while, or somebody is asking.
        Raises any other refusal.
        """
        with self._lock:
            self._held = {one: held for one, held in self._held.items() if self.good(held.expires)}
            if key in self._held and self._held[key].waiting:
                return False
            asking = self._held[key] = _Held(0, self._workload.now() + MAX_LEASE, waiting=True)
        asked = LeaseRequest(
            request.token, request.invocation, request.channel_binding, request.argument_hash,
            request.bytes_out, min(uses, MAX_LEASED),
        )  # fmt: skip
        try:
            lease = self._workload.lease(asked, number)
        except BudgetExhausted:
            return False
        except BaseException:
            with self._lock:
                # Where the service took longer than we wait, what is there now is another's.
                if self._held.get(key) is asking:
                    del self._held[key]
            raise
        with self._lock:
            self._held[key] = _Held(lease.uses - 1, lease.expires)
        return True
