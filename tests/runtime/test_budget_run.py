"""A run that would cost more than it may stops by itself, with a checkpoint, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import environment, forge

JOB = """\
name: dear
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100000, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none, max_usd: 0.5}
tracking: {wandb: {mode: disabled}}
"""


@pytest.mark.slow
def test_a_budget_ends_a_run_with_a_checkpoint_and_is_known_again(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    env = environment(tmp_path, FORGE_USD_PER_HOUR="200")
    done = forge("train", "job.yaml", "-o", "json", cwd=tmp_path, env=env)
    assert done.returncode == 4, done.stderr
    assert "stopped: it has cost 0.5" in done.stderr
    run = json.loads(done.stdout)
    assert run["status"] == "stopped"
    assert run["checkpoint"].endswith(f"step-{run['step']:08}")
    assert 0.5 <= run["usd"] < 2
    shown = forge("runs", "show", "latest", cwd=tmp_path, env=env).stdout
    assert f"{run['usd']:.2f} USD" in shown
