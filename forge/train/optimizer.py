"""Build the optimizer of a job: one parameter group for each group of the plan.

Each group of the torch optimizer has further keys: `algorithm`, `lr_factor`, and torch's `param_names`.
`STATE_KINDS` names the state of each algorithm that has the layout of the weights; state with another layout is in
`replicated_state`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from forge.config.optimizer import OptimizerSpec
from forge.model.parameters import trained_parameters
from forge.plan.parameter_groups import Algorithm, parameter_groups
from forge.train.adafactor import Adafactor
from forge.train.flat_layout import FlatLayout
from forge.train.lion import Lion
from forge.train.model_shape import named_parameters
from forge.train.muon import Muon
from forge.train.optimizer_8bit import build_8bit, reset_8bit, state_8bit

STATE_KINDS: Mapping[Algorithm, tuple[str, ...]] = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw-8bit": (),
    "lion": ("exp_avg",),
    "muon": ("momentum_buffer",),
    "adafactor": ("variance",),
    "adafactor-matrix": (),
}
"""fp32 state by algorithm, each with one element for every element of a weight."""

_WITH_STEP = frozenset({"adamw", "adafactor", "adafactor-matrix"})
"""Algorithms whose update depends on the number of the step."""


def build_optimizer(module: nn.Module, spec: OptimizerSpec, *, device: torch.device) -> torch.optim.Optimizer:
    """Build the optimizer with the groups of the plan; its learning rate is 0 until a step sets it.

    Raises: PlanError if a pattern of `groups` matches nothing, or bitsandbytes is missing.
    """
    by_name = dict(named_parameters(module))
    plain_names = dict(zip(dict(module.named_parameters()), by_name, strict=True))
    trained = [replace(found, name=plain_names[found.name]) for found in trained_parameters(module)]
    groups: list[dict[str, Any]] = [
        {
            "params": [(parameter.name, by_name[parameter.name]) for parameter in group.parameters],
            "weight_decay": group.weight_decay,
            "lr_factor": group.lr_factor,
            "algorithm": group.algorithm,
        }
        for group in parameter_groups(spec, trained)
    ]
    if spec.name == "lion":
        return Lion(groups, betas=(spec.value("beta1"), spec.value("beta2")))
    if spec.name == "adafactor":
        return Adafactor(groups, beta2_decay=spec.value("beta2_decay"), clip_threshold=spec.value("clip_threshold"))
    adam: dict[str, Any] = {
        "lr": 0.0,
        "betas": (spec.value("beta1"), spec.value("beta2")),
        "eps": spec.value("eps"),
    }
    if spec.name == "adamw-8bit":
        return build_8bit(groups, hyperparameters=adam)
    adam["fused"] = device.type in ("cuda", "cpu")
    if spec.name == "muon":
        return Muon(groups, momentum=spec.value("momentum"), **adam)
    return torch.optim.AdamW(groups, **adam)


@torch.no_grad()
def reset_state(optimizer: Any, layouts: Sequence[FlatLayout]) -> None:
    """Create the state of every tensor that the optimizer steps on, with step 0.

    torch would create it at the first step. DeepSpeed's bf16 optimizer of ZeRO 0 takes an empty step when it is
    built, which would count in the bias correction.
    """
    if isinstance(optimizer, (Muon, Adafactor)):
        optimizer.bind(layouts)
    if any(layout.algorithm == "adamw-8bit" for layout in layouts):
        reset_8bit(optimizer)
        return
    for layout in layouts:
        state = optimizer.state[layout.owner]
        for kind in STATE_KINDS[layout.algorithm]:
            state[kind] = torch.zeros_like(layout.owner, dtype=torch.float32, requires_grad=False)
        if layout.algorithm in _WITH_STEP:
            state["step"] = torch.zeros((), dtype=torch.float32, device=layout.owner.device)


def replicated_state(optimizer: Any, layouts: Sequence[FlatLayout]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, kind and tensor of the state that has another layout than the weights; equal on every rank."""
    if isinstance(optimizer, Adafactor):
        for name, factors in optimizer.factors.items():
            yield name, "row_var", factors.row_var
            yield name, "col_var", factors.col_var
    for layout in layouts:
        if layout.algorithm == "adamw-8bit":
            for kind, tensor in state_8bit(optimizer.state[layout.owner]):
                yield layout.pieces[0].name, kind, tensor


@torch.no_grad()
def set_step(optimizer: Any, *, step: int) -> None:
    """Set the count of steps, where an update depends on it."""
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"].fill_(float(step))
        elif "step" in state:
            state["step"] = step
