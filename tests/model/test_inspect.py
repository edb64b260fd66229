"""Counting a network on the meta device, and saying what is wrong with its section."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forge.config.model import ModelSpec
from forge.model.inspect import ModelSpecError, measure
from forge.plan.flops import flops_per_token
from forge.plan.inputs import ModelInfo

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def ask(**keys: object) -> ModelInfo | ModelSpecError:
    return measure(ModelSpec.model_validate(keys), vocab_size=97, seq_len=16, eot_id=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt_neox", "phi", "olmo"])
def test_the_count_is_that_of_a_model_that_was_really_built(architecture: str) -> None:
    facts = ask(architecture=architecture, **SIZES)
    assert isinstance(facts, ModelInfo)
    config = AutoConfig.for_model(architecture, **SIZES, vocab_size=97, max_position_embeddings=16)
    real = AutoModelForCausalLM.from_config(config)
    assert facts.num_parameters == sum(p.numel() for p in real.parameters())
    assert facts.class_name == type(real).__name__


@pytest.mark.parametrize("tied", [False, True])
def test_the_input_embedding_is_no_arithmetic_unless_it_is_the_head(tied: bool) -> None:
    facts = ask(architecture="llama", tie_word_embeddings=tied, **SIZES)
    assert isinstance(facts, ModelInfo)
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert facts.num_matmul_parameters == 2 * layer + 97 * 32


def test_flops_agree_with_torchs_own_counter() -> None:
    """Forward and backward are three times the forward; torch counts matrix products only, as MFU does."""
    from torch.utils.flop_counter import FlopCounterMode

    facts = ask(architecture="llama", **SIZES)
    assert isinstance(facts, ModelInfo)
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=97, max_position_embeddings=16)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 16, dtype=torch.int64), use_cache=False)
    assert flops_per_token(facts, seq_len=16) * 16 == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


def test_of_a_mixture_of_experts_only_the_active_share_counts() -> None:
    facts = ask(architecture="mixtral", num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2, **SIZES)
    assert isinstance(facts, ModelInfo)
    experts = 2 * 8 * 3 * 32 * 64
    assert facts.num_matmul_parameters < facts.num_parameters - 0.7 * experts


@pytest.mark.parametrize(
    ("keys", "blamed"),
    [
        ({"architecture": "lama"}, "architecture"),
        ({"architecture": "llama", "hiden_size": 32}, "hiden_size"),
        ({"architecture": "llama", "hidden_size": "wide"}, "hidden_size"),
        ({"from_pretrained": "/nowhere/at/all"}, "from_pretrained"),
    ],
)
def test_the_key_that_is_wrong_is_named(keys: dict[str, object], blamed: str) -> None:
    answer = ask(**keys)
    assert isinstance(answer, ModelSpecError)
    assert answer.key == blamed
    assert "\n" not in answer.problem


def test_a_wrong_key_comes_with_the_valid_ones() -> None:
    answer = ask(architecture="llama", hiden_size=32)
    assert isinstance(answer, ModelSpecError)
    assert "hidden_size" in answer.choices
