"""The feed between a run's files and a tracker."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from forge.config.resources import TrackingSpec
from forge.events import EarlyStopped, GenerationStarting, MembershipChangeStarted
from forge.runs.recorder import Recorder
from forge.runs.trackers.base import RunStatus, StepRanges, TrackedRow, TrackedRun, Tracker
from forge.runs.trackers.feed import TrackerFeed
from tests.support.runs import metrics, open_recorder
from tests.support.seeds import SEED


def test_step_ranges__any_steps_and_ranges__has_exactly_them() -> None:
    draw = random.Random(SEED)
    for _ in range(200):
        steps = [draw.randrange(1, 40) for _ in range(draw.randrange(12))]
        start, stop = draw.randrange(1, 40), draw.randrange(1, 40)
        ranges = StepRanges([*steps, *sorted(steps)])
        ranges.add(start, stop)
        assert [step for step in range(45) if step in ranges] == sorted({*steps, *range(start, stop)})


class FaultyTracker:
    """Keeps rows in memory; every third call fails after it has kept the first row, as after a lost answer."""

    name: ClassVar[str] = "faulty"
    max_rows: ClassVar[int] = 5
    pause_s: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.rows: list[TrackedRow] = []
        self.ended: list[tuple[RunStatus, Sequence[str]]] = []
        self.num_starts = self._num_calls = 0

    def start(self) -> StepRanges:
        self.num_starts += 1
        return StepRanges(row.step for row in self.rows)

    def send(self, rows: Sequence[TrackedRow]) -> None:
        self._num_calls += 1
        is_lost = self._num_calls % 3 == 1
        self.rows += rows[:1] if is_lost else rows
        if is_lost:
            raise ConnectionError("the answer was lost")

    def finish(self, status: RunStatus, events: Sequence[str]) -> None:
        self.ended.append((status, list(events)))

    def abandon(self) -> None:
        pass


def feed(folder: Path, tracker: Tracker, reasons: list[str]) -> TrackerFeed:
    run = TrackedRun(folder=folder, run_id="tiny", config={}, group=None, report=reasons.append)
    return TrackerFeed(tracker, run)


def test_feed__tracker_that_fails_again_and_again__gets_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.runs.trackers.feed._RETRY_S", (0.01,))
    reasons: list[str] = []
    tracker, recorder = FaultyTracker(), open_recorder(tmp_path)
    feeding = feed(tmp_path, tracker, reasons)
    for step in range(1, 61):
        recorder.step(metrics(step))
        feeding.wake()
    time.sleep(0.01)  # an event at the time of a step is taken for one before it
    recorder.event(EarlyStopped(step=60, metric="eval/loss", best=1.0, best_step=3))
    feeding.begin_end("stopped", timeout_s=30)
    feeding.wait_for_end()
    assert [row.step for row in tracker.rows] == list(range(1, 61))
    ((status, events),) = tracker.ended
    assert status == "stopped" and "stopped early at step 60" in events[-1]
    assert tracker.num_starts > 3 and all("the answer was lost" in reason for reason in reasons)


class StuckTracker(FaultyTracker):
    """Does not return from `send`."""

    name = "stuck"

    def send(self, rows: Sequence[TrackedRow]) -> None:
        threading.Event().wait(60)


def test_feed__tracker_that_never_returns__delays_the_end_by_its_limit_and_is_reported(tmp_path: Path) -> None:
    reasons: list[str] = []
    recorder = open_recorder(tmp_path)
    feeding = feed(tmp_path, StuckTracker(), reasons)
    recorder.step(metrics(1))
    feeding.wake()
    began = time.monotonic()
    feeding.begin_end("finished", timeout_s=0.5)
    feeding.wait_for_end()
    assert time.monotonic() - began < 5
    assert len(reasons) == 1 and "stuck did not take every step in time" in reasons[0]


def test_recorder__package_of_a_tracker_missing__said_once_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    monkeypatch.setattr("forge.runs.trackers.feed._RETRY_S", (0.01,))
    monkeypatch.setattr("forge.runs.recorder._TRACKERS_END_S", 1.0)
    recorder = open_recorder(tmp_path, tensorboard=True)
    for step in range(1, 6):
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [reason for reason in reasons if "TensorBoard takes no metrics" in reason] == reasons[:1]
    assert "tensorboard" in reasons[0]


def test_trackers__secrets_in_configuration_and_events__are_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hunter2-0123456789abcdef"
    monkeypatch.setenv("SERVICE_TOKEN", secret)
    tracking = {"wandb": {"mode": "offline"}, "mlflow": {}, "tensorboard": True}
    spec = TrackingSpec.model_validate(tracking)
    config = {"name": "tiny", "data": {"files": [f"http://host/{secret}"]}}
    recorder = Recorder(tmp_path, run_id=tmp_path.name, tracking=spec, config=config)
    recorder.step(metrics(1))
    reason = f"node b was lost: GET http://host/{secret} refused"
    recorder.event(MembershipChangeStarted(generation=1, cause="loss", reason=reason, seconds_since_cause=0.1))
    recorder.event(GenerationStarting(generation=2, world_size=1, from_step=1, source="memory"))
    time.sleep(0.01)
    recorder.step(metrics(2))
    recorder.close(exit_code=0)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    found = [path for path in files if secret.encode() in path.read_bytes()]
    assert found == []
    told = [path for path in files if b"node b was lost" in path.read_bytes()]
    assert {path.relative_to(tmp_path).parts[0] for path in told} == {
        *("events.jsonl", "mlflow.db", "tensorboard", "wandb")
    }
