"""Attribute the wall time of a run to buckets: every second belongs to exactly one.

The input is the records of `events.jsonl` and `metrics.jsonl`, one by one, so that a screen can update a tracker
while the run is running; no single record is required. The wall time is the sum of the run's sessions, each from
the start of its driver to its end; the time between sessions does not count. Every record advances the clock by the
time since the previous record (by nothing if its time is earlier) and assigns a part of the unassigned seconds to a
bucket; a record that ends a step or a generation assigns the rest. So the buckets always add up to the wall time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any, Literal

from forge.runs.goodput_report import BUCKETS, Bucket, GoodputReport, MembershipChange
from forge.runs.node_utilization import NodeSeconds
from forge.runs.speed import MeanSpeed

Record = Mapping[str, Any]
_FAILURES = ("hang", "failure")
# Written just before the record of the step that they belong to.
_BEFORE_THEIR_STEP = ("GenerationStarted", "Evaluated")


def goodput_of(events: Iterable[Record], steps: Iterable[Record], *, now: float | None) -> GoodputReport:
    """Return the goodput report of a run.

    Args:
        events, steps: the records of its two files, each in the order of the file.
        now: seconds since the epoch, for a running run; None for one that ended.
    """
    return tracker_of(events, steps).report(now=now)


def tracker_of(events: Iterable[Record], steps: Iterable[Record]) -> GoodputTracker:
    """Build a goodput tracker from the records so far; feed it more with `add`."""
    tracker = GoodputTracker()
    for record in heapq.merge(events, steps, key=moment):
        tracker.add(record)
    return tracker


def moment(record: Record) -> tuple[float, int]:
    """Sort key that restores the order in which the records of both files were written; times are rounded."""
    kind = record.get("event")
    return record["time"], 1 if kind is None else 0 if kind in _BEFORE_THEIR_STEP else 2


class GoodputTracker:
    """Updates a run's goodput from one record after another, each at constant cost."""

    def __init__(self) -> None:
        self._seconds: dict[Bucket, float] = dict.fromkeys(BUCKETS, 0.0)
        self._wall_s = self._between_s = 0.0
        self._num_sessions = self._num_joined = self._num_left = 0
        self._speed = MeanSpeed()
        self._is_open = False
        self._at = -math.inf
        self._unassigned_s = 0.0
        """Time since the last record that assigned all of it, such as a step."""
        self._interrupted_s = 0.0
        """Time of the step that was running when a change began; lost unless that step is recorded after all."""
        self._evaluated_s = 0.0
        """Assigned to an evaluation since the last step."""
        self._phase: Literal["starting", "waiting", "training"] = "starting"
        self._is_ending = False
        """A change has begun, and the next generation is not starting yet."""
        self._step = self._world_size = self._largest_world_size = 0
        self._steps_s: list[float] = []
        self._num_steps = self._num_repeated = self._num_losses = self._num_failures = 0
        self._noticed: set[str] = set()
        self._nodes = NodeSeconds()
        self._former_changes: list[MembershipChange] = []
        self._changes: list[MembershipChange] = []
        """Those that led to this generation; their parts may be recorded after its first steps."""

    def add(self, record: Record) -> None:
        """Take in one record of either file; unknown records only advance the clock."""
        time, kind = _number(record, "time"), record.get("event")
        if not time:
            return
        if kind == "RunStarted":
            if self._is_open:  # the session before ended without a record
                self._close(lost=True)
            self._open(time - _number(record, "startup_s"))
        elif kind is None and not self._is_open:
            self._open(time - _number(record, "speed/step_s"))
        if self._is_open:
            self._pass_time(time)
        if kind == "NodeJoined":
            self._num_joined += 1
            self._nodes.join(str(record.get("node")))
        elif kind == "NodeLeft":
            self._num_left += 1
            self._nodes.leave(str(record.get("node")))
        elif self._is_open:
            self._take(kind, record)

    def report(self, *, now: float | None = None) -> GoodputReport:
        """Return the goodput until now.

        Args:
            now: seconds since the epoch, for a running run. Its current step counts as training, up to the ideal
            step
                time.
        """
        elapsed_s = max(0.0, now - self._at) if self._is_open and now is not None else 0.0
        wall_s, seconds, ideal_step_s = self._wall_s + elapsed_s, dict(self._seconds), self._ideal_step_s()
        rest_s = self._unassigned_s + elapsed_s
        seconds["repeated"] += self._interrupted_s
        if self._phase != "training":
            seconds[self._phase] += rest_s
        elif now is None:
            seconds["repeated"] += rest_s
        else:
            training_s = min(rest_s, ideal_step_s) if self._steps_s else rest_s
            seconds["training"] += training_s
            seconds["other"] += rest_s - training_s
        available_s = self._nodes.available_s(elapsed_s)
        return GoodputReport(
            wall_s=wall_s,
            num_sessions=self._num_sessions,
            between_s=self._between_s,
            tokens_per_s=self._speed.tokens_per_s,
            mfu=self._speed.mfu,
            seconds=seconds,
            ideal_step_s=ideal_step_s,
            goodput=self._num_steps * ideal_step_s / wall_s if wall_s else math.nan,
            node_goodput=min(1.0, self._nodes.useful_s() / available_s) if available_s else math.nan,
            num_steps=self._num_steps,
            num_repeated_steps=self._num_repeated,
            num_preemptions=len(self._noticed) + self._num_losses,
            num_failures=self._num_failures,
            num_nodes=self._nodes.num_now,
            num_nodes_joined=self._num_joined,
            num_nodes_left=self._num_left,
            changes=(*self._former_changes, *self._changes),
        )

    def _take(self, kind: str | None, record: Record) -> None:
        match kind:
            case None:
                self._take_step(record, step_s=_number(record, "speed/step_s"), size_key="elastic/world_size")
            case "StepRepeated":
                self._take_step(record, step_s=_number(record, "step_s"), size_key="world_size")
            case "Evaluated":
                self._take_evaluation(_number(record, "seconds"))
            case "CheckpointSaved":
                self._take_checkpoint(record)
            case "SampleGenerated" | "SampleFailed":
                self._assign("sampling", _number(record, "seconds"))
            case "TasksScored" | "TasksFailed":
                self._take_evaluation(_number(record, "seconds"))
            case "PreemptionNoticeReceived" if record.get("is_certain", True):
                self._noticed.add(str(record.get("node")))
            case "MembershipChangeStarted":
                self._take_change(record)
            case "WaitingForMachines":
                self._assign_all(lost=True)
                self._phase = "waiting"
            case "GenerationStarting":
                self._take_starting(record)
            case "GenerationStarted":
                self._take_started(record)
            case "RunFinished" | "RunStopped":
                self._close(lost=False)
            case "RunFailed":
                self._close(lost=True)

    def _take_step(self, record: Record, *, step_s: float, size_key: str) -> None:
        self._step = int(_number(record, "step"))
        is_new = "event" not in record
        # The step that was running when a change began was completed.
        self._unassigned_s, self._interrupted_s = self._unassigned_s + self._interrupted_s, 0.0
        training_s = self._assign("training" if is_new else "repeated", step_s)
        ended_at, self._evaluated_s = _number(record, "time") - self._evaluated_s, 0.0
        if self._is_ending:
            self._assign_rest("other")
        else:
            self._assign_all(lost=False)
            self._phase = "training"
            self._changes = [
                change if change.has_ended else replace(change, seconds=max(0.0, ended_at - change.time))
                for change in self._changes
            ]
        self._world_size = int(_number(record, size_key)) or self._world_size
        if not is_new:
            self._num_repeated += 1
            return
        self._num_steps += 1
        self._speed.add(record, step_s=step_s)
        self._nodes.work(training_s)
        if self._world_size > self._largest_world_size:
            self._largest_world_size = self._world_size
            self._steps_s.clear()
        if self._world_size == self._largest_world_size:
            self._steps_s.append(step_s)

    def _take_evaluation(self, seconds: float) -> None:
        """Assign the time of an evaluation; it may be read after the record of the step that it follows."""
        claimed_s = self._assign("evaluating", seconds)
        self._evaluated_s += claimed_s
        self._move("other", "evaluating", seconds - claimed_s)

    def _take_checkpoint(self, record: Record) -> None:
        """Assign the time of a checkpoint: the last one delays the end of the run, others delay steps."""
        if self._phase == "training" and record.get("step") == self._step:
            self._assign("saving", _number(record, "seconds"))
            return
        stall_s = _number(record, "stall_s")
        # Training waited between steps, and inside the one that followed.
        self._move("training", "saving", stall_s - self._move("other", "saving", stall_s))

    def _take_change(self, record: Record) -> None:
        change = MembershipChange(
            time=_number(record, "time"),
            cause=str(record.get("cause")),
            reason=str(record.get("reason")),
            after_s=self._wall_s,
            seconds_since_cause=_number(record, "seconds_since_cause"),
            from_world_size=self._world_size or None,
        )
        if any(former.has_ended for former in self._changes):
            self._retire_changes()
        self._changes.append(change)
        if change.cause == "hang":
            self._assign("stalled", change.seconds_since_cause or self._unassigned_s)
        if self._phase == "training":
            self._interrupted_s, self._unassigned_s = self._unassigned_s, 0.0
        else:
            self._assign_all(lost=True)
        self._phase, self._is_ending = "starting", True
        self._num_failures += change.cause in _FAILURES
        # A node that is lost after its notice is one preemption; the reason names the node.
        self._num_losses += change.cause == "loss" and not any(node in change.reason for node in self._noticed)

    def _take_starting(self, record: Record) -> None:
        self._assign_all(lost=True)
        self._phase, self._is_ending = "starting", False
        self._nodes.next_generation()
        world_size, from_step = int(_number(record, "world_size")), int(_number(record, "from_step"))
        self._changes = [
            replace(change, to_world_size=world_size, from_step=from_step, source=record.get("source"))
            for change in self._changes
        ]

    def _take_started(self, record: Record) -> None:
        self._world_size = int(_number(record, "world_size")) or self._world_size
        self._nodes.form({str(rank.get("node")) for rank in record.get("ranks") or ()})
        parts = record.get("seconds")
        if isinstance(parts, Mapping):
            self._changes = [replace(change, parts=dict(parts)) for change in self._changes]

    def _retire_changes(self) -> None:
        self._former_changes += self._changes
        self._changes = []

    def _open(self, time: float) -> None:
        self._is_open, self._phase, self._is_ending = True, "starting", False
        self._num_sessions += 1
        if self._at > -math.inf:
            self._between_s += max(0.0, time - self._at)
        self._at = max(self._at, time)

    def _close(self, *, lost: bool) -> None:
        self._assign_all(lost=lost)
        self._is_open = False
        self._nodes.end()
        self._retire_changes()

    def _pass_time(self, time: float) -> None:
        elapsed_s = max(0.0, time - self._at)
        self._at = max(self._at, time)
        self._wall_s += elapsed_s
        self._unassigned_s += elapsed_s
        self._nodes.pass_time(elapsed_s)

    def _assign(self, bucket: Bucket, seconds: float) -> float:
        """Assign at most `seconds` of the unassigned time to a bucket. Returns: the assigned seconds."""
        claimed_s = min(seconds, self._unassigned_s)
        self._seconds[bucket] += claimed_s
        self._unassigned_s -= claimed_s
        return claimed_s

    def _assign_rest(self, bucket: Bucket) -> None:
        self._assign(bucket, self._unassigned_s)

    def _move(self, source: Bucket, target: Bucket, seconds: float) -> float:
        moved_s = min(seconds, self._seconds[source])
        self._seconds[source] -= moved_s
        self._seconds[target] += moved_s
        return moved_s

    def _assign_all(self, *, lost: bool) -> None:
        """Assign all unassigned time.

        Args:
            lost: the step that was running was not completed.
        """
        self._seconds["repeated"] += self._interrupted_s
        self._interrupted_s = self._evaluated_s = 0.0
        if self._phase == "training":
            self._assign_rest("repeated" if lost else "other")
        else:
            self._assign_rest(self._phase)

    def _ideal_step_s(self) -> float:
        self._steps_s.sort()  # almost sorted already, which is fast
        return median(self._steps_s) if self._steps_s else math.nan


def _number(record: Record, key: str) -> float:
    """Read a positive number from a record; 0 if the value is missing or malformed."""
    value = record.get(key)
    is_number = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    return float(value) if is_number and value is not None else 0.0
