"""A run whose nodes cost more than `resources.max_usd` stops by itself, with a checkpoint, and stays stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import environment, forge

MAX_USD = 4.0
JOB = f"""\
name: budget
model: {{architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}}
data: {{files: "corpus/*.txt", seq_len: 32, tokenizer: {{vocab_size: 300}}, held_out: 0}}
training: {{total_steps: 100000, global_batch_size: 4, optimizer: {{lr: 1.0e-2}}}}
resources: {{workers: 1, gpu: none, max_usd: {MAX_USD}}}
tracking: {{wandb: {{mode: disabled}}}}
"""
# The budget is spent 10 s after the agent has joined: enough for its imports and the first steps.
USD_PER_HOUR = 1440


def train(home: Path, *arguments: str) -> dict[str, Any]:
    """Run `forge train` until the budget stops it. Returns: its JSON output."""
    env = environment(home, FORGE_USD_PER_HOUR=str(USD_PER_HOUR))
    done = forge("train", *arguments, "-o", "json", cwd=home, env=env)
    assert done.returncode == 4, done.stderr
    assert f"stopped: it has cost {MAX_USD:.0f}." in done.stderr, done.stderr
    run: dict[str, Any] = json.loads(done.stdout)
    assert run["status"] == "stopped"
    return run


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    return tmp_path


@pytest.mark.slow
def test_forge_train__budget_spent__stops_with_a_checkpoint_and_the_cost(home: Path) -> None:
    run = train(home, "job.yaml")
    assert run["step"] >= 1
    assert run["checkpoint"].endswith(f"step-{run['step']:08}")
    assert MAX_USD <= run["usd"] < 2 * MAX_USD
    shown = forge("runs", "show", "latest", cwd=home, env=environment(home)).stdout
    assert f"{run['usd']:.2f} USD" in shown


@pytest.mark.slow
def test_forge_train__resumed_with_its_budget_spent__stops_again_and_counts_on(home: Path) -> None:
    first = train(home, "job.yaml")
    second = train(home, "--resume", first["folder"])
    assert second["step"] >= first["step"]
    assert first["usd"] <= second["usd"] < 2 * MAX_USD
