"""The layers that a model repeats: what is compiled one by one, and whose products may be in fp8."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model of transformers, or else the modules in its lists of modules of one class."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return layers or _listed_layers(model)


def _listed_layers(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(child) for child in module}) == 1:
        return list(module)
    return [layer for child in module.children() for layer in _listed_layers(child)]
