"""Pretraining, the same run longer, and a run from its weights, through the public API."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import forge

JOB = """
name: first
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,
  num_key_value_heads: 2}
data: {files: "*.txt", seq_len: 32, held_out: 20%, tokenizer: {vocab_size: 300}}
training: {total_steps: 3, global_batch_size: 4, evaluate_every: 1 step, optimizer: {lr: 1.0e-2}}
checkpoint: {keep: 1, keep_best: 1}
resources: {gpu: none}
tracking: {wandb: {mode: disabled}}
"""
TUNED = """
name: tuned
model: {init_from: latest}
data: {files: "*.txt", seq_len: 32}
training: {total_steps: 2, global_batch_size: 4, optimizer: {lr: 1.0e-4}}
resources: {gpu: none}
tracking: {wandb: {mode: disabled}}
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_runs__pretrained_then_longer_then_tuned__continue_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"file {number} says what it says " * 60)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "tuned.yaml").write_text(TUNED)
    first = forge.train_job("job.yaml", on_record=forge.quiet)
    longer = forge.resume_run(first.run_id, overrides=["training.total_steps=5"], on_record=forge.quiet)
    assert [record["step"] for record in longer.history()] == [1, 2, 3, 4, 5]
    changed = longer.newest("LengthChanged")
    assert changed is not None
    assert (changed["from_step"], changed["total_steps_before"], changed["total_steps"]) == (4, 3, 5)
    assert forge.resume_run(first.run_id, on_record=forge.quiet).step == 5

    best = longer.best_checkpoint()
    losses = {record["step"]: record["eval/loss"] for record in longer.history()}
    assert best is not None
    assert (best.step, best.is_best) == (min(losses, key=losses.__getitem__), True)
    assert best.metric_value == min(losses.values())

    tuned = forge.train_job("tuned.yaml", on_record=forge.quiet)
    assert tuned.plan.init is not None
    assert (tuned.plan.init.step, tuned.plan.init.source) == (best.step, str(Path(best.url).absolute()))
    assert tuned.history()[0]["train/loss"] < longer.history()[0]["train/loss"]
    tokenizers = [json.loads((run.folder / "tokenizer" / "tokenizer.json").read_text()) for run in (first, tuned)]
    assert tokenizers[0]["model"] == tokenizers[1]["model"]
