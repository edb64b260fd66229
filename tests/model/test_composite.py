"""forge.model.composite: an encoder and a decoder of transformers in one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.composite import encoder_of
from forge.model.dropout import has_dropout
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.transformers_family import TransformersFamily
from forge.model.seq2seq import seq2seq_logits
from forge.model.transformers_config import build_config, check_keys

BERT: dict[str, Any] = {
    "architecture": "bert", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
DATA = DataShape(vocab_size=90, seq_len=12, eot_id=0, pad_id=1, auto_class="AutoModelForSeq2SeqLM")


def spec(encoder: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None) -> ModelSpec:
    parts = {"encoder": BERT | (encoder or {}), "decoder": BERT | (decoder or {})}
    return ModelSpec.model_validate({"architecture": "encoder-decoder", **parts})


def test_build_config__two_berts__get_vocabulary_tokens_and_cross_attention() -> None:
    config = build_config(spec(encoder={"num_hidden_layers": 3}), DATA)
    assert (config.encoder.vocab_size, config.decoder.vocab_size) == (90, 90)
    assert config.encoder.max_position_embeddings == config.decoder.max_position_embeddings == 13
    assert config.decoder.is_decoder and config.decoder.add_cross_attention and not config.encoder.is_decoder
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (1, 1, 0)
    assert encoder_of(config).num_hidden_layers == 3


def test_inspect__encoder_is_deeper__counts_both() -> None:
    info = TransformersFamily().inspect(spec(encoder={"num_hidden_layers": 3}), DATA)
    assert (info.class_name, info.num_encoder_layers, info.num_layers) == ("EncoderDecoderModel", 3, 4)
    assert info.num_source_matmul_parameters > 3 * (4 * 32 * 32 + 2 * 32 * 64)


def test_build__same_weights__logits_are_those_of_transformers() -> None:
    options = BuildOptions(dtype=torch.float32, device=torch.device("cpu"), seed=3, skip_init=False)
    model = TransformersFamily().build(spec(decoder={"num_hidden_layers": 2}), DATA, options=options).eval()
    encoder, decoder = BertConfig(**model.config.encoder.to_dict()), BertConfig(**model.config.decoder.to_dict())
    peer = EncoderDecoderModel(
        encoder=BertModel(encoder, add_pooling_layer=False), decoder=BertLMHeadModel(decoder)
    ).eval()
    peer.load_state_dict(model.state_dict())
    source, labels = torch.randint(2, 90, (2, 8)), torch.randint(2, 90, (2, 5))
    first = torch.cat([torch.ones(2, 1, dtype=torch.int64), labels[:, :-1]], dim=1)
    theirs = peer(input_ids=source, decoder_input_ids=first).logits
    torch.testing.assert_close(seq2seq_logits(model, source=source, labels=labels), theirs)


def test_has_dropout__only_in_the_encoder__is_found() -> None:
    assert not has_dropout(build_config(spec(), DATA))
    assert has_dropout(build_config(spec(encoder={"hidden_dropout_prob": 0.1}), DATA))


@pytest.mark.parametrize(
    ("model", "key", "problem"),
    [
        ({}, "architecture", "needs encoder"),
        ({"encoder": BERT}, "architecture", "needs decoder"),
        ({"encoder": {"hidden_size": 32}, "decoder": BERT}, "encoder", "needs encoder"),
        (
            {"encoder": BERT, "decoder": BERT | {"architecture": "brt"}},
            "decoder.architecture",
            "no decoder of this",
        ),
        ({"encoder": BERT, "decoder": BERT | {"architecture": "llama"}}, "decoder.architecture", "cross attention"),
        ({"encoder": BERT | {"hidden_sise": 3}, "decoder": BERT}, "encoder.hidden_sise", "no such key"),
    ],
)
def test_check_keys__mistake_in_a_part__is_named(model: dict[str, Any], key: str, problem: str) -> None:
    wrong = ModelSpec.model_validate({"architecture": "encoder-decoder", **model})
    with pytest.raises(ModelError, match=problem) as raised:
        check_keys(wrong, auto_class="AutoModelForSeq2SeqLM")
    assert raised.value.key == key
