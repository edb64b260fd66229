"""`forge tune` with real Ray, Tune and training: trials that finish, diverge, cannot be; and what comes out."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from forge.config.load import load_job
from forge.runs.lock import driver_pid
from forge.runs.reader import read_metrics, read_run
from forge.runs.trials import TrialTable, trial_folder
from tests.support.command import environment, forge, mentioning, start_forge, wait_for
from tests.support.wandb_file import read_groups, read_history

JOB = """\
name: tiny
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 10%}
training:
  total_steps: 200
  global_batch_size: 8
  precision: fp32
  schedule: {kind: constant}
  evaluate_every: 20 steps
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: offline}}
search:
  space:
    training.optimizer.lr: {grid: [3.0e-3, 1.0e+30]}
    model.num_attention_heads: {grid: [2, 3]}
  searcher: {kind: grid}
  trials_at_once: 2
  proxy: {training.total_steps: 40}
"""
TEXT = "the cat sat on a mat and saw one dog run past his old red barn while rain fell down hard"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "tune.yaml").write_text(JOB)
    (folder / "corpus").mkdir()
    chance = random.Random(0)
    for number in range(40):
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(chance.choices(TEXT.split(), k=400)))
    return folder


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    """What a whole search says of itself."""
    done = forge("tune", "tune.yaml", "-o", "json", cwd=home)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads(done.stdout)
    return record


@pytest.mark.slow
def test_forge_tune__trial_diverges_or_fails__is_marked_and_the_search_continues(found: dict[str, Any]) -> None:
    trials = {trial["trial"]: trial for trial in found["trials"]}
    assert {number: trial["status"] for number, trial in trials.items()} == {
        1: "finished",
        2: "diverged",
        3: "failed",
        4: "failed",
    }
    assert "at a learning rate of 1e+30" in trials[2]["reason"]
    assert "not a multiple" in trials[3]["reason"]
    assert [step for step, _ in trials[1]["reports"]] == [20, 40]
    assert found["best"]["trial"] == 1


@pytest.mark.slow
def test_forge_tune__best_yaml__trains_unchanged(home: Path, found: dict[str, Any]) -> None:
    best = home / found["best_yaml"]
    assert "training.total_steps" in best.read_text().partition("\nname:")[0]  # the proxy's, told in a comment
    job = load_job(best).job
    assert (job.search, job.training.total_steps, job.training.optimizer.lr) == (None, 200, 3e-3)
    done = forge("plan", str(best), cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / found["report"]).stat().st_size > 10**5


@pytest.mark.slow
def test_forge_tune__trials__are_runs_of_one_wandb_group(home: Path, found: dict[str, Any]) -> None:
    folder = Path(trial_folder(str(home / found["folder"]), 1))
    run = read_run(folder)
    assert (run.status, run.step) == ("finished", 40)
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert read_groups(file) == [found["search_id"]]
    assert [row["step"] for row in read_history(file) if "train/loss" in row] == list(range(1, 41))


@pytest.mark.slow
def test_forge_tune__finished__leaves_no_process(home: Path, found: dict[str, Any]) -> None:
    assert mentioning(found["search_id"]) == []


@pytest.mark.slow
def test_forge_tune__ctrl_c__checkpoints_every_trial_and_resumes(home: Path) -> None:
    long = [
        "--set",
        "search.proxy.training.total_steps=150",
        "--set",
        "search.space.model.num_attention_heads={grid: [2]}",
    ]
    process = start_forge("tune", "tune.yaml", *long, cwd=home)
    runs = home / "runs"
    folder: Path = wait_for(
        lambda: next((path for path in runs.glob("*") if path.name != "x" and driver_pid(path)), None)
    )
    wait_for(lambda: 1 in table_of(folder).trials and table_of(folder).trials[1].step >= 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert f"forge tune --resume {folder.name}" in err
    stopped = read_run(Path(trial_folder(str(folder), 1)))
    saved = stopped.newest("CheckpointSaved")
    assert saved is not None
    assert saved["step"] == stopped.step < 150
    done = forge("tune", "--resume", folder.name, cwd=home)
    assert done.returncode == 0, done.stderr
    trials = table_of(folder).trials
    assert {number: trial.status for number, trial in trials.items()} == {1: "finished", 2: "diverged"}
    steps = [record["step"] for record in read_metrics(Path(trial_folder(str(folder), 1)))]
    assert steps == list(range(1, 151))


def table_of(folder: Path) -> TrialTable:
    return TrialTable(read_run(folder).events)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.held_out=0", "eval/loss"),
        ("search.trials_at_once=99", "room for"),
    ],
)
def test_forge_tune__impossible_search__is_rejected_before_it_starts(home: Path, change: str, message: str) -> None:
    done = forge("tune", "tune.yaml", "--set", change, cwd=home, env=environment(home))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
