"""A search carried out by Ray Tune: it asks for trials, runs them on the cluster, and lets its schedulers judge.

The search's events are its journal. What was decided is written before it is done, and nothing else is kept:
after a kill the same trials have the same values, those that were over stay so, and the others go on from their
checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import placement_group_table, remove_placement_group

from forge.config.overrides import own_values, search_of, trial_job, usual_values
from forge.errors import RunError
from forge.events import CostUpdated, Event, TrialEnded, TrialSuggested, event_to_record
from forge.plan.plan import Plan, plan_to_json
from forge.plan.search import SearchPlan
from forge.pricing.budget import CostLimits, CostMeter, read_price
from forge.runs.reader import read_run
from forge.runs.secrets import credentials
from forge.runs.trials import Trial, TrialTable
from forge.runtime.corpus_server import CORPUS_SERVER
from forge.runtime.elastic_engine import NAMESPACE, resource_of
from forge.runtime.recorder_actor import HEAD
from forge.search.encoding import config_values
from forge.search.node_actor import NodePool
from forge.search.scheduler import JournaledScheduler, make_scheduler
from forge.search.suggest import suggest
from forge.search.trial import TrialConfig, TrialTrainable, plan_trial
from forge.search.tune_algorithm import JournalSearch, StopAll

_TUNE = {
    # A trial that waits has its actor, so that the one before it hands its own on.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_THRESHOLD_S": "60",
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Ray's smallest part of a resource.
_LEAST_SHARE = 1e-4
_MAX_FAILURES = 5
_COUNT_S = 1.0
_STOP_S = 120.0
_HALT_POLL_S = 0.3


def run_search(plan: Plan, *, folder: Path, recorder: Any, stop: threading.Event) -> str | None:
    """Carry a search out, or on; returns when every trial is over, or it is stopped.

    Args:
        folder: the search's.
        recorder: its one writer, an actor.
        stop: set when every trial is to write a checkpoint and stop.

    Returns: why it was stopped, empty if somebody asked; None if every trial is over.
    """
    os.environ.update(_TUNE | {"TUNE_MAX_PENDING_TRIALS_PG": str(_planned(plan).trials_at_once)})
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # it misses files that nobody writes
    from ray import tune

    control = SearchCoordinator(plan, folder=folder, recorder=recorder, stop=stop, events=read_run(folder).events)
    control.begin()  # processes become warm while Tune starts
    try:
        search, book = search_of(plan.job), control.book
        seed = search.searcher.seed + book.population_step
        random.seed(seed)
        np.random.seed(seed % 2**32)
        every = trial_job(plan.job, usual_values(plan.job)).training.evaluate_every.steps or plan.total_steps
        schedule = JournaledScheduler(
            make_scheduler(search, first_report=every, total_steps=plan.total_steps),
            search=search,
            book=book,
            tell=control.tell,
            on_hello=control.hello,
            on_stopped=control.give_up,
            spared={1} if search.searcher.kind != "grid" and own_values(plan.job) else set(),
        )
        wiring = TrialConfig(
            search_folder=str(folder), plan_json=plan_to_json(plan), hosts=control.hosts, recorder=recorder
        )
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(TrialTrainable, wiring=wiring),
                {"cpu": 0} | dict.fromkeys(HEAD, share_of(_planned(plan).trials_at_once)),
            ),
            tune_config=tune.TuneConfig(search_alg=control.algorithm(), scheduler=schedule, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"session-{int(time.time())}",
                storage_path=str((folder / "logs" / "tune").absolute()),
                stop=control.stopper(),
                failure_config=tune.FailureConfig(max_failures=_MAX_FAILURES),
                verbose=0,
            ),
        )
        tuner.fit()
    finally:
        control.end()
    return control.conclude()


class SearchCoordinator:
    """What a search knows and decides while Tune carries it out."""

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
        self._folder = folder
        self.book = TrialTable(events)
        self.hosts = NodePool(
            search_id=folder.name,
            namespace=NAMESPACE,
            folder=str(folder),
            environment=credentials(os.environ),
            num_ranks=_planned(plan).trials_at_once * plan.job.resources.workers.low,
        )
        self._stages: dict[int, str] = {}
        self._fresh: set[int] = set()
        """Trials whose values are chosen when their turn has come."""
        self._wants: set[int] = set()
        """Of them, those whose turn has come."""
        self._halt_reason: str | None = None
        self._is_halted, self._is_over = threading.Event(), threading.Event()
        self._spent_s = seconds_carried(events)
        self._began = time.monotonic()
        spent_usd = max((event["usd"] for event in events if event["event"] == "CostUpdated"), default=0.0)
        wanted = plan.job.resources
        least = min((usd for usd in (self._search.max_usd, wanted.max_usd) if usd is not None), default=None)
        limits = CostLimits(usd=least, usd_per_hour=wanted.max_usd_per_hour)
        host = ray.util.get_node_ip_address()
        self._meter = CostMeter(
            limits.capped_by(os.environ), head=host, head_usd_per_hour=read_price(os.environ), spent_usd=spent_usd
        )
        self._met: set[str] = set()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    # --- what Tune asks

    def algorithm(self) -> JournalSearch:
        """Where Tune gets its trials from: those that were not over, then new ones."""
        waiting = [trial for trial in self.book.trials.values() if not trial.is_over]
        configs = {trial.number: self._config_again(trial) for trial in waiting}
        for number in range(max(self.book.trials, default=0) + 1, _planned(self._plan).num_trials + 1):
            configs[number] = {"trial": number}
            if self._search.scheduler.is_population:
                configs[number]["values"] = self._config_values(self._choose(number))
            else:
                self._fresh.add(number)
        return JournalSearch(configs, on_handed_out=lambda: None)

    def stopper(self) -> StopAll:
        """Tells Tune when to end: once every trial has written its checkpoint."""
        return StopAll(self._is_halted)

    def hello(self, number: int, stage: str) -> None:
        """A trial has an actor, and waits for its values if it has none."""
        self._stages[number] = stage
        if number in self._fresh:  # again, if its actor had to be started anew
            self._wants.add(number)
            self._assign()

    def give_up(self, number: int, reason: str) -> None:
        """End a trial at once."""
        stage = self._stage_of(number)
        if stage is not None:
            stage.leave.remote(reason)

    def tell(self, event: Event) -> None:
        """Write an event down, then know it."""
        ray.get(self._recorder.event.remote(event))
        self.book.add({"time": time.time()} | event_to_record(event))
        if isinstance(event, TrialEnded):
            self._stages.pop(event.trial, None)
            self._assign()
            self._grow_when_last()

    # --- its own watch

    def begin(self) -> None:
        """Have processes warm on every machine, and watch cost and time from now on."""
        remove_groups(self.hosts.search_id)
        plan_json, kind = (
            plan_to_json(plan_trial(self._plan, usual_values(self._plan.job))),
            resource_of(self._plan),
        )
        low, at_once = self._plan.job.resources.workers.low, _planned(self._plan).trials_at_once
        for node in ray.nodes():
            num_trials = min(at_once, int(node["Resources"].get(kind, 0)) // low) if node["Alive"] else 0
            if num_trials:
                self.hosts.on(node["NodeID"]).warm_up.remote(plan_json, num_trials)
        self._watching.start()

    def end(self) -> None:
        """Nothing of the search stays on the cluster."""
        self._is_over.set()
        self._watching.join(timeout=_STOP_S)
        self._meter.count(time.monotonic())
        if self._meter.usd_per_hour:  # all of it, for whoever carries the search on
            self._tell_cost()
        self.hosts.end()
        remove_groups(self.hosts.search_id)
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(f"{CORPUS_SERVER}{self.hosts.search_id}", namespace=NAMESPACE))

    def conclude(self) -> str | None:
        """Why it was stopped, empty if somebody asked; None if every trial is over.

        Raises: RunError if neither is so.
        """
        left = [trial.number for trial in self.book.trials.values() if not trial.is_over]
        if not left and len(self.book.trials) == _planned(self._plan).num_trials:
            return None
        if self._halt_reason is not None:
            return self._halt_reason
        if left:
            raise RunError(f"Ray Tune has ended, and trial {left[0]} has not; see {self.hosts.folder}/logs")
        return None

    def _watch(self) -> None:
        while not self._is_over.wait(_COUNT_S):
            with contextlib.suppress(ray.exceptions.RayError):  # asked again in a second
                self._count()
            if self._halt_reason is None:
                self._halt_reason = self._why_halt()
            if self._halt_reason is not None:
                self._halt()
                return

    def _why_halt(self) -> str | None:
        if self._stop.is_set():
            return ""
        hours = self._search.max_hours
        if hours is not None and self._spent_s + time.monotonic() - self._began > hours * 3600:
            return f"it has gone on for {hours:g} hours, as long as search.max_hours allows"
        return self._meter.violation()

    def _halt(self) -> None:
        """Have every trial write its checkpoint, then have Tune end."""
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline and not self._is_over.is_set():
            stages = [stage for number in list(self._stages) if (stage := self._stage_of(number)) is not None]
            with contextlib.suppress(ray.exceptions.RayError):
                if not any(ray.get([stage.stop.remote() for stage in stages], timeout=_STOP_S)):
                    break
            time.sleep(_HALT_POLL_S)
        self._is_halted.set()

    def _count(self) -> None:
        """What all machines of the search cost."""
        hosts = self.hosts.all()
        for name in hosts.keys() - self._met:
            address, price = ray.get(hosts[name].price.remote(), timeout=_STOP_S)
            self._meter.add_agent(name, host=address, usd_per_hour=price)
        for name in self._met - hosts.keys():
            self._meter.remove_agent(name)
        self._met = set(hosts)
        now = time.monotonic()
        self._meter.count(now)
        if self._meter.take_report(now):
            self._tell_cost()

    def _tell_cost(self) -> None:
        counted = CostUpdated(usd=self._meter.spent_usd, usd_per_hour=self._meter.usd_per_hour)
        self._recorder.event.remote(counted)

    # --- values

    def _assign(self) -> None:
        """Choose values for the trials whose turn has come, in the order of their numbers."""
        while self._wants and self._halt_reason is None:
            last = max(self.book.trials, default=0)
            if last < max(self._wants) and self._choose(last + 1) is None:
                break
            for number in sorted(self._wants & self.book.trials.keys()):
                self._wants.discard(number)
                stage, trial = self._stage_of(number), self.book.trials[number]
                if stage is not None:
                    stage.assign.remote(number, trial.values, time.time())

    def _choose(self, number: int) -> dict[str, Any] | None:
        """The values of a new trial, written down; None if another one must end before."""
        at_once = _planned(self._plan).trials_at_once
        values = suggest(self._plan.job, number=number, book=self.book, at_once=at_once)
        if values is not None:
            self.tell(TrialSuggested(trial=number, values=values))
        return values

    def _config_values(self, values: Mapping[str, Any] | None) -> dict[str, Any]:
        assert values is not None, "the first values of a population wait for nobody"
        return config_values(values, self._search)

    def _config_again(self, trial: Trial) -> dict[str, Any]:
        """Of a trial that was not over when the search ended before."""
        config: dict[str, Any] = {
            "trial": trial.number,
            "values": self._config_values(trial.values),
            "reported": trial.step,
        }
        if self._search.scheduler.is_population:
            if trial.step > self.book.population_step:  # it waits for the others
                config |= {"replay": True, "value": trial.value}
            elif trial.moves and trial.moves[-1][0] == trial.step:
                config["moved"] = trial.moves[-1]
        return config

    def _grow_when_last(self) -> None:
        """When no trial waits for a place, those that run may take all."""
        planned = _planned(self._plan)
        running = [trial for trial in self.book.trials.values() if not trial.is_over]
        num_over = len(self.book.trials) - len(running)
        if len(running) < planned.trials_at_once and num_over + len(running) == planned.num_trials:
            for trial in running:
                stage = self._stage_of(trial.number)
                if stage is not None:
                    stage.grow.remote()

    def _stage_of(self, number: int) -> Any:
        name = self._stages.get(number)
        if name is None:
            return None
        try:
            return ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return None


def share_of(num_trials: int) -> float:
    """What a trial's actor takes of the head's own resource: as many fit as are to run at once, and no more."""
    return max(1, math.floor(1 / (num_trials + 0.5) / _LEAST_SHARE)) * _LEAST_SHARE


def remove_groups(search_id: str) -> None:
    """Give back the places that killed trials of a search have left."""
    for entry in placement_group_table().values():
        if entry["name"].startswith(f"forge-{search_id}.") and entry["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it was removed meanwhile
                remove_placement_group(ray.util.get_placement_group(entry["name"]))


def seconds_carried(events: Sequence[Mapping[str, Any]]) -> float:
    """How long a search has gone on, in all the times that it was carried."""
    total, began = 0.0, None
    for before, event in pairwise(events):
        if before["event"] == "RunStarted":
            began = before["time"]
        if began is not None and event["event"] != "RunStarted":
            total += event["time"] - before["time"]
    return total


def _planned(plan: Plan) -> SearchPlan:
    assert plan.search is not None, "a search is carried by a plan that has one"
    return plan.search
