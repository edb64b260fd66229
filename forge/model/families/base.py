"""The interface of a model family: inspect a model without allocating it, and build it on every rank.

A family turns the `model:` section and the shape of the data into an `nn.Module`. The planner calls `inspect`
on torch's meta device; every rank calls `build`. `forge.model.families.registry` chooses the family.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from forge.config.model import ModelSpec
from forge.model.init import GatherParameters
from forge.model.parameters import trained_parameters
from forge.model.pretrained import PretrainedWeights
from forge.objective.registry import AutoClass
from forge.plan.inputs import ModelInfo
from forge.plan.outputs import ProblemType, outputs_of
from forge.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """What a model takes from the data and the objective."""

    vocab_size: int
    seq_len: int
    eot_id: int | None
    auto_class: AutoClass = "AutoModelForCausalLM"
    """The class of transformers that the objective trains."""
    num_labels: int | None = None
    """Outputs of a sequence or token classifier; None: as the config of the model says."""
    label_names: tuple[str, ...] = ()
    """Their names, in order; empty: transformers' `LABEL_0`, ..."""
    problem_type: ProblemType | None = None
    """What they mean, in the word of transformers' configs."""
    pad_id: int | None = None
    """The tokenizer's padding token; None if it names none."""

    @classmethod
    def of(cls, plan: Plan) -> DataShape:
        """Return that of a plan."""
        corpus, job = plan.corpus, plan.job
        return cls(
            vocab_size=corpus.vocab_size,
            seq_len=job.data.seq_len,
            eot_id=corpus.eot_id,
            **asdict(outputs_of(job, corpus=corpus)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How ZeRO 3 partitions parameters among ranks while a model is built."""

    construct: Callable[[], AbstractContextManager[Any]]
    """Modules created in this context are partitioned immediately."""
    gather: GatherParameters
    """Gathers partitioned parameters; values that rank 0 writes to them are broadcast to all ranks."""
    partition: Callable[[nn.Module], None]
    """Partitions a module that was built without partitioning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a rank builds its model."""

    dtype: torch.dtype
    """Of all parameters; buffers such as rotary frequencies stay in fp32."""
    device: torch.device
    """Where the model will compute; it is built on the host."""
    seed: int
    skip_init: bool = False
    """Do not initialise the weights, because all of them are loaded afterwards."""
    sharding: Sharding | None = None
    """Under ZeRO 3."""
    attention: str | None = None
    """transformers' `attn_implementation`; None: by device and length. The model's own keys come first."""


class ModelFamily(Protocol):
    """One kind of model."""

    def inspect(self, spec: ModelSpec, data: DataShape) -> ModelInfo:
        """Count a model without allocating it. Raises: ModelError, PlanError."""

    def build(self, spec: ModelSpec, data: DataShape, *, options: BuildOptions) -> nn.Module:
        """Build the model, frozen parameters marked; collective under ZeRO 3. Raises: PlanError."""

    def open_pretrained(self, spec: ModelSpec, data: DataShape) -> PretrainedWeights:
        """The weights of `from_pretrained`, to be read after `build`. Raises: ModelError, PlanError."""

    def import_classes(self, spec: ModelSpec, data: DataShape) -> None:
        """Import what `build` needs before processes are forked."""


def parameter_counts(model: nn.Module) -> dict[str, Any]:
    """Return the fields of ModelInfo that every family counts the same way; tied parameters count once."""
    return {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "largest_module_parameters": max(
            sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()
        ),
        "trained": trained_parameters(model),
    }
