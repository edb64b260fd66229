"""Models of transformers: weights from a seed, configs from a job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge.config.model import ModelSpec
from forge.errors import PlanError
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.model.transformers_config import build_config

DATA = DataShape(vocab_size=97, seq_len=16, eot_id=0)
LLAMA = {
    "architecture": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def build(seed: int = 1, *, skip_init: bool = False, **keys: object) -> torch.nn.Module:
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=seed, skip_init=skip_init)
    return TransformersFamily().build(ModelSpec.model_validate(LLAMA | keys), DATA, options=options)


def test_build__same_seed__same_weights_whatever_was_drawn_before() -> None:
    first = build().state_dict()
    torch.rand(1000)
    second = build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_build__another_seed__other_weights() -> None:
    first, second = build(1).state_dict(), build(2).state_dict()
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_build__one_more_layer__the_other_layers_keep_their_weights() -> None:
    small, large = build().state_dict(), build(num_hidden_layers=3).state_dict()
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_build__layers_of_the_same_shape__differ() -> None:
    weights = build().state_dict()
    assert not torch.equal(
        weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    )


def test_build__initializer_range__is_the_spread_of_the_weights() -> None:
    std = build(initializer_range=0.05).state_dict()["lm_head.weight"].std()
    assert std == pytest.approx(0.05, rel=0.1)


def test_build__leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(1), expected)


def test_build__tied_weights__stay_tied() -> None:
    model = build(tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]


def test_config__takes_vocabulary_positions_and_end_of_text_from_the_data() -> None:
    config = build_config(ModelSpec.model_validate(LLAMA), DataShape(vocab_size=97, seq_len=16, eot_id=3))
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (97, 16, 3)


def test_config__a_key_of_the_job__wins_over_the_data() -> None:
    spec = ModelSpec.model_validate(LLAMA | {"vocab_size": 128, "max_position_embeddings": 64})
    config = build_config(spec, DATA)
    assert (config.vocab_size, config.max_position_embeddings) == (128, 64)


def test_config__alias_of_a_key__counts_as_the_key() -> None:
    spec = ModelSpec.model_validate({"architecture": "gpt2", "n_positions": 64, "n_embd": 32, "n_head": 2})
    assert build_config(spec, DATA).max_position_embeddings == 64


@pytest.mark.parametrize("keys", [{"hidden_size": "wide"}, {"hidden_size": 33}, {"num_hidden_layers": -1.5}])
def test_config__value_that_transformers_refuses__is_one_clear_line(keys: dict[str, object]) -> None:
    with pytest.raises(PlanError) as caught:
        build_config(ModelSpec.model_validate(LLAMA | keys), DATA)
    assert "llama" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config__folder_without_a_model__is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="from_pretrained"):
        build_config(ModelSpec(from_pretrained=str(tmp_path)), DATA)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_build__skip_init__draws_nothing_and_fills_buffers(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, object] = {"architecture": architecture, "num_key_value_heads": 2}
    if architecture == "gpt2":
        keys = {"architecture": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
        monkeypatch.setattr("tests.model.test_transformers_family.LLAMA", {})
    drawn = build(**keys)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *_, **__: pytest.fail("a weight was initialised"))
    monkeypatch.setattr(
        "forge.model.families.transformers_family.initialise",
        lambda *_, **__: pytest.fail("weights were initialised"),
    )
    blank = build(skip_init=True, **keys)
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in drawn.named_parameters()}
    ours, theirs = dict(blank.named_buffers()), dict(drawn.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    blank.load_state_dict(drawn.state_dict())
    tokens = torch.arange(8).unsqueeze(0)
    assert torch.equal(blank.eval()(tokens).logits, drawn.eval()(tokens).logits)
