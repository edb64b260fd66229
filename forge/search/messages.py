"""Messages between a trial's Tune actor and its trial runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.elastic.supervisor import Outcome
from forge.runtime.supervised_run import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialAssignment:
    """A trial for the runner to run."""

    run: RunConfig
    group: str
    """The group that the trials of a search share in the trackers."""
    reported_step: int
    """The newest step whose objective value the search knows already."""
    decided_at: float
    """When the trial's values were chosen; seconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstStep:
    """A trial has completed its first step."""

    seconds: float
    """Since its values were chosen."""
    is_warm: bool
    """Whether fork servers of earlier trials were ready for all of its ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialUpdate:
    """What is new about the active trial."""

    records: tuple[Mapping[str, Any], ...] = ()
    """New lines of `metrics.jsonl` that hold the search's metric."""
    first_step: FirstStep | None = None
    outcome: Outcome | None = None
    is_stopped_early: bool = False
    """Whether the outcome is that of `training.early_stopping`."""
