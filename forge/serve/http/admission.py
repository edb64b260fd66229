"""The requests in a server: how many wait and run, the bound on those that wait, and the drain at the end."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from forge.serve.http.errors import ApiError
from forge.serve.http.telemetry import Telemetry

_LAST_STARTS = 32
"""Requests whose start tells how fast the queue moves."""
_DRAIN_RETRY_S = 5.0


class Ticket:
    """One admitted request: waiting, then running, then closed."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.began = admission.clock()
        self.is_started = self._is_closed = False

    def start(self) -> None:
        """Note the first token."""
        if not self.is_started and not self._is_closed:
            self.is_started = True
            self._admission.changed(waiting=-1, running=1)

    def close(self) -> None:
        """Note the end of the request, however it ended."""
        if not self._is_closed:
            self._is_closed = True
            self._admission.changed(waiting=0 if self.is_started else -1, running=-1 if self.is_started else 0)


class Admission:
    """Lets requests in while fewer than `max_queue` wait for their first token."""

    def __init__(
        self, *, max_queue: int, telemetry: Telemetry, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._max_queue, self._telemetry = max_queue, telemetry
        self._waiting = self._running = 0
        self._starts: deque[float] = deque(maxlen=_LAST_STARTS)
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        return self._waiting + self._running

    def counts(self) -> dict[str, int]:
        """How many wait and how many run."""
        return {"waiting": self._waiting, "running": self._running}

    def enter(self) -> Ticket:
        """Admit a request. Raises: ApiError, 503 while the server stops, 429 if too many wait."""
        if self.is_draining:
            raise ApiError(
                "the server is stopping and takes no more requests",
                status=503,
                code="draining",
                retry_after_s=_DRAIN_RETRY_S,
            )
        if self._waiting >= self._max_queue:
            raise ApiError(
                f"the queue is full ({self._waiting} of {self._max_queue})",
                status=429,
                code="queue_full",
                retry_after_s=self._expected_wait(),
            )
        self.changed(waiting=1, running=0)
        return Ticket(self)

    def changed(self, *, waiting: int, running: int) -> None:
        """Add to the counts."""
        self._waiting += waiting
        self._running += running
        if running > 0:
            self._starts.append(self.clock())
        self._telemetry.queue(waiting=self._waiting, running=self._running)
        if self.num_requests:
            self._idle.clear()
        else:
            self._idle.set()

    async def drain(self, *, timeout_s: float) -> bool:
        """Refuse new requests and wait for the others. Returns: whether all have ended."""
        self.is_draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _expected_wait(self) -> float:
        """Seconds until half of the queue has moved on, by the last starts; between 1 and 60."""
        if len(self._starts) < 2:
            return 1.0
        per_start = (self.clock() - self._starts[0]) / len(self._starts)
        return min(60.0, max(1.0, per_start * self._waiting / 2))
