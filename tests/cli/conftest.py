from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.peaks import share_peaks

JOB = """\
name: tiny
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}}
training: {total_steps: 4, global_batch_size: 8, optimizer: {lr: 1.0e-2}}
resources: {workers: 1..2, gpu: none}
"""


@pytest.fixture(scope="session")
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting a model takes seconds; its answer is kept here."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _shared_cache: Path) -> Path:
    """The working folder of a user with a job file, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", str(_shared_cache))
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    share_peaks(tmp_path / "state")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    for number in range(8):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"the cat number {number} sat on the mat " * 40)
    return tmp_path
