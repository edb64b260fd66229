"""How often a snapshot is taken: at every step where that costs little, else at every n-th.

What one costs is measured: how long training stood still for it and, on CPU, the processor time it took
from training. n is the smallest at which the cost is at most 1 % of the time of the n steps; so what a
lost machine makes the run repeat costs about as much as what its snapshots cost.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_SHARE = 0.01
# Snapshots and steps that are looked back upon; the first ones of a generation touch memory for the first time.
_NUM_RECENT = 8
_MOST_STEPS = 1000


class SnapshotInterval:
    """The interval between snapshots, in steps."""

    def __init__(self, *, fixed: int | None) -> None:
        """Args:
        fixed: take one every so many steps, whatever they cost.
        """
        self._fixed = fixed
        self.every = fixed or 1
        self.cost_s = 0.0
        self._last_step = 0
        self._costs: deque[float] = deque(maxlen=_NUM_RECENT)
        self._steps_s: deque[float] = deque(maxlen=2 * _NUM_RECENT)

    @property
    def share(self) -> float:
        """What snapshots cost, as a share of the time of the steps."""
        return self.cost_s / (self.every * median(self._steps_s)) if self._steps_s else 0.0

    def is_due(self, step: int) -> bool:
        """Whether this step ends with a snapshot."""
        return step - self._last_step >= self.every

    def took(self, step: int) -> None:
        """A snapshot of this step is taken."""
        self._last_step = step

    def learn(self, *, step_s: float, cost_s: float) -> bool:
        """Account for a step and for what snapshots have cost in it. Returns: whether the pace is another now."""
        self._steps_s.append(step_s)
        if cost_s > 0:
            self._costs.append(cost_s)
        if self._fixed is not None or len(self._costs) < _NUM_RECENT:
            return False
        self.cost_s = median(self._costs)
        best = min(_MOST_STEPS, max(1, math.ceil(self.cost_s / (_SHARE * median(self._steps_s)))))
        if best <= self.every < 2 * best:  # noise: one that costs little enough, and is not far too slow, stays
            return False
        self.every = best
        return True
