"""Folders and events of searches that never ran."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.config.search import SearchSpec
from forge.events import (
    CostUpdated,
    Event,
    RunFinished,
    RunStarted,
    TrialEnded,
    TrialExploited,
    TrialReported,
    TrialStarted,
    TrialSuggested,
    event_to_record,
)
from forge.plan.plan import Plan, plan_to_json
from forge.plan.search import plan_search
from forge.runs.trials import TrialTable
from tests.support.jobs import tiny_job, tiny_plan

LR = "training.optimizer.lr"
WARMUP = "training.schedule.warmup"
DECAY = "training.optimizer.weight_decay"
SPACE = {LR: {"loguniform": [1e-4, 1e-1]}, WARMUP: {"choice": [0, 1, 2, 4]}, DECAY: {"uniform": [0.0, 0.3]}}


def search_plan(search: Mapping[str, Any] | None = None, **changes: Any) -> Plan:
    """The tiny job with a search; `search` are its own keys, `changes` those of the job, as `tiny_job` has them."""
    body = {"space": SPACE, **(search or {})}
    plan = tiny_plan(search=body, **changes)
    assert plan.job.search is not None
    return replace(plan, search=plan_search(plan.job, plan.job.search, num_slots=4))


def search_spec(search: Mapping[str, Any] | None = None) -> SearchSpec:
    """The search section of that job."""
    found = tiny_job(search={"space": SPACE, **(search or {})}).search
    assert found is not None
    return found


class SearchHistory:
    """The events of a search that never ran."""

    def __init__(self, *, began: float = 1_000_000.0) -> None:
        self.now = began
        self.events: list[dict[str, Any]] = []
        self._num_trials = 0
        self.record(RunStarted(run_id="r", total_steps=6, resumed_from_step=0))

    @property
    def table(self) -> TrialTable:
        """The table of trials that the events describe."""
        return TrialTable(self.events)

    def record(self, event: Event, *, after_s: float = 0.0) -> None:
        """Append an event."""
        self.now += after_s
        self.events.append({"time": self.now} | event_to_record(event))

    def suggest(self, values: Mapping[str, Any]) -> int:
        """Suggest a new trial. Returns: its number."""
        self._num_trials += 1
        self.record(TrialSuggested(trial=self._num_trials, values=values))
        return self._num_trials

    def start(self, trial: int, *, total_steps: int = 6, seconds: float = 2.0) -> None:
        """A trial completes its first step."""
        self.record(TrialStarted(trial=trial, total_steps=total_steps, seconds=seconds, is_warm=trial > 1))

    def report(self, trial: int, step: int, value: float) -> None:
        """A trial reports an objective value."""
        self.record(TrialReported(trial=trial, step=step, value=value, metrics={"step": step}), after_s=1.0)

    def move(self, trial: int, *, donor: int, step: int, values: Mapping[str, Any]) -> None:
        """A trial continues from another's checkpoint with new values."""
        self.record(TrialExploited(trial=trial, donor=donor, step=step, values=values))

    def end(self, trial: int, *, status: str = "finished", reason: str = "") -> None:
        """A trial ends."""
        known = self.table.trials[trial]
        ended = TrialEnded(trial=trial, status=status, step=known.step, value=known.value, reason=reason)
        self.record(ended, after_s=0.5)

    def run(
        self,
        values: Mapping[str, Any],
        reported: Sequence[float],
        *,
        status: str = "finished",
        reason: str = "",
        total_steps: int = 6,
    ) -> int:
        """A whole trial with an objective value per step. Returns: its number."""
        trial = self.suggest(values)
        self.start(trial, total_steps=total_steps)
        for step, value in enumerate(reported, start=1):
            self.report(trial, step, value)
        self.end(trial, status=status, reason=reason)
        return trial

    def write(self, root: Path, plan: Plan, *, name: str = "tune-tiny-0101-000000-abcd") -> Path:
        """Write the folder of the search. Returns: the folder."""
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(plan_to_json(plan))
        (folder / "events.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self.events))
        return folder


def lifelike(*, num_trials: int = 16, num_steps: int = 20, seed: int = 3) -> SearchHistory:
    """A search over `SPACE` under asha: the learning rate decides, the warm-up helps, one trial diverges."""
    rng, history = random.Random(seed), SearchHistory()
    for number in range(1, num_trials + 1):
        values = {LR: 10 ** rng.uniform(-4, -1), WARMUP: rng.choice([0, 1, 2, 4]), DECAY: rng.uniform(0.0, 0.3)}
        floor = 2.0 + 0.6 * (math.log10(values[LR]) + 2.2) ** 2 - 0.04 * values[WARMUP]
        curve = [
            floor + (4.6 - floor) * math.exp(-step / 6) + rng.gauss(0, 0.015) for step in range(1, num_steps + 1)
        ]
        if number == 5:
            history.run(values, [4.2, 9.7, math.nan], status="diverged", total_steps=num_steps,
                        reason="its loss at step 3 is no number")  # fmt: skip
        elif number == 9:
            history.run(values, [], status="failed", total_steps=num_steps, reason="CUDA out of memory on rank 0")
        elif floor > 2.6:
            history.run(values, curve[: 2 if floor > 3 else 6], status="stopped", total_steps=num_steps,
                        reason="asha: not among the best 1/3 at its rung")  # fmt: skip
        else:
            history.run(values, curve, total_steps=num_steps)
        history.record(CostUpdated(usd=0.11 * number, usd_per_hour=2.4), after_s=3.0)
    history.record(RunFinished(step=num_trials))
    return history
