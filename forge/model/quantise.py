"""Keep frozen linear layers in 4 bits while adapters are trained (QLoRA, arXiv 2305.14314), by bitsandbytes.

Each weight is read from the pretrained files, quantised on the device and freed again, one at a time. Checkpoints
refer to the files, as for any frozen weight; what is quantised is made again at every start. bitsandbytes is
imported here and in `forge.train.optimizer_8bit`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.errors import CheckpointError, ModelError
from forge.model.adapter_names import unwrapped_name
from forge.model.pretrained import PretrainedWeights

_QUANTISED = "_forge_quantised"


def require_bitsandbytes() -> None:
    """Raises: ModelError with the command that installs bitsandbytes if it is missing."""
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "needs the package bitsandbytes, which is not installed: pip install bitsandbytes==0.50.2",
            key="lora.quantize",
        )


def quantised_layers(model: nn.Module, *, trained: Sequence[str]) -> list[str]:
    """List the linear layers to quantise: all but the output head, and what is trained whole.

    Args:
        model: with or without adapters, maybe on the meta device.

    Returns: names in the model as it is.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found = []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module is head or id(module.weight) in embeddings:
            continue
        if ".lora_" not in name and unwrapped_name(f"{name}.weight") not in trained:
            found.append(name)
    return found


def num_quantised(model: nn.Module) -> int:
    """The number of weights that `quantise` would keep in 4 bits, in a model with adapters."""
    named = dict(model.named_parameters())
    frozen = [named[f"{name}.weight"] for name in quantised_layers(model, trained=())]
    return sum(weight.numel() for weight in frozen if not weight.requires_grad)


@torch.no_grad()
def quantise(model: nn.Module, weights: PretrainedWeights, *, trained: Sequence[str], device: torch.device) -> None:
    """Replace the linear layers of a model by layers in 4 bits (NF4, double quantisation) with pretrained values.

    Raises: ModelError if bitsandbytes is missing; CheckpointError if a weight cannot be read.
    """
    require_bitsandbytes()
    with without_hub_kernels():
        from bitsandbytes.nn import Linear4bit, Params4bit
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
    for name in quantised_layers(model, trained=trained):
        layer: Any = model.get_submodule(name)
        whole = torch.empty(layer.weight.shape, dtype=layer.weight.dtype)
        try:
            weights.read_into(unwrapped_name(f"{name}.weight"), whole.view(-1))
        except (OSError, EOFError) as error:
            raise CheckpointError(f"pretrained weights cannot be read: {error}") from error
        made = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=whole.dtype, device="meta", **options
        )
        made.weight = Params4bit(whole, requires_grad=False, **options)._quantize(device)
        made.bias = layer.bias
        # On CPU an evaluation would store the weight in another order, which the backward pass does not read.
        made.support_avx512bf16_for_cpu = False
        setattr(made, _QUANTISED, whole.to("meta"))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)


def quantised_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the names in the module of weights in 4 bits → a meta tensor with their whole shape and type."""
    named: dict[str, Any] = dict(model.named_modules())
    return {
        f"{name}.weight": getattr(module, _QUANTISED)
        for name, module in named.items()
        if hasattr(module, _QUANTISED)
    }


@contextmanager
def without_hub_kernels() -> Iterator[None]:
    """Keep bitsandbytes from loading kernels of the Hub, which is code that forge does not execute."""
    log = logging.getLogger("bitsandbytes")
    before, level = sys.modules.get("kernels"), log.level
    sys.modules["kernels"] = None  # type: ignore[assignment]
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before
