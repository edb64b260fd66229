"""The mean speed of a run over its new steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class MeanSpeed:
    """Adds up tokens and MFU of one step after another, each by its time."""

    def __init__(self) -> None:
        self._num_tokens = self._mfu_s = self._tokens_step_s = self._mfu_step_s = 0.0

    def add(self, step: Mapping[str, Any], *, step_s: float) -> None:
        """Add a step of `metrics.jsonl`; a value that it lacks is left out of the mean."""
        tokens_per_s, mfu = step.get("speed/tokens_per_s"), step.get("speed/mfu")
        if _is_known(tokens_per_s):
            self._num_tokens += float(tokens_per_s or 0.0) * step_s
            self._tokens_step_s += step_s
        if _is_known(mfu):
            self._mfu_s += float(mfu or 0.0) * step_s
            self._mfu_step_s += step_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of training; nan before the first step."""
        return self._num_tokens / self._tokens_step_s if self._tokens_step_s else math.nan

    @property
    def mfu(self) -> float:
        """Mean MFU by time; nan if no step has one."""
        return self._mfu_s / self._mfu_step_s if self._mfu_step_s else math.nan


def _is_known(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
