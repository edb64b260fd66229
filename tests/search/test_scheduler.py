"""Journaled Tune schedulers: after a restart they decide as if there had been none."""

from __future__ import annotations

import random
from typing import Any

import pytest
from ray.train import Checkpoint
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import TrialScheduler

from forge.events import Event, event_to_record
from forge.runs.trials import TrialTable
from forge.search.encoding import config_values, plain_values
from forge.search.scheduler import JournaledScheduler, make_scheduler
from tests.support.searches import DECAY, LR, SearchHistory, search_spec

TOTAL = 27
POPULATION = 6
INTERVAL = 3


class RayTrial:
    """What asha and median ask of a Tune trial."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:04d}"
        self.config: dict[str, Any] = {"trial": number}
        self.status = "RUNNING"


class Tune:
    """What asha and median ask of Tune's controller."""

    search_alg = None

    def get_live_trials(self) -> list[RayTrial]:
        return []


class Scenario:
    """Trials that report one after the other to a scheduler that may be restarted at any moment."""

    def __init__(self, kind: str) -> None:
        self.spec = search_spec({"scheduler": {"kind": kind, "grace_steps": 3}})
        self.history = SearchHistory()
        self.table = TrialTable(self.history.events)
        self.rays: dict[int, RayTrial] = {}
        self.decisions: list[tuple[int, int, str]] = []
        self.begin()

    def begin(self) -> None:
        self.table = TrialTable(self.history.events)
        self.schedule = JournaledScheduler(
            make_scheduler(self.spec, first_report=3, total_steps=TOTAL),
            search=self.spec,
            table=self.table,
            record=self.record,
            on_registration=lambda number, runner: None,
            on_stopped=lambda number, reason: None,
        )
        for number, trial in self.table.trials.items():
            if not trial.is_over:
                self.schedule.on_trial_add(Tune(), self.rays[number])

    def record(self, event: Event) -> None:
        self.history.record(event)
        self.table.add({"time": self.history.now} | event_to_record(event))

    def add(self, number: int) -> None:
        self.rays[number] = RayTrial(number)
        self.schedule.on_trial_add(Tune(), self.rays[number])
        self.history.suggest({})
        self.table.add(self.history.events[-1])
        self.history.start(number, total_steps=TOTAL)
        self.table.add(self.history.events[-1])

    def judge(self, number: int, step: int, value: float) -> bool:
        """Returns: whether the trial continues."""
        result = {"step": step, "value": value, "runner": "", "done": False}
        decision = self.schedule.on_trial_result(Tune(), self.rays[number], result)
        self.decisions.append((number, step, decision))
        return decision == "CONTINUE"


def scenario_of(kind: str, *, restarts: set[int]) -> list[tuple[int, int, str]]:
    chance, scenario = random.Random(11), Scenario(kind)
    floors = {number: chance.uniform(1, 3) for number in range(1, 13)}
    running: dict[int, int] = {}
    waiting = list(floors)
    for moment in range(400):
        if moment in restarts:
            scenario.begin()
        while waiting and len(running) < 3:
            number = waiting.pop(0)
            scenario.add(number)
            running[number] = 0
        if not running:
            break
        number = chance.choice(sorted(running))
        running[number] += 3
        step = running[number]
        if step >= TOTAL or not scenario.judge(number, step, floors[number] + 2.0 / step):
            if step >= TOTAL:
                last = {"step": step, "value": floors[number], "status": "finished", "done": True, "reason": ""}
                scenario.schedule.on_trial_complete(Tune(), scenario.rays[number], last)
            del running[number]
    return scenario.decisions


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_scheduler__restarted_at_any_moment__decides_the_same(kind: str) -> None:
    expected = scenario_of(kind, restarts=set())
    assert {decision for _, _, decision in expected} == {"CONTINUE", "STOP"}
    assert scenario_of(kind, restarts={5, 6, 20, 37}) == expected


def test_on_trial_result__known_step__is_neither_recorded_nor_judged() -> None:
    scenario = Scenario("asha")
    scenario.add(1)
    scenario.judge(1, 3, 2.0)
    num_events = len(scenario.history.events)
    assert scenario.judge(1, 3, 9.0)
    assert len(scenario.history.events) == num_events


def test_plain_values__of_config_values__are_the_values() -> None:
    spec = search_spec(
        {"space": {LR: {"loguniform": [1e-4, 1e-2]}, DECAY: {"uniform": [0.0, 0.4]}},
         "scheduler": {"kind": "pb2", "interval_steps": 2}}
    )  # fmt: skip
    boxed = config_values({LR: 1e-3, DECAY: 0.1}, spec)
    assert boxed == pytest.approx({LR: 0.5, DECAY: 0.25})
    assert plain_values(boxed, spec) == pytest.approx({LR: 1e-3, DECAY: 0.1})
    assert plain_values({LR: 1.2, DECAY: -0.1}, spec) == pytest.approx({LR: 1e-2, DECAY: 0.0})


class PausedTrial(TuneTrial):  # type: ignore[misc]
    """A trial of Tune, without an actor; a population's trials always have a checkpoint when they pause."""

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(f"/nowhere/{self.trial_id}")


class Population:
    """Trials that take turns; the parts of Tune's controller that PBT uses."""

    search_alg = None

    def __init__(self, kind: str) -> None:
        space = {LR: {"loguniform": [1e-4, 1e-1]}, DECAY: {"uniform": [0.0, 0.4]}}
        self.spec = search_spec({"space": space, "scheduler": {"kind": kind, "interval_steps": INTERVAL}})
        self.history = SearchHistory()
        chance = random.Random(5)
        for _ in range(POPULATION):
            self.history.suggest({LR: 10 ** chance.uniform(-4, -1), DECAY: chance.uniform(0, 0.4)})
        self.begin()

    def begin(self) -> None:
        """Build scheduler and trials from the journal, as a resumed search does."""
        random.seed()  # a new process begins with another state
        self.table = TrialTable(self.history.events)
        self.schedule = JournaledScheduler(
            make_scheduler(self.spec, first_report=INTERVAL, total_steps=TOTAL),
            search=self.spec,
            table=self.table,
            record=self.record,
            on_registration=lambda number, runner: None,
            on_stopped=lambda number, reason: None,
        )
        self.trials = {}
        for number, trial in self.table.trials.items():
            config = {"trial": number, "values": config_values(trial.values, self.spec)}
            self.trials[number] = PausedTrial("stub", config=config, trial_id=f"{number:04d}", stub=True)
            self.schedule.on_trial_add(self, self.trials[number])

    def record(self, event: Event) -> None:
        self.history.record(event)
        self.table.add({"time": self.history.now} | event_to_record(event))

    def report(self, number: int, step: int) -> None:
        """A trial's loss depends on its values and those of all its ancestors."""
        trial, values = self.trials[number], self.table.trials[number].values
        trial.status = TuneTrial.RUNNING
        value = values[LR] + values[DECAY] + 1.0 / step
        decision = self.schedule.on_trial_result(self, trial, {"step": step, "value": value, "done": False})
        assert decision in (TrialScheduler.PAUSE, TrialScheduler.NOOP)
        trial.status = TuneTrial.PAUSED

    def get_trials(self) -> list[TuneTrial]:
        return list(self.trials.values())

    get_live_trials = get_trials

    def pause_trial(self, trial: TuneTrial, *, should_checkpoint: bool) -> None:
        trial.status = TuneTrial.PAUSED

    def _schedule_trial_save(self, trial: TuneTrial, *, result: dict[str, Any]) -> Checkpoint:
        return trial.checkpoint


def population_journal(kind: str, *, restarts: set[tuple[int, int]]) -> list[dict[str, Any]]:
    """The events of four rounds; a restart `(round, n)` is before the n-th trial reports in that round."""
    population = Population(kind)
    for round_ in range(1, 5):
        for number in range(1, POPULATION + 1):
            if (round_, number) in restarts:
                population.begin()
                for earlier in range(1, number):  # as resumed trials do that were waiting for the others
                    population.report(earlier, round_ * INTERVAL)
            population.report(number, round_ * INTERVAL)
    return population.history.events


def test_pbt__restarted_at_any_moment__exploits_the_same_trials_with_the_same_values() -> None:
    expected = population_journal("pbt", restarts=set())
    exploited = [event for event in expected if event["event"] == "TrialExploited"]
    assert len({event["step"] for event in exploited}) == 4
    assert all(event["donor"] != event["trial"] for event in exploited)
    for restarts in ({(2, 1)}, {(3, 4)}, {(1, 6), (2, 1), (4, 3)}):
        assert population_journal("pbt", restarts=restarts) == expected


def test_pb2__restarted__continues_with_the_next_round_within_the_ranges() -> None:
    """Its model is fitted to the results since the restart only; rounds and ranges are the same."""
    events = population_journal("pb2", restarts={(3, 1)})
    rounds = [event["step"] for event in events if event["event"] == "PopulationRoundCompleted"]
    assert rounds == [INTERVAL * number for number in (1, 2, 3, 4)]
    exploited = [event["values"] for event in events if event["event"] == "TrialExploited"]
    assert exploited
    assert all(1e-4 <= values[LR] <= 1e-1 and 0 <= values[DECAY] <= 0.4 for values in exploited)
