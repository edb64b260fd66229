"""Decide from a run's own records what is worth an alert.

The same records give the same alerts, so that a recorder that is started again finds those that the one before it
had no time to send. Only a stalled run is found by the clock. No text of an alert comes from the training data:
messages of errors, which may quote it, are not in them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from forge.config.alerts import AlertKind
from forge.runs.alerts.loss_spike import NUM_STEPS, LossSpikes
from forge.runs.event_text import deadline_text, is_late, short
from forge.units import format_duration

BUDGET_SHARES = (0.5, 0.8, 1.0)
_STALL_STEPS = 10
_MIN_STALL_S = 600.0
_MIN_START_S = 1800.0
"""Until the first step, which the start of the run and the preparation of its model precede."""
_NUM_DURATIONS = 50
_PROGRESS = ("RunStarted", "StepRepeated", "Evaluated", "EvaluationProgress", "TasksScored", "ShardsComputed")
"""What happens between two steps when all is well."""
_ENDS = ("RunFinished", "RunStopped", "RunFailed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something that a person should know."""

    kind: AlertKind
    text: str
    step: int
    """The last recorded one."""
    at: float
    """When it was recorded, in seconds since the epoch."""


class AlertDetector:
    """Reads the records of one run.

    Args:
        usd_limit: key and value of the job's cost limit, if it has one.
        now_s: a monotonic clock, as in every method: when reading began.
        noun: what costs, `run` or `search`.
    """

    def __init__(self, *, usd_limit: tuple[str, float] | None, now_s: float, noun: str = "run") -> None:
        self._usd_limit, self._noun, self._progress_s = usd_limit, noun, now_s
        self._step = 0
        self._total_steps: int | None = None
        self._spikes = LossSpikes()
        self._is_nan = False
        self._num_shares = 0
        """Of `BUDGET_SHARES`: those that the run has cost already."""
        self._durations: deque[float] = deque(maxlen=_NUM_DURATIONS)
        self._is_over = True
        self._is_stalled = False
        self._waiting = ""

    def step(self, record: Mapping[str, Any], *, now_s: float) -> Iterator[Alert]:
        """Yield the alerts of a record of `metrics.jsonl`."""
        self._step, loss, at = record["step"], record["train/loss"], record["time"]
        self._progress(now_s)
        if record["speed/step_s"] is not None:
            self._durations.append(record["speed/step_s"])
        if loss is None or not math.isfinite(loss):
            if not self._is_nan:
                yield self._alert("nan", f"the loss of step {self._step} is not a finite number", at=at)
            self._is_nan = True
            return
        self._is_nan = False
        usual = self._spikes.add(loss)
        if usual is not None:
            text = f"the loss is {loss:.4g} at step {self._step}; the median of the {NUM_STEPS} steps before is "
            yield self._alert("loss_spike", f"{text}{usual:.4g}", at=at)

    def event(self, record: Mapping[str, Any], *, now_s: float) -> Iterator[Alert]:
        """Yield the alerts of a record of `events.jsonl`."""
        kind, at = record["event"], record["time"]
        if kind in _PROGRESS:
            self._progress(now_s)
        match kind:
            case "RunStarted":
                self._is_over, self._total_steps = False, record["total_steps"]
            case "WaitingForMachines":
                self._waiting = f"; it waits for machines: {record['have']} of {record['need']} workers"
            case "GenerationStarting":
                self._waiting = ""
            case "CostUpdated":
                yield from self._budget(record["usd"], at=at)
            case "DeadlineForecast" if is_late(record):
                yield self._alert("late", short(deadline_text(record)), at=at)
            case "RankHung":
                silent = format_duration(record["silent_s"])
                yield self._alert("stalled", f"rank {record['rank']} hung for {silent}{self._where()}", at=at)
            case "MembershipChangeStarted" if record["cause"] in ("loss", "notice"):
                yield self._alert("preempted", f"{short(record['reason'])}{self._where()}", at=at)
        if kind in _ENDS:
            self._is_over = True
            yield from self._end(record, at=at)

    def stalled(self, *, now_s: float, at: float) -> Alert | None:
        """Return the alert of a run that has made no step for too long, once."""
        is_done = self._total_steps is not None and 0 < self._total_steps <= self._step
        if self._is_over or self._is_stalled or is_done:
            return None
        usual_s = median(self._durations) if self._durations else None
        limit_s = _MIN_START_S if usual_s is None else max(_MIN_STALL_S, _STALL_STEPS * usual_s)
        silent_s = now_s - self._progress_s
        if silent_s < limit_s:
            return None
        self._is_stalled = True
        text = f"no step for {format_duration(silent_s)}{self._where()}{self._waiting}"
        return self._alert("stalled", text, at=at)

    def _progress(self, now_s: float) -> None:
        self._progress_s, self._is_stalled = now_s, False

    def _budget(self, usd: float | None, *, at: float) -> Iterator[Alert]:
        if self._usd_limit is None or usd is None:
            return
        key, limit = self._usd_limit
        reached = sum(usd >= share * limit for share in BUDGET_SHARES)
        if reached > self._num_shares:
            self._num_shares = reached
            share = f"{BUDGET_SHARES[reached - 1]:.0%} of {key}"
            text = f"the {self._noun} has cost {usd:,.2f} USD, {share} ({limit:,.2f} USD){self._where()}"
            yield self._alert("budget", text, at=at)

    def _end(self, record: Mapping[str, Any], *, at: float) -> Iterator[Alert]:
        match record["event"]:
            case "RunFinished":
                yield self._alert("finished", f"finished{self._where()}", at=at)
            case "RunStopped":
                reason = f": {short(record['reason'])}" if record["reason"] else " on request"
                yield self._alert("finished", f"stopped{self._where()}{reason}", at=at)
            case "RunFailed":
                if record["error"] == "DivergedError":
                    yield self._alert("nan", f"the loss or gradient is not finite{self._where()}", at=at)
                yield self._alert("failed", f"failed{self._where()}: {short(record['error'])}", at=at)

    def _where(self) -> str:
        return f" after step {self._step}" if self._step else ""

    def _alert(self, kind: AlertKind, text: str, *, at: float) -> Alert:
        return Alert(kind=kind, text=text, step=self._step, at=at)
