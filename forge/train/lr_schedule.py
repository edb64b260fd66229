"""The learning rate as a pure function of the step; nothing to save, nothing to restore."""

from __future__ import annotations

import math

from forge.config.training import ScheduleSpec


def learning_rate(schedule: ScheduleSpec, *, step: int, total_steps: int, peak: float) -> float:
    """The rate of step `step`, counted from 1.

    Warm-up: `peak · step / warmup_steps`, reaching the peak at its last step. After it, with
    `x = (step - warmup) / (total - warmup)` in (0, 1] and final fraction f:
    cosine `peak · (f + (1 - f) · (1 + cos πx) / 2)`, linear `peak · (1 - (1 - f) · x)`.

    Source: cosine as in SGDR, arXiv 1608.03983, equation 5, without restarts.
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant" or total_steps <= warmup:
        return peak
    done = min(1.0, (step - warmup) / (total_steps - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return peak * (schedule.final_fraction + (1 - schedule.final_fraction) * left)
