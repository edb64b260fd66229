"""Models that are asked and not trained: the teacher of a distillation and the reference of DPO."""

from __future__ import annotations

import torch
from torch import nn

from forge.checkpoint.source import weights_digest
from forge.config.distillation import DistillationSpec
from forge.config.model import ModelSpec
from forge.errors import CheckpointError
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of


def build_frozen(
    spec: ModelSpec,
    data: DataShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    attention: str | None = None,
) -> nn.Module:
    """Build the model of `from_pretrained` as it is before training, without adapters, and read its weights.

    Args:
        seed: of weights that the folder lacks.
        attention: as in `BuildOptions`.

    Raises: CheckpointError if the weights cannot be read; ModelError, PlanError.
    """
    spec = spec.model_copy(update={"lora": None, "freeze": ()})
    family = family_of(spec)
    model = family.build(
        spec, data, options=BuildOptions(dtype=dtype, device=device, seed=seed, attention=attention)
    )
    weights = family.open_pretrained(spec, data)
    try:
        for name, parameter in model.named_parameters():
            if name in weights:
                weights.read_into(name, parameter.data.view(-1))
    except (OSError, EOFError) as error:
        raise CheckpointError(f"pretrained weights cannot be read: {error}") from error
    return model.to(device).eval().requires_grad_(requires_grad=False)


def build_teacher(
    spec: DistillationSpec, data: DataShape, *, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Build and load the teacher.

    Raises: CheckpointError if its files are not those that the plan was made for, or cannot be read; ModelError,
        PlanError.
    """
    assert spec.teacher is not None, "a plan of a distillation names its teacher"
    digest = weights_digest(spec.teacher)
    if digest != spec.digest:
        raise CheckpointError(
            f"the teacher {spec.teacher} has other content than when the plan was made: digests {digest} and "
            f"{spec.digest}"
        )
    return build_frozen(ModelSpec(from_pretrained=spec.teacher), data, dtype=dtype, device=device, seed=0)
