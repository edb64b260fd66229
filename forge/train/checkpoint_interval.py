"""The interval between durable checkpoints while a worker trains: fixed, or adapted to what a checkpoint costs.

The cost is the median waiting for the last checkpoints; before the first one, for a few snapshots, from which
checkpoints are written. Rank 0 decides when a checkpoint is due, so only its interval counts.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

from forge.events import CheckpointIntervalChanged
from forge.plan.checkpoint_interval import CheckpointRisk, best_interval_s, is_worth_a_change
from forge.train.async_checkpoint import CheckpointWritten
from forge.units import Every

_NUM_RECENT = 5


class CheckpointInterval:
    """The interval between checkpoints."""

    def __init__(self, every: Every, *, risk: CheckpointRisk | None = None) -> None:
        """Args:
        every: the job's interval, or the planned one if it is adapted.
        risk: what the run has measured so far; None: keep the interval.
        """
        is_adapted = risk is not None and risk.every_s is not None
        self.every = Every(seconds=risk.every_s) if risk is not None and is_adapted else every
        self._risk = risk
        self._stalls_s: deque[float] = deque(maxlen=_NUM_RECENT)
        self._snapshot_s: float | None = None
        self._written_s = 0.0

    def is_due(self, *, step: int, since_s: float) -> bool:
        """Whether a checkpoint is due after this step, `since_s` after the last one."""
        return self.every.is_due(step=step, seconds_since_last=since_s)

    def record_checkpoint(self, written: CheckpointWritten) -> None:
        """Record how long training waited for a checkpoint, and how long it took to write."""
        if math.isfinite(written.stall_s) and math.isfinite(written.seconds):
            self._stalls_s.append(written.stall_s)
            self._written_s = written.seconds

    def record_snapshot_cost(self, cost_s: float) -> None:
        """Record what a snapshot costs, 0 before it was measured; only the first value counts, as it varies."""
        self._snapshot_s = self._snapshot_s or cost_s or None

    def update(self) -> CheckpointIntervalChanged | None:
        """Adapt the interval. Returns: the event if it changed."""
        if self._risk is None or (cost_s := self._cost_s) is None or self.every.seconds is None:
            return None
        before_s = self.every.seconds
        best_s = best_interval_s(cost_s=cost_s, mtbf_s=self._risk.mtbf_s, written_s=self._written_s)
        if not is_worth_a_change(before_s, best_s):
            return None
        self.every = Every(seconds=float(round(best_s)))
        return CheckpointIntervalChanged(
            seconds=float(round(best_s)), before_s=before_s, cost_s=cost_s, mtbf_s=self._risk.mtbf_s
        )

    @property
    def _cost_s(self) -> float | None:
        if self._stalls_s:
            return median(self._stalls_s)
        return self._risk.cost_s if self._risk is not None and self._risk.cost_s is not None else self._snapshot_s
