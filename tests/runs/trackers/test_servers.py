"""Trackers with servers: MLflow's own, killed and started again, and `wandb sync` to one that keeps lines."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from mlflow.tracking import MlflowClient

from forge.process import free_port
from forge.runs.trackers.wandb_log import is_offline, log_files
from tests.runs.trackers.test_mlflow import events_of
from tests.support.runs import metrics, open_recorder
from tests.support.tracked_run import kill_when
from tests.support.wandb_server import wandb_server

pytestmark = pytest.mark.slow

_KEY = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """MLflow's tracking server on a database in a folder, killed at the end."""
    program = str(Path(sys.executable).with_name("mlflow"))
    options = ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [program, "server", *options], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 90
        while not _answers(port):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.2)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.read() == b"OK")
    except OSError:
        return False


def steps_on(client: MlflowClient) -> list[int]:
    experiment = client.get_experiment_by_name("forge")
    if experiment is None:
        return []
    (run,) = client.search_runs([experiment.experiment_id])
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def test_mlflow__server_killed_and_started_again__every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TIMEOUT": "5", "MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    folder, port = tmp_path / "tiny-1", free_port("127.0.0.1")
    recorder = open_recorder(folder, mlflow={"uri": f"http://127.0.0.1:{port}"})
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{port}")
    with mlflow_server(tmp_path, port):
        for step in range(1, 151):
            recorder.step(metrics(step))
        deadline = time.monotonic() + 60
        while not steps_on(client) and time.monotonic() < deadline:
            time.sleep(0.1)
    for step in range(151, 301):  # nobody answers
        recorder.step(metrics(step))
        time.sleep(0.01)
    time.sleep(2)
    with mlflow_server(tmp_path, port):
        recorder.close(exit_code=0)
        assert Counter(steps_on(client)) == Counter(range(1, 301))
        assert Counter(event["event"] for event in events_of(folder)) == {"TrackingDegraded": 1}


@pytest.mark.parametrize("least_bytes", [0, 40_000])
def test_wandb_sync__files_of_a_killed_and_resumed_run__one_run_with_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_bytes: int
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "tiny-1"

    def has_written() -> bool:
        return any(path.stat().st_size >= least_bytes for path in log_files(folder, run_id=folder.name))

    kill_when(folder, {"mode": "offline"}, steps=300, is_time=has_written)
    recorder = open_recorder(folder, mode="offline")
    for step in range(290, 311):
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    with wandb_server() as server:
        settings = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": _KEY, "WANDB_RESUME": "allow"}
        command = [str(Path(sys.executable).with_name("wandb")), "sync", str(folder / "wandb")]
        result = subprocess.run(
            command,
            env=os.environ | settings | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        assert Counter(row["step"] for row in server.rows(folder.name)) == Counter(range(1, 311))


def test_wandb__online_killed_and_resumed__every_step_once_on_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny-1"
    with wandb_server() as server:
        for name, value in {"BASE_URL": server.url, "API_KEY": _KEY, "MODE": "online"}.items():
            monkeypatch.setenv(f"WANDB_{name}", value)
        kill_when(folder, {"mode": "online"}, steps=300, is_time=lambda: bool(server.rows(folder.name)))
        server.forget(folder.name, after=120)  # as if the kill had come before the last upload
        wandb.teardown()  # W&B reads its environment once a process
        recorder = open_recorder(folder, mode="online")
        for step in range(290, 304):
            recorder.step(metrics(step))
        recorder.close(exit_code=0)
        assert Counter(row["step"] for row in server.rows(folder.name)) == Counter(range(1, 304))
        assert not [path for path in log_files(folder, run_id=folder.name) if is_offline(path)]
