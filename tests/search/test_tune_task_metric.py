"""`forge tune` with the score of a task as its metric: trials are ranked by it, in its own direction."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from forge.runs.reader import read_metrics
from forge.runs.trials import trial_folder
from tests.support.command import forge

pytestmark = pytest.mark.slow
JOB = """\
name: tiny
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 10%}
training:
  {total_steps: 40, global_batch_size: 8, precision: fp32, schedule: {kind: constant}, evaluate_every: 20 steps}
evaluate: {tasks: [tasks/words.yaml], every: evaluation}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: offline}}
search:
  metric: evaluate/words/bits_per_byte
  space: {training.optimizer.lr: {grid: [1.0e-5, 1.0e-2]}}
  searcher: {kind: grid}
  trials_at_once: 2
"""
TASK = "name: words\nkind: log-likelihood\ndata: {files: words.jsonl}\ntarget: text\nmetrics: bits_per_byte\n"
TEXT = "the cat sat on a mat and saw one dog run past his old red barn while rain fell down hard"
METRIC = "evaluate/words/bits_per_byte"


def test_forge_tune__metric_of_a_task__best_trial_has_the_lowest_score(tmp_path: Path) -> None:
    chance = random.Random(0)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "tasks").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(" ".join(chance.choices(TEXT.split(), k=400)))
    lines = [json.dumps({"text": " ".join(chance.choices(TEXT.split(), k=12))}) for _ in range(40)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    (tmp_path / "tasks" / "words.yaml").write_text(TASK)
    (tmp_path / "tune.yaml").write_text(JOB)

    done = forge("tune", "tune.yaml", "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    trials = {trial["trial"]: trial for trial in found["trials"]}
    assert {number: trial["status"] for number, trial in trials.items()} == {1: "finished", 2: "finished"}
    for number, trial in trials.items():
        rows = read_metrics(Path(trial_folder(str(tmp_path / found["folder"]), number)))
        scores = [[row["step"], row[METRIC]] for row in rows if METRIC in row]
        assert [step for step, _ in scores] == [20, 40]
        assert trial["reports"] == [[step, pytest.approx(value)] for step, value in scores]
    last = {number: trial["reports"][-1][1] for number, trial in trials.items()}
    assert last[2] < last[1], "the larger learning rate learns more"
    assert found["best"]["trial"] == 2
    assert METRIC in done.stderr

    wrong = forge("tune", "tune.yaml", "--set", "search.metric=evaluate/words/perplexity", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "evaluate/words/bits_per_byte" in wrong.stderr
