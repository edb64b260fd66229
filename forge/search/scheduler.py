"""Ray Tune's schedulers, as a search uses them: what they are told is written down first, and told again after a
restart.

Tune itself forgets a scheduler's state when a search is restored. Here it follows from the search's journal: what
trials were judged by before is told to a new scheduler in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any

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
from forge.events import Event, PopulationRoundCompleted, TrialEnded, TrialExploited, TrialReported
from forge.runs.trials import Trial, TrialTable
from forge.search.encoding import ONCE, plain_values, searched, within

_TIME = "step"
_VALUE = "value"


class JournaledScheduler(TrialScheduler):  # type: ignore[misc]
    """A scheduler of Tune's, with a memory."""

    def __init__(
        self,
        inner: TrialScheduler,
        *,
        search: SearchSpec,
        book: TrialTable,
        tell: Callable[[Event], None],
        on_hello: Callable[[int, str], None],
        on_stopped: Callable[[int, str], None],
        spared: Set[int] = frozenset(),
    ) -> None:
        """Args:
        book: the trials as they were when the search was carried on, and as they become.
        tell: writes an event down, and takes it into the book; returns when it is written.
        on_hello: told of the stage that a trial is on.
        on_stopped: told of a trial that was given up, and why.
        spared: trials that are never given up, as the one with the job's own values.
        """
        super().__init__()
        self._inner, self._search, self._book = inner, search, book
        self._tell, self._on_hello, self._on_stopped = tell, on_hello, on_stopped
        self._spared = spared
        self._is_population = search.scheduler.is_population
        self._rays: dict[int, RayTrial] = {}
        for trial in book.trials.values():
            if trial.is_over and not self._is_population:
                self._remember(_Known(trial.number), trial)
        if self._is_population and book.population_step:
            inner._next_perturbation_sync = book.population_step + self._interval

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a pickle of what it is given, and never needs it: a search is known from its journal."""
        return {}

    @property
    def metric(self) -> None:
        """Tune need not look at results itself."""
        return

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """They are the job's."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        """A trial is there; perhaps one that was judged before."""
        number = int(trial.trial_id)
        if self._rays.get(number) is trial:  # it has a new actor, and is what it was
            return
        self._rays[number] = trial
        known = self._book.trials.get(number)
        if known is not None and not self._is_population:
            self._remember(trial, known)
        else:
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Write it down, then decide what becomes of the trial."""
        number, step = int(trial.trial_id), int(result[_TIME])
        if result.get("is_hello"):
            self._on_hello(number, result["stage"])
        if _VALUE not in result:
            return str(TrialScheduler.CONTINUE)
        is_known = step <= self._book.trials[number].step
        if not is_known:
            self._tell(_reported(number, result))
        elif not self._is_population:
            return str(TrialScheduler.CONTINUE)
        for once in ONCE:  # a copy of this trial must not begin as this one did
            trial.config.pop(once, None)
        decision = str(self._inner.on_trial_result(tune_controller, trial, result))
        if self._is_population:
            self._tell_moves(step)
        elif decision == TrialScheduler.PAUSE or (decision == TrialScheduler.STOP and number in self._spared):
            # A trial is never put aside for another.
            return str(TrialScheduler.CONTINUE)
        elif decision == TrialScheduler.STOP:
            reason = f"given up by {self._search.scheduler.kind} at step {step}"
            self._on_stopped(number, reason)
            self._tell(TrialEnded(trial=number, status="stopped", step=step, value=result[_VALUE], reason=reason))
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        """It has said that it is done."""
        number = int(trial.trial_id)
        known = self._book.trials.get(number)
        if known is None or known.is_over:
            return
        if _VALUE in result and int(result[_TIME]) > known.step:
            self._tell(_reported(number, result))
        self._tell(
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
        """Its actor has died; Tune gives it another one, unless that happened too often."""
        if trial.should_recover():
            return
        number = int(trial.trial_id)
        known = self._book.trials.get(number)
        if known is not None and not known.is_over:
            reason = "its process died again and again; see the search's logs"
            self._tell(TrialEnded(trial=number, status="failed", step=known.step, value=known.value, reason=reason))
        self._inner.on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        """It was taken away before it ran."""
        self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """The inner one's choice."""
        return self._inner.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        """For Tune's own output, which is off."""
        return str(self._inner.debug_string())

    def _remember(self, trial: Any, known: Trial) -> None:
        """Tell the inner scheduler of a trial as if it had just been judged; what it decides was done already."""
        self._inner.on_trial_add(None, trial)
        results = [{_TIME: step, _VALUE: value, "training_iteration": step} for step, value in known.reports]
        for result in results:
            self._inner.on_trial_result(_NoOthers(), trial, result)
        if known.status == "finished":
            self._inner.on_trial_complete(None, trial, results[-1])

    def _tell_moves(self, step: int) -> None:
        """What a round of copying has changed."""
        if self._inner._next_perturbation_sync <= self._book.population_step + self._interval:
            return
        for number, trial in self._rays.items():
            donor = trial.config["trial"]  # its config is a copy of the donor's
            if donor != number:
                trial.config["trial"] = number
                values = plain_values(trial.config["values"], self._search)
                self._tell(TrialExploited(trial=number, donor=donor, step=step, values=values))
        self._tell(PopulationRoundCompleted(step=step))

    @property
    def _interval(self) -> int:
        return self._search.scheduler.interval_steps or 1


class _Known:
    """A trial of a search before this one, which Tune does not know any more."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:04d}"


class _NoOthers:
    """What a scheduler asks of Tune while it is only told of the past."""

    def get_live_trials(self) -> list[Any]:
        return []


def make_scheduler(search: SearchSpec, *, first_report: int, total_steps: int) -> TrialScheduler:
    """Ray Tune's own, as the job has it.

    Args:
        first_report: the step at which a trial is judged first.
        total_steps: of a trial.
    """
    spec = search.scheduler
    judged = {"time_attr": _TIME, "metric": _VALUE, "mode": search.mode}
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
