"""Which linear layers of a model compute their products in fp8 (`training.fp8`).

Those within the repeated layers, whose sizes the hardware accepts. Embeddings, the output head, the classifier and
what else comes before or after the layers stay in bf16, as do routers of experts, which choose by small
differences. The same function answers for the plan, on the meta device, and for the ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from forge.model.repeated_layers import repeated_layers
from forge.plan.inputs import Fp8Layers

_MULTIPLE = 16
"""Both sizes of a weight must be multiples of it. Source: torch's `_scaled_mm`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFp8Layers:
    """The layers by name, and their numbers for the plan."""

    names: frozenset[str]
    info: Fp8Layers


def find_fp8_layers(model: nn.Module) -> FoundFp8Layers:
    """Find the linear layers whose products can be in fp8; their weights may be partitioned."""
    inside = {id(module) for layer in repeated_layers(model) for module in layer.modules()}
    num_experts = _num_experts(model)
    names: set[str] = set()
    num_parameters = 0
    left_out: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or id(module) not in inside:
            continue
        reason = _reason_against(module, num_experts=num_experts)
        if reason is None:
            names.add(name)
            num_parameters += module.in_features * module.out_features
        else:
            left_out[reason] += 1
    info = Fp8Layers(num_layers=len(names), num_parameters=num_parameters, left_out=dict(left_out))
    return FoundFp8Layers(names=frozenset(names), info=info)


def _reason_against(linear: nn.Linear, *, num_experts: int | None) -> str | None:
    if type(linear) is not nn.Linear:
        return f"of the class {type(linear).__name__}"
    if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
        return f"of sizes that are no multiples of {_MULTIPLE}"
    if num_experts is not None and linear.out_features == num_experts:
        return "that route to experts"
    return None if linear.weight.requires_grad else "that are frozen"


def _num_experts(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((count for name in names if (count := getattr(text, name, None))), None)
