"""MLflow in a SQLite file, read back with MLflow's own client."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from forge.config.resources import MlflowSpec
from forge.events import RunStopped
from forge.runs.trackers.mlflow_tracker import credentials_problem
from tests.support.runs import metrics, open_recorder
from tests.support.tracked_run import kill_when, lose_a_node

_TOKEN = "mlflow-token-0123456789"


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def only_run(folder: Path) -> Run:
    """The one run in a run folder's database."""
    client = client_of(folder)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return run


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to create, and no run."""
    folder = tmp_path_factory.mktemp("database")
    client_of(folder).search_experiments()
    return folder / "mlflow.db"


def copied(database: Path, folder: Path) -> Path:
    """A run folder with a copy of the database."""
    folder.mkdir()
    shutil.copy(database, folder)
    return folder


def steps_of(folder: Path, key: str = "train/loss") -> Counter[int]:
    history = client_of(folder).get_metric_history(only_run(folder).info.run_id, key)
    return Counter(metric.step for metric in history)


def test_mlflow__steps_events_and_config__are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a run of MLflow that forge was started in.
    for name, value in {"RUN_ID": "a" * 32, "EXPERIMENT_ID": "7", "TRACKING_URI": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    folder = tmp_path / "tiny-1"
    recorder = open_recorder(folder, mlflow={"experiment": "lab"})
    for step in range(1, 5):
        if step == 3:
            lose_a_node(recorder, step)
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    run = only_run(folder)
    assert (run.info.run_name, run.info.status, run.data.params) == ("tiny-1", "FINISHED", {"name": "tiny"})
    assert run.data.metrics["train/loss"] == pytest.approx(1.25)
    assert steps_of(folder) == steps_of(folder, "elastic/world_size") == Counter(range(1, 5))
    assert run.data.tags["forge.events"] == (
        "step 3: node b was lost; starting generation 2 with 1 worker from step 2 (memory)"
    )
    assert client_of(folder).get_experiment_by_name("lab") is not None
    assert "speed/mfu" not in run.data.metrics, "nan is no value"


def test_mlflow__end_of_the_run__is_its_status(tmp_path: Path, database: Path) -> None:
    folder = copied(database, tmp_path / "tiny-2")
    recorder = open_recorder(folder, mlflow={})
    recorder.step(metrics(1))
    recorder.event(RunStopped(step=1, reason="budget"))
    recorder.close(exit_code=0)
    assert only_run(folder).info.status == "KILLED"
    recorder = open_recorder(folder, mlflow={})
    recorder.step(metrics(2))
    recorder.close(exit_code=1)
    assert only_run(folder).info.status == "FAILED"


@pytest.mark.slow
def test_mlflow__killed_and_resumed__one_run_with_every_step_once(tmp_path: Path, database: Path) -> None:
    folder = copied(database, tmp_path / "tiny-3")
    client = client_of(folder)

    def has_written() -> bool:
        experiment = client.get_experiment_by_name("forge")
        return (
            experiment is not None
            and bool(client.search_runs([experiment.experiment_id]))
            and bool(steps_of(folder))
        )

    kill_when(folder, {"mlflow": {}}, steps=300, is_time=has_written)
    assert only_run(folder).info.status == "RUNNING"
    recorder = open_recorder(folder, mlflow={})
    for step in range(290, 304):
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    assert steps_of(folder) == Counter(range(1, 304))
    assert only_run(folder).info.status == "FINISHED"
    assert client.get_run(only_run(folder).info.run_id).data.metrics["train/loss"] == pytest.approx(5 / 303)


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_mlflow__server_unreachable__training_is_not_delayed_and_steps_are_sent_later(
    tmp_path: Path, closed_port: int, monkeypatch: pytest.MonkeyPatch, database: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", _TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed_port}/")
    monkeypatch.setattr("forge.runs.trackers.feed._LAST_ATTEMPT_S", 1.0)
    monkeypatch.setattr("forge.runs.trackers.feed._RETRY_S", (0.2,))
    folder = copied(database, tmp_path / "tiny-4")
    recorder = open_recorder(folder, mlflow={"uri": f"http://127.0.0.1:{closed_port}"})
    began = time.monotonic()
    for step in range(1, 51):
        recorder.step(metrics(step))
    assert time.monotonic() - began < 1.0
    deadline = time.monotonic() + 60
    while not events_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)  # several attempts
    recorder.close(exit_code=0)
    degraded = [event["reason"] for event in events_of(folder) if event["event"] == "TrackingDegraded"]
    assert len(degraded) <= 2 and "MLflow takes no metrics" in degraded[0], "said once, and at the end"
    assert not [path for path in folder.rglob("*") if path.is_file() and _TOKEN.encode() in path.read_bytes()]

    later = open_recorder(folder, mlflow={})  # as if the server were back
    later.close(exit_code=0)
    assert steps_of(folder) == Counter(range(1, 51))


@pytest.mark.parametrize("own", ["", "https://mlflow.example.com"])
def test_mlflow__server_of_a_foreign_folder__gets_no_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", _TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    monkeypatch.setattr("forge.runs.trackers.feed._LAST_ATTEMPT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        recorder = open_recorder(tmp_path / "tiny-5", mlflow={"uri": uri})
        recorder.step(metrics(1))
        recorder.close(exit_code=0)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            server.accept()
    reason = events_of(tmp_path / "tiny-5")[0]["reason"]
    assert f"MLFLOW_TRACKING_TOKEN is not sent to {uri}" in reason and _TOKEN not in reason


@pytest.mark.parametrize(
    ("uri", "own", "is_refused"),
    [
        ("https://a.example.com", "https://a.example.com/", False),
        ("https://a.example.com", "https://b.example.com", True),
        ("https://a.example.com", "", True),
        ("sqlite:////tmp/mlflow.db", "", False),
        (None, "", False),
    ],
)
def test_credentials_problem__only_the_server_of_the_environment__gets_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str | None, own: str, is_refused: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own)
    spec = MlflowSpec.model_validate({"uri": uri})
    assert credentials_problem(spec) is None
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\n")
    assert (credentials_problem(spec) is not None) == is_refused
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "x" * 9)
    assert ("MLFLOW_TRACKING_PASSWORD" in (credentials_problem(spec) or "")) == is_refused
