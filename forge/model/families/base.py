"""What a kind of model has to offer: counting it without memory, and building it on every rank.

A family turns the `model:` section and what the data determine into an `nn.Module`. The planner calls `inspect`
on torch's meta device; every rank calls `build`. `forge.model.families.registry` chooses the family.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from forge.config.model import ModelSpec
from forge.model.init import GatherParameters
from forge.model.pretrained import PretrainedWeights
from forge.plan.inputs import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """What a model takes from the data."""

    vocab_size: int
    seq_len: int
    eot_id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How ZeRO 3 divides parameters among ranks while a model is built."""

    construct: Callable[[], AbstractContextManager[Any]]
    """Modules that are created in this context are divided at once."""
    gather: GatherParameters
    """Makes divided parameters whole; what rank 0 writes to them is sent to all."""
    partition: Callable[[nn.Module], None]
    """Divide a module that was built whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a rank builds its model."""

    dtype: torch.dtype
    """Of all parameters; buffers such as rotary frequencies stay in fp32."""
    device: torch.device
    """Where the model will compute; it is built on the host."""
    seed: int
    skip_init: bool = False
    """Leave the weights without values, since all of them are read afterwards."""
    sharding: Sharding | None = None
    """Under ZeRO 3."""


class ModelFamily(Protocol):
    """One kind of model."""

    def inspect(self, spec: ModelSpec, data: DataShape) -> ModelInfo:
        """Count a model without allocating it. Raises: ModelError, PlanError."""

    def build(self, spec: ModelSpec, data: DataShape, *, options: BuildOptions) -> nn.Module:
        """Build the model, frozen parameters marked; collective under ZeRO 3. Raises: PlanError."""

    def open_pretrained(self, spec: ModelSpec, data: DataShape) -> PretrainedWeights:
        """The weights of `from_pretrained`, to be read after `build`. Raises: ModelError, PlanError."""

    def import_classes(self, spec: ModelSpec, data: DataShape) -> None:
        """Import what `build` needs, so that a process forked afterwards has it already."""


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """The fields of ModelInfo that are counted alike for every family; tied parameters count once."""
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "largest_module_parameters": max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
    }
