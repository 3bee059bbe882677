"""What an enclave refuses by itself, told to the service, so that it stands in the log: a stolen token, a replay.

    >>> from types import SimpleNamespace
    >>> told = []
    >>> refusals = Refusals(SimpleNamespace(report_refusals=told.append))
    >>> for _ in range(5):
    ...     refusals.note(b"grant", b"token", "holder_refused")
    >>> [one.times for one in told]
    [1, 1, 2]

It tells of the 1st, 2nd, 4th, 8th ... of one code, for each of the owner's grants: whoever is refused can come
again as often as he likes, and costs the service the logarithm of it. Spec: docs/spec/service.md, section 7.2.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from attrs import define

from isolate.errors import IsolateError
from isolate.messages.invoke import RefusalReport

if TYPE_CHECKING:
    from isolate.enclave.workload import Workload


@define
class _Count:
    total: int = 0
    told: int = 0


class Refusals:
    """Safe to share between threads; nobody waits here while another tells the service."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        # As many as the owner has grants, and this enclave codes.
        self._counts: dict[tuple[bytes, str], _Count] = {}
        self._lock = threading.Lock()

    def note(self, grant: bytes, token: bytes, code: str) -> None:
        """Count one. Never raises: a service that is away hears of it the next time that one is told.

        ``grant`` is the id of the first block of a chain that verified, ``token`` that chain; both are empty where
        none did.
        """
        with self._lock:
            count = self._counts.setdefault((grant, code), _Count())
            count.total += 1
            if count.total & (count.total - 1):
                return
            times, count.told = count.total - count.told, count.total
        try:
            self._workload.report_refusals(RefusalReport(token, code, times))
        except IsolateError:
            with self._lock:
                count.told -= times
