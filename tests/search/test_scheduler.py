"""Ray Tune's schedulers with a memory: one that is made anew decides as if it had been there all the time."""

from __future__ import annotations

import random
from typing import Any

import pytest

from forge.events import Event, event_to_record
from forge.runs.trials import TrialTable
from forge.search.encoding import config_values, plain_values
from forge.search.scheduler import JournaledScheduler, make_scheduler
from tests.support.searches import DECAY, LR, SearchHistory, search_spec

TOTAL = 27


class RayTrial:
    """What a scheduler sees of one."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"{number:04d}"
        self.config: dict[str, Any] = {"trial": number}
        self.status = "RUNNING"


class Tune:
    """What a scheduler asks of Tune."""

    search_alg = None

    def get_live_trials(self) -> list[RayTrial]:
        return []


class Story:
    """Trials that are judged one after the other, by a scheduler that may be made anew at any moment."""

    def __init__(self, kind: str) -> None:
        self.spec = search_spec({"scheduler": {"kind": kind, "grace_steps": 3}})
        self.history = SearchHistory()
        self.book = TrialTable(self.history.events)
        self.rays: dict[int, RayTrial] = {}
        self.decisions: list[tuple[int, int, str]] = []
        self.begin()

    def begin(self) -> None:
        self.book = TrialTable(self.history.events)
        self.schedule = JournaledScheduler(
            make_scheduler(self.spec, first_report=3, total_steps=TOTAL),
            search=self.spec,
            book=self.book,
            tell=self.tell,
            on_hello=lambda number, stage: None,
            on_stopped=lambda number, reason: None,
        )
        for number, trial in self.book.trials.items():
            if not trial.is_over:
                self.schedule.on_trial_add(Tune(), self.rays[number])

    def tell(self, event: Event) -> None:
        self.history.tell(event)
        self.book.add({"time": self.history.now} | event_to_record(event))

    def add(self, number: int) -> None:
        self.rays[number] = RayTrial(number)
        self.schedule.on_trial_add(Tune(), self.rays[number])
        self.history.suggest({})
        self.book.add(self.history.events[-1])
        self.history.start(number, total_steps=TOTAL)
        self.book.add(self.history.events[-1])

    def judge(self, number: int, step: int, value: float) -> bool:
        """Returns: whether the trial goes on."""
        result = {"step": step, "value": value, "stage": "", "done": False}
        decision = self.schedule.on_trial_result(Tune(), self.rays[number], result)
        self.decisions.append((number, step, decision))
        return decision == "CONTINUE"


def story_of(kind: str, *, restarts: set[int]) -> list[tuple[int, int, str]]:
    chance, story = random.Random(11), Story(kind)
    floors = {number: chance.uniform(1, 3) for number in range(1, 13)}
    running: dict[int, int] = {}
    waiting = list(floors)
    for moment in range(400):
        if moment in restarts:
            story.begin()
        while waiting and len(running) < 3:
            number = waiting.pop(0)
            story.add(number)
            running[number] = 0
        if not running:
            break
        number = chance.choice(sorted(running))
        running[number] += 3
        step = running[number]
        if step >= TOTAL or not story.judge(number, step, floors[number] + 2.0 / step):
            if step >= TOTAL:
                last = {"step": step, "value": floors[number], "status": "finished", "done": True, "reason": ""}
                story.schedule.on_trial_complete(Tune(), story.rays[number], last)
            del running[number]
    return story.decisions


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_made_anew_at_any_moment_it_decides_the_same(kind: str) -> None:
    expected = story_of(kind, restarts=set())
    assert {decision for _, _, decision in expected} == {"CONTINUE", "STOP"}
    assert story_of(kind, restarts={5, 6, 20, 37}) == expected


def test_a_result_that_is_known_is_neither_written_nor_judged_again() -> None:
    story = Story("asha")
    story.add(1)
    story.judge(1, 3, 2.0)
    told = len(story.history.events)
    assert story.judge(1, 3, 9.0)
    assert len(story.history.events) == told


def test_values_of_a_box_come_back_as_they_were() -> None:
    spec = search_spec(
        {"space": {LR: {"loguniform": [1e-4, 1e-2]}, DECAY: {"uniform": [0.0, 0.4]}},
         "scheduler": {"kind": "pb2", "interval_steps": 2}}
    )  # fmt: skip
    boxed = config_values({LR: 1e-3, DECAY: 0.1}, spec)
    assert boxed == pytest.approx({LR: 0.5, DECAY: 0.25})
    assert plain_values(boxed, spec) == pytest.approx({LR: 1e-3, DECAY: 0.1})
    assert plain_values({LR: 1.2, DECAY: -0.1}, spec) == pytest.approx({LR: 1e-2, DECAY: 0.0})
