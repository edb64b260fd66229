"""A real run with a deadline and an automatic interval between checkpoints, resumed after its deadline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.runtime.supervised_run import recorded_ends
from tests.support.command import environment, forge
from tests.support.elastic import write_job

STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=STEPS, workers="2")
    return home


def train(home: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run `forge train`. Returns: its JSON output, and what it printed for people."""
    # A machine that lasts 114 years: the interval must become longer than the shortest one.
    env = environment(home, FORGE_MTBF_HOURS="1e6")
    done = forge("train", *arguments, "-o", "json", cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    run: dict[str, Any] = json.loads(done.stdout)
    return run, done.stderr


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_recorded_ends__first_record_and_last_event_of_a_kind(tmp_path: Path) -> None:
    history = tmp_path / "events.jsonl"
    assert recorded_ends(history, "B") == (None, None)
    kinds = ("A", "B", "B", "A")
    lines = [json.dumps({"time": float(at), "event": kind}) for at, kind in enumerate(kinds, start=5)]
    history.write_text("\n".join(["not json", "[]", *lines, '{"time": 1']))
    assert recorded_ends(history, "B") == ({"time": 5.0}, {"time": 7.0, "event": "B"})


@pytest.mark.slow
def test_train__deadline_and_auto_interval__are_watched_and_survive_a_resume(home: Path) -> None:
    changes = ("--set", "checkpoint.every=auto", "--set", "resources.deadline=2h")
    run, said = train(home, "job.yaml", *changes)
    assert "before its deadline" in said
    (met,) = events_of(home / run["folder"], "DeadlineForecast")
    assert met["ends_at"] < met["deadline"] and not met["can_rent"]
    changed = events_of(home / run["folder"], "CheckpointIntervalChanged")
    assert changed and changed[0]["before_s"] == 60 and changed[0]["seconds"] > 90
    assert len(changed) <= 3  # the first from snapshots; the cost of checkpoints may differ from it

    longer = ("--set", f"training.total_steps={2 * STEPS}", "--set", "resources.deadline=1s")
    again, said = train(home, "--resume", run["folder"], *longer)
    assert again["step"] == 2 * STEPS  # it is late, and goes on
    passed = events_of(home / run["folder"], "DeadlineForecast")[-1]
    assert passed["needed_workers"] is None
    assert passed["deadline"] == pytest.approx(met["deadline"] - 7199)  # from the first start
    assert "has passed" in said
    shown = forge("runs", "show", run["folder"], cwd=home, env=environment(home)).stdout
    assert "the run goes on" in shown
