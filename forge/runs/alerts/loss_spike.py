"""Find spikes of the training loss: several steps far above what the steps before had."""

from __future__ import annotations

from collections import deque
from statistics import median

NUM_STEPS = 100
"""Steps that a loss is compared with."""
_MIN_STEPS = 20
NUM_TOGETHER = 5
"""The median of so many steps must be above the limit, so that one or two odd batches are no spike."""
MAD_FACTOR = 8 * 1.4826
"""Eight standard deviations of normal noise, whose median absolute deviation is 1 / 1.4826 of one.

Source: Rousseeuw and Croux, "Alternatives to the Median Absolute Deviation", 1993."""
MIN_RISE = 0.2
"""A spike is also above the fifth largest loss, by at least this share of the median: constant losses have almost
no deviation, and where some batches are of another kind of text, their losses are usual though rare."""
_MIN_RISE_ABSOLUTE = 0.02


class LossSpikes:
    """Compares each loss with the median of the steps before, in the order of the steps."""

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=NUM_STEPS)
        self._newest: deque[float] = deque(maxlen=NUM_TOGETHER)
        self._num_high = 0

    def add(self, loss: float) -> float | None:
        """Add a step; return the usual loss if a spike begins at it, else None.

        A spike ends when the loss is back, or has stayed high for `NUM_STEPS` steps, which is then usual.
        """
        if len(self._newest) == NUM_TOGETHER and not self._num_high:
            self._before.append(self._newest[0])
        self._newest.append(loss)
        if len(self._before) < _MIN_STEPS:
            return None
        usual = median(self._before)
        deviation = median(abs(value - usual) for value in self._before)
        rise = max(MIN_RISE * abs(usual), _MIN_RISE_ABSOLUTE)
        limit = max(usual + MAD_FACTOR * deviation, sorted(self._before)[-NUM_TOGETHER] + rise)
        if median(self._newest) <= limit:
            self._num_high = 0
            return None
        self._num_high += 1
        if self._num_high > NUM_STEPS:
            self._before.clear()
            self._num_high = 0
        return usual if self._num_high == 1 else None
