"""Ray Tune's schedulers with a journal, so that a resumed search makes the same decisions.

Tune does not keep a scheduler's state when a search is resumed. Here the state is rebuilt from the journal: the
results of earlier trials are replayed to a new scheduler in the same order, and a population's random choices are
seeded by its round. Exception: after a resumption, PB2 fits its model only to later results.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2

from forge.config.search import ParameterSpec, SearchSpec
from forge.errors import RunError
from forge.events import Event, PopulationRoundCompleted, TrialEnded, TrialExploited, TrialReported
from forge.runs.trials import Trial, TrialTable
from forge.search.encoding import FIRST_START_KEYS, plain_values, searched, within

_TIME = "step"
_VALUE = "value"


class JournaledScheduler(TrialScheduler):  # type: ignore[misc]
    """A Tune scheduler that records what happens and can be rebuilt from the record."""

    def __init__(
        self,
        inner: TrialScheduler,
        *,
        search: SearchSpec,
        table: TrialTable,
        record: Callable[[Event], None],
        on_registration: Callable[[int, str], None],
        on_stopped: Callable[[int, str], None],
        spared: Set[int] = frozenset(),
    ) -> None:
        """Args:
        inner: the scheduler that decides, from `make_scheduler`.
        table: the trials of the search; `record` updates it.
        record: writes an event to the journal; returns when it is written.
        on_registration: called with a trial's number and the name of its runner actor.
        on_stopped: called with the number of a trial that the scheduler stops, and the reason.
        spared: trials that are never stopped, such as the one with the job's own values.
        """
        super().__init__()
        self._inner, self._search, self._table = inner, search, table
        self._record, self._on_registration, self._on_stopped = record, on_registration, on_stopped
        self._spared = spared
        self._is_population = search.scheduler.is_population
        self._rays: dict[int, RayTrial] = {}
        for trial in table.trials.values():
            if trial.is_over and not self._is_population:
                self._replay(_FormerTrial(trial.number), trial)
        if self._is_population:
            _set_next_round(inner, table.population_step + self._interval)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune pickles its scheduler, but a search is restored from its journal."""
        return {}

    @property
    def metric(self) -> None:
        """None: Tune itself does not evaluate results."""
        return

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Keep the metric and mode that the job has set."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        """Add a trial; one of a resumed search with its earlier results."""
        number = int(trial.trial_id)
        if self._rays.get(number) is trial:  # only its Tune actor was replaced
            return
        self._rays[number] = trial
        known = self._table.trials.get(number)
        if known is not None and not self._is_population:
            self._replay(trial, known)
        else:
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Record the result, then let the inner scheduler decide."""
        number, step = int(trial.trial_id), int(result[_TIME])
        if result.get("is_registration"):
            self._on_registration(number, result["runner"])
        if _VALUE not in result:
            return str(TrialScheduler.CONTINUE)
        is_known = step <= self._table.trials[number].step
        if not is_known:
            self._record(_reported(number, result))
        elif not self._is_population:
            return str(TrialScheduler.CONTINUE)
        for key in FIRST_START_KEYS:  # another trial may continue with a copy of this config
            trial.config.pop(key, None)
        if self._is_population:
            self._seed_round()
        decision = str(self._inner.on_trial_result(tune_controller, trial, result))
        if self._is_population:
            self._record_round(step)
        elif decision == TrialScheduler.PAUSE or (decision == TrialScheduler.STOP and number in self._spared):
            # Trials are never paused in favour of another, except in a population.
            return str(TrialScheduler.CONTINUE)
        elif decision == TrialScheduler.STOP:
            reason = f"stopped by {self._search.scheduler.kind} at step {step}"
            self._on_stopped(number, reason)
            self._record(TrialEnded(trial=number, status="stopped", step=step, value=result[_VALUE], reason=reason))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        """Record how a trial ended."""
        number = int(trial.trial_id)
        known = self._table.trials.get(number)
        if known is None or known.is_over:
            return
        if _VALUE in result and int(result[_TIME]) > known.step:
            self._record(_reported(number, result))
        self._record(
            TrialEnded(
                trial=number,
                status=result.get("status", "failed"),
                step=known.step,
                value=known.value,
                reason=result.get("reason", ""),
            )
        )
        if known.status == "finished":
            self._inner.on_trial_complete(tune_controller, trial, result)
        else:
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        """Record a failure if the trial's Tune actor has died too often; otherwise Tune replaces the actor."""
        if trial.should_recover():
            return
        number = int(trial.trial_id)
        known = self._table.trials.get(number)
        if known is not None and not known.is_over:
            reason = "its process died too often; see the search's logs"
            self._record(
                TrialEnded(trial=number, status="failed", step=known.step, value=known.value, reason=reason)
            )
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self._inner.debug_string())

    def _replay(self, trial: Any, known: Trial) -> None:
        """Replay a trial's recorded results to the inner scheduler; its decisions have already taken effect."""
        self._inner.on_trial_add(None, trial)
        results = [{_TIME: step, _VALUE: value, "training_iteration": step} for step, value in known.reports]
        for result in results:
            self._inner.on_trial_result(_NoLiveTrials(), trial, result)
        if known.status == "finished":
            self._inner.on_trial_complete(None, trial, results[-1])

    def _seed_round(self) -> None:
        """Make a round's random choices depend on the search's seed and the round alone, not on earlier rounds."""
        seed = self._search.searcher.seed + self._table.population_step
        random.seed(seed)
        np.random.seed(seed % 2**32)

    def _record_round(self, step: int) -> None:
        """If a round of the population is complete, record which trials continue from another's checkpoint."""
        if _next_round(self._inner) <= self._table.population_step + self._interval:
            return
        for number, trial in self._rays.items():
            donor = trial.config["trial"]  # exploiting copies the donor's config
            if donor != number:
                trial.config["trial"] = number
                values = plain_values(trial.config["values"], self._search)
                self._record(TrialExploited(trial=number, donor=donor, step=step, values=values))
        self._record(PopulationRoundCompleted(step=step))

    @property
    def _interval(self) -> int:
        return self._search.scheduler.interval_steps or 1


class _FormerTrial:
    """A trial that ended before the search was resumed, for which Tune has no object."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:04d}"


class _NoLiveTrials:
    """Stands in for Tune's controller while recorded results are replayed: no trial is live."""

    def get_live_trials(self) -> list[Any]:
        return []


def _next_round(scheduler: TrialScheduler) -> int:
    """Return the step at which a synchronous population exploits next."""
    return int(scheduler._next_perturbation_sync)


def _set_next_round(scheduler: TrialScheduler, step: int) -> None:
    """Continue a population at a later round.

    Ray (2.60) has no public way to do this: `PopulationBasedTraining(burn_in_period=...)` would, but `PB2` does not
    accept it. Only this function and `_next_round` use the private attribute.

    Raises: RunError if this version of Ray has renamed it.
    """
    if not hasattr(scheduler, "_next_perturbation_sync"):
        raise RunError(
            f"cannot resume a population with ray {ray.__version__}: install the version in constraints.txt"
        )
    scheduler._next_perturbation_sync = step


def make_scheduler(search: SearchSpec, *, first_report: int, total_steps: int) -> TrialScheduler:
    """The Ray Tune scheduler that the job's search section describes.

    Args:
        first_report: step of a trial's first objective value.
        total_steps: of a trial.
    """
    spec = search.scheduler
    judged = {"time_attr": _TIME, "metric": _VALUE, "mode": search.direction}
    grace = min(spec.grace_steps or first_report, total_steps)
    if spec.kind == "asha":
        return AsyncHyperBandScheduler(
            max_t=total_steps,
            grace_period=grace,
            reduction_factor=spec.reduction_factor,
            stop_last_trials=False,
            **judged,
        )
    if spec.kind == "median":
        return MedianStoppingRule(grace_period=grace, **judged)
    if spec.kind == "pbt":
        return PopulationBasedTraining(
            perturbation_interval=spec.interval_steps or 1,
            quantile_fraction=spec.quantile,
            hyperparam_mutations={"values": {key: _domain(entry) for key, entry in searched(search).items()}},
            custom_explore_fn=lambda config: config | {"values": within(config["values"], search)},
            synch=True,
            log_config=False,
            **judged,
        )
    if spec.kind == "pb2":
        return PB2(
            perturbation_interval=spec.interval_steps or 1,
            quantile_fraction=spec.quantile,
            hyperparam_bounds={"values": {key: [0.0, 1.0] for key in searched(search)}},
            synch=True,
            log_config=False,
            **judged,
        )
    return FIFOScheduler()


def _reported(number: int, result: Mapping[str, Any]) -> TrialReported:
    metrics = {key.removeprefix("metrics/"): value for key, value in result.items() if key.startswith("metrics/")}
    return TrialReported(trial=number, step=int(result[_TIME]), value=result[_VALUE], metrics=metrics)


def _domain(entry: ParameterSpec) -> Any:
    if entry.values is not None:
        return list(entry.values)
    if entry.int is not None:
        return tune.randint(entry.int[0], entry.int[1] + 1)
    if entry.loguniform is not None:
        return tune.loguniform(*entry.loguniform)
    assert entry.uniform is not None, "ParameterSpec holds that one of its kinds is given"
    return tune.uniform(*entry.uniform)
