"""Weights from a seed, and configs from a job."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge.config.model import ModelSpec
from forge.errors import PlanError
from forge.model.build import build_config, build_model

LLAMA = {
    "architecture": "llama", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def build(seed: int = 1, **keys: object) -> torch.nn.Module:
    spec = ModelSpec.model_validate(LLAMA | keys)
    config = build_config(spec, vocab_size=97, seq_len=16, eot_id=0)
    return build_model(spec, config, seed=seed, dtype=torch.float32)


def test_the_seed_alone_decides_the_weights_whatever_was_drawn_before() -> None:
    first = build().state_dict()
    torch.rand(1000)
    second = build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights() -> None:
    first, second = build(1).state_dict(), build(2).state_dict()
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_a_layer_more_leaves_the_other_layers_weights_alone() -> None:
    small, large = build().state_dict(), build(num_hidden_layers=3).state_dict()
    assert all(torch.equal(small[name], large[name]) for name in small)


def test_layers_of_the_same_shape_differ() -> None:
    weights = build().state_dict()
    assert not torch.equal(
        weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    )


def test_weights_have_the_spread_the_config_asks_for() -> None:
    std = build(initializer_range=0.05).state_dict()["lm_head.weight"].std()
    assert std == pytest.approx(0.05, rel=0.1)


def test_building_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(1), expected)


def test_tied_weights_stay_tied() -> None:
    model = build(tie_word_embeddings=True)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_data_gives_vocabulary_positions_and_end_of_text() -> None:
    config = build_config(ModelSpec.model_validate(LLAMA), vocab_size=97, seq_len=16, eot_id=3)
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (97, 16, 3)


def test_what_the_job_says_wins_over_what_the_data_gives() -> None:
    spec = ModelSpec.model_validate(LLAMA | {"vocab_size": 128, "max_position_embeddings": 64})
    config = build_config(spec, vocab_size=97, seq_len=16, eot_id=0)
    assert (config.vocab_size, config.max_position_embeddings) == (128, 64)


def test_a_models_own_name_for_positions_is_known() -> None:
    spec = ModelSpec.model_validate({"architecture": "gpt2", "n_positions": 64, "n_embd": 32, "n_head": 2})
    assert build_config(spec, vocab_size=97, seq_len=16, eot_id=0).max_position_embeddings == 64


@pytest.mark.parametrize("keys", [{"hidden_size": "wide"}, {"hidden_size": 33}, {"num_hidden_layers": -1.5}])
def test_values_that_transformers_refuses_are_one_clear_line(keys: dict[str, object]) -> None:
    with pytest.raises(PlanError) as caught:
        build_config(ModelSpec.model_validate(LLAMA | keys), vocab_size=97, seq_len=16, eot_id=0)
    assert "llama" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_local_folder_gives_configuration_and_weights(tmp_path: Path) -> None:
    saved = build(seed=7)
    saved.save_pretrained(tmp_path)
    spec = ModelSpec(from_pretrained=str(tmp_path))
    config = build_config(spec, vocab_size=97, seq_len=16, eot_id=0)
    loaded = build_model(spec, config, seed=1, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in saved.state_dict().items())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="from_pretrained"):
        build_config(ModelSpec(from_pretrained=str(tmp_path)), vocab_size=97, seq_len=16, eot_id=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_blank_model_has_everything_but_the_weights(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new generation builds, to be filled from memory: nothing is drawn, and buffers are right."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2} if architecture == "gpt2" else {}
    spec = ModelSpec.model_validate((sizes or LLAMA | {"num_key_value_heads": 2}) | {"architecture": architecture})
    config = build_config(spec, vocab_size=97, seq_len=16, eot_id=0)
    drawn = build_model(spec, config, seed=1, dtype=torch.float32)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda *_, **__: pytest.fail("a weight was initialised"))
    monkeypatch.setattr("forge.model.build.initialise", lambda *_, **__: pytest.fail("weights were initialised"))
    blank = build_model(spec, config, seed=1, dtype=torch.float32, skip_init=True)
    assert {n: p.shape for n, p in blank.named_parameters()} == {n: p.shape for n, p in drawn.named_parameters()}
    ours, theirs = dict(blank.named_buffers()), dict(drawn.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    blank.load_state_dict(drawn.state_dict())
    tokens = torch.arange(8).unsqueeze(0)
    assert torch.equal(blank.eval()(tokens).logits, drawn.eval()(tokens).logits)
