"""Facts about a network, for a planner that must not import torch.

    python -m forge.model.inspect < request.json > answer.json

The request holds the job's `model:` section and what the data gives to the config; the answer holds
ModelInfo, or what is wrong and with which key. The network is built on torch's meta device: exact
shapes, no memory, so a 70B model is counted in seconds.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from forge.config.model import ModelSpec
from forge.errors import ForgeError
from forge.model.build import build_config
from forge.plan.inputs import ModelInfo
from forge.user_code import use_code


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpecError:
    """What is wrong with a `model:` section, so that the loader can blame the line."""

    problem: str
    key: str | None = None
    """Below `model`, if one key is to blame."""
    choices: tuple[str, ...] = ()
    """What would be valid in its place."""


def measure(spec: ModelSpec, *, vocab_size: int, seq_len: int, eot_id: int | None) -> ModelInfo | ModelSpecError:
    """Count a network without allocating it, or say what is wrong with its section."""
    complaint = _check_keys(spec)
    if complaint:
        return complaint
    try:
        config = build_config(spec, vocab_size=vocab_size, seq_len=seq_len, eot_id=eot_id)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ForgeError as error:
        blamed = re.search(r"field '(\w+)'", str(error))
        is_given = blamed is not None and blamed[1] in spec.config_overrides
        return ModelSpecError(problem=str(error), key=blamed[1] if blamed and is_given else None)
    except Exception as error:  # a config that transformers builds and its model class cannot
        return ModelSpecError(problem=f"transformers cannot build this model: {error}")
    return _count(model, config)


def _check_keys(spec: ModelSpec) -> ModelSpecError | None:
    if spec.architecture is not None and spec.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        choices = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        problem = "transformers has no causal language model of this name"
        return ModelSpecError(problem=problem, key="architecture", choices=choices)
    if spec.architecture is not None:
        config = AutoConfig.for_model(spec.architecture)
    else:
        folder = spec.from_pretrained or ""
        if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
            return ModelSpecError(problem="there is no such folder", key="from_pretrained")
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            return ModelSpecError(problem=" ".join(str(error).split()), key="from_pretrained")
    known = _config_keys(config)
    for key in spec.config_overrides:
        if key not in known:
            problem = f"{type(config).__name__} has no such key"
            return ModelSpecError(problem=problem, key=key, choices=tuple(sorted(known)))
    return None


def _config_keys(config: PretrainedConfig) -> set[str]:
    """Every key that a config's class takes, its aliases included."""
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
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    positions = getattr(text, "max_position_embeddings", None)
    return ModelInfo(
        architecture=config.model_type,
        class_name=type(model).__name__,
        num_parameters=model.num_parameters(),
        num_trainable_parameters=model.num_parameters(only_trainable=True),
        num_matmul_parameters=multiplied,
        largest_module_parameters=max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        attention_width=heads * head_dim,
        vocab_size=text.vocab_size,
        max_seq_len=positions,
    )


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    use_code(request.pop("code"))
    spec = ModelSpec.model_validate_json(json.dumps(request.pop("model")))
    answer = measure(spec, **request)
    kind = "facts" if isinstance(answer, ModelInfo) else "complaint"
    json.dump({kind: dataclasses.asdict(answer)}, sys.stdout)


if __name__ == "__main__":
    main()
