"""Models that see later tokens are found by running a small copy of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from forge.config.model import ModelSpec
from forge.errors import ModelError, PlanError
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.model.look_ahead import probe_forward
from forge.plan.inputs import ModelInfo
from forge.plan.plan import make_draft
from tests.support.jobs import CPU, tiny_job

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def ask(*, seq_len: int = 16, **keys: Any) -> ModelInfo:
    spec = ModelSpec.model_validate(keys)
    return family_of(spec).inspect(spec, DataShape(vocab_size=97, seq_len=seq_len, eot_id=0))


@pytest.mark.parametrize("architecture", ["bert", "electra", "xlm-roberta-xl", "camembert", "xlnet"])
def test_probe_forward__encoder__looks_ahead(architecture: str) -> None:
    assert probe_forward(AutoConfig.for_model(architecture), seq_len=64).looks_ahead is True


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "qwen3_moe", "mixtral", "deepseek_v3", "opt", "bloom", "mamba", "gemma3_text", "gpt_oss"],
)
def test_probe_forward__decoder_of_any_size__does_not(architecture: str) -> None:
    assert probe_forward(AutoConfig.for_model(architecture), seq_len=64).looks_ahead is False


@pytest.mark.parametrize("keys", [{"use_bidirectional_attention": True}])
def test_probe_forward__decoder_with_a_key_that_lifts_its_mask__looks_ahead(keys: dict[str, Any]) -> None:
    config = AutoConfig.for_model("gemma3_text", **keys)
    assert probe_forward(config, seq_len=64).looks_ahead is True


def test_probe_forward__leaves_config_and_random_state_alone() -> None:
    config = AutoConfig.for_model("llama")
    before = config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    probe_forward(config, seq_len=64)
    assert torch.equal(torch.rand(1), expected)
    assert config.to_dict() == before


def test_inspect__encoder__names_the_key_that_makes_it_a_decoder() -> None:
    info = ask(architecture="bert", **SIZES)
    assert info.look_ahead_problem is not None
    assert info.look_ahead_problem.endswith("set model.is_decoder: true")
    assert ask(architecture="bert", is_decoder=True, **SIZES).look_ahead_problem is None


@pytest.mark.parametrize(("objective", "is_refused"), [("causal-lm", True), ("my_losses:Masked", False)])
def test_make_draft__encoder__is_refused_for_next_token_prediction_alone(objective: str, is_refused: bool) -> None:
    job = tiny_job(model={"architecture": "bert", **SIZES}, training__objective=objective, code="./src")
    info = ask(architecture="bert", **SIZES)
    if not is_refused:
        make_draft(job, model=info, hardware=CPU)
        return
    with pytest.raises(
        PlanError, match=r"model\.architecture: in BertLMHeadModel .* sees the tokens after it"
    ) as caught:
        make_draft(job, model=info, hardware=CPU)
    assert caught.value.job_key == "model.architecture"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "counts positions from its padding token on, and the tokenizer names none: set model.pad_token_id"),
        (
            {"pad_token_id": 1, "max_position_embeddings": 16},
            r"a forward pass over 16 tokens fails, though one over fewer works: .*out of bounds",
        ),
    ],
)
def test_inspect__model_whose_forward_pass_fails__is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        ask(architecture="roberta", is_decoder=True, **SIZES, **keys)
    assert caught.value.key == "architecture"


def test_inspect__roberta_with_a_padding_token_and_room_for_it__is_accepted() -> None:
    info = ask(architecture="roberta", is_decoder=True, pad_token_id=1, **SIZES)
    assert info.look_ahead_problem is None
    assert info.notes == () and info.max_seq_len == 16
