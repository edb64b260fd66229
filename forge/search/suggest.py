"""Suggest a trial's values, as a pure function of the search's seed, the trial's number and the earlier trials.

No state is kept between suggestions, so a search that is resumed from its journal suggests the same values.
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
    """The values of a trial. The first has the job's own values if they are in the search space, as the baseline.

    Without a scheduler, the sampler learns from the trials up to `number - at_once`, all of which must be over, so
    that values do not depend on which of the concurrent trials ends first. With a scheduler, whose decisions depend
    on the order of results anyway, it learns from all trials that are over.

    Args:
        number: of the trial, from 1.
        at_once: how many trials run concurrently.
        table: the trials so far.

    Returns: values by key; None if a trial that must be over first is not.
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
    return _sampled(search, number, known=known, running=running)


def combination(search: SearchSpec, index: int) -> dict[str, Any]:
    """One combination of a grid; the alphabetically last key changes fastest, keys without a list are sampled."""
    lists = {key: entry.values for key, entry in sorted(search.space.items()) if entry.values is not None}
    drawn = _sampled(search, index + 1, known=[], running=[])
    chosen = next(itertools.islice(itertools.product(*(values or () for values in lists.values())), index, None))
    return drawn | dict(zip(lists, chosen, strict=True))


def _sampled(search: SearchSpec, number: int, *, known: list[Trial], running: list[Trial]) -> dict[str, Any]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed = (search.searcher.seed * _SEED_STEP + number) % 2**31
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=seed)
    if known or running:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, constant_liar=True)
    study = optuna.create_study(sampler=sampler, direction="minimize" if search.direction == "min" else "maximize")
    space = distributions(search)
    for trial in known:
        study.add_trial(_finished_trial(trial, search, space))
    for trial in running:
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING, params=_encoded(trial, search), distributions=space
            )
        )
    return _decoded(study.ask(fixed_distributions=space).params, search)


def _finished_trial(trial: Trial, search: SearchSpec, space: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    """Convert an ended trial for Optuna; stopped and diverged trials are pruned, so worse than finished ones."""
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
    """Convert a trial's values to Optuna's."""
    searched = {key: entry for key, entry in search.space.items() if entry.of is None}
    return {
        key: trial.values[key] if entry.values is None else as_choice(trial.values[key])
        for key, entry in searched.items()
    }


def _decoded(params: Mapping[str, Any], search: SearchSpec) -> dict[str, Any]:
    """Convert Optuna's values to the job's; the inverse of `_encoded`."""
    found = dict(params)
    for key, chosen in params.items():
        values = search.space[key].values
        if values is not None:
            found[key] = next(value for value in values if as_choice(value) == chosen)
    return found
