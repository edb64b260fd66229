"""What a trial and its stage tell each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge.elastic.supervisor import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialAssignment:
    """What a stage is told of the trial that comes on."""

    run_folder: str
    plan_json: str
    group: str
    """The W&B group that the trials of a search share."""
    reported_step: int
    """Up to which the search knows already how the trial is judged."""
    decided_at: float
    """When it was decided to run it; seconds since the epoch."""
    secret: str = field(repr=False)
    """Which the trial's agents and its supervisor share, over a restart of the stage too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStep:
    """A trial has begun to train."""

    seconds: float
    """Since it was decided to run it."""
    is_warm: bool
    """Whether an earlier trial's processes were there for all of its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialUpdate:
    """What there is to tell of the trial that is on."""

    records: tuple[Mapping[str, Any], ...] = ()
    """Lines of `metrics.jsonl` by which it is judged, that were not told of before."""
    first_step: FirstStep | None = None
    outcome: Outcome | None = None
