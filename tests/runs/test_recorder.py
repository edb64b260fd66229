"""The run's one writer, on real files and with the real W&B."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import wandb

from forge.events import CheckpointSaved, CorpusRead, PatternRead, RunFailed, StepRepeated, TrackingDegraded
from forge.runs.recorder import append_event, last_recorded_step
from forge.runs.records import RecordReader
from tests.support.runs import metrics, open_recorder
from tests.support.wandb_file import read_history

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no .netrc
    wandb.teardown()  # W&B reads its environment once a process


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_recorder__events_and_steps__lines_with_a_time(tmp_path: Path) -> None:
    before = time.time()
    recorder = open_recorder(tmp_path)
    recorder.step(metrics(1))
    recorder.event(StepRepeated(step=1, loss=0.5, step_s=0.1, world_size=2))
    (step,), (event,) = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "events.jsonl")
    assert (step["step"], step["train/loss"], step["elastic/world_size"]) == (1, 5.0, 2)
    assert event == {
        "time": event["time"],
        "event": "StepRepeated",
        "step": 1,
        "loss": 0.5,
        "step_s": 0.1,
        "world_size": 2,
    }
    assert all(before - 1 < line["time"] < time.time() + 1 for line in (step, event))


def test_recorder__what_the_corpus_was_read_as__is_read_back(tmp_path: Path) -> None:
    pattern = PatternRead(pattern="*.txt", num_files=2, kinds={"text": 2}, skipped={"empty": 1})
    read = CorpusRead(
        num_documents=2, num_train_tokens=9, num_held_out_tokens=0, patterns=(pattern,), warnings=("short",)
    )
    open_recorder(tmp_path).event(read)
    (found,) = RecordReader(tmp_path, kind="event").read()
    assert found["patterns"] == [
        {"pattern": "*.txt", "num_files": 2, "kinds": {"text": 2}, "skipped": {"empty": 1}}
    ]
    assert (found["event"], found["warnings"]) == ("CorpusRead", ["short"])


def test_recorder__checkpoint_reported_again__is_recorded_once(tmp_path: Path) -> None:
    def saved(step: int, seconds: float) -> CheckpointSaved:
        return CheckpointSaved(step=step, folder="c", size_bytes=1, seconds=seconds, stall_s=seconds)

    recorder = open_recorder(tmp_path)
    for event in (saved(3, 0.5), saved(3, math.nan), saved(4, math.nan)):
        recorder.event(event)
    open_recorder(tmp_path).event(saved(4, 0.5))
    found = [(event["step"], event["seconds"]) for event in lines(tmp_path / "events.jsonl")]
    assert found == [(3, 0.5), (4, None)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_recorder__not_finite__null_in_strict_json(tmp_path: Path, value: float) -> None:
    open_recorder(tmp_path).step(metrics(1, loss=value))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["train/loss"] is None


@pytest.mark.parametrize("torn", [b'{"step": 3, "train', b"{", b"\x00" * 5000, b'{"step": 3}'])
def test_recorder__partial_last_line__is_removed(tmp_path: Path, torn: bytes) -> None:
    first = open_recorder(tmp_path)
    first.step(metrics(1))
    first.step(metrics(2))
    first.close(exit_code=0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    second = open_recorder(tmp_path)
    assert second.last_step == last_recorded_step(tmp_path) == 2
    second.step(metrics(3))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_recorder__damaged_line__run_can_resume(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "time": 0}\n\x00\x00\xff\n[]\n')
    recorder = open_recorder(tmp_path)
    assert recorder.last_step == 1
    recorder.step(metrics(2))
    assert last_recorded_step(tmp_path) == 2


def test_recorder__repeated_step__becomes_an_event(tmp_path: Path) -> None:
    first = open_recorder(tmp_path)
    for step in (1, 2, 3):
        first.step(metrics(step))
    again = open_recorder(tmp_path)  # after a crash, from a checkpoint of step 1
    for step in (2, 3, 4):
        again.step(metrics(step, loss=step / 8))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [line["train/loss"] for line in lines(tmp_path / "metrics.jsonl")] == [5.0, 2.5, 5 / 3, 0.5]
    repeated = [(line["event"], line["step"], line["loss"]) for line in lines(tmp_path / "events.jsonl")]
    assert repeated == [("StepRepeated", 2, 0.25), ("StepRepeated", 3, 0.375)]


def test_recorder__second_failure__is_ignored(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.event(RunFailed(error="RunError", message="the cause"))
    recorder.event(RunFailed(error="RunError", message="what followed from it"))
    assert recorder.failure == RunFailed(error="RunError", message="the cause")
    assert [line["message"] for line in lines(tmp_path / "events.jsonl")] == ["the cause"]


def test_append_event__without_recorder__is_written(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "RunStarted"}\n{"torn')
    append_event(tmp_path, RunFailed(error="RunError", message="gone"))
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["RunStarted", "RunFailed"]


def test_wandb__disabled__no_files(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    recorder.step(metrics(1))
    recorder.close(exit_code=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]


def record_with_wandb(folder: Path, *, mode: str) -> list[dict[str, Any]]:
    """Record three steps. Returns: the events."""
    recorder = open_recorder(folder, mode=mode)
    for step in (1, 2, 3):
        recorder.step(metrics(step, grad_norm=math.nan))
    recorder.close(exit_code=0)
    recorder.close(exit_code=0)
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == [1, 2, 3]
    return lines(folder / "events.jsonl")


def offline_history(folder: Path) -> list[dict[str, Any]]:
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert record.name == f"run-{folder.name}.wandb"
    return read_history(record)


def test_wandb__offline__whole_history_in_the_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-1"
    assert record_with_wandb(folder, mode="offline") == []
    history = offline_history(folder)
    assert [(row["step"], row["train/loss"]) for row in history] == [(1, 5.0), (2, 2.5), (3, pytest.approx(5 / 3))]
    assert not any("train/grad_norm" in row or "speed/mfu" in row for row in history)


def test_wandb__online_without_key__records_offline(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-2"
    (event,) = record_with_wandb(folder, mode="online")
    assert event["event"] == TrackingDegraded.__name__
    assert "WANDB_API_KEY" in event["reason"]
    assert "recording offline" in event["reason"]
    assert [row["step"] for row in offline_history(folder)] == [1, 2, 3]


def test_wandb__online_without_network__offline_in_time_and_key_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("forge.runs.trackers.wandb_tracker._INIT_TIMEOUT_S", 3)
    folder, began = tmp_path / "tiny-3", time.monotonic()
    (event,) = record_with_wandb(folder, mode="online")
    assert time.monotonic() - began < 20
    assert event["event"] == "TrackingDegraded"
    assert "recording offline" in event["reason"]
    assert [row["step"] for row in offline_history(folder)] == [1, 2, 3]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
