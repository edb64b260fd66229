"""Count the parameters and the arithmetic of a transformers model on the meta device."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from forge.model.adapter_names import unwrapped_name
from forge.model.composite import encoder_of
from forge.model.families.base import DataShape, parameter_counts
from forge.model.fp8_layers import find_fp8_layers
from forge.model.isolation import isolation_problem
from forge.model.positions import num_positions
from forge.model.sequence_parallel import sequence_parallel_problem
from forge.objective.registry import AutoClass
from forge.plan.inputs import ModelInfo

_SEQUENCES: AutoClass = "AutoModelForSequenceClassification"


def count_model(model: Any, config: PretrainedConfig, *, data: DataShape, of_sources: Set[str] | None) -> ModelInfo:
    """Count a model on the meta device.

    Args:
        of_sources: names of the matrices of an encoder-decoder that the tokens of sources are multiplied with; None
            for other models.
    """
    text = config.get_text_config()
    per_token = _uses_per_token(model, seq_len=data.seq_len) if data.auto_class == _SEQUENCES else {}
    head = model.get_output_embeddings()
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not (head is not None and module.weight is head.weight)
    }
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    active = (getattr(text, "num_experts_per_tok", None) or experts or 1) / (experts or 1)
    of_head = _head_parameters(model)
    multiplied = frozen = 0
    in_head = frozen_in_head = 0
    sources = frozen_sources = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in looked_up:
            share = per_token.get(id(parameter), 1.0)
            count = round(parameter.numel() * (active if "experts" in name else share))
            multiplied += count
            frozen += 0 if parameter.requires_grad else count
            if id(parameter) in of_head:
                in_head += count
                frozen_in_head += 0 if parameter.requires_grad else count
            if of_sources is not None and unwrapped_name(name) in of_sources:
                sources += count
                frozen_sources += 0 if parameter.requires_grad else count
    heads = getattr(text, "num_attention_heads", None) or 1
    is_seq2seq = of_sources is not None
    decoders = (getattr(text, key, None) for key in ("num_decoder_layers", "decoder_layers"))
    num_decoder_layers = next((count for count in decoders if count), text.num_hidden_layers)
    num_encoder_layers = encoder_of(config).num_hidden_layers
    return ModelInfo(
        architecture=config.model_type,
        class_name=type(model).__name__,
        **parameter_counts(model),
        num_matmul_parameters=multiplied,
        num_frozen_matmul_parameters=frozen,
        num_head_matmul_parameters=in_head,
        num_frozen_head_matmul_parameters=frozen_in_head,
        num_source_matmul_parameters=sources,
        num_frozen_source_matmul_parameters=frozen_sources,
        num_encoder_layers=num_encoder_layers if is_seq2seq else 0,
        num_layers=num_encoder_layers + (num_decoder_layers if is_seq2seq else 0),
        hidden_size=text.hidden_size,
        intermediate_size=_width_of_mlp(text),
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
        sliding_window=getattr(text, "sliding_window", None),
        num_window_layers=_num_window_layers(text),
        sequence_parallel_problem=sequence_parallel_problem(model),
        fp8_layers=find_fp8_layers(model).info,
        vocab_size=text.vocab_size,
        num_outputs=text.hidden_size if data.auto_class == "AutoModel" else data.num_labels,
        max_seq_len=num_positions(model),
        isolation_problem=isolation_problem(model),
        has_linear_head=not is_seq2seq and has_linear_head(model),  # last, since it changes the model
    )


def _num_window_layers(config: PretrainedConfig) -> int:
    """Return how many layers have a sliding window: those that `layer_types` names, without it all."""
    if getattr(config, "sliding_window", None) is None:
        return 0
    kinds = getattr(config, "layer_types", None)
    return int(config.num_hidden_layers if kinds is None else kinds.count("sliding_attention"))


def _uses_per_token(model: Any, *, seq_len: int) -> dict[int, float]:
    """How often a token is multiplied with the weight of each linear layer: a layer that is given one vector of a
    sequence, as pooling layers and classifiers are, counts as one part in `seq_len`.

    Args:
        model: on the meta device.
    """
    rows: dict[int, float] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda linear, given: rows.update({id(linear.weight): given[0].numel() // linear.in_features})
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="meta"))
    except Exception:  # one that reads values: every layer counts for every token
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {weight: 1 / seq_len for weight, count in rows.items() if count == 1}


def _head_parameters(model: Any) -> set[int]:
    """Ids of the parameters that are used after the base model, including an embedding that is also the head."""
    inner = {id(module) for module in model.base_model.modules()}
    after = (module for module in model.modules() if id(module) not in inner)
    return {id(parameter) for module in after for parameter in module.parameters(recurse=False)}


def _width_of_mlp(config: PretrainedConfig) -> int:
    given = (getattr(config, key, None) for key in ("intermediate_size", "d_ff", "encoder_ffn_dim"))
    return int(next((width for width in given if width), 4 * config.hidden_size))


def has_linear_head(model: Any) -> bool:
    """Whether logits are the head's linear map of the base model's last hidden state, and nothing more.

    The loss is computed in chunks of logits then. Caps, scales and layers between base model and head have too
    many names to list them, so the model is run on the meta device with its base model replaced by one that
    returns a marked tensor: the head must be called once, on exactly this tensor, and the logits must be exactly
    what it returned. A model that does not call its base model as a whole (OPT) counts as not linear.

    Args:
        model: a transformers causal LM on the meta device, which is changed; throw it away.
    """
    head, base = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or base is model:
        return False
    hidden = torch.empty(1, 8, head.in_features, device="meta")
    calls: list[tuple[Tensor, Tensor, int]] = []
    base.forward = lambda *_, **__: _HiddenState(last_hidden_state=hidden)
    head.register_forward_hook(lambda _, given, out: calls.append((given[0], out, out._version)))
    tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
    except Exception:  # the class needs more of its base model than a hidden state: not known to be linear
        return False
    if len(calls) != 1:
        return False
    given, out, version = calls[0]
    return _is_same(given, hidden) and _is_same(logits, out) and logits._version == version


class _HiddenState(BaseModelOutputWithPast):  # type: ignore[misc]
    """A model output of which only the last hidden state is set; all other fields are None."""

    def __getattr__(self, name: str) -> None:
        return None


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same view of the same memory."""
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata and (
        one.shape,
        one.stride(),
        one.storage_offset(),
    ) == (other.shape, other.stride(), other.storage_offset())
