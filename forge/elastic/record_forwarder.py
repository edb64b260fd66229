"""Forwards events and metrics of ranks to the run's recorder, in order, and acknowledges recorded steps."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from forge.events import Event, StepMetrics

_Record = tuple[str, Event | StepMetrics]


class RecorderClient(Protocol):
    """Connection to the single writer of the run's records."""

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        """Write events and steps in order; return when they are written.

        Args:
            records: (`event`, `step` or `resend`, its value); a resent step may have been written before.
        """


class RecordForwarder:
    """A queue of records; `run` empties it."""

    def __init__(self, recorder: RecorderClient, *, on_recorded: Callable[[int], None]) -> None:
        """Args:
        on_recorded: called with the newest step that is recorded.
        """
        self._recorder, self._on_recorded = recorder, on_recorded
        self._queue: deque[_Record | Awaitable[None]] = deque()
        self._wakeup = asyncio.Event()

    def put(self, kind: str, record: Event | StepMetrics) -> None:
        """Forward a record."""
        self._queue.append((kind, record))
        self._wakeup.set()

    def after_records(self, work: Awaitable[None]) -> None:
        """Await `work` after everything queued so far is recorded."""
        self._queue.append(work)
        self._wakeup.set()

    async def run(self) -> None:
        """Forward records until cancelled."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._queue:
                batch = self._leading_records()
                if batch:
                    await self._write(batch)  # they stay in the queue until they are written
                    for _ in batch:
                        self._queue.popleft()
                elif not isinstance(work := self._queue.popleft(), tuple):
                    await work

    def _leading_records(self) -> list[_Record]:
        """Return the records that were queued before the first awaitable."""
        batch: list[_Record] = []
        for item in self._queue:
            if not isinstance(item, tuple):
                break
            batch.append(item)
        return batch

    async def _write(self, batch: list[_Record]) -> None:
        await self._recorder.write(batch)
        steps = [record.step for _, record in batch if isinstance(record, StepMetrics)]
        if steps:
            self._on_recorded(max(steps))
