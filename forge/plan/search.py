"""What a search will do: how many trials, how many at once, with how many workers each. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.errors import PlanError
from forge.spec.job import JobSpec
from forge.spec.search import SearchSpec

DEFAULT_TRIALS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """The trials of a search."""

    num_trials: int
    num_combinations: int | None
    """Of a grid; None where values are drawn."""
    trials_at_once: int
    num_places: int
    """How many workers the cluster has room for, counted when the plan was made."""

    @property
    def is_whole_grid(self) -> bool:
        """Whether every combination is tried."""
        return self.num_combinations is not None and self.num_combinations <= self.num_trials


def plan_search(job: JobSpec, search: SearchSpec, *, num_places: int) -> SearchPlan:
    """Resolve a search.

    trials at once = ⌊places / smallest number of workers⌋, at most as many as there are trials.

    Args:
        num_places: how many workers the cluster has room for.

    Raises: PlanError if not even one trial has room, or a number that was asked for has not.
    """
    low = job.resources.workers.low
    room = num_places // low
    if room == 0:
        raise PlanError(
            f"a trial needs at least {low} workers, and the cluster has room for {num_places}; "
            "lower resources.workers, or start a larger cluster"
        )
    if search.trials_at_once != "auto" and search.trials_at_once > room:
        raise PlanError(
            f"search.trials_at_once is {search.trials_at_once}: with {low} workers each that is "
            f"{search.trials_at_once * low} workers, and the cluster has room for {num_places}"
        )
    combinations = num_combinations(search)
    num_trials = search.max_trials or combinations or DEFAULT_TRIALS
    if search.scheduler.is_population and num_trials < 2:
        raise PlanError(f"{search.scheduler.kind} copies among trials: search.max_trials must be at least 2")
    at_once = room if search.trials_at_once == "auto" else search.trials_at_once
    return SearchPlan(
        num_trials=num_trials if combinations is None else min(num_trials, combinations),
        num_combinations=combinations,
        trials_at_once=min(at_once, num_trials),
        num_places=num_places,
    )


def num_combinations(search: SearchSpec) -> int | None:
    """How many a grid has; None where values are drawn, which has no end."""
    if search.searcher.kind != "grid":
        return None
    lists = [entry.values for entry in search.space.values() if entry.of is None]
    return math.prod(len(values) for values in lists if values is not None)
