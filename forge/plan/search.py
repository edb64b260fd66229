"""Plan of a search: how many trials, how many at once, with how many workers each. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.config.job import JobSpec
from forge.config.search import SearchSpec
from forge.errors import PlanError

DEFAULT_TRIALS = 16
_FREE = ("max_trials", "max_hours", "max_usd", "trials_at_once")
"""Keys that may change when a search is resumed: its limits and how many trials run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """The trials of a search."""

    num_trials: int
    num_combinations: int | None
    """Of a grid; None if values are sampled."""
    trials_at_once: int
    num_slots: int
    """Workers that fit on the cluster, counted when the plan was made."""

    @property
    def is_whole_grid(self) -> bool:
        """Whether every combination of the grid is tried."""
        return self.num_combinations is not None and self.num_combinations <= self.num_trials


def plan_search(job: JobSpec, search: SearchSpec, *, num_slots: int) -> SearchPlan:
    """Plan a search.

    With `trials_at_once: auto`, min(⌊slots / minimum number of workers⌋, number of trials) trials run at once.

    Args:
        num_slots: number of workers that fit on the cluster.

    Raises: PlanError if not one trial fits, or fewer than the job's `trials_at_once` fit.
    """
    low = job.resources.workers.low
    room = num_slots // low
    if room == 0:
        raise PlanError(
            f"a trial needs at least {low} workers, and the cluster has room for {num_slots}; "
            "lower resources.workers, or start a larger cluster"
        )
    if search.trials_at_once != "auto" and search.trials_at_once > room:
        raise PlanError(
            f"search.trials_at_once is {search.trials_at_once}: with {low} workers each that is "
            f"{search.trials_at_once * low} workers, and the cluster has room for {num_slots}"
        )
    num_trials = count_trials(search)
    if search.scheduler.is_population and num_trials < 2:
        raise PlanError(f"{search.scheduler.kind} copies between trials: search.max_trials must be at least 2")
    at_once = room if search.trials_at_once == "auto" else search.trials_at_once
    return SearchPlan(
        num_trials=num_trials,
        num_combinations=num_combinations(search),
        trials_at_once=min(at_once, num_trials),
        num_slots=num_slots,
    )


def count_trials(search: SearchSpec) -> int:
    """Return the number of trials: `max_trials`, at most the size of the grid; 16 if neither is given."""
    combinations = num_combinations(search)
    wanted = search.max_trials or combinations or DEFAULT_TRIALS
    return wanted if combinations is None else min(wanted, combinations)


def changed_keys(before: SearchSpec | None, now: SearchSpec | None) -> list[str]:
    """Return the changed keys that make old and new trials incomparable; empty if the search may be resumed."""
    if before is None or now is None:
        return [] if before is now else ["search"]
    fixed = [name for name in SearchSpec.model_fields if name not in _FREE]
    return [f"search.{name}" for name in fixed if getattr(before, name) != getattr(now, name)]


def num_combinations(search: SearchSpec) -> int | None:
    """Return the size of the grid; None if values are sampled, which is unlimited."""
    if search.searcher.kind != "grid":
        return None
    lists = [entry.values for entry in search.space.values() if entry.of is None]
    return math.prod(len(values) for values in lists if values is not None)
