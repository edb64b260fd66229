"""`training.optimizer:` the optimizer and its hyperparameters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge.config.section import Number, Section


class OptimizerSpec(Section):
    """AdamW (arXiv 1711.05101); moments and master weights are fp32."""

    name: Literal["adamw"] = "adamw"
    """The optimizer: torch's implementation, so that nothing is compiled at run time."""

    lr: Number = Field(3e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up. The default is a common starting
    point for AdamW; small models usually take more."""

    weight_decay: Number = Field(0.1, ge=0)
    """Decoupled weight decay, applied to matrices only, not to biases, norms and other vectors. 0.1 is usual for
    language models."""

    beta1: Number = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""

    beta2: Number = Field(0.95, ge=0, lt=1)
    """Decay of the second moment. 0.95, lower than AdamW's usual 0.999, is common for language models."""

    eps: Number = Field(1e-8, gt=0)
    """Added to the denominator of the update."""

    grad_clip: Number = Field(1.0, ge=0)
    """Maximum global gradient norm; 0 disables clipping. DeepSpeed's `gradient_clipping`."""
