"""`forge runs sync`: trackers get what they lack after the end of a run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import struct
from collections import Counter
from pathlib import Path

import pytest

from forge.errors import ArgumentError
from forge.plan.plan import plan_to_json
from forge.runs.create import reopen_run, require_plain_folder
from forge.runs.lock import hold_lock
from forge.runs.reader import read_plan
from forge.runs.scores import TaskScore, TaskValue, append_score
from forge.runs.sync import sync_run
from forge.runs.trackers.wandb_log import log_files
from tests.runs.trackers.test_mlflow import only_run, steps_of
from tests.runs.trackers.test_tensorboard import read
from tests.support.command import forge
from tests.support.jobs import tiny_plan
from tests.support.runs import make_run
from tests.support.wandb_file import read_history


def untracked_run(folder: Path, *, steps: int = 6) -> Path:
    """A run of which no tracker has anything, though its job names all of them."""
    run = make_run(folder, steps=steps)
    tracking = {"wandb": {"mode": "offline"}, "mlflow": {}, "tensorboard": True}
    plan = tiny_plan()
    job = plan.job.model_validate(plan.job.model_dump(mode="json") | {"tracking": tracking})
    plan_text = json.loads(plan_to_json(plan)) | {"job": job.model_dump(mode="json")}
    (run / "plan.json").write_text(json.dumps(plan_text))
    return run


@pytest.mark.slow
def test_sync_run__nothing_sent_before__every_tracker_has_every_step_and_again_nothing_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run, reasons = untracked_run(tmp_path / "runs"), []
    results = {result.tracker: result for result in sync_run(run, on_reason=reasons.append)}
    assert {name: result.num_sent for name, result in results.items()} == {"W&B": 6, "MLflow": 6, "TensorBoard": 6}
    assert all(result.is_complete for result in results.values()) and reasons == []
    again = sync_run(run, on_reason=reasons.append)
    assert {result.num_sent for result in again} == {0}
    assert only_run(run).info.status == "KILLED", "a run that died can be resumed"
    (file,) = log_files(run, run_id=run.name)
    steps = Counter(range(1, 7))
    assert Counter(row["step"] for row in read_history(file)) == steps_of(run) == steps
    assert Counter(event.step for event in read(run).Scalars("train/loss")) == steps


def test_sync_run__scores_of_tasks__are_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = make_run(tmp_path / "runs")
    text = json.loads((run / "plan.json").read_text())
    text["job"]["tracking"] = {"wandb": {"mode": "offline"}}
    (run / "plan.json").write_text(json.dumps(text))
    value = TaskValue(value=0.5, low=0.4, high=0.6, direction="max", num_examples=9, signature="accuracy")
    names = {"task": "t", "kind": "generate", "model": run.name, "task_digest": "t"}
    for step in (2, 4):
        score = TaskScore(
            **names, model_digest=str(step), step=step, ema=False, values={"accuracy": value}, num_examples=9,
            num_skipped=0, contamination=None, examples="",
        )  # fmt: skip
        append_score(run, score)
    for expected in (2, 0):
        (found,) = (one for one in sync_run(run, on_reason=print) if one.run_id == f"{run.name}-tasks")
        assert (found.num_sent, found.is_complete) == (expected, True)
    (file,) = log_files(run, run_id=f"{run.name}-tasks")
    assert [(row["step"], row["t/accuracy"]) for row in read_history(file)] == [(2, 0.5), (4, 0.5)]


def test_sync_run__running_or_without_trackers__is_refused(tmp_path: Path) -> None:
    run = untracked_run(tmp_path / "runs")
    with hold_lock(run), pytest.raises(ArgumentError, match="is running"):
        sync_run(run, on_reason=print)
    other = make_run(tmp_path / "others")
    text = json.loads((other / "plan.json").read_text())
    text["job"]["tracking"]["wandb"]["mode"] = "disabled"
    (other / "plan.json").write_text(json.dumps(text))
    with pytest.raises(ArgumentError, match="no trackers"):
        sync_run(other, on_reason=print)


def test_sync_run__server_that_does_not_answer__is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed_port: int
) -> None:
    monkeypatch.setattr("forge.runs.trackers.feed._LAST_ATTEMPT_S", 1.0)
    run = make_run(tmp_path / "runs")
    text = json.loads((run / "plan.json").read_text())
    text["job"]["tracking"] = {"wandb": {"mode": "disabled"}, "mlflow": {"uri": f"http://127.0.0.1:{closed_port}"}}
    (run / "plan.json").write_text(json.dumps(text))
    reasons: list[str] = []
    (result,) = sync_run(run, on_reason=reasons.append)
    assert not result.is_complete and result.num_sent == 0
    assert "MLflow takes no metrics" in reasons[0] and f"forge runs sync {run.name}" in reasons[-1]


def test_forge_runs_sync__run_that_is_over__says_what_was_sent(tmp_path: Path) -> None:
    run = untracked_run(tmp_path / "runs")
    text = json.loads((run / "plan.json").read_text())
    text["job"]["tracking"] = {"wandb": {"mode": "disabled"}, "tensorboard": True}
    (run / "plan.json").write_text(json.dumps(text))
    first, again = (forge("runs", "sync", "latest", "-o", "json", cwd=tmp_path) for _ in range(2))
    wanted = {"run_id": run.name, "tracker": "TensorBoard", "num_sent": 6, "is_complete": True}
    assert json.loads(first.stdout) == [wanted] and "sent 6 steps to TensorBoard" in first.stderr
    assert json.loads(again.stdout) == [wanted | {"num_sent": 0}]


def set_tracking(run: Path, tracking: dict[str, object]) -> None:
    text = json.loads((run / "plan.json").read_text())
    text["job"]["tracking"] = tracking
    (run / "plan.json").write_text(json.dumps(text))


@pytest.mark.parametrize(
    "name", ["wandb", "tensorboard", "mlflow.db", ".lock", "events.jsonl", "trials/trial-00000"]
)
def test_sync_run__link_out_of_the_folder__is_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    run, victim = untracked_run(tmp_path / "runs"), tmp_path / "victim"
    victim.mkdir()
    link = run / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(victim / "x" if "." in name else victim)
    with pytest.raises(ArgumentError, match="is a link that leads out of the folder"):
        sync_run(run, on_reason=print)
    assert not list(victim.iterdir())


def test_sync_run__trial_that_is_a_link__is_refused(tmp_path: Path) -> None:
    search, victim = untracked_run(tmp_path / "runs"), untracked_run(tmp_path / "victims")
    (search / "trials").mkdir()
    trial = search / "trials" / "trial-00000"
    trial.symlink_to(victim)
    before = sorted(victim.rglob("*"))
    with pytest.raises(ArgumentError, match="is a link that leads out of the folder"):
        sync_run(search, on_reason=print)
    assert sorted(victim.rglob("*")) == before


def test_sync_run__database_outside_the_folder__only_if_the_environment_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, other = untracked_run(tmp_path / "runs"), tmp_path / "other.db"
    for uri in (f"sqlite:///{other}", f"sqlite:///{run}/../../other.db", f"sqlite:///{run}/m.db?uri=true"):
        set_tracking(run, {"wandb": {"mode": "disabled"}, "mlflow": {"uri": uri}})
        with pytest.raises(ArgumentError, match="a database outside the run's folder"):
            sync_run(run, on_reason=print)
    assert not other.exists()
    uri = f"sqlite:///{other}"
    set_tracking(run, {"wandb": {"mode": "disabled"}, "mlflow": {"uri": uri}})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (result,) = sync_run(run, on_reason=print)
    assert result.is_complete and other.exists()


def test_reopen_run__database_outside_the_folder__is_refused(tmp_path: Path) -> None:
    run = untracked_run(tmp_path / "runs")
    set_tracking(run, {"mlflow": {"uri": f"sqlite:///{tmp_path}/other.db"}})
    with pytest.raises(ArgumentError, match=r"cannot resume .* a database outside the run's folder"):
        reopen_run(run, read_plan(run))


def test_forge_runs_sync__current_folder__has_the_folders_name_as_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untracked_run(tmp_path / "runs")
    set_tracking(run, {"wandb": {"mode": "disabled"}, "tensorboard": True})
    monkeypatch.chdir(run)
    (result,) = sync_run(Path(), on_reason=print)
    assert result.run_id == run.name and result.is_complete


@pytest.mark.parametrize("name", ["tensorboard/events.out.tfevents.1", "wandb/run-1", "mlflow.db", "events.jsonl"])
def test_sync_run__pipe_in_the_folder__is_refused(tmp_path: Path, name: str) -> None:
    run = untracked_run(tmp_path / "runs")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(ArgumentError, match=rf"{re.escape(name)} is neither a file nor a folder"):
        sync_run(run, on_reason=print)


@pytest.mark.parametrize("name", [".lock", "events.jsonl"])
def test_sync_run__folder_in_the_place_of_a_file__is_refused(tmp_path: Path, name: str) -> None:
    run = untracked_run(tmp_path / "runs")
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(ArgumentError, match=rf"{name}( cannot be written)?: Is a directory"):
        sync_run(run, on_reason=print)


def test_sync_run__record_of_gigabytes__is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.runs.trackers.feed._LAST_ATTEMPT_S", 1.0)
    run = untracked_run(tmp_path / "runs")
    set_tracking(run, {"wandb": {"mode": "disabled"}, "tensorboard": True})
    (run / "tensorboard").mkdir()
    with (run / "tensorboard" / "events.out.tfevents.1").open("wb") as file:
        file.write(struct.pack("<Q", 2**33) + bytes(4))
        file.truncate(2**34)
    reasons: list[str] = []
    (result,) = sync_run(run, on_reason=reasons.append)
    assert not result.is_complete and "has a record of 8589934592 bytes" in reasons[0]


def test_sync_run__database_with_a_trigger__is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.runs.trackers.feed._LAST_ATTEMPT_S", 1.0)
    run = untracked_run(tmp_path / "runs")
    set_tracking(run, {"wandb": {"mode": "disabled"}, "mlflow": {}})
    assert sync_run(run, on_reason=print)[0].is_complete
    with contextlib.closing(sqlite3.connect(run / "mlflow.db")) as database:
        database.execute(
            "CREATE TRIGGER forever AFTER UPDATE ON runs BEGIN INSERT INTO tags SELECT x, x, x FROM "
            "(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n); END"
        )
        database.commit()
    reasons: list[str] = []
    (result,) = sync_run(run, on_reason=reasons.append)
    assert not result.is_complete and "triggers that MLflow does not make, such as 'forever'" in reasons[0]


def test_sync_run__link_of_wandb_in_a_trial__is_allowed(tmp_path: Path) -> None:
    run, log = untracked_run(tmp_path / "runs"), tmp_path / "debug-core.log"
    log.touch()
    for folder in (run / "wandb" / "offline-run-1-x" / "logs", run / "trials" / "t" / "wandb" / "run-1" / "logs"):
        folder.mkdir(parents=True)
        (folder / "debug-core.log").symlink_to(log)
    require_plain_folder(run)
    deeper = run / "logs" / "wandb" / "run-1" / "logs"
    deeper.mkdir(parents=True)
    (deeper / "debug-core.log").symlink_to(log)
    with pytest.raises(ArgumentError, match="leads out of the folder"):
        require_plain_folder(run)
