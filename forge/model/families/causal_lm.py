"""Causal language models of transformers: an `architecture` by name, or the folder of `from_pretrained`.

The config consists of the job's keys, with vocabulary and positions taken from the data. `forge.model.init`
initialises the weights. With `from_pretrained` the model is built without values, and each rank reads its own shard
afterwards (`forge.model.pretrained`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forge.config.model import ModelSpec
from forge.errors import ModelError, PlanError
from forge.model.dropout import has_dropout
from forge.model.families.base import BuildOptions, DataShape, parameter_counts
from forge.model.freeze import freeze_parameters
from forge.model.init import initialise
from forge.model.isolation import isolation_problem
from forge.model.pretrained import PretrainedWeights
from forge.model.weight_files import open_weight_files
from forge.plan.inputs import ModelInfo
from forge.process import one_line

# On CPU torch's fused attention is slower than three plain products up to this many tokens: 1.18 times at
# 128, 1.08 at 256, 1.07 at 512, 0.70 at 1024 (a training step of a small Llama in bf16, one core).
_PLAIN_ATTENTION_TOKENS = 512


class CausalLmFamily:
    """Models that `AutoModelForCausalLM` knows."""

    def inspect(self, spec: ModelSpec, data: DataShape) -> ModelInfo:
        _check_keys(spec)
        try:
            config = build_config(spec, data)
            model = build_on_meta(config)
        except PlanError as error:
            named = re.search(r"field '(\w+)'", str(error))
            is_given = named is not None and named[1] in spec.config_overrides
            raise ModelError(str(error), key=named[1] if named and is_given else None) from error
        except Exception as error:  # a config that transformers builds and its model class cannot
            raise ModelError(f"transformers cannot build this model: {one_line(error)}") from error
        freeze_parameters(model, spec.freeze)
        if spec.from_pretrained is not None and Path(spec.from_pretrained).expanduser().is_dir():
            PretrainedWeights(open_weight_files(spec.from_pretrained), model)  # checks names and shapes
        info = _count(model, config)
        frozen = info.num_parameters - info.num_trainable_parameters
        return replace(info, num_base_parameters=frozen if spec.from_pretrained is not None else 0)

    def build(self, spec: ModelSpec, data: DataShape, *, options: BuildOptions) -> nn.Module:
        config = build_config(spec, data)
        is_short = options.device.type == "cpu" and data.seq_len <= _PLAIN_ATTENTION_TOKENS
        # Fused attention draws its dropout from a stream of its own, which a seed per sample cannot reach.
        if has_dropout(config) or (is_short and "attn_implementation" not in spec.config_overrides):
            config._attn_implementation = "eager"
        sharding = options.sharding
        with no_init_weights(), sharding.construct() if sharding else nullcontext():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=options.dtype, trust_remote_code=False
            )
        if not options.skip_init and spec.from_pretrained is None:
            initialise(model, seed=options.seed, gather=sharding.gather if sharding else None)
        model.tie_weights()
        freeze_parameters(model, spec.freeze)
        return cast(nn.Module, model)

    def open_pretrained(self, spec: ModelSpec, data: DataShape) -> PretrainedWeights:
        assert spec.from_pretrained is not None
        return PretrainedWeights(open_weight_files(spec.from_pretrained), build_on_meta(build_config(spec, data)))

    def import_classes(self, spec: ModelSpec, data: DataShape) -> None:
        build_on_meta(build_config(spec, data))


def build_config(spec: ModelSpec, data: DataShape) -> PretrainedConfig:
    """Return the transformers config of a job: its keys, with vocabulary and positions taken from the data.

    Raises: PlanError if transformers refuses the architecture or a value.
    """
    if spec.from_pretrained is not None:
        config = _load_config(spec.from_pretrained, spec.config_overrides)
        _check_attention(config)
        return config
    given = spec.config_overrides
    try:
        base = AutoConfig.for_model(spec.architecture)
        names = {base.attribute_map.get(key, key) for key in given}
        derived: dict[str, Any] = {"vocab_size": data.vocab_size, "max_position_embeddings": data.seq_len}
        derived |= {"bos_token_id": data.eot_id, "eos_token_id": data.eot_id, "pad_token_id": None}
        derived = {
            key: value
            for key, value in derived.items()
            if hasattr(base, key) and base.attribute_map.get(key, key) not in names
        }
        config = AutoConfig.for_model(spec.architecture, **(derived | given))
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        raise PlanError(f"model.architecture {spec.architecture}: {one_line(error)}") from error
    _check_attention(config)
    return config


def config_from_record(record: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config that a checkpoint contains."""
    body = dict(record)
    return AutoConfig.for_model(body.pop("model_type"), **body)


def build_on_meta(config: PretrainedConfig) -> Any:
    """Build a model on the meta device, which allocates no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def _load_config(source: str, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Raises: ModelError if the config cannot be read, needs code of its folder, or is of quantised weights."""
    try:
        folder = str(Path(source).expanduser())
        config = AutoConfig.from_pretrained(folder, **(dict(overrides) | {"trust_remote_code": False}))
    except Exception as error:  # transformers validates with exceptions of several unrelated classes
        problem = f"the config of {source} cannot be used: {one_line(error)}"
        if "trust_remote_code" in str(error):
            problem = (
                f"the model of {source} consists of code in its own folder (`auto_map`), and forge does not "
                "execute it: take a model that transformers contains, or write it as a `class` in the folder of "
                "`code`"
            )
        raise ModelError(problem, key="from_pretrained") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ModelError(
            f"the weights of {source} are quantised ({method or 'method not named'}), and forge trains plain "
            "floating point: give the model that they were quantised from, or save them dequantised",
            key="from_pretrained",
        )
    return config


def _check_attention(config: PretrainedConfig) -> None:
    """Raises: ModelError if the attention is a kernel of the Hub, which is code that would be downloaded."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for chosen in (getattr(part, "_attn_implementation", None) for part in parts):
        if "/" in str(chosen):
            raise ModelError(
                f"attn_implementation {chosen} is code of the Hub, which forge does not execute: choose eager, "
                "sdpa or flash_attention_2",
            )


def _check_keys(spec: ModelSpec) -> None:
    """Raises: ModelError for an unknown architecture, folder or key of the config."""
    if spec.architecture is not None and spec.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        choices = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        raise ModelError(
            "transformers has no causal language model of this name", key="architecture", choices=choices
        )
    if spec.architecture is not None:
        config = AutoConfig.for_model(spec.architecture)
    else:
        folder = spec.from_pretrained or ""
        if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
            raise ModelError("there is no such folder", key="from_pretrained")
        config = _load_config(folder, {})
    known = _config_keys(config)
    for key in spec.config_overrides:
        if key not in known:
            raise ModelError(f"{type(config).__name__} has no such key", key=key, choices=tuple(sorted(known)))


def _config_keys(config: PretrainedConfig) -> set[str]:
    """Return every key that a config's class accepts, including aliases."""
    names = set(config.attribute_map)
    for cls in type(config).__mro__:
        names |= set(getattr(cls, "__annotations__", {}))
        initialiser = vars(cls).get("__init__")
        if initialiser is not None:
            names |= set(inspect.signature(initialiser).parameters)
    names.add("attn_implementation")
    return {name for name in names if not name.startswith("_")} - {"self", "kwargs", "args"}


def _count(model: Any, config: PretrainedConfig) -> ModelInfo:
    text = config.get_text_config()
    head = model.get_output_embeddings()
    looked_up = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not (head is not None and module.weight is head.weight)
    }
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    active = (getattr(text, "num_experts_per_tok", None) or experts or 1) / (experts or 1)
    multiplied = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in looked_up:
            multiplied += round(parameter.numel() * (active if "experts" in name else 1))
    heads = getattr(text, "num_attention_heads", None) or 1
    return ModelInfo(
        architecture=config.model_type,
        class_name=type(model).__name__,
        **parameter_counts(model),
        num_matmul_parameters=multiplied,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        attention_width=heads * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocab_size=text.vocab_size,
        max_seq_len=getattr(text, "max_position_embeddings", None),
        isolation_problem=isolation_problem(model),
        has_linear_head=has_linear_head(model),  # last, since it changes the model
    )


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
