"""The tensors of a model, by their names in transformers; equal on every rank and at every ZeRO stage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from forge.checkpoint.manifest import BaseWeights, ModelShape, Parameter
from forge.model.adapter_names import has_adapters, unwrapped_name
from forge.model.adapters import adapter_record
from forge.model.quantise import quantised_weights
from forge.objective.base import MODEL_PREFIX

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""Safetensors names of torch types."""


def shape_of(engine: Any, *, base: BaseWeights | None = None) -> ModelShape:
    """Return every tensor of the model by its name in transformers; equal on every rank.

    Args:
        base: the pretrained weights that parameters which are not trained refer to.
    """
    module = engine.module
    quantised = {_plain_name(module, name): whole for name, whole in quantised_weights(module).items()}
    parameters = {
        name: Parameter(
            shape=tuple(quantised[name].shape) if name in quantised else tuple(getattr(p, "ds_shape", p.shape)),
            dtype=DTYPE_NAMES[quantised[name].dtype if name in quantised else p.dtype],
            kind="master" if p.requires_grad else "frozen" if base is None else "base",
        )
        for name, p in named_parameters(module)
    }
    for name, buffer in named_buffers(module):
        parameters[name] = Parameter(shape=tuple(buffer.shape), dtype=DTYPE_NAMES[buffer.dtype], kind="buffer")
    first = {id(p): name for name, p in named_parameters(module)}
    every = [(_plain_name(module, name), p) for name, p in module.named_parameters(remove_duplicate=False)]
    return ModelShape(
        parameters=parameters,
        tied={name: first[id(p)] for name, p in every if first[id(p)] != name},
        config=_config_of(getattr(module, "model", module)),
        base=base,
        adapters=adapter_record(getattr(module, "model", module)),
    )


def _config_of(model: Any) -> dict[str, Any]:
    """Return a transformers model's config as JSON."""
    if not hasattr(model, "config"):
        return {}
    config: dict[str, Any] = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    return config


def named_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List each parameter once, by its name in the transformers model."""
    return [(_plain_name(module, name), parameter) for name, parameter in module.named_parameters()]


def _plain_name(module: nn.Module, name: str) -> str:
    """Convert a name in the `ObjectiveModule` to that in the model, without the wrappers of adapters."""
    plain = name.removeprefix(MODEL_PREFIX)
    return unwrapped_name(plain) if has_adapters(getattr(module, "model", module)) else plain


def named_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of the state dict that are not parameters, such as a router's bias."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    quantised = tuple(f"{name}." for name in quantised_weights(module))  # with their scales
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in parameters and isinstance(tensor, Tensor) and not name.startswith(quantised):
            yield _plain_name(module, name), tensor
