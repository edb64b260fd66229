"""Send a run's steps from its files to one tracker, on a thread of its own.

A tracker is behind `metrics.jsonl`, never ahead of it: the thread asks the tracker which steps it has and sends
the others in their order, once each, also those of an earlier start that were lost in a kill. So a tracker that is
slow or cannot be reached delays neither the recorder nor training, and nothing is kept in memory for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any

from forge.process import first_line
from forge.runs.event_text import EventDescriber
from forge.runs.records import METRICS, RecordReader
from forge.runs.trackers.base import RunStatus, StepRanges, TrackedRow, TrackedRun, Tracker

_RETRY_S = (2.0, 5.0, 15.0, 60.0)
"""Pauses before a tracker is started again; the last one repeats."""
_LAST_ATTEMPT_S = 10.0
"""How long the end of a run waits for a tracker that fails."""


class TrackerFeed:
    """Sends what the recorder writes to one tracker."""

    def __init__(self, tracker: Tracker, run: TrackedRun) -> None:
        self._tracker, self._run = tracker, run
        self.name = tracker.name
        self.num_sent = 0
        """Steps that this feed has sent."""
        self.is_complete = False
        """Whether the run is over and the tracker has all of it."""
        self._news = threading.Event()
        """Set when there is something to send, or the run is over."""
        self._ending: tuple[RunStatus, float] | None = None
        """How the run ended, and when to give up."""
        self._has_failed = False
        self._actions: deque[tuple[Callable[[Any], None], Future[None]]] = deque()
        self._thread = threading.Thread(target=self._feed, name=f"tracker {tracker.name}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let the thread read the new records."""
        self._news.set()

    def call(self, action: Callable[[Any], None]) -> Future[None]:
        """Let the thread call a function with its tracker, between two rows, while the tracker is started."""
        done: Future[None] = Future()
        self._actions.append((action, done))
        self._news.set()
        return done

    def begin_end(self, status: RunStatus, *, timeout_s: float) -> None:
        """Say that the run is over. What the tracker has not taken `timeout_s` later is left in `metrics.jsonl`."""
        limit_s = min(timeout_s, _LAST_ATTEMPT_S) if self._has_failed else timeout_s
        self._ending = (status, time.monotonic() + limit_s)
        self._news.set()

    def wait_for_end(self) -> None:
        """Wait until the tracker has everything, or the time of `begin_end` is over; report what is missing."""
        assert self._ending is not None, "begin_end comes first"
        self._thread.join(max(0.0, self._ending[1] - time.monotonic()))
        if not self.is_complete:
            self._run.report(
                f"{self.name} did not take every step in time; all are in {METRICS}. Send the rest later: "
                f"forge runs sync {self._run.run_id}"
            )

    def _feed(self) -> None:
        num_failures = 0
        while True:
            began = time.monotonic()
            try:
                self._follow()
                return
            except Exception as error:  # libraries of trackers raise many unrelated classes
                self._report_once(error)
            self._tracker.abandon()
            if time.monotonic() - began > _RETRY_S[-1]:
                num_failures = 0
            if not self._wait_to_retry(_RETRY_S[min(num_failures, len(_RETRY_S) - 1)]):
                return
            num_failures += 1

    def _follow(self) -> None:
        """Send everything until the run is over."""
        records = _Records(self._run.folder, known=self._tracker.start())
        while True:
            self._news.clear()
            ending = self._ending
            began = time.monotonic()
            while rows := records.read(self._tracker.max_rows):
                self._tracker.send(rows)
                self.num_sent += len(rows)
                self._has_failed = False
            self._act()
            if ending is not None:
                self._tracker.finish(ending[0], records.last_events())
                self.is_complete = True
                return
            self._news.wait()
            while self._ending is None and (left := began + self._tracker.pause_s - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))

    def _act(self) -> None:
        while self._actions:
            action, done = self._actions.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                action(self._tracker)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _report_once(self, error: Exception) -> None:
        """Report the first of several failures in a row."""
        if not self._has_failed:
            self._has_failed = True
            if self._ending is not None:
                status, deadline = self._ending
                self._ending = (status, min(deadline, time.monotonic() + _LAST_ATTEMPT_S))
            self._run.report(
                f"{self._tracker.name} takes no metrics: {first_line(error)}; steps are in {METRICS} and are sent "
                "when it takes them again"
            )

    def _wait_to_retry(self, pause_s: float) -> bool:
        """Wait for a while. Returns: whether there is time for another attempt."""
        until = time.monotonic() + pause_s
        while (now := time.monotonic()) < until:
            if self._ending is not None:
                until = min(until, now + _RETRY_S[0])
                if until > self._ending[1]:
                    return False
            self._news.clear()
            self._news.wait(until - now)
        return True


class _Records:
    """New steps of a run that a tracker does not have, with the events between them."""

    def __init__(self, folder: Path, *, known: StepRanges) -> None:
        self._known = known
        self._steps = RecordReader(folder, kind="step")
        self._events: RecordReader | None = RecordReader(folder, kind="event")
        self._describer = EventDescriber()
        self._pending: deque[tuple[float, str]] = deque()
        """Time and text of events that no row has yet."""

    def read(self, limit: int) -> list[TrackedRow]:
        """Return the next rows; none if there is nothing new."""
        return list(islice(self._rows(), limit))

    def last_events(self) -> list[str]:
        """Return the events after the last step."""
        self._read_events()
        return [text for _, text in self._pending]

    def _rows(self) -> Iterator[TrackedRow]:
        self._read_events()
        for record in self._steps.read():
            events = []
            while self._pending and self._pending[0][0] <= record["time"]:
                events.append(self._pending.popleft()[1])
            if record["step"] not in self._known:
                yield _row(record, events=tuple(events))

    def _read_events(self) -> None:
        if self._events is None:
            return
        try:
            for event in self._events.read():
                text = self._describer.describe(event)
                if text:
                    self._pending.append((event["time"], text))
        except ValueError:  # larger than any that is read; the steps do not depend on it
            self._events = None


def _row(record: dict[str, Any], *, events: tuple[str, ...]) -> TrackedRow:
    metrics = {key: value for key, value in record.items() if key not in ("step", "time") and value is not None}
    return TrackedRow(step=record["step"], time=record["time"], metrics=metrics, events=events)
