"""Run an encoder-decoder of transformers on sources and labels, and see which of its layers read which of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from forge.model.auto_classes import build_on_meta

_NUM_SOURCE, _NUM_TARGET = 8, 4
"""Lengths that tell apart what a layer is given."""


def decoder_inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return what makes the decoder predict the labels: they are shifted by the model's own rule.

    Shapes: labels: int64[n, T], -100 at padding, which the rule replaces.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels=labels)}


def seq2seq_output(model: Any, *, source: Tensor, labels: Tensor, **options: Any) -> Any:
    """Return what a model says about labels; its `logits` float[n, T, V] predict them.

    Args:
        options: of the model's forward pass, such as `attention_mask` int64[n, S].

    Shapes: source: int64[n, S]; labels: int64[n, T].
    """
    return model(input_ids=source, **options, **decoder_inputs(model, labels), use_cache=False)


def seq2seq_logits(model: Any, *, source: Tensor, labels: Tensor) -> Tensor:
    """`seq2seq_output(...).logits`."""
    logits: Tensor = seq2seq_output(model, source=source, labels=labels).logits
    return logits


def parameters_of_sources(config: PretrainedConfig) -> set[str]:
    """Return the names of the matrices that source tokens are multiplied with: of the encoder, and of the keys and
    values of cross attention.

    A forward pass of the model on the meta device shows what each layer is given; where that is not possible, those
    of the encoder alone.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the masks of others depend on values
    model = build_on_meta(config, auto_class="AutoModelForSeq2SeqLM").eval()
    found: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            given = arguments[0] if arguments else None
            if isinstance(given, Tensor) and given.ndim >= 2 and given.shape[-2] == _NUM_SOURCE:
                found.update(f"{name}.{own}" for own, _ in module.named_parameters(recurse=False))

        return hook

    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(watch(name))
    source = torch.zeros(1, _NUM_SOURCE, dtype=torch.int64, device="meta")
    labels = torch.zeros(1, _NUM_TARGET, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            seq2seq_logits(model, source=source, labels=labels)
    except Exception:  # whatever it is
        within = {id(parameter) for parameter in model.get_encoder().parameters()}
        return {name for name, parameter in model.named_parameters() if id(parameter) in within}
    return found
