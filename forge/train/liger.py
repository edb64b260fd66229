"""Liger's fused kernels in the layers of a model (`training.liger`).

Norms, rotary positions and gated activation functions are replaced in the model of this process, whose weights stay
the same. The loss is not: forge computes it in chunks itself, exactly over ranks and rows.

Source: Liger Kernel, arXiv 2410.10989.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from forge.errors import RunError


def use_liger(model: nn.Module) -> None:
    """Replace what liger-kernel can replace in a model of transformers, but for its loss.

    Raises: RunError if the package is missing or does not know the model.
    """
    if find_spec("liger_kernel") is None or find_spec("triton") is None:
        raise RunError(
            "training.liger: the package liger-kernel is not installed on this machine; install forge-train[liger] "
            "on every machine, or use auto"
        )
    known = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    config: Any = model.config
    apply = known.get(config.model_type)
    if apply is None:
        raise RunError(f"training.liger: this version of liger-kernel does not know {config.model_type}; use auto")
    losses = {"cross_entropy", "fused_linear_cross_entropy"} & inspect.signature(apply).parameters.keys()
    apply(model=model, **dict.fromkeys(losses, False))
