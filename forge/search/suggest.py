"""Which values a trial has: a function of the search's seed, the trial's number and the trials before. Pure.

Nothing is kept from one suggestion to the next. Whoever knows the trials so far, by the search's journal, makes the
same suggestion again: so a search that was killed goes on as if it had not been.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import optuna

from forge.config.job import JobSpec
from forge.config.overrides import own_values, search_of
from forge.config.search import SearchSpec
from forge.runs.trials import Trial, TrialTable
from forge.search.importance import as_choice, distributions

_SEED_STEP = 1_000_003


def suggest(job: JobSpec, *, number: int, table: TrialTable, at_once: int) -> dict[str, Any] | None:
    """The values of a trial. The first has the job's own, where they may be tried: it is what the others must beat.

    What is learnt from: without a scheduler, the trials up to `number - at_once`, all of which must be over; so it
    does not depend on which of those that run at once ends first. With a scheduler, which decides by time anyway,
    all that are over.

    Args:
        number: of the trial, from 1.
        at_once: how many trials run at a time.

    Returns: values by their keys; None if a trial that must be over first is not.
    """
    search = search_of(job)
    if search.searcher.kind == "grid":
        return combination(search, number - 1)
    own = own_values(job) if number == 1 else None
    if own is not None:
        return own
    learns = search.searcher.kind == "optuna" and number > search.searcher.startup_trials
    before = [table.trials[one] for one in sorted(table.trials) if one < number]
    if not learns:
        known: list[Trial] = []
    elif search.scheduler.kind == "none":
        known = [trial for trial in before if trial.number <= number - at_once]
        if any(not trial.is_over for trial in known):
            return None
    else:
        known = [trial for trial in before if trial.is_over]
    running = [trial for trial in before if trial not in known] if learns else []
    return _drawn(search, number, known=known, running=running)


def combination(search: SearchSpec, index: int) -> dict[str, Any]:
    """One of a grid, the last key by the alphabet changing fastest; what is no list is drawn for each."""
    lists = {key: entry.values for key, entry in sorted(search.space.items()) if entry.values is not None}
    drawn = _drawn(search, index + 1, known=[], running=[])
    chosen = next(itertools.islice(itertools.product(*(values or () for values in lists.values())), index, None))
    return drawn | dict(zip(lists, chosen, strict=True))


def _drawn(search: SearchSpec, number: int, *, known: list[Trial], running: list[Trial]) -> dict[str, Any]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = (search.searcher.seed * _SEED_STEP + number) % 2**31
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if known or running:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if search.mode == "min" else "maximize")
    space = distributions(search)
    for trial in known:
        study.add_trial(_told(trial, search, space))
    for trial in running:
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, params=_encoded(trial, search), distributions=space
            )
        )
    return _plain(study.ask(fixed_distributions=space).params, search)


def _told(trial: Trial, search: SearchSpec, space: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    """A trial as Optuna is told of it: given up early or diverged, it is worse than those that were finished."""
    params = _encoded(trial, search)
    value = trial.value
    if trial.status == "finished" and value is not None and math.isfinite(value):
        return optuna.trial.create_trial(params=params, distributions=dict(space), value=value)
    reports = {step: value for step, value in trial.reports if math.isfinite(value)}
    is_sound = trial.status == "stopped"
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED,
        params=params,
        distributions=dict(space),
        intermediate_values=reports if is_sound else {},
    )


def _encoded(trial: Trial, search: SearchSpec) -> dict[str, Any]:
    """A trial's values as Optuna keeps them."""
    searched = {key: entry for key, entry in search.space.items() if entry.of is None}
    return {
        key: trial.values[key] if entry.values is None else as_choice(trial.values[key])
        for key, entry in searched.items()
    }


def _plain(params: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """And as the job has them."""
    found = dict(params)
    for key, chosen in params.items():
        values = search.space[key].values
        if values is not None:
            found[key] = next(value for value in values if as_choice(value) == chosen)
    return found
