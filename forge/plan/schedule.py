"""The lengths of a learning rate schedule in steps. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from forge.config.schedule import ScheduleSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSteps:
    """What `forge.train.lr_schedule` needs to know besides the step."""

    total: int
    warmup: int = 0
    decay: int = 0
    """Of `wsd`: steps of the decay at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormerLength:
    """A length that a run had before it was resumed with another one."""

    given: str
    """As in the job: `total_steps: 1000`."""
    schedule: ScheduleSteps
    until_step: int
    """The last step whose learning rate follows this schedule: the last one recorded before the change."""
    config_digest: str
    """Of the job with this length. Checkpoints keep the digest of the run's first length."""


def schedule_steps(schedule: ScheduleSpec, *, total_steps: int, tokens_per_step: int) -> ScheduleSteps:
    """Convert the lengths of a schedule, which may be shares of the training or tokens, to whole steps."""
    warmup, decay = (
        given.in_steps(total_steps=total_steps, tokens_per_step=tokens_per_step) if given is not None else 0
        for given in (schedule.warmup, schedule.decay)
    )
    return ScheduleSteps(total=total_steps, warmup=warmup, decay=decay)
