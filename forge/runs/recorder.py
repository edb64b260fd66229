"""The only writer of a run's records: `events.jsonl`, `metrics.jsonl`, and the runs of W&B, MLflow and TensorBoard.

Every step is written once: a step that is already in `metrics.jsonl` becomes a StepRepeated event instead. A
partial last line, left by a crash, is removed when the files are opened again. The trackers are fed from these
files on threads of their own, so that none of them delays or stops a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from forge.config.resources import TrackingSpec
from forge.events import (
    CheckpointSaved,
    EarlyStopped,
    Event,
    PopulationRoundCompleted,
    RunFailed,
    RunFinished,
    RunStopped,
    StepMetrics,
    StepRepeated,
    TrackingDegraded,
    TrialEnded,
    TrialExploited,
    TrialReported,
    TrialSuggested,
    event_to_record,
)
from forge.plan.plan import Plan
from forge.redact import redacted_values
from forge.runs.alerts.run_alerts import RunAlerts, start_alerts
from forge.runs.patient_file import PatientFile, open_whole_lines
from forge.runs.records import EVENTS, METRICS, RecordReader, last_step_of
from forge.runs.trackers.base import RunStatus, TrackedRun
from forge.runs.trackers.feed import TrackerFeed
from forge.runs.trackers.registry import build_trackers
from forge.runs.trackers.wandb_tracker import WandbTracker, end_wandb

# How long the trackers may take at the end of a run for what they do not have yet.
_TRACKERS_END_S = 90.0

_FSYNCED = (
    CheckpointSaved,
    EarlyStopped,
    RunFinished,
    RunStopped,
    RunFailed,
    TrialSuggested,
    TrialReported,
    TrialExploited,
    PopulationRoundCompleted,
    TrialEnded,
)
"""Events after which both files are flushed to disk, since resuming relies on them."""


class Recorder:
    """Writes the events and metrics of one run; used by one thread besides those of its trackers."""

    def __init__(
        self, folder: Path, *, run_id: str, tracking: TrackingSpec, config: dict[str, Any], group: str | None = None
    ) -> None:
        """Open the run's files and remove a partial last line.

        Args:
            group: the search that the run is a trial of. Several recorders then use W&B in this process, and
                `end_tracking` is called after the last one.

        Raises: OSError if the folder cannot be written.
        """
        self._spec = tracking
        self._run = TrackedRun(
            folder=folder,
            run_id=run_id,
            config=redacted_values(config, os.environ),
            group=group,
            report=self._report,
        )
        self._feeds: list[TrackerFeed] | None = None
        """None until the trackers are started."""
        self._alerts: RunAlerts | None = None
        self._has_wandb_alerts = False
        self._status: RunStatus = "finished"
        self._lock = threading.Lock()
        """Of the files, in which the trackers' threads record what fails."""
        self.failure: RunFailed | None = None
        """The first failure that was reported."""
        self._saved_steps = _saved_steps(folder)
        """Steps whose CheckpointSaved is written: several processes may report the same checkpoint."""
        self._events = PatientFile(folder / EVENTS)
        self._metrics = PatientFile(folder / METRICS)
        self.last_step = last_recorded_step(folder)

    def start_alerts(self, plan: Plan) -> None:
        """Send the alerts of the job, also those that were recorded before and not sent."""
        self._alerts = start_alerts(
            plan, folder=self._run.folder, record=self._record_alert, call_wandb=self._call_wandb
        )
        self._has_wandb_alerts = plan.job.alerts is not None and plan.job.alerts.wandb

    def connect(self) -> None:
        """Start the trackers that the job names; they get every step that they do not have yet.

        Called at the first step, so that starting them does not delay the start of training.
        """
        self._feeds = [TrackerFeed(tracker, self._run) for tracker in build_trackers(self._spec, self._run)]

    def event(self, event: Event) -> None:
        """Write one event."""
        if isinstance(event, RunFailed):
            if self.failure is not None:
                return
            self.failure = event
        if isinstance(event, CheckpointSaved):
            if event.step in self._saved_steps:
                return
            self._saved_steps.add(event.step)
        if isinstance(event, RunStopped):
            self._status = "stopped"
        self._write(self._events, {"time": round(time.time(), 3)} | event_to_record(event))
        if isinstance(event, _FSYNCED):
            # After a power cut the newest checkpoint must not be ahead of the recorded steps.
            self._sync()
        if self._alerts is not None:
            self._alerts.wake()

    def step(self, metrics: StepMetrics) -> None:
        """Write one step; if it is already recorded, write a StepRepeated event instead."""
        if metrics.step <= self.last_step:
            self.event(
                StepRepeated(
                    step=metrics.step, loss=metrics.loss, step_s=metrics.step_s, world_size=metrics.world_size
                )
            )
            return
        self._write(self._metrics, metrics.as_record() | {"time": round(time.time(), 3)})
        self.last_step = metrics.step
        if self._feeds is None:
            self.connect()
        for feed in self._feeds or ():
            feed.wake()
        if self._alerts is not None:
            self._alerts.wake()

    def close(self, *, exit_code: int) -> None:
        """Send the last alerts and end the trackers' runs, within a time limit; a second call does nothing."""
        self._sync()
        if self._feeds is None and (self.last_step or self._has_wandb_alerts):
            self.connect()  # the process before this one may have been killed before it had sent everything
        alerts, self._alerts = self._alerts, None
        if alerts is not None:
            alerts.close()
        feeds, self._feeds = self._feeds or (), []
        for feed in feeds:
            feed.begin_end("failed" if exit_code else self._status, timeout_s=_TRACKERS_END_S)
        for feed in feeds:
            feed.wait_for_end()

    def _report(self, reason: str) -> None:
        """Record why a tracker is degraded; called on the tracker's thread."""
        with contextlib.suppress(OSError):  # the next record meets the same error, and the run ends with it
            self.event(TrackingDegraded(reason=reason))

    def _record_alert(self, event: Event) -> None:
        """Record an alert; called on the threads of the alerts."""
        with contextlib.suppress(OSError):  # as in _report
            self.event(event)

    def _call_wandb(self, action: Callable[[WandbTracker], None]) -> Future[None]:
        """Let W&B's tracker do something; it is started with the first step."""
        feed = next((feed for feed in self._feeds or () if feed.name == WandbTracker.name), None)
        if feed is None:
            raise RuntimeError("W&B has not been started: there is no step yet")
        return feed.call(action)

    def _write(self, file: PatientFile, record: dict[str, Any]) -> None:
        line = json.dumps(redacted_values(record, os.environ), allow_nan=False)
        with self._lock:
            file.write_line(line)

    def _sync(self) -> None:
        """Flush both files to disk."""
        with self._lock:
            self._events.sync()
            self._metrics.sync()


def end_tracking() -> None:
    """End what the trackers of all recorders of this process share; call it after the last recorder closed."""
    end_wandb()


def append_event(folder: Path, event: Event) -> None:
    """Write one event without a recorder: before it was started, or after it died."""
    with open_whole_lines(folder / EVENTS) as file:
        record = {"time": round(time.time(), 3)} | event_to_record(event)
        file.write(json.dumps(redacted_values(record, os.environ)) + "\n")


def last_recorded_step(folder: Path) -> int:
    """Return the last step in `metrics.jsonl`; 0 if there is none."""
    return int(last_step_of(folder).get("step", 0))


def _saved_steps(folder: Path) -> set[int]:
    """Return the steps of all readable CheckpointSaved events."""
    found: set[int] = set()
    with contextlib.suppress(ValueError):  # larger than any that is read
        for record in RecordReader(folder, kind="event").read():
            if record["event"] == CheckpointSaved.__name__:
                found.add(record["step"])
    return found
