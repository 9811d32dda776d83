"""A few threads with a bounded, visible queue, for inference that an event loop must not wait for.

Not ``concurrent.futures``: its queue has no bound, and a thread that hangs in it also hangs the process's exit.
Here a job that is no longer wanted leaves the queue, and a thread that hangs is replaced.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

MAX_LOST = 8  # hanging threads that are replaced; beyond, the queue fills and requests are shed


class Job:
    """A call to be made in a thread. ``done`` is told there, at most once, that it ended."""

    def __init__(self, call: Callable[[], Any], done: Callable[[], None]) -> None:
        self.call = call
        self.done = done
        self.started: float | None = None  # time.perf_counter(), when a thread took it
        self.ended: float | None = None
        self.result: Any = None
        self.error: BaseException | None = None


class Workers:
    """``count`` daemon threads, started with the first job."""

    def __init__(self, count: int, max_queue: int, stuck_seconds: float) -> None:
        self._count, self._max_queue, self._stuck_seconds = count, max_queue, stuck_seconds
        self._jobs: deque[Job] = deque()
        self._ready = threading.Condition()
        self._busy: dict[threading.Thread, float] = {}  # since when
        self._idle = 0
        self._threads: set[threading.Thread] = set()
        self._lost = 0
        self._closed = False
        self._took: deque[float] = deque(maxlen=9)  # seconds of the last jobs
        self.finished = 0  # jobs that ended: no progress here means a router that hangs

    @property
    def queued(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        return len(self._busy)

    def expected(self) -> float:
        """Seconds until a job submitted now would be done, as the last ones went; 0 where a thread is free for it.

        Free threads take a job whatever the last ones took: so what is known gets better again.
        """
        with self._ready:
            if len(self._jobs) + len(self._busy) < self._count or not self._took:
                return 0.0
            one, now = median(self._took), time.monotonic()
            ahead = one * len(self._jobs) + sum(max(0.0, one - (now - since)) for since in self._busy.values())
            return ahead / self._count + one

    def submit(self, job: Job) -> bool:
        """Queue a job; False where the queue is full or closed."""
        with self._ready:
            if self._closed or len(self._jobs) >= self._max_queue:
                self._replace_stuck()
                return False
            self._jobs.append(job)
            if self._idle:
                self._ready.notify()
            else:
                self._replace_stuck()
                if len(self._threads) < self._count:
                    self._start()
        return True

    def withdraw(self, job: Job) -> None:
        """Take a job out of the queue, if it still waits there."""
        with self._ready:
            if job.started is None and job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        """Let the threads end; jobs that still wait are not made."""
        with self._ready:
            self._closed = True
            self._jobs.clear()
            self._ready.notify_all()

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="arllm-router", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _replace_stuck(self) -> None:
        now = time.monotonic()
        for thread, since in list(self._busy.items()):
            if now - since > self._stuck_seconds and self._lost < MAX_LOST:
                del self._busy[thread]
                self._threads.discard(thread)
                self._lost += 1
                self._start()

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            with self._ready:
                self._idle += 1
                while not self._jobs and not self._closed:
                    self._ready.wait()
                self._idle -= 1
                if self._closed:
                    self._threads.discard(me)
                    return
                job = self._jobs.popleft()
                job.started = time.perf_counter()
                self._busy[me] = time.monotonic()
            try:
                job.result = job.call()
            except BaseException as raised:  # also what would end the thread: the job must be answered
                job.error = raised
            job.ended = time.perf_counter()
            with self._ready:
                self.finished += 1
                self._took.append(job.ended - job.started)
                lost = me not in self._busy  # replaced meanwhile
                self._lost -= lost
                self._busy.pop(me, None)
            job.done()
            if lost:
                return
            del job  # hold no decision while waiting
