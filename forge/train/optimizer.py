"""The optimizer: torch's AdamW, with decay on matrices only."""

from __future__ import annotations

import torch
from torch import nn

from forge.config.optimizer import OptimizerSpec


def build_optimizer(module: nn.Module, spec: OptimizerSpec, *, device: torch.device) -> torch.optim.AdamW:
    """AdamW with decay on matrices only, fused where torch can; its rate is 0 until a step sets it."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    # Under ZeRO 3 a divided parameter is empty; its shape is kept beside it.
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
        fused=device.type in ("cuda", "cpu"),
    )
