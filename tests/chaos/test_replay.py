"""A replay on a machine that is too slow for its trace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from forge.chaos.replay import change_interval_s, pace_warning
from forge.chaos.trace import poisson
from forge.chaos.trace_file import read_trace
from tests.support.command import forge

JOB = """\
name: paced
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 100000, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: disabled}}
"""


def test_change_interval_s__changes_after_the_beginning__are_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("0,add,a\n0,add,b\n30000,remove,a\n60000,add,a\n")
    assert change_interval_s(read_trace(path)) == 30.0
    assert change_interval_s(poisson(num_nodes=2, mtbf_s=1e9, down_s=1.0, duration_s=60.0, seed=0)) == math.inf


@pytest.mark.parametrize("interval_s", [50.0, math.inf])
def test_pace_warning__time_to_train_between_changes__is_none(interval_s: float) -> None:
    assert pace_warning(interval_s=interval_s, start_s=10.0, speed=20.0) is None


def test_pace_warning__changes_faster_than_starts__has_the_numbers_and_a_speed() -> None:
    warning = pace_warning(interval_s=3.0, start_s=10.0, speed=20.0)
    assert warning is not None
    assert "changes every 3.0 s at --speed 20, and workers take 10.0 s to start on this machine" in warning
    assert "use about --speed 1, or fewer --nodes" in warning
    # With the suggested speed there is nothing to say.
    assert pace_warning(interval_s=3.0 * 20.0, start_s=10.0, speed=1.0) is None


@pytest.mark.slow
def test_replay__trace_faster_than_this_machine__warns_once_while_it_runs(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    lines = ["0,add,a", "0,add,b", *(f"{500 * n},{'add' if n % 2 == 0 else 'remove'},b" for n in range(1, 40))]
    (tmp_path / "trace.csv").write_text("\n".join(lines))
    done = forge("chaos", "replay", "trace.csv", "--job", "job.yaml", "--nodes", "2", "-o", "json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the trace changes every 0.5 s at --speed 1, and workers take") == 1
    (warning,) = json.loads(done.stdout)["warnings"]
    assert "use about --speed 0.0" in warning
