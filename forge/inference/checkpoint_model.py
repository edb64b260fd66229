"""Build the model of a run with the weights of one of its checkpoints, without Ray or DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from forge.checkpoint.adapter_config import adapter_config_from_record
from forge.checkpoint.reader import Checkpoint
from forge.errors import CheckpointError
from forge.inference.weights import CheckpointWeights
from forge.model.adapter_names import unwrapped_name
from forge.model.adapters import add_adapters
from forge.model.auto_classes import build_on_meta
from forge.model.families.base import BuildOptions, DataShape
from forge.model.families.registry import family_of
from forge.model.families.transformers_family import build_from_config
from forge.model.transformers_config import config_from_record
from forge.plan.plan import Plan


def load_model(plan: Plan, checkpoint: Checkpoint, *, ema: bool = False) -> Any:
    """Build the model of a plan with the weights of one checkpoint, in evaluation mode.

    Raises: CheckpointError if the checkpoint belongs to another model, or holds no averaged weights.
    """
    weights = CheckpointWeights(checkpoint, ema=ema)
    data = DataShape.of(plan)
    dtype = torch.bfloat16 if plan.job.training.precision == "bf16" else torch.float32
    options = BuildOptions(dtype=dtype, device=torch.device("cpu"), seed=plan.job.training.seed, skip_init=True)
    if checkpoint.shape.config:  # not from the job, whose `from_pretrained` folder may have moved since
        config = config_from_record(checkpoint.shape.config)
        # Compared first without memory: a config may describe a model far larger than the checkpoint.
        _tensors_of(_adapted(build_on_meta(config, auto_class=data.auto_class), checkpoint), checkpoint)
        built = build_from_config(config, options=options, data=data)
        built.tie_weights()
        model: Any = _adapted(built, checkpoint)
    else:
        model = family_of(plan.job.model).build(plan.job.model, data, options=options)
    held = _tensors_of(model, checkpoint)
    with torch.no_grad():
        for name, tensor in weights.tensors():
            held[name].copy_(tensor)
    return model.eval()


def _adapted(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Put the adapters of a checkpoint into a model. Raises: ModelError."""
    if checkpoint.shape.adapters:
        add_adapters(model, adapter_config_from_record(checkpoint.shape.adapters))
    return model


def _tensors_of(model: nn.Module, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the tensors of a model by their names in a checkpoint.

    Raises: CheckpointError if the checkpoint lacks a parameter, or a tensor of it has another shape or no place.
    """
    named = unwrapped_name if checkpoint.shape.adapters else str
    stored = checkpoint.shape.parameters
    held = {named(name): value for name, value in (*model.named_parameters(), *model.named_buffers())}
    missing = {named(name) for name, _ in model.named_parameters()} - set(stored)
    if missing:
        raise CheckpointError(
            f"{checkpoint.url} lacks {len(missing)} parameters of the model, {min(missing)} among them"
        )
    for name, parameter in stored.items():
        if name not in held or tuple(held[name].shape) != parameter.shape:
            raise CheckpointError(f"{checkpoint.url} does not match the model of its plan: {name}")
    return held
