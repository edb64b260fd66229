"""Models that ZeRO 3 divides while they are built have the buffers of undivided ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.ranks import on_ranks


@pytest.mark.slow
def test_build__under_zero_3_in_bf16__rotary_frequencies_are_those_of_fp32() -> None:
    for frequencies, expected, num_elements in on_ranks(built, world_size=2):
        assert frequencies == expected
        assert num_elements == 0, "the weights are not divided"


def built(rank: int) -> tuple[list[float], list[float], int]:
    """Frequencies of a Llama that is divided and of one that is not, and elements of a divided weight."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from forge.train.process_group import join_process_group
    from forge.train.zero3 import sharding_of

    join_process_group(device=torch.device("cpu"), rendezvous=None)
    config = AutoConfig.for_model(
        "llama", hidden_size=192, num_attention_heads=2, num_hidden_layers=1, vocab_size=32
    )
    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    sharding = sharding_of({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_batch_size": 2})
    with sharding.construct():
        divided: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    found, expected = (model.model.rotary_emb.inv_freq for model in (divided, whole))
    assert found.dtype == torch.float32
    return found.tolist(), expected.tolist(), divided.model.layers[0].mlp.up_proj.weight.numel()
