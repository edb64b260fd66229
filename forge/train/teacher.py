"""The teacher of a distillation: a frozen model that every rank holds whole, beside what is trained."""

from __future__ import annotations

import torch
from torch import nn

from forge.checkpoint.source import weights_digest
from forge.config.distillation import DistillationSpec
from forge.config.model import ModelSpec
from forge.errors import CheckpointError
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.train.reference import load_weights


def build_teacher(
    spec: DistillationSpec, data: DataShape, *, dtype: torch.dtype, device: torch.device
) -> nn.Module | None:
    """Build and load the teacher; None if there is none.

    Raises: CheckpointError if its files are not those that the plan was made for, or cannot be read; ModelError,
        PlanError.
    """
    if spec.teacher is None:
        return None
    digest = weights_digest(spec.teacher)
    if digest != spec.digest:
        raise CheckpointError(
            f"the teacher {spec.teacher} has other content than when the plan was made: digests {digest} and "
            f"{spec.digest}"
        )
    model = ModelSpec(from_pretrained=spec.teacher)
    family = family_of(model)
    teacher = family.build(model, data, options=BuildOptions(dtype=dtype, device=device, seed=0, skip_init=True))
    load_weights(teacher, family.open_pretrained(model, data))
    teacher.tie_weights()  # type: ignore[operator]
    return teacher.to(device).eval().requires_grad_(requires_grad=False)
