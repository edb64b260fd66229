"""forge.model.kept_activations: what it says against what torch keeps of a real forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

from forge.model.kept_activations import kept_bytes_per_row

SEQ_LEN = 64
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LLAMA = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
GPT2 = GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.0)
BERT = BertConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    attention_probs_dropout_prob=0.0,
)
MODELS = {"llama": (LLAMA, AutoModelForCausalLM), "gpt2": (GPT2, AutoModelForCausalLM)}
MODELS |= {"bert": (BERT, AutoModelForMaskedLM)}


def kept_of_real_pass(model: Any) -> int:
    """Bytes of all distinct storages that torch keeps, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = model.base_model(input_ids=torch.zeros(1, SEQ_LEN, dtype=torch.int64), use_cache=False)
    assert result.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_kept_bytes__on_the_meta_device__are_those_of_a_real_pass(name: str, precision: str) -> None:
    config, auto_class = MODELS[name]
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = auto_class.from_config(config)
    found = kept_bytes_per_row(model, seq_len=SEQ_LEN).layers[precision]
    assert (model.config._attn_implementation, model.dtype) == ("sdpa", torch.float32)
    real = auto_class.from_config(config).to(DTYPES[precision]).train()
    assert found == pytest.approx(kept_of_real_pass(real), rel=0.05)


def test_kept_bytes__router_reads_values__is_not_measured() -> None:
    config = MixtralConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert kept_bytes_per_row(model, seq_len=SEQ_LEN).layers == {}


def test_kept_bytes__frozen_body__keeps_less() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA)
    whole = kept_bytes_per_row(model, seq_len=SEQ_LEN).layers["bf16"]
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad = False
    model.model.embed_tokens.weight.requires_grad = False
    assert kept_bytes_per_row(model, seq_len=SEQ_LEN).layers["bf16"] < 0.7 * whole
