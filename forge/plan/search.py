"""What a search will do: how many trials, how many at once, with how many workers each. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.config.job import JobSpec
from forge.config.search import SearchSpec
from forge.errors import PlanError

DEFAULT_TRIALS = 16
_FREE = ("max_trials", "max_hours", "max_usd", "trials_at_once")
"""What a search may be resumed with: for how long it goes on, and how broadly."""


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
    num_trials = count_trials(search)
    if search.scheduler.is_population and num_trials < 2:
        raise PlanError(f"{search.scheduler.kind} copies among trials: search.max_trials must be at least 2")
    at_once = room if search.trials_at_once == "auto" else search.trials_at_once
    return SearchPlan(
        num_trials=num_trials,
        num_combinations=num_combinations(search),
        trials_at_once=min(at_once, num_trials),
        num_places=num_places,
    )


def count_trials(search: SearchSpec) -> int:
    """How many trials a search makes: what it asks for, at most its grid; 16 where nothing says how many."""
    combinations = num_combinations(search)
    wanted = search.max_trials or combinations or DEFAULT_TRIALS
    return wanted if combinations is None else min(wanted, combinations)


def changed_keys(before: SearchSpec | None, now: SearchSpec | None) -> list[str]:
    """Keys of a search that are other than they were, and may not be: its trials belong together no more."""
    if before is None or now is None:
        return [] if before is now else ["search"]
    fixed = [name for name in SearchSpec.model_fields if name not in _FREE]
    return [f"search.{name}" for name in fixed if getattr(before, name) != getattr(now, name)]


def num_combinations(search: SearchSpec) -> int | None:
    """How many a grid has; None where values are drawn, which has no end."""
    if search.searcher.kind != "grid":
        return None
    lists = [entry.values for entry in search.space.values() if entry.of is None]
    return math.prod(len(values) for values in lists if values is not None)
