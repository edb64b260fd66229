"""The parameters that are trained, with their shapes and what they are used for."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from forge.model.adapter_names import has_adapters, unwrapped_name
from forge.plan.inputs import TrainedParameter


def trained_parameters(model: nn.Module) -> tuple[TrainedParameter, ...]:
    """Return every parameter with a gradient once, in the order of `named_parameters`.

    Args:
        model: on any device; under ZeRO 3 partitioned, as the whole shape is kept beside each shard.
    """
    roles = _roles(model)
    return tuple(
        TrainedParameter(
            name=unwrapped_name(name) if has_adapters(model) else name,
            shape=tuple(getattr(parameter, "ds_shape", parameter.shape)),
            role=roles.get(id(parameter), "other"),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def _roles(model: nn.Module) -> dict[int, Any]:
    """Return the role of each weight that has one; one that is both embedding and head is an embedding."""
    roles: dict[int, str] = {}
    for module in model.modules():
        find_head = getattr(module, "get_output_embeddings", None)
        weight = getattr(find_head(), "weight", None) if callable(find_head) else None
        if isinstance(weight, nn.Parameter):
            roles[id(weight)] = "head"
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            roles[id(module.weight)] = "embedding"
        elif isinstance(module, _ConvNd):
            roles[id(module.weight)] = "convolution"
    return roles
