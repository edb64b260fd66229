"""The only writer of a run's records: `events.jsonl`, `metrics.jsonl` and one W&B run.

Every step is written once: a step that is already in `metrics.jsonl` becomes a StepRepeated event instead. A
partial last line, left by a crash, is removed when the files are opened again. W&B has its own step
metric, so that it accepts steps in any order. It never stops a run: if it cannot be reached, the run continues and
records offline.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from forge.config.resources import WandbSpec
from forge.environment import home_folder
from forge.events import (
    CheckpointSaved,
    EarlyStopped,
    Evaluated,
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
from forge.process import first_line
from forge.redact import redacted_values
from forge.runs.records import EVENTS, METRICS, RecordReader, last_step_of

# How long W&B may take to start before the run continues without it.
_WANDB_INIT_TIMEOUT_S = 20
# How long W&B may take to upload the rest at the end; what is missing stays in the run folder for `wandb sync`.
_WANDB_FINISH_TIMEOUT_S = 60


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
    """Writes the events and metrics of one run; used by one thread."""

    def __init__(
        self, folder: Path, *, run_id: str, wandb: WandbSpec, config: dict[str, Any], group: str | None = None
    ) -> None:
        """Open the run's files and remove a partial last line.

        Args:
            group: W&B group that the trials of a search share. Several recorders then use W&B in this process, and
                `end_tracking` is called after the last one.

        Raises: OSError if the folder cannot be written.
        """
        self._folder = folder
        self._run_id = run_id
        self._spec = wandb
        self._config = config
        self._group = group
        self._tracker: Any = None
        self._is_connected = False
        self.failure: RunFailed | None = None
        """The first failure that was reported."""
        self._saved_steps = _saved_steps(folder)
        """Steps whose CheckpointSaved is written: several processes may report the same checkpoint."""
        self._events = open_whole_lines(folder / EVENTS)
        self._metrics = open_whole_lines(folder / METRICS)
        self.last_step = last_recorded_step(folder)

    def connect(self) -> None:
        """Start W&B, online or offline as the job says; fall back to offline and record why.

        Called at the first step, so that starting W&B does not delay the start of training.
        """
        self._is_connected = True
        if self._spec.mode == "disabled":
            return
        reason = self._connect(self._spec.mode)
        if reason and self._spec.mode == "online":
            self.event(TrackingDegraded(reason=f"{reason}; recording offline instead"))
            reason = self._connect("offline")
        if reason:
            self.event(TrackingDegraded(reason=f"{reason}; metrics are in {METRICS} only"))

    def event(self, event: Event) -> None:
        """Write one event, and send the metrics of an EMA evaluation to W&B."""
        if isinstance(event, RunFailed):
            if self.failure is not None:
                return
            self.failure = event
        if isinstance(event, CheckpointSaved):
            if event.step in self._saved_steps:
                return
            self._saved_steps.add(event.step)
        self._write(self._events, {"time": round(time.time(), 3)} | event_to_record(event))
        if isinstance(event, _FSYNCED):
            # After a power cut the newest checkpoint must not be ahead of the recorded steps.
            os.fsync(self._events.fileno())
            os.fsync(self._metrics.fileno())
        if isinstance(event, Evaluated) and event.weights == "ema":
            values = {"loss": event.loss, **event.metrics}
            self._track({"step": event.step} | {f"eval/ema_{name}": value for name, value in values.items()})

    def step(self, metrics: StepMetrics) -> None:
        """Write one step; if it is already recorded, write a StepRepeated event instead."""
        if metrics.step <= self.last_step:
            self.event(
                StepRepeated(
                    step=metrics.step, loss=metrics.loss, step_s=metrics.step_s, world_size=metrics.world_size
                )
            )
            return
        record = metrics.as_record()
        self._write(self._metrics, record | {"time": round(time.time(), 3)})
        self.last_step = metrics.step
        if not self._is_connected:
            self.connect()
        self._track(record)

    def close(self, *, exit_code: int) -> None:
        """End the W&B run; a second call does nothing."""
        if self._tracker is None:
            return
        import wandb

        try:
            self._tracker.finish(exit_code=exit_code)
            if self._group is None:
                # `finish` does not wait for the file; the end of W&B's background service does.
                wandb.teardown()
        except Exception as error:  # the service may be gone
            self.event(TrackingDegraded(reason=f"W&B did not finish: {error}"))
        self._tracker = None

    def _connect(self, mode: str) -> str | None:
        """Start one W&B run. Returns: the reason if that failed."""
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _has_netrc()):
            return "W&B has no API key (set WANDB_API_KEY)"
        try:
            self._tracker = wandb.init(
                project=self._spec.project,
                entity=self._spec.entity,
                id=self._run_id,
                name=self._run_id,
                group=self._group,
                dir=self._folder,
                config=redacted_values(self._config, os.environ),
                resume="allow" if mode == "online" else None,
                reinit="create_new",  # beside an earlier one that is still uploading
                mode="online" if mode == "online" else "offline",
                settings=wandb.Settings(
                    init_timeout=_WANDB_INIT_TIMEOUT_S,
                    finish_timeout=_WANDB_FINISH_TIMEOUT_S,
                    finish_timeout_raises=True,
                    console="off",
                    silent=True,
                    disable_git=True,
                    save_code=False,
                    x_disable_meta=True,
                ),
            )
            self._tracker.define_metric("step")
            self._tracker.define_metric("*", step_metric="step")
        except Exception as error:  # W&B raises many unrelated classes; training continues
            self._tracker = None
            with contextlib.suppress(Exception):
                if self._group is None:
                    wandb.teardown()  # its background service still holds the run's id; the next attempt needs it
            return f"W&B could not be started: {first_line(error)}"
        return None

    def _track(self, record: dict[str, Any]) -> None:
        if self._tracker is None:
            return
        try:
            self._tracker.log({key: value for key, value in record.items() if value is not None})
        except Exception as error:
            self._tracker = None
            self.event(TrackingDegraded(reason=f"W&B stopped taking metrics: {error}"))

    def _write(self, file: TextIO, record: dict[str, Any]) -> None:
        file.write(json.dumps(redacted_values(record, os.environ), allow_nan=False) + "\n")
        file.flush()


def end_tracking() -> None:
    """End W&B's background service, after which its files are complete; call it after the last recorder closed."""
    if "wandb" in sys.modules:
        import wandb

        with contextlib.suppress(Exception):  # it may be gone
            wandb.teardown()


def append_event(folder: Path, event: Event) -> None:
    """Write one event without a recorder: before it was started, or after it died."""
    with open_whole_lines(folder / EVENTS) as file:
        record = {"time": round(time.time(), 3)} | event_to_record(event)
        file.write(json.dumps(redacted_values(record, os.environ)) + "\n")


def last_recorded_step(folder: Path) -> int:
    """Return the last step in `metrics.jsonl`; 0 if there is none."""
    return int(last_step_of(folder).get("step", 0))


def open_whole_lines(path: Path) -> TextIO:
    """Open a file for appending, after removing a partial last line.

    Raises: OSError if it cannot be written, or is a link, which may lead to another file.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(os.dup(handle), "rb+") as file:
        file.truncate(_end_of_last_line(file))
    return os.fdopen(handle, "a", encoding="utf-8")


def _end_of_last_line(file: Any) -> int:
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 4096)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        position = start
    return 0


def _saved_steps(folder: Path) -> set[int]:
    """Return the steps of all readable CheckpointSaved events."""
    found: set[int] = set()
    with contextlib.suppress(ValueError):  # larger than any that is read
        for record in RecordReader(folder, kind="event").read():
            if record["event"] == CheckpointSaved.__name__:
                found.add(record["step"])
    return found


def _has_netrc() -> bool:
    return any((home_folder() / name).is_file() for name in (".netrc", "_netrc"))
