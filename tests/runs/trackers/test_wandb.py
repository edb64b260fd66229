"""W&B offline: every step once over all files of a run, also after kills."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import wandb

from forge.events import Evaluated
from forge.runs.trackers.wandb_log import log_files, read_log, repair_log
from tests.support.runs import metrics, open_recorder
from tests.support.tracked_run import kill_when
from tests.support.wandb_file import read_history
from tests.support.wandb_server import wandb_server

_BLOCK_BYTES = 32768


@pytest.fixture(autouse=True)
def _no_wandb_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    wandb.teardown()


def rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of all files of a run."""
    return [row for path in log_files(folder, run_id=folder.name) for row in read_history(path)]


def killed_run(root: Path) -> Path:
    """Record 400 steps and kill the recording process; again if W&B had written all rows by then."""
    for attempt in range(6):
        folder = root / str(attempt) / "tiny-1"

        def has_written(folder: Path = folder) -> bool:
            return any(path.stat().st_size >= 2 * _BLOCK_BYTES for path in log_files(folder, run_id=folder.name))

        kill_when(folder, {"mode": "offline"}, steps=400, is_time=has_written)
        (first,) = log_files(folder, run_id=folder.name)
        if len(read_history(first)) < 400:
            return folder
    pytest.fail("no kill lost a row, so nothing can be shown")


def test_wandb__killed_and_resumed__every_step_in_one_row(tmp_path: Path) -> None:
    folder = killed_run(tmp_path)
    recorder = open_recorder(folder, mode="offline")
    for step in range(380, 404):  # from a checkpoint of step 379
        recorder.step(metrics(step))
    recorder.event(Evaluated(step=403, loss=2.0, metrics={}, num_tokens=9, weights="ema", seconds=0.1))
    recorder.close(exit_code=0)
    assert Counter(row["step"] for row in rows(folder)) == Counter(range(1, 404))
    assert all(row["_step"] == row["step"] for row in rows(folder)), "the numbers of several files must not overlap"
    assert len(log_files(folder, run_id=folder.name)) == 2
    assert [row["elastic/event"] for row in rows(folder) if "elastic/event" in row] == [
        "node b was lost; starting generation 2 with 1 worker from step 199 (memory)"
    ]


def test_wandb__stopped_and_resumed_with_nothing_left__lost_rows_are_sent(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-2"
    kill_when(folder, {"mode": "offline"}, steps=20, is_time=lambda: bool(log_files(folder, run_id=folder.name)))
    open_recorder(folder, mode="offline").close(exit_code=0)
    assert Counter(row["step"] for row in rows(folder)) == Counter(range(1, 21))


@pytest.mark.parametrize("num_bytes", [1, 7, 100])
def test_repair_log__file_cut_short__ends_with_a_whole_record(tmp_path: Path, num_bytes: int) -> None:
    folder = tmp_path / "tiny-3"
    recorder = open_recorder(folder, mode="offline")
    for step in range(1, 6):
        recorder.step(metrics(step))
    recorder.close(exit_code=0)
    (path,) = log_files(folder, run_id=folder.name)
    ends = [record.end for record in read_log(path)]
    assert ends[-1] == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-num_bytes])
    whole = max(end for end in ends if end <= ends[-1] - num_bytes)
    assert f"removed {ends[-1] - num_bytes - whole} bytes" in (repair_log(path) or "removed 0 bytes")
    assert path.stat().st_size == whole
    assert repair_log(path) is None


def test_repair_log__file_without_the_run__is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "run-tiny-4.wandb"
    path.write_bytes(b":W&B\xe1\xbe\x01\x00\x00\x00\x00")
    assert "no row" in (repair_log(path) or "")
    assert not path.exists()


@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_wandb__settings_in_the_current_folder__are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    cwd, user = tmp_path / "foreign", tmp_path / "home/.config/wandb"
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    with wandb_server() as foreign, wandb_server() as own:
        for folder, server in ((cwd / name, foreign), (user, own)):
            folder.mkdir(parents=True)
            (folder / "settings").write_text(f"[default]\nbase_url = {server.url}\n")
        monkeypatch.chdir(cwd)
        recorder = open_recorder(tmp_path / "tiny-5", mode="online")
        recorder.step(metrics(1))
        recorder.close(exit_code=0)
        wandb.teardown()
        assert foreign.num_requests == 0 and own.num_requests > 0
        assert [row["step"] for row in own.rows("tiny-5")] == [1]
