"""Run a search on Ray Tune: choose the values of trials, decide when to stop, and count the cost.

The search's events are its journal and its only state: every decision is written before it takes effect. A search
that is resumed after a kill gives the same trials the same values, keeps the trials that had ended, and continues
the others from their checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from forge.config.overrides import own_values, search_of, trial_job, usual_values
from forge.errors import RunError
from forge.events import Event, TrialEnded, TrialSuggested, event_to_record
from forge.plan.plan import Plan, plan_to_json
from forge.plan.search import SearchPlan
from forge.pricing.budget import CostLimits, CostMeter, read_price
from forge.runs.reader import read_run
from forge.runs.records import seconds_run
from forge.runs.secrets import credentials
from forge.runs.trials import Trial, TrialTable
from forge.runtime.actor_names import HEAD, NAMESPACE
from forge.runtime.corpus_server import end_corpus_server
from forge.runtime.local_cluster import is_local_cluster
from forge.runtime.supervised_run import resource_of
from forge.search.encoding import config_values
from forge.search.node_pool import NodePool
from forge.search.scheduler import JournaledScheduler, make_scheduler
from forge.search.suggest import suggest
from forge.search.trial import TrialConfig, TrialTrainable, plan_trial
from forge.search.tune_algorithm import JournalSearch, StopAll

_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# The smallest fraction of a resource that Ray accounts for.
_LEAST_SHARE = 1e-4
_MAX_FAILURES = 5
_COUNT_S = 1.0
_STOP_S = 120.0
_HALT_POLL_S = 0.3


def run_search(plan: Plan, *, folder: Path, recorder: Any, stop: threading.Event) -> str | None:
    """Run or resume a search; returns when every trial is over, or the search was stopped.

    Args:
        folder: the search's run folder.
        recorder: handle of the search's recorder actor.
        stop: set when every trial is to write a checkpoint and stop.

    Returns: None if every trial is over; otherwise why the search stopped, empty if it was asked to.
    """
    # As many trials have a Tune actor as run at once, so that a waiting trial takes over the actor of one that
    # ends.
    os.environ.update(_TUNE | {"TUNE_MAX_PENDING_TRIALS_PG": str(_search_plan(plan).trials_at_once)})
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # it warns about result files that forge does not write
    from ray import tune

    events = read_run(folder).events
    coordinator = SearchCoordinator(plan, folder=folder, recorder=recorder, stop=stop, events=events)
    coordinator.begin()  # fork servers start while Tune does
    try:
        common = TrialConfig(
            search_folder=str(folder), plan_json=plan_to_json(plan), nodes=coordinator.nodes, recorder=recorder
        )
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialTrainable, common=common),
                {"cpu": 0} | dict.fromkeys(HEAD, share_of(_search_plan(plan).trials_at_once)),
            ),
            tune_config=tune.TuneConfig(
                search_alg=coordinator.algorithm(), scheduler=_scheduler(plan, coordinator), reuse_actors=True
            ),
            run_config=tune.RunConfig(
                name=f"session-{int(time.time())}",
                storage_path=str((folder / "logs" / "tune").absolute()),
                stop=coordinator.stopper(),
                failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
                verbose=0,
            ),
        )
        tuner.fit()
    finally:
        coordinator.end()
    return coordinator.conclude()


def _scheduler(plan: Plan, coordinator: SearchCoordinator) -> JournaledScheduler:
    search = search_of(plan.job)
    first_trial = trial_job(plan.job, usual_values(plan.job))
    first_report = first_trial.training.evaluate_every.steps or plan.total_steps
    return JournaledScheduler(
        make_scheduler(search, first_report=first_report, total_steps=plan.total_steps),
        search=search,
        table=coordinator.table,
        record=coordinator.record,
        on_registration=coordinator.register,
        on_stopped=coordinator.end_trial,
        spared={1} if search.searcher.kind != "grid" and own_values(plan.job) else set(),
    )


class SearchCoordinator:
    """The decisions of a search that are not Tune's: values, slots, budget, when to stop."""

    def __init__(
        self,
        plan: Plan,
        *,
        folder: Path,
        recorder: Any,
        stop: threading.Event,
        events: Sequence[dict[str, Any]],
    ) -> None:
        self._plan, self._search, self._recorder, self._stop = plan, search_of(plan.job), recorder, stop
        self._search_plan = _search_plan(plan)
        self.table = TrialTable(events)
        self.nodes = NodePool(
            search_id=folder.name,
            folder=str(folder),
            environment=credentials(os.environ, with_files=is_local_cluster()),
            num_ranks=self._search_plan.trials_at_once * plan.job.resources.workers.low,
        )
        self._runners: dict[int, str] = {}
        self._undecided: set[int] = set()
        """Trials whose values are chosen only when they are about to start."""
        self._ready: set[int] = set()
        """Of these, the ones that are ready to start."""
        self._halt_reason: str | None = None
        self._is_halted, self._is_over = threading.Event(), threading.Event()
        self._spent_s = seconds_run(events)
        self._started_at = time.monotonic()
        spent_usd = max((event["usd"] for event in events if event["event"] == "CostUpdated"), default=0.0)
        resources = plan.job.resources
        usd_limit = plan.job.usd_limit
        limits = CostLimits(usd=usd_limit and usd_limit[1], usd_per_hour=resources.max_usd_per_hour)
        host = ray.util.get_node_ip_address()
        self._meter = CostMeter(
            limits.capped_by(os.environ), head=host, head_usd_per_hour=read_price(os.environ), spent_usd=spent_usd
        )
        self._counted: set[str] = set()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    # --- called by Tune

    def algorithm(self) -> JournalSearch:
        """The trials that Tune is to run: those that were not over, then new ones."""
        waiting = [trial for trial in self.table.trials.values() if not trial.is_over]
        configs = {trial.number: self._resumed_config(trial) for trial in waiting}
        for number in range(max(self.table.trials, default=0) + 1, self._search_plan.num_trials + 1):
            configs[number] = {"trial": number}
            if self._search.scheduler.is_population:
                configs[number]["values"] = self._config_values(self._choose(number))
            else:
                self._undecided.add(number)
        return JournalSearch(configs)

    def stopper(self) -> StopAll:
        """Ends Tune's loop once every trial has written its checkpoint."""
        return StopAll(self._is_halted)

    def register(self, number: int, runner: str) -> None:
        """Note the runner of a trial, and choose the trial's values if it has none."""
        self._runners[number] = runner
        if number in self._undecided:  # repeated if its Tune actor was replaced
            self._ready.add(number)
            self._assign()

    def end_trial(self, number: int, reason: str) -> None:
        """End a trial at once."""
        runner = self._runner_of(number)
        if runner is not None:
            runner.end_trial.remote(reason)

    def record(self, event: Event) -> None:
        """Write an event to the journal, then apply it to the table of trials."""
        ray.get(self._recorder.event.remote(event))
        self.table.add({"time": time.time()} | event_to_record(event))
        if isinstance(event, TrialEnded):
            self._runners.pop(event.trial, None)
            self._assign()
            self._grow_when_last()

    # --- begin and end

    def begin(self) -> None:
        """Start fork servers on every node, and begin to watch cost and time."""
        remove_groups(self.nodes.search_id)
        plan_json = plan_to_json(plan_trial(self._plan, usual_values(self._plan.job)))
        kind = resource_of(self._plan)
        low, at_once = self._plan.job.resources.workers.low, self._search_plan.trials_at_once
        for node in ray.nodes():
            num_trials = min(at_once, int(node["Resources"].get(kind, 0)) // low) if node["Alive"] else 0
            if num_trials:
                self.nodes.on(node["NodeID"]).start_fork_servers.remote(plan_json, num_trials)
        self._watching.start()

    def end(self) -> None:
        """End all actors of the search and remove its placement groups."""
        self._is_over.set()
        self._watching.join(timeout=_STOP_S)
        self._meter.count(time.monotonic())
        if self._meter.usd_per_hour:  # the final sum, where a resumed search begins
            self._record_cost()
        self.nodes.end()
        remove_groups(self.nodes.search_id)
        end_corpus_server(self.nodes.search_id)

    def conclude(self) -> str | None:
        """What `run_search` returns.

        Raises: RunError if Tune has ended before the last trial although nothing stopped the search.
        """
        left = [trial.number for trial in self.table.trials.values() if not trial.is_over]
        if not left and len(self.table.trials) == self._search_plan.num_trials:
            return None
        if self._halt_reason is not None:
            return self._halt_reason
        if left:
            raise RunError(f"Ray Tune ended before trial {left[0]} did; see {self.nodes.folder}/logs")
        return None

    def _watch(self) -> None:
        while not self._is_over.wait(_COUNT_S):
            with contextlib.suppress(ray.exceptions.RayError):  # repeated in a second
                self._count()
            if self._halt_reason is None:
                self._halt_reason = self._halt_cause()
            if self._halt_reason is not None:
                self._halt()
                return

    def _halt_cause(self) -> str | None:
        if self._stop.is_set():
            return ""
        hours = self._search.max_hours
        if hours is not None and self._spent_s + time.monotonic() - self._started_at > hours * 3600:
            return f"it has run for {hours:g} hours, the limit of search.max_hours"
        return self._meter.violation()

    def _halt(self) -> None:
        """Ask every trial to write a checkpoint and stop; end Tune's loop when all have."""
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline and not self._is_over.is_set():
            runners = [runner for number in list(self._runners) if (runner := self._runner_of(number)) is not None]
            with contextlib.suppress(ray.exceptions.RayError):
                if not any(ray.get([runner.stop.remote() for runner in runners], timeout=_STOP_S)):
                    break
            time.sleep(_HALT_POLL_S)
        self._is_halted.set()

    def _count(self) -> None:
        """Update the cost of all nodes of the search."""
        actors = self.nodes.all()
        for name in actors.keys() - self._counted:
            address, price = ray.get(actors[name].price.remote(), timeout=_STOP_S)
            self._meter.add_agent(name, host=address, usd_per_hour=price)
        for name in self._counted - actors.keys():
            self._meter.remove_agent(name)
        self._counted = set(actors)
        now = time.monotonic()
        self._meter.count(now)
        if self._meter.take_report(now):
            self._record_cost()

    def _record_cost(self) -> None:
        counted = self._meter.cost()
        self._recorder.event.remote(counted)

    # --- values

    def _assign(self) -> None:
        """Choose values for the trials that are ready to start, in the order of their numbers."""
        while self._ready and self._halt_reason is None:
            last = max(self.table.trials, default=0)
            if last < max(self._ready) and self._choose(last + 1) is None:
                break
            for number in sorted(self._ready & self.table.trials.keys()):
                self._ready.discard(number)
                runner, trial = self._runner_of(number), self.table.trials[number]
                if runner is not None:
                    runner.set_values.remote(number, trial.values, time.time())

    def _choose(self, number: int) -> dict[str, Any] | None:
        """Choose and record the values of a new trial; None if an earlier trial must end first."""
        values = suggest(self._plan.job, number=number, table=self.table, at_once=self._search_plan.trials_at_once)
        if values is not None:
            self.record(TrialSuggested(trial=number, values=values))
        return values

    def _config_values(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        assert values is not None, "the first values of a population do not depend on other trials"
        return config_values(values, self._search)

    def _resumed_config(self, trial: Trial) -> dict[str, Any]:
        """Return the Tune config of a trial that had not ended when the search was interrupted."""
        config: dict[str, Any] = {
            "trial": trial.number,
            "values": self._config_values(trial.values),
            "reported": trial.step,
        }
        if self._search.scheduler.is_population:
            if trial.step > self.table.population_step:  # it had reported and was waiting for the others
                config |= {"replay": True, "value": trial.value}
            elif trial.moves and trial.moves[-1][0] == trial.step:
                config["exploited"] = trial.moves[-1]
        return config

    def _grow_when_last(self) -> None:
        """If no trial is waiting for slots, allow the running trials to use all of them."""
        running = [trial for trial in self.table.trials.values() if not trial.is_over]
        num_over = len(self.table.trials) - len(running)
        if (
            len(running) < self._search_plan.trials_at_once
            and num_over + len(running) == self._search_plan.num_trials
        ):
            for trial in running:
                runner = self._runner_of(trial.number)
                if runner is not None:
                    runner.claim_slots.remote()

    def _runner_of(self, number: int) -> Any:
        name = self._runners.get(number)
        if name is None:
            return None
        try:
            return ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None


def share_of(num_trials: int) -> float:
    """The share of the head node's own resource that a Tune actor takes, so that exactly `num_trials` fit."""
    return max(1, math.floor(1 / (num_trials + 0.5) / _LEAST_SHARE)) * _LEAST_SHARE


def remove_groups(search_id: str) -> None:
    """Remove the placement groups that killed trial runners of a search have left."""
    for entry in placement_group_table().values():
        if entry["name"].startswith(f"forge-{search_id}.") and entry["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it was removed in between
                remove_placement_group(ray.util.get_placement_group(entry["name"]))


def _search_plan(plan: Plan) -> SearchPlan:
    assert plan.search is not None, "called for plans of a search only"
    return plan.search
