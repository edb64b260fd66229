"""The Transformer of 2017 against torch.nn.Transformer with the same weights, and in transformers."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.model.transformer_2017 import (
    DecoderLayer,
    EncoderLayer,
    MultiHeadAttention,
    Transformer2017ForConditionalGeneration,
    sinusoids,
)

SIZES: dict[str, Any] = {"d_model": 32, "d_ff": 64, "num_heads": 4, "num_layers": 2, "vocab_size": 50}
SHAPE = DataShape(vocab_size=50, seq_len=16, eot_id=0, pad_id=1, auto_class="AutoModelForSeq2SeqLM")
SPEC = ModelSpec.model_validate({"architecture": "transformer-2017", **SIZES})


def small(**changes: Any) -> Transformer2017ForConditionalGeneration:
    torch.manual_seed(0)
    config = AutoConfig.for_model("transformer-2017", **SIZES | changes)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    assert isinstance(model, Transformer2017ForConditionalGeneration)
    return model


def batch() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    source, labels = (torch.randint(2, 50, (3, length), generator=draw) for length in (9, 7))
    mask = torch.ones_like(source)
    mask[1, 5:] = mask[2, 2:] = 0
    labels[0, 4:] = -100
    return {"input_ids": source, "attention_mask": mask, "labels": labels}


def torch_transformer(model: Transformer2017ForConditionalGeneration) -> nn.Transformer:
    """torch's with the weights of ours: post-norm, without the norms after the last layers that the paper lacks."""
    config = model.config
    sizes = {"d_model": config.d_model, "nhead": config.num_heads, "dim_feedforward": config.d_ff}
    options = {"dropout": 0.0, "batch_first": True, "norm_first": False}
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes, **options), config.num_layers)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes, **options), config.num_layers)
    # Its constructor draws the weights of the layers that it is given.
    made = nn.Transformer(**sizes, **options, custom_encoder=encoder, custom_decoder=decoder).eval()
    for theirs, ours in zip(encoder.layers, model.encoder.layers, strict=True):
        copy_layer(theirs, ours)
    for theirs, ours in zip(decoder.layers, model.decoder.layers, strict=True):
        copy_layer(theirs, ours)
        copy_attention(theirs.multihead_attn, ours.cross_attention)
        theirs.norm3.load_state_dict(ours.norms[2].state_dict())
    return made


def copy_layer(theirs: Any, ours: EncoderLayer | DecoderLayer) -> None:
    copy_attention(theirs.self_attn, ours.attention)
    theirs.linear1.load_state_dict(ours.feed_forward.inner.state_dict())
    theirs.linear2.load_state_dict(ours.feed_forward.outer.state_dict())
    theirs.norm1.load_state_dict(ours.norms[0].state_dict())
    theirs.norm2.load_state_dict(ours.norms[1].state_dict())


def copy_attention(theirs: nn.MultiheadAttention, ours: MultiHeadAttention) -> None:
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.out_proj.weight.copy_(ours.output.weight)
        theirs.in_proj_bias.zero_()
        theirs.out_proj.bias.zero_()


def test_logits__padded_batch__are_those_of_torch() -> None:
    model, given = small(), batch()
    for parameter in model.parameters():  # norms and biases too
        nn.init.normal_(parameter, std=0.3)
    reference = torch_transformer(model)
    table = model.encoder.embedding.tokens.weight
    decoder_ids = model.prepare_decoder_input_ids_from_labels(given["labels"])
    places = sinusoids(9, width=32, device=torch.device("cpu"))
    source, target = (
        table[ids] * math.sqrt(32) + places[: ids.shape[1]] for ids in (given["input_ids"], decoder_ids)
    )
    is_padding = given["attention_mask"] == 0
    hidden = reference(
        source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(7), tgt_is_causal=True,
        src_key_padding_mask=is_padding, memory_key_padding_mask=is_padding,
    )  # fmt: skip
    out = model(**given)
    torch.testing.assert_close(out.logits, hidden @ table.T, rtol=1e-4, atol=1e-4)
    expected = nn.functional.cross_entropy((hidden @ table.T).flatten(0, 1), given["labels"].flatten())
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sinusoids__every_dimension__is_the_formula_of_the_paper() -> None:
    found = sinusoids(40, width=6, device=torch.device("cpu"))
    for position in (0, 1, 17, 39):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert found[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert found[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_inspect__base_and_big_model__have_the_published_sizes() -> None:
    for sizes, published in (({}, 65e6), ({"d_model": 1024, "d_ff": 4096, "num_heads": 16}, 213e6)):
        spec = ModelSpec.model_validate({"architecture": "transformer-2017", "vocab_size": 37_000, **sizes})
        info = TransformersFamily().inspect(spec, SHAPE)
        assert info.num_parameters == pytest.approx(published, rel=0.04)  # tables 3 and 4 round
        assert info.num_layers == 12 and info.num_encoder_layers == 6
        assert info.num_source_matmul_parameters > info.num_matmul_parameters / 4


def test_inspect__width_that_heads_do_not_divide__is_refused() -> None:
    with pytest.raises(ModelError, match="multiple of num_heads: 5"):
        TransformersFamily().inspect(
            ModelSpec.model_validate(SPEC.model_dump(exclude_unset=True) | {"num_heads": 5}), SHAPE
        )


def test_build__from_a_seed__ties_and_scales_the_embedding() -> None:
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=1)
    spec = ModelSpec.model_validate({"architecture": "transformer-2017", **SIZES | {"d_model": 128}})
    model: Any = TransformersFamily().build(spec, SHAPE, options=options)
    assert model.lm_head.weight is model.encoder.embedding.tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert model.config.decoder_start_token_id == model.config.pad_token_id == 1
    again: Any = TransformersFamily().build(spec, SHAPE, options=options)
    assert all(bool((a == b).all()) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_from_pretrained__saved_model__has_the_same_logits_where_forge_is_imported(tmp_path: Path) -> None:
    model, given = small(), batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.encoder.embedding.tokens.weight
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits, rtol=0, atol=0)
    program = f"""
import forge.model.transformer_2017
from transformers import AutoModelForSeq2SeqLM
print(type(AutoModelForSeq2SeqLM.from_pretrained({str(tmp_path)!r})).__name__)
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Transformer2017ForConditionalGeneration"


@pytest.mark.parametrize("use_cache", [False, True])
def test_generate__greedy__is_the_likeliest_token_after_the_other(use_cache: bool) -> None:
    model, given = small(pad_token_id=1, decoder_start_token_id=1, eos_token_id=0), batch()
    chosen = {"max_new_tokens": 5, "use_cache": use_cache}
    written = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **chosen)
    ids = torch.full((3, 1), 1)
    for _ in range(written.shape[1] - 1):
        logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], decoder_input_ids=ids)
        ids = torch.cat([ids, logits.logits[:, -1:].argmax(dim=-1)], dim=1)
    before_end = (written == 0).cumsum(dim=1) == 0
    assert bool((written == ids)[before_end].all()) and written.shape[1] > 1


def test_gradients__recomputed__are_the_same() -> None:
    plain, given = small(dropout=0.0).train(), batch()
    plain(**given).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
    plain.zero_grad()
    plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain(**given).loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
