"""Adaptive interval between snapshots: every step if that is cheap, otherwise every n-th step.

The cost of a snapshot is measured: how long training waited for it and, on CPU, the CPU time it took. n is the
smallest interval at which the cost is at most 1 % of the time of the n steps.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_SHARE = 0.01
# Snapshots that the median is taken over; the first ones of a generation are slower, as pages are allocated.
_NUM_RECENT = 8
_MOST_STEPS = 1000


class SnapshotInterval:
    """The interval between snapshots, in steps."""

    def __init__(self, *, fixed: int | None) -> None:
        """Args:
        fixed: interval in steps; None: adapt it to the measured cost.
        """
        self._fixed = fixed
        self.every = fixed or 1
        self.cost_s = 0.0
        self._last_step = 0
        self._costs: deque[float] = deque(maxlen=_NUM_RECENT)
        self._steps_s: deque[float] = deque(maxlen=2 * _NUM_RECENT)

    @property
    def share(self) -> float:
        """Cost of snapshots as a share of the step time."""
        return self.cost_s / (self.every * median(self._steps_s)) if self._steps_s else 0.0

    def is_due(self, step: int) -> bool:
        """Whether this step ends with a snapshot."""
        return step - self._last_step >= self.every

    def record_snapshot(self, step: int) -> None:
        """Record that a snapshot of this step was taken."""
        self._last_step = step

    def update(self, *, step_s: float, cost_s: float) -> bool:
        """Record the times of a step and of the snapshots in it. Returns: whether the interval changed."""
        self._steps_s.append(step_s)
        if cost_s > 0:
            self._costs.append(cost_s)
        if len(self._costs) < _NUM_RECENT:
            return False
        self.cost_s = median(self._costs)
        if self._fixed is not None:
            return False
        best = min(_MOST_STEPS, max(1, math.ceil(self.cost_s / (_SHARE * median(self._steps_s)))))
        if best <= self.every < 2 * best:  # keep an interval that is cheap enough and at most twice too long
            return False
        self.every = best
        return True
