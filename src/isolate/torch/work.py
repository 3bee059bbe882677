"""What a collective answers: a Work of torch, done by one thread after the other in the order of the calls.

>>> from isolate.torch.work import Queue, Task
>>> queue, seen = Queue("example"), []
>>> task = Task(lambda: seen.append(1), result=[])
>>> queue.submit(task)
>>> task.wait(), seen
(True, [1])
>>> queue.close()
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from isolate.errors import ChannelTimeout, IsolateError


class Task(dist.Work):
    """One collective. ``run`` does it, ``result`` is what its future resolves to: the tensors.

    ``late`` is told when somebody waited for it with a limit of his own that passed; it answers the error.
    """

    def __init__(
        self,
        run: Callable[[], None] | None,
        result: Any,
        *,
        devices: list[Any] | None = None,
        late: Callable[[], BaseException] | None = None,
    ) -> None:
        super().__init__()
        self._run, self._result, self._devices, self._late = run, result, devices, late
        self._finished = threading.Event()
        self._guard = threading.Lock()
        self._error: BaseException | None = None
        self._begun: torch.futures.Future[Any] | None = None
        self._future: torch.futures.Future[Any] | None = None
        self.source = -1

    def execute(self) -> None:
        """Do it, here and now. What goes wrong is kept for whoever waits."""
        error: BaseException | None = None
        try:
            if self._run is not None:
                self._run()
        except BaseException as caught:  # noqa: BLE001  # whoever waits gets it, whatever it is
            error = caught
        self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        """It is over. Only the first time counts."""
        with self._guard:
            if self._finished.is_set():
                return
            self._error = error
            # The tensors may be large, and the work may be kept for long.
            self._run = None
            self._finished.set()
            begun = self._begun
        if begun is not None:
            begun.set_result(None)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait, at most ``timeout`` where it is above zero. Raises what went wrong."""
        seconds = timeout.total_seconds() if timeout else 0
        if not self._finished.wait(seconds if seconds > 0 else None):
            error = self._late() if self._late else ChannelTimeout("not done in time")
            self.finish(error)
        if self._error is not None:
            raise self._error
        return True

    def get_future(self) -> Any:
        """A future of the tensors. It fails as the work does, also for code in C++ that waits for it."""
        with self._guard:
            if self._future is None:
                devices = self._devices or None
                self._begun = torch.futures.Future(devices=devices) if devices else torch.futures.Future()
                # Future.set_exception() hides the error in a value, which DDP's reducer takes for tensors: the
                # error of a callback is a true one.
                self._future = self._begun.then(self._outcome)
                if self._finished.is_set():
                    self._begun.set_result(None)
            return self._future

    def _outcome(self, _: Any) -> Any:
        if self._error is not None:
            raise self._error
        return self._result

    def is_completed(self) -> bool:
        return self._finished.is_set()

    def is_success(self) -> bool:
        return self._finished.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> Any:
        self.wait()
        return self._result

    def synchronize(self) -> None:
        self.wait()

    def source_rank(self) -> int:
        """Of a received message: the rank in the group that sent it."""
        return self.source

    _source_rank = source_rank


class Queue:
    """Tasks in the order of the calls, in a thread of their own; or at once, in the caller's, if nothing waits."""

    def __init__(self, name: str) -> None:
        self._guard = threading.Lock()
        self._running = threading.Lock()
        self._waiting: SimpleQueue[Task | None] = SimpleQueue()
        self._pending = 0
        self._closed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=f"isolate-{name}", daemon=True)
        self._started = False

    def submit(self, task: Task, *, now: bool = False) -> None:
        """``now``: the caller waits anyway, so it may do it itself, which saves two changes of thread."""
        with self._guard:
            if self._closed is not None:
                task.finish(self._closed)
                return
            idle = self._pending == 0
            self._pending += 1
            # Nothing is pending, so nobody holds it; taken here, so that no later task overtakes this one.
            mine = now and idle and self._running.acquire(blocking=False)
            if not mine:
                self._waiting.put(task)
                if not self._started:
                    self._started = True
                    self._thread.start()
        if mine:
            self._one(task)

    def _one(self, task: Task) -> None:
        try:
            task.execute()
        finally:
            with self._guard:
                self._pending -= 1
                self._running.release()

    def _work(self) -> None:
        while (task := self._waiting.get()) is not None:
            self._running.acquire()
            self._one(task)

    def close(self, error: BaseException | None = None, *, timeout: float = 10.0) -> None:
        """Take no more; what waits is still done, unless it fails. Returns when the thread is gone, or in time."""
        with self._guard:
            if self._closed is not None:
                return
            self._closed = error or IsolateError("this process group was destroyed", code="group_over")
            self._waiting.put(None)
        if self._started and threading.current_thread() is not self._thread:
            self._thread.join(timeout)
