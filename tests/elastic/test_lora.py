"""LoRA of a base of 30 million parameters on real Ray: faults cost no more than of a small run, and the state that
machines keep for each other is that of the adapters."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from forge.runs.reader import read_metrics
from tests.elastic.test_faults import assert_equals_undisturbed_run
from tests.support.command import wait_for
from tests.support.elastic import TEXT, Run, leftovers, machines, start_run, stop_run, write_job

VOCAB = 4096
NUM_ADAPTER_PARAMETERS = 8 * (4 * 8 * (512 + 512) + 3 * 8 * (512 + 1408))
"""Rank 8 on each linear layer."""


def save_base(folder: Path) -> int:
    """Save a random Llama with a tokenizer of the words of the tests' corpus. Returns: its number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    ids = {"<eos>": 0} | {word: number for number, word in enumerate(sorted(set(TEXT.split())), start=1)}
    words = Tokenizer(WordLevel(ids, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    words.add_special_tokens(["<eos>"])
    words.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sum(parameter.numel() for parameter in model.parameters())


def snapshot_sizes(run: Run) -> list[int]:
    """Bytes of every snapshot and replica that the agents hold."""
    sizes = []
    for rank in run.formed["ranks"]:
        for path in Path(f"/proc/{run.agent(rank['node'])}/fd").iterdir():
            if "memfd:forge-snapshot" in str(path.readlink()):
                sizes.append(path.stat().st_size)
    return sizes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_rank_and_machine__lora__repeat_at_most_one_step_each(tmp_path: Path) -> None:
    num_parameters = save_base(tmp_path / "base")
    assert num_parameters > 29e6
    write_job(tmp_path, steps=100_000, lr=1e-3)
    text = (tmp_path / "job.yaml").read_text()
    lines = text.replace(", tokenizer: {vocab_size: 300}", "").splitlines()
    model = "model: {from_pretrained: base, lora: {rank: 8, dropout: 0.1}}"
    (tmp_path / "job.yaml").write_text(
        "\n".join(model if line.startswith("model:") else line for line in lines) + "\n"
    )
    with machines(tmp_path, count=2) as cluster:
        run = start_run(cluster)
        run.await_world(2, timeout_s=300)
        sizes = wait_for(lambda: snapshot_sizes(run))
        # Buffers have up to three areas, each with the master weights and two moments of half the parameters.
        assert max(sizes) < 1.1 * 3 * 12 * NUM_ADAPTER_PARAMETERS / 2
        assert max(sizes) < 0.025 * 3 * 12 * num_parameters / 2

        run.recovers_from(lambda: os.kill(run.formed["ranks"][1]["pid"], signal.SIGKILL))
        assert run.formed["world_size"] == 2
        assert len(run.repeated()) <= 1

        node = run.machine_of(run.formed["ranks"][0])
        run.recovers_from(lambda: run.cluster.kill(node))
        assert run.formed["world_size"] == 1
        assert len(run.repeated()) <= 2
        stop_run(run)
        wait_for(lambda: run.of("RunStopped"))
        assert leftovers(run) == []
        assert {record["elastic/world_size"] for record in read_metrics(run.folder)} == {1, 2}
        saved = run.of("CheckpointSaved")[-1]
        assert saved["size_bytes"] < 1.2 * 12 * NUM_ADAPTER_PARAMETERS
        assert_equals_undisturbed_run(run, tmp_path / "undisturbed")
