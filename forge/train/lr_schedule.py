"""The learning rate as a pure function of the step; nothing to save, nothing to restore."""

from __future__ import annotations

import math

from forge.config.schedule import ScheduleSpec
from forge.events import LengthChanged
from forge.plan.plan import DraftPlan
from forge.plan.schedule import ScheduleSteps

_TIMESCALE_STEPS = 10_000


def learning_rate(schedule: ScheduleSpec, *, step: int, lengths: ScheduleSteps, peak: float) -> float:
    """The rate of step `step`, counted from 1.

    Warm-up over w steps: `peak · step / w`, reaching the peak at its last step. After it `peak · factor`, with the
    final fraction f: `f + (1 - f) · left`, where x in (0, 1] is the finished share of the steps after the warm-up:

        cosine       left = (1 + cos πx) / 2
        linear       left = 1 - x
        polynomial   left = (1 - x) ** power
        wsd          left = 1 until the decay of its last steps; x is the finished share of the decay, and
                     left = 1 - √x, 1 - x or (1 + cos πx) / 2
        inverse-sqrt factor = √(timescale / (step - w + timescale))

    Source: cosine as in SGDR, arXiv 1608.03983, equation 5, without restarts; the others as in
    transformers.optimization, whose functions of step s give the rate of step s here.
    """
    warmup = lengths.warmup
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant" or lengths.total <= warmup:
        return peak
    if schedule.kind == "inverse-sqrt":
        timescale = schedule.timescale or warmup or _TIMESCALE_STEPS
        return peak * math.sqrt(timescale / (step - warmup + timescale))
    floor = schedule.final_fraction
    return peak * (floor + (1 - floor) * _left(schedule, step=step, lengths=lengths))


def length_change(plan: DraftPlan) -> LengthChanged:
    """Describe the latest change of a run's length, with the learning rates on both sides of it.

    Args:
        plan: of a run with a former length.
    """
    former, training = plan.former_lengths[-1], plan.job.training
    schedule, peak, step = training.schedule, training.optimizer.lr, former.until_step
    before = learning_rate(schedule, step=step, lengths=former.schedule, peak=peak) if step else math.nan
    return LengthChanged(
        from_step=step + 1,
        before=former.given,
        total_steps_before=former.schedule.total,
        total_steps=plan.total_steps,
        learning_rate_before=before,
        learning_rate=learning_rate(schedule, step=step + 1, lengths=plan.schedule_steps, peak=peak),
    )


def _left(schedule: ScheduleSpec, *, step: int, lengths: ScheduleSteps) -> float:
    """Return the share of the decay that is left, from 1 to 0."""
    first = lengths.total - lengths.decay if schedule.kind == "wsd" else lengths.warmup
    if step <= first:
        return 1.0
    done = min(1.0, (step - first) / (lengths.total - first))
    shape = schedule.decay_shape if schedule.kind == "wsd" else schedule.kind
    if shape == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if shape == "1-sqrt":
        return 1 - math.sqrt(done)
    return float((1 - done) ** (schedule.power or 1.0))
