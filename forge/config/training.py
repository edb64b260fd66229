"""`training:` what is minimised, for how long, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from forge.config.section import Count, FieldError, Fraction, Interval, Number, Section, WholeOrAuto
from forge.units import Every


class OptimizerSpec(Section):
    """AdamW (arXiv 1711.05101), its moments and master weights in fp32."""

    name: Literal["adamw"] = "adamw"
    """The optimizer; torch's own implementation, so nothing is compiled at run time."""

    lr: Number = Field(3e-4, gt=0)
    """Peak learning rate, reached at the end of the warm-up."""

    weight_decay: Number = Field(0.1, ge=0)
    """Decoupled weight decay, on matrices only: biases, norms and other vectors are not decayed."""

    beta1: Number = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""

    beta2: Number = Field(0.95, ge=0, lt=1)
    """Decay of the second moment; 0.95 is usual for language models."""

    eps: Number = Field(1e-8, gt=0)
    """Added to the denominator."""

    grad_clip: Number = Field(1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off. DeepSpeed's `gradient_clipping`."""


class ScheduleSpec(Section):
    """Learning rate as a function of the step alone."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """The shape after the warm-up."""

    warmup_steps: Count = Field(0, ge=0)
    """Steps over which the rate rises linearly from 0 to `optimizer.lr`."""

    final_fraction: Fraction = Field(0.1, ge=0, le=1)
    """The last step's rate as a share of `optimizer.lr`; of no effect with `constant`."""


class ZeroSpec(Section):
    """DeepSpeed ZeRO (arXiv 1910.02054): what is divided among the ranks."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing; 1: optimizer states; 2: and gradients; 3: and parameters."""

    offload: Literal["none", "cpu"] = "none"
    """Where master weights and moments are kept and updated: `none`, with the weights; `cpu`, in the host's memory,
    which leaves a GPU to weights, gradients and activations. DeepSpeed's `offload_optimizer`; not at stage 0."""

    @model_validator(mode="after")
    def _is_divided(self) -> ZeroSpec:
        if self.offload != "none" and self.stage == 0:
            raise FieldError("offload", "needs stage 1, 2 or 3: at stage 0 nothing is divided")
        return self


class EmaSpec(Section):
    """An exponential moving average of the weights, kept in fp32 beside the master weights."""

    decay: Number = Field(0.999, gt=0, lt=1)
    """Weight of the past at each step: `ema ← decay · ema + (1 - decay) · weights`; smaller in the first
    steps, `(1 + step) / (10 + step)`, so that the random first weights are forgotten."""


class TrainingSpec(Section):
    """The optimisation, independent of the machines it runs on."""

    objective: Literal["causal-lm"] = "causal-lm"
    """What is minimised: the mean cross entropy of the next token."""

    total_steps: Count | None = Field(None, ge=1)
    """Length as optimizer steps. Give one of `total_steps`, `total_tokens`, `epochs`."""

    total_tokens: Count | None = Field(None, ge=1)
    """Length as predicted tokens, rounded up to whole steps."""

    epochs: Number | None = Field(None, gt=0)
    """Length as passes over the training sequences, rounded up to whole steps."""

    global_batch_size: Count = Field(32, ge=1)
    """Sequences per optimizer step, the same at every number of workers. DeepSpeed's `train_batch_size`."""

    micro_batch_size: WholeOrAuto = "auto"
    """Sequences per forward and backward on one worker; the rest of the batch is accumulated. `auto`: the
    largest that the memory estimate allows, at most 8. DeepSpeed's `train_micro_batch_size_per_gpu`."""

    optimizer: OptimizerSpec = OptimizerSpec()
    """The update rule."""

    schedule: ScheduleSpec = ScheduleSpec()
    """The learning rate over the steps."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Of weights, activations and gradients in forward and backward; master weights are always fp32."""

    zero: ZeroSpec = ZeroSpec()
    """What is divided among the workers."""

    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third more arithmetic, far less memory."""

    cross_entropy: Literal["chunked", "plain"] = "chunked"
    """`chunked`: the loss and its gradient are computed over a few rows of logits at a time, so the
    logits of the batch never exist at once; `plain`: the transformers model's own loss. They agree
    within the precision's rounding."""

    ema: EmaSpec | None = None
    """Keep an average of the weights, and report its held-out loss at the end. Off by default."""

    evaluate_every: Interval = Every(steps=100)
    """How often the held-out loss is measured; it is measured at the end in any case."""

    seed: int = Field(1, ge=0, lt=2**63)
    """Seed of the initial weights."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSpec:
        lengths = [self.total_steps, self.total_tokens, self.epochs]
        if sum(length is not None for length in lengths) != 1:
            raise ValueError("give exactly one of 'total_steps', 'total_tokens' and 'epochs'")
        micro = self.micro_batch_size
        if micro != "auto" and not 1 <= micro <= self.global_batch_size:
            raise FieldError("micro_batch_size", f"must lie in 1..{self.global_batch_size}, the global batch")
        warmup_steps = self.schedule.warmup_steps
        if self.total_steps is not None and warmup_steps > self.total_steps:
            raise FieldError(
                "schedule.warmup_steps",
                f"{warmup_steps} steps of warm-up are more than the {self.total_steps} of 'total_steps'",
            )
        return self
