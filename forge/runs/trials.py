"""The trials of a search, rebuilt from its events.

The `events.jsonl` of a search is its journal: every decision is written before it takes effect, so a search that
was killed resumes from it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forge.config.evaluate import METRIC_PREFIX
from forge.plan.plan import Plan

TRIALS = "trials"
"""Folder in the search's folder that holds one run folder per trial."""

_MAX_GAP = 1000
"""Trials are numbered one after the other; a file with a number far beyond the others was not written by forge."""

Mode = Literal["min", "max"]


@dataclass(slots=True, kw_only=True)
class Trial:
    """One trial and what it has reported so far."""

    number: int
    """From 1."""
    values: dict[str, Any]
    """Current values; they change when the trial exploits another one."""
    suggested_at: float
    """Seconds since the epoch."""
    reports: list[tuple[int, float]] = field(default_factory=list)
    """(step, value of the metric), each step once."""
    status: str = "waiting"
    """`waiting`, `running`, `finished`, `stopped`, `diverged`, `failed`."""
    reason: str = ""
    total_steps: int | None = None
    start_s: float | None = None
    """From the decision to run it to its first step."""
    is_warm: bool = False
    ended_at: float | None = None
    moves: list[tuple[int, int]] = field(default_factory=list)
    """(step, donor): where it continued from another trial's state."""
    last_metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last step that it reported."""
        return self.reports[-1][0] if self.reports else 0

    @property
    def value(self) -> float | None:
        """The last value that it reported."""
        return self.reports[-1][1] if self.reports else None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status not in ("waiting", "running")

    @property
    def seconds(self) -> float | None:
        """From its suggestion to its end; None until then."""
        return None if self.ended_at is None else self.ended_at - self.suggested_at


class TrialTable:
    """All trials of a search, in order."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.trials: dict[int, Trial] = {}
        self.population_step = 0
        """The last step at which a population round was completed."""
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one record of `events.jsonl`; events that do not concern trials are ignored."""
        kind = record.get("event")
        if kind == "TrialSuggested" and 1 <= record["trial"] <= max(self.trials, default=0) + _MAX_GAP:
            self.trials[record["trial"]] = Trial(
                number=record["trial"], values=dict(record["values"]), suggested_at=record["time"]
            )
            return
        if kind == "PopulationRoundCompleted":
            self.population_step = record["step"]
        trial = self.trials.get(record.get("trial", 0))
        if trial is None:
            return
        if kind == "TrialStarted":
            trial.status, trial.total_steps = "running", record["total_steps"]
            if trial.start_s is None:
                trial.start_s, trial.is_warm = record["seconds"], record["is_warm"]
        elif kind == "TrialReported":
            if record["step"] > trial.step:
                value = record["value"]
                trial.reports.append((record["step"], math.nan if value is None else value))
                trial.last_metrics = dict(record["metrics"])
        elif kind == "TrialExploited":
            trial.values = dict(record["values"])
            trial.moves.append((record["step"], record["donor"]))
        elif kind == "TrialEnded":
            trial.status, trial.reason, trial.ended_at = record["status"], record["reason"], record["time"]

    def best(self, mode: Mode) -> Trial | None:
        """Return the best finished trial; if none finished, the best of those that reported a value."""
        reported = [
            trial for trial in self.trials.values() if trial.value is not None and math.isfinite(trial.value)
        ]
        sound = [trial for trial in reported if trial.status not in ("diverged", "failed")]
        finished = [trial for trial in sound if trial.status == "finished"]
        sign = 1.0 if mode == "min" else -1.0
        return min(
            finished or sound, key=lambda trial: (sign * float(trial.value or 0.0), trial.number), default=None
        )

    def best_so_far(self, mode: Mode) -> list[tuple[int, float]]:
        """Return (number of ended trials, best value among them), in the order in which trials ended."""
        ended = sorted(
            (trial for trial in self.trials.values() if trial.ended_at is not None),
            key=lambda trial: trial.ended_at or 0.0,
        )
        found: list[tuple[int, float]] = []
        choose = min if mode == "min" else max
        for count, trial in enumerate(ended, start=1):
            value = trial.value
            if value is None or not math.isfinite(value) or trial.status in ("diverged", "failed"):
                continue
            found.append((count, choose([value, *(best for _, best in found[-1:])])))
        return found

    def counts(self) -> dict[str, int]:
        """Return the number of trials of each status."""
        found: dict[str, int] = {}
        for trial in self.trials.values():
            found[trial.status] = found.get(trial.status, 0) + 1
        return found


def seconds_left(table: TrialTable, *, num_trials: int, at_once: int) -> float | None:
    """Estimate the remaining time from the ended trials; None if none has ended."""
    took = [trial.seconds for trial in table.trials.values() if trial.seconds is not None]
    if not took:
        return None
    return sum(took) / len(took) * math.ceil((num_trials - len(took)) / max(1, at_once))


def trial_folder(search_folder: str, number: int) -> str:
    """Return the run folder of a trial; its name is the trial's id."""
    return f"{search_folder}/{TRIALS}/{trial_id(search_folder.rstrip('/').rpartition('/')[2], number)}"


def trial_id(search_id: str, number: int) -> str:
    """`tune-lr-1126-0301-ab12`, 7 → `tune-lr-1126-0301-ab12-0007`."""
    return f"{search_id}-{number:04d}"


def is_judged(record: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a record of `metrics.jsonl` reports the trial's value: at an evaluation, and at the last step."""
    if "eval/loss" in record or any(key.startswith(METRIC_PREFIX) for key in record):
        return True
    has_held_out = plan.corpus.num_held_out_sequences > 0
    every = plan.job.training.evaluate_every.steps
    last = min(plan.total_steps, plan.pause_at or plan.total_steps)
    return not has_held_out and (record["step"] == last or bool(every and record["step"] % every == 0))
