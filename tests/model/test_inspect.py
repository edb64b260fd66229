"""Counting a network on the meta device, and saying what is wrong with its section."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.families.base import DataShape
from forge.model.families.count import has_linear_head
from forge.model.families.registry import family_of
from forge.model.position_wise import selected_positions
from forge.plan.flops import flops_per_token
from forge.plan.inputs import ModelInfo

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def ask(**keys: object) -> ModelInfo:
    spec = ModelSpec.model_validate(keys)
    return family_of(spec).inspect(spec, DataShape(vocab_size=97, seq_len=16, eot_id=0))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gpt_neox", "phi", "olmo"])
def test_the_count_is_that_of_a_model_that_was_really_built(architecture: str) -> None:
    facts = ask(architecture=architecture, **SIZES)
    config = AutoConfig.for_model(architecture, **SIZES, vocab_size=97, max_position_embeddings=16)
    real = AutoModelForCausalLM.from_config(config)
    assert facts.num_parameters == sum(p.numel() for p in real.parameters())
    assert facts.class_name == type(real).__name__


@pytest.mark.parametrize("tied", [False, True])
def test_the_input_embedding_is_no_arithmetic_unless_it_is_the_head(tied: bool) -> None:
    facts = ask(architecture="llama", tie_word_embeddings=tied, **SIZES)
    layer = 4 * 32 * 32 + 3 * 32 * 64
    assert facts.num_matmul_parameters == 2 * layer + 97 * 32


def test_flops_agree_with_torchs_own_counter() -> None:
    """Forward and backward are three times the forward; torch counts matrix products only, as MFU does."""
    from torch.utils.flop_counter import FlopCounterMode

    facts = ask(architecture="llama", **SIZES)
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=97, max_position_embeddings=16)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 16, dtype=torch.int64), use_cache=False)
    assert flops_per_token(facts, seq_len=16) * 16 == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("masked", [1, 5, 16])
def test_flops__masked_language_model__are_those_of_the_masked_positions(masked: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    sizes = SIZES | {"vocab_size": 997, "max_position_embeddings": 16}
    spec = ModelSpec.model_validate({"architecture": "bert", **sizes})
    data = DataShape(vocab_size=997, seq_len=16, eot_id=0, auto_class="AutoModelForMaskedLM", pad_id=1)
    facts = family_of(spec).inspect(spec, data)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", attn_implementation="eager", **sizes))
    where = torch.arange(masked)
    with FlopCounterMode(display=False) as counter, selected_positions(model, where):
        logits = model(input_ids=torch.zeros(1, 16, dtype=torch.int64)).logits
        logits.sum().backward()
    found = flops_per_token(facts, seq_len=16, share_of_head=masked / 16) * 16
    assert facts.has_positionwise_head and logits.shape[1] == masked
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        (
            {"architecture": "xglm", "layerdrop": 0.1, "d_model": 64, "num_layers": 2, "attention_heads": 2},
            "layerdrop",
        ),
        ({"architecture": "mixtral", "router_jitter_noise": 0.01, **SIZES}, "router_jitter_noise"),
    ],
)
def test_random_numbers_of_a_whole_batch_are_refused(keys: dict[str, object], key: str) -> None:
    with pytest.raises(ModelError, match="drawn for a micro-batch") as caught:
        ask(**keys)
    assert caught.value.key == key
    if key == "layerdrop":
        assert ask(**(keys | {key: 0.0})).class_name == "XGLMForCausalLM"


def test_layerdrop_of_an_encoder_decoder_is_refused_and_can_be_turned_off() -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    data = DataShape(vocab_size=97, seq_len=16, eot_id=0, auto_class="AutoModelForSeq2SeqLM", pad_id=1)
    for architecture, given in (("bart", {"encoder_layerdrop": 0.1}), ("m2m_100", {})):
        spec = ModelSpec.model_validate({"architecture": architecture, **sizes, **given})
        with pytest.raises(ModelError, match="skips whole layers at random") as caught:
            family_of(spec).inspect(spec, data)
        assert caught.value.key == "encoder_layerdrop"
    off = {"encoder_layerdrop": 0, "decoder_layerdrop": 0.0}
    spec = ModelSpec.model_validate({"architecture": "m2m_100", **sizes, **off})
    assert family_of(spec).inspect(spec, data).class_name == "M2M100ForConditionalGeneration"


def test_of_a_mixture_of_experts_only_the_active_share_counts() -> None:
    facts = ask(architecture="mixtral", num_key_value_heads=1, num_local_experts=8, num_experts_per_tok=2, **SIZES)
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
    with pytest.raises(ModelError) as caught:
        ask(**keys)
    assert caught.value.key == blamed
    assert "\n" not in caught.value.problem


def test_a_wrong_key_comes_with_the_valid_ones() -> None:
    with pytest.raises(ModelError) as caught:
        ask(architecture="llama", hiden_size=32)
    assert "hidden_size" in caught.value.choices


LINEAR = [
    ("llama", {}, True),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, True),
    ("mixtral", {"num_key_value_heads": 1, "num_local_experts": 4}, True),
    ("gemma2", {"head_dim": 16, "num_key_value_heads": 1, "final_logit_softcapping": 1.0}, False),
    ("granite", {"logits_scaling": 3.0}, False),
    ("cohere", {"logit_scale": 0.1}, False),
]


@pytest.mark.parametrize(("architecture", "keys", "is_linear"), LINEAR)
def test_inspect__head__is_linear_as_the_model_itself_computes_it(
    architecture: str, keys: dict[str, object], is_linear: bool
) -> None:
    sizes = {} if architecture == "gpt2" else SIZES
    assert ask(architecture=architecture, **(sizes | keys)).has_linear_head is is_linear
    config = AutoConfig.for_model(architecture, **(sizes | keys), vocab_size=97)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), logits) is is_linear


def test_inspect__model_with_and_without_isolation__is_in_the_facts() -> None:
    assert ask(architecture="llama", **SIZES).isolation_problem is None
    without = ask(architecture="bloom", hidden_size=32, n_layer=2, n_head=2)
    assert without.isolation_problem == "BloomForCausalLM takes no position_ids"


def test_has_linear_head__logits_changed_in_place__is_not_linear() -> None:
    config = AutoConfig.for_model("llama", **SIZES, vocab_size=97)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().register_forward_hook(lambda _, given, out: None)
    original = type(model).forward
    model.forward = lambda **inputs: _halved(original(model, **inputs))
    assert not has_linear_head(model)


def _halved(out: Any) -> Any:
    out.logits.mul_(0.5)
    return out


@pytest.mark.parametrize("pattern", ["model.embed_tokens", "model.layers.0.*", "*.mlp"])
def test_inspect__freeze__is_not_counted_as_trainable(pattern: str) -> None:
    whole, part = ask(architecture="llama", **SIZES), ask(architecture="llama", freeze=pattern, **SIZES)
    assert part.num_trainable_parameters < part.num_parameters == whole.num_trainable_parameters


def test_inspect__freeze_pattern_without_match__names_near_ones() -> None:
    with pytest.raises(ModelError, match=r"'model\.embed_token'.*model\.embed_tokens") as caught:
        ask(architecture="llama", freeze="model.embed_token", **SIZES)
    assert caught.value.key == "freeze"


def test_inspect__everything_frozen__is_refused() -> None:
    with pytest.raises(ModelError, match="nothing would be trained"):
        ask(architecture="llama", freeze="*", **SIZES)
