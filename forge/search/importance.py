"""Estimate the importance of each searched key with Optuna's fANOVA over the trials of a search.

The trials are copied into an Optuna study in memory, which is discarded afterwards: a search's only record is its
events. The Optuna distributions of the search space are also used by `forge.search.suggest`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from forge.config.search import ParameterSpec, SearchSpec
from forge.runs.trials import Trial, TrialTable

_SEED = 1
# Half of Optuna's default: on 8 to 32 trials of known functions they find the same order in half the time.
_NUM_TREES = 32


def distributions(search: SearchSpec) -> dict[str, BaseDistribution]:
    """The Optuna distribution of each searched key; keys that are computed from others have none.

    The values of a `choice` or a `grid` stand as `as_choice` has them.
    """
    return {key: _distribution(entry) for key, entry in sorted(search.space.items()) if entry.of is None}


def as_choice(value: Any) -> CategoricalChoiceType:
    """A value of a `choice` as Optuna can store it: unchanged if it is a scalar, otherwise its JSON text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return json.dumps(value, sort_keys=True)


def importances(search: SearchSpec, table: TrialTable) -> dict[str, float]:
    """The share of each searched key in the variance of the objective, the largest first; the shares add up to 1.

    fANOVA (Hutter et al., ICML 2014): a random forest learns the value from the keys, and its variance is split
    among them. A `loguniform` range is used on a logarithmic axis, as it was sampled. Only finished and stopped
    trials with a finite value count; the last value of a failed or diverged trial is not its final one.

    Returns: an empty mapping for fewer than two such trials, or if all have the same value.
    """
    axes = {key: _axis(found) for key, found in distributions(search).items()}
    judged = [trial for trial in table.trials.values() if trial.status in ("finished", "stopped")]
    trials = [found for trial in judged if (found := _frozen(search, trial, axes)) is not None]
    if len({trial.value for trial in trials}) < 2 or all(axis.single() for axis in axes.values()):
        return {}
    shares = _ask(trials)
    return shares if all(math.isfinite(share) for share in shares.values()) else {}


def _ask(trials: list[optuna.trial.FrozenTrial]) -> dict[str, float]:
    # Only where it is asked for: it brings scikit-learn and pandas, which take more than a second to import.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    with quiet_optuna():
        study = optuna.create_study()
        study.add_trials(trials)
        evaluator = FanovaImportanceEvaluator(seed=_SEED, n_trees=_NUM_TREES)
        try:
            found = get_param_importances(study, evaluator=evaluator)
        except RuntimeError:  # every tree is constant: trials of the same values that came out differently
            return {}
    return {key: float(share) for key, share in found.items()}


def _distribution(entry: ParameterSpec) -> BaseDistribution:
    if entry.values is not None:
        return CategoricalDistribution([as_choice(value) for value in entry.values])
    if entry.int is not None:
        return IntDistribution(*entry.int)
    if entry.loguniform is not None:
        return FloatDistribution(*entry.loguniform, log=True)
    assert entry.uniform is not None, "ParameterSpec holds that one of its kinds is given"
    return FloatDistribution(*entry.uniform)


def _axis(found: BaseDistribution) -> BaseDistribution:
    """Map a logarithmic range to a linear one, because fANOVA weights ranges by their linear length."""
    if isinstance(found, FloatDistribution) and found.log:
        return FloatDistribution(math.log(found.low), math.log(found.high))
    return found


def _frozen(
    search: SearchSpec, trial: Trial, axes: Mapping[str, BaseDistribution]
) -> optuna.trial.FrozenTrial | None:
    """Return None if the trial's objective is not finite or any searched key is missing or out of range."""
    if trial.value is None or not math.isfinite(trial.value):
        return None
    try:
        params = {key: _placed(search.space[key], trial.values[key], axis=axis) for key, axis in axes.items()}
        return optuna.trial.create_trial(params=params, distributions=dict(axes), value=trial.value)
    except (KeyError, TypeError, ValueError):
        return None


def _placed(entry: ParameterSpec, value: Any, *, axis: BaseDistribution) -> Any:
    """Return a value's position on its axis, clipped to the range: a perturbed value may be outside it."""
    if not isinstance(axis, (FloatDistribution, IntDistribution)):
        return as_choice(value)
    at = math.log(value) if entry.loguniform is not None and value > 0 else value
    clipped = min(max(at, axis.low), axis.high)
    return round(clipped) if isinstance(axis, IntDistribution) else float(clipped)


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence Optuna, which logs every study and every trial that is added."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
