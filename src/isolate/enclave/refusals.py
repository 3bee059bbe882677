"""What an enclave refuses by itself, told to the service, so that it stands in the log: a stolen token, a replay.

    >>> from types import SimpleNamespace
    >>> told = []
    >>> refusals = Refusals(SimpleNamespace(report_refusals=told.append))
    >>> for _ in range(5):
    ...     refusals.note(b"grant", b"token", "holder_refused")
    ...     _ = refusals.tell()
    >>> [one.times for one in told]
    [1, 1, 2]

It tells of the 1st, 2nd, 4th, 8th ... of one code, for each of the owner's grants: whoever is refused can come
again as often as he likes, and costs the service the logarithm of it. Spec: docs/spec/service.md, section 7.2.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from attrs import define

from isolate.messages.invoke import RefusalReport

if TYPE_CHECKING:
    from isolate.enclave.workload import Workload

AGAIN = 30.0  # seconds before a service that was away is told again

Key: TypeAlias = tuple[bytes, str]  # the grant's id, or nothing; a code


@define
class _Count:
    total: int = 0
    told: int = 0


class Refusals:
    """Many threads note, and one tells: nobody who is refused waits for the service, or learns from the time that
    it takes how many others were.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        # As many as the owner has grants, and this enclave codes. ``_due``: which to tell of, with what token.
        self._counts: dict[Key, _Count] = {}
        self._due: dict[Key, bytes] = {}
        self._lock = threading.Lock()
        self._news = threading.Event()

    def note(self, grant: bytes, token: bytes, code: str) -> None:
        """Count one. ``grant`` is the id of the first block of a chain that verified, ``token`` that chain; both
        are empty where none did.
        """
        with self._lock:
            count = self._counts.setdefault((grant, code), _Count())
            count.total += 1
            if count.total & (count.total - 1) == 0:
                self._due[grant, code] = token
                self._news.set()

    def tell(self) -> bool:
        """Tell the service of what is due. False where something of it did not get through, and is due still."""
        with self._lock:
            due, self._due = self._due, {}
        left = dict[Key, bytes]()
        for key, token in due.items():
            count = self._counts[key]
            times = count.total - count.told
            try:
                if times:  # else told with those before, which were due when they came
                    self._workload.report_refusals(RefusalReport(token, key[1], times))
                    count.told += times
            except Exception:  # noqa: BLE001 (whatever it is: the next one is told all the same)
                left[key] = token
        with self._lock:
            self._due = left | self._due
        return not left

    def run(self) -> NoReturn:
        """Tell whatever becomes due, until the process ends."""
        while True:
            self._news.wait()
            self._news.clear()
            while not self.tell():
                time.sleep(AGAIN)
