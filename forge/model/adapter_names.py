"""Names of the parameters of a model with adapters, without the wrappers that peft puts around layers.

    in the module                                        here, in checkpoints and in messages
    model.layers.0.mlp.up_proj.base_layer.weight         model.layers.0.mlp.up_proj.weight
    model.layers.0.mlp.up_proj.lora_A.default.weight     model.layers.0.mlp.up_proj.lora_A.weight

So weights have the names of transformers, and adapters those of peft's files.
"""

from __future__ import annotations

import re

from torch import nn

ADAPTER_NAME = "default"
"""peft's name of the only adapter."""
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""peft's modules of an adapter."""

_IN_MODULE = re.compile(rf"\.({'|'.join(PARTS)})\.{ADAPTER_NAME}(?=\.)")
_WRAPPERS = re.compile(r"(\.base_layer)+(?=\.)")
_PLAIN = re.compile(rf"\.({'|'.join(PARTS)})\.weight$")


def has_adapters(model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    return hasattr(model, "peft_config")


def unwrapped_name(name: str) -> str:
    """Convert the name of a parameter or buffer in a model with adapters."""
    if _IN_MODULE.search(name):
        return _IN_MODULE.sub(r".\1", name)
    return _WRAPPERS.sub("", name)


def is_adapter(name: str) -> bool:
    """Whether an unwrapped name is that of an adapter's parameter."""
    return _PLAIN.search(name) is not None
