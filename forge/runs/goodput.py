"""Where the wall time of a run went: every second in exactly one bucket.

    training     steps done for the first time
    repeated     steps done again, and what was lost of the one that an interruption ended
    evaluating   the held-out loss was measured
    saving       training stood still for a checkpoint, or the run waited for its last one
    stalled      a rank hung, until that was seen
    forming      from the start, or from the end of a generation, until the next one's first step begins
    waiting      too few machines
    other        the rest: between steps, and from the last step to the end of the run

In come the records of `events.jsonl` and `metrics.jsonl`, one by one, so that a screen can keep a tracker as the
run goes on; nothing else is needed, and no record is indispensable. The wall time is the sum of the run's
stretches, each from RunStarted to its end; between two of them nobody works. Every record moves the clock on
by what has passed since the one before (nothing, if its time is earlier) and claims its part of the seconds
that are unclaimed; who ends a part of the run, a step or a generation, settles the rest. So the buckets add
up to the wall time whatever the records say.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Literal, get_args

from forge.runs.node_utilization import NodeSeconds

Record = Mapping[str, Any]
Bucket = Literal["training", "repeated", "evaluating", "saving", "stalled", "forming", "waiting", "other"]
BUCKETS: tuple[Bucket, ...] = get_args(Bucket)

_FAILURES = ("hang", "failure")
# Written a moment before the record of the step that they belong to.
_BEFORE_THEIR_STEP = ("GenerationStarted", "Evaluated")


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipChange:
    """One generation after another."""

    time: float
    """When it began, in seconds since the epoch."""
    cause: str
    reason: str
    seconds_since_cause: float
    """How much earlier it had happened, where that is known."""
    seconds: float | None = None
    """Until the first step of the next generation ended; None if none did."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What forming was made of, in seconds."""
    from_world_size: int | None = None
    to_world_size: int | None = None
    from_step: int | None = None
    source: str | None = None
    """Where the state came from: `memory`, `storage`."""

    @property
    def has_ended(self) -> bool:
        """Whether a step was made after it."""
        return self.seconds is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputReport:
    """A run's time, and what became of it."""

    wall_s: float
    seconds: Mapping[Bucket, float]
    """Of every bucket; together the wall time."""
    ideal_step_s: float
    """Median of the first-time steps at the largest world size that the run had; nan before the first."""
    goodput: float
    """New steps × ideal step time / wall time; above 1 if fewer workers were faster. nan before the first step."""
    node_goodput: float
    """Node-seconds of first-time steps / node-seconds available; 0 to 1, or nan."""
    num_steps: int
    """First-time steps."""
    num_repeated_steps: int
    num_preemptions: int
    """Notices, and machines lost without one."""
    num_failures: int
    """Changes because a rank hung or broke."""
    num_nodes: int
    """Machines that are there now, or were at the end."""
    changes: tuple[MembershipChange, ...]

    @property
    def num_changes(self) -> int:
        """How often one generation had to follow another."""
        return len(self.changes)

    def share(self, bucket: Bucket) -> float:
        """Of the wall time, 0 to 1."""
        return self.seconds[bucket] / self.wall_s if self.wall_s else 0.0

    def as_record(self) -> dict[str, Any]:
        """As JSON; what is unknown becomes null."""
        record = asdict(self) | {
            "seconds": {bucket: round(seconds, 6) for bucket, seconds in self.seconds.items()},
            "num_changes": self.num_changes,
            "changes": [asdict(change) for change in self.changes],
        }
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value for key, value in record.items()
        }


def goodput_of(events: Sequence[Record], steps: Sequence[Record], *, now: float | None) -> GoodputReport:
    """The ledger of a run.

    Args:
        events, steps: the records of its two files, each in the order of the file.
        now: seconds since the epoch, for a run that goes on; None for one that does not.
    """
    return tracker_of(events, steps).report(now=now)


def tracker_of(events: Iterable[Record], steps: Iterable[Record]) -> GoodputTracker:
    """What is known of a run so far, for a tracker that goes on."""
    tracker = GoodputTracker()
    for record in heapq.merge(events, steps, key=moment):
        tracker.add(record)
    return tracker


def moment(record: Record) -> tuple[float, int]:
    """The order in which the records of the two files were written, whose times are rounded to milliseconds."""
    kind = record.get("event")
    return record["time"], 1 if kind is None else 0 if kind in _BEFORE_THEIR_STEP else 2


class GoodputTracker:
    """Takes in one record after another; costs the same for each, however long the run is."""

    def __init__(self) -> None:
        self._seconds: dict[Bucket, float] = dict.fromkeys(BUCKETS, 0.0)
        self._wall_s = 0.0
        self._is_open = False
        self._at = -math.inf
        self._unclaimed_s = 0.0
        """Since the last step, or whatever else settled."""
        self._in_doubt_s = 0.0
        """Since the last step when a change began: lost, unless that step is recorded after all."""
        self._evaluated_s = 0.0
        """Claimed by an evaluation since the last step."""
        self._phase: Literal["forming", "waiting", "training"] = "forming"
        self._is_ending = False
        """A change has begun, and the next generation is not yet forming."""
        self._step = self._world_size = self._largest_world_size = 0
        self._steps_s: list[float] = []
        self._num_steps = self._num_repeated = self._num_losses = self._num_failures = 0
        self._noticed: set[str] = set()
        self._nodes = NodeSeconds()
        self._former_changes: list[MembershipChange] = []
        self._changes: list[MembershipChange] = []
        """Those that led to this generation; what it was made of may be told later than its first steps."""

    def add(self, record: Record) -> None:
        """Take in one record of either file; those that say nothing of time only move the clock."""
        time, kind = _number(record, "time"), record.get("event")
        if not time:
            return
        if kind == "RunStarted":
            if self._is_open:  # the stretch before died without a word
                self._close(lost=True)
            self._open(time)
        elif kind is None and not self._is_open:
            self._open(time - _number(record, "speed/step_s"))
        if self._is_open:
            self._pass_time(time)
        if kind == "NodeJoined":
            self._nodes.join(str(record.get("node")))
        elif kind == "NodeLeft":
            self._nodes.leave(str(record.get("node")))
        elif self._is_open:
            self._take(kind, record)

    def report(self, *, now: float | None = None) -> GoodputReport:
        """How things stand.

        Args:
            now: for a run that goes on. The step that it is at counts as training, for as long as steps take.
        """
        elapsed_s = max(0.0, now - self._at) if self._is_open and now is not None else 0.0
        wall_s, seconds, ideal_step_s = self._wall_s + elapsed_s, dict(self._seconds), self._ideal_step_s()
        rest_s = self._unclaimed_s + elapsed_s
        seconds["repeated"] += self._in_doubt_s
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
            seconds=seconds,
            ideal_step_s=ideal_step_s,
            goodput=self._num_steps * ideal_step_s / wall_s if wall_s else math.nan,
            node_goodput=min(1.0, self._nodes.useful_s() / available_s) if available_s else math.nan,
            num_steps=self._num_steps,
            num_repeated_steps=self._num_repeated,
            num_preemptions=len(self._noticed) + self._num_losses,
            num_failures=self._num_failures,
            num_nodes=self._nodes.num_now,
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
            case "PreemptionNoticeReceived" if record.get("is_certain", True):
                self._noticed.add(str(record.get("node")))
            case "MembershipChangeStarted":
                self._take_change(record)
            case "WaitingForMachines":
                self._settle(lost=True)
                self._phase = "waiting"
            case "GenerationStarting":
                self._take_forming(record)
            case "GenerationStarted":
                self._take_formed(record)
            case "RunFinished" | "RunStopped":
                self._close(lost=False)
            case "RunFailed":
                self._close(lost=True)

    def _take_step(self, record: Record, *, step_s: float, size_key: str) -> None:
        self._step = int(_number(record, "step"))
        is_new = "event" not in record
        # The step that was going on when a change began has ended well.
        self._unclaimed_s, self._in_doubt_s = self._unclaimed_s + self._in_doubt_s, 0.0
        training_s = self._claim("training" if is_new else "repeated", step_s)
        ended_at, self._evaluated_s = _number(record, "time") - self._evaluated_s, 0.0
        if self._is_ending:
            self._book("other")
        else:
            self._settle(lost=False)
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
        self._nodes.work(training_s)
        if self._world_size > self._largest_world_size:
            self._largest_world_size = self._world_size
            self._steps_s.clear()
        if self._world_size == self._largest_world_size:
            self._steps_s.append(step_s)

    def _take_evaluation(self, seconds: float) -> None:
        """Evaluations are reported before the step that they follow; the other way round if read in bad luck."""
        claimed_s = self._claim("evaluating", seconds)
        self._evaluated_s += claimed_s
        self._move("other", "evaluating", seconds - claimed_s)

    def _take_checkpoint(self, record: Record) -> None:
        """One that is reported with no step since is waited for, at the end; what another cost lies in the past."""
        if self._phase == "training" and record.get("step") == self._step:
            self._claim("saving", _number(record, "seconds"))
            return
        stall_s = _number(record, "stall_s")
        # It waited between steps, and inside of the one that followed.
        self._move("training", "saving", stall_s - self._move("other", "saving", stall_s))

    def _take_change(self, record: Record) -> None:
        change = MembershipChange(
            time=_number(record, "time"),
            cause=str(record.get("cause")),
            reason=str(record.get("reason")),
            seconds_since_cause=_number(record, "seconds_since_cause"),
            from_world_size=self._world_size or None,
        )
        if any(former.has_ended for former in self._changes):
            self._retire_changes()
        self._changes.append(change)
        if change.cause == "hang":
            self._claim("stalled", change.seconds_since_cause or self._unclaimed_s)
        if self._phase == "training":
            self._in_doubt_s, self._unclaimed_s = self._unclaimed_s, 0.0
        else:
            self._settle(lost=True)
        self._phase, self._is_ending = "forming", True
        self._num_failures += change.cause in _FAILURES
        # A machine that is lost after its notice is one preemption; the reason names it.
        self._num_losses += change.cause == "loss" and not any(node in change.reason for node in self._noticed)

    def _take_forming(self, record: Record) -> None:
        self._settle(lost=True)
        self._phase, self._is_ending = "forming", False
        self._nodes.next_generation()
        world_size, from_step = int(_number(record, "world_size")), int(_number(record, "from_step"))
        self._changes = [
            replace(change, to_world_size=world_size, from_step=from_step, source=record.get("source"))
            for change in self._changes
        ]

    def _take_formed(self, record: Record) -> None:
        self._world_size = int(_number(record, "world_size")) or self._world_size
        self._nodes.form({str(place.get("node")) for place in record.get("ranks") or ()})
        parts = record.get("seconds")
        if isinstance(parts, Mapping):
            self._changes = [replace(change, parts=dict(parts)) for change in self._changes]

    def _retire_changes(self) -> None:
        self._former_changes += self._changes
        self._changes = []

    def _open(self, time: float) -> None:
        self._is_open, self._phase, self._is_ending = True, "forming", False
        self._at = max(self._at, time)

    def _close(self, *, lost: bool) -> None:
        self._settle(lost=lost)
        self._is_open = False
        self._nodes.end()
        self._retire_changes()

    def _pass_time(self, time: float) -> None:
        elapsed_s = max(0.0, time - self._at)
        self._at = max(self._at, time)
        self._wall_s += elapsed_s
        self._unclaimed_s += elapsed_s
        self._nodes.pass_time(elapsed_s)

    def _claim(self, bucket: Bucket, seconds: float) -> float:
        """Book so much of the unclaimed time, or what there is of it. Returns: how much."""
        claimed_s = min(seconds, self._unclaimed_s)
        self._seconds[bucket] += claimed_s
        self._unclaimed_s -= claimed_s
        return claimed_s

    def _book(self, bucket: Bucket) -> None:
        self._claim(bucket, self._unclaimed_s)

    def _move(self, source: Bucket, target: Bucket, seconds: float) -> float:
        moved_s = min(seconds, self._seconds[source])
        self._seconds[source] -= moved_s
        self._seconds[target] += moved_s
        return moved_s

    def _settle(self, *, lost: bool) -> None:
        """Book all unclaimed time.

        Args:
            lost: whatever step was going on has not ended.
        """
        self._seconds["repeated"] += self._in_doubt_s
        self._in_doubt_s = self._evaluated_s = 0.0
        if self._phase == "training":
            self._book("repeated" if lost else "other")
        else:
            self._book(self._phase)

    def _ideal_step_s(self) -> float:
        self._steps_s.sort()  # all but the newest are sorted: then it is quick
        return median(self._steps_s) if self._steps_s else math.nan


def _number(record: Record, key: str) -> float:
    """A number of a record that may have been written by anyone; 0 if it is none."""
    value = record.get(key)
    is_number = isinstance(value, (int, float)) and math.isfinite(value) and value > 0
    return float(value) if is_number and value is not None else 0.0
