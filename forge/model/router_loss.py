"""The auxiliary loss of a mixture of experts, which keeps its routers from sending all tokens to the same experts.

transformers computes it over all tokens of a forward pass, so its value would depend on how a batch is divided
among workers and micro-batches. Here it is computed for each row (sequence) by itself and weighted by the row's
targets, so that the loss of a step is the same on any number of machines. With one row per pass the two are equal.

Source: Switch Transformer, arXiv 2101.03961, equations 4 to 6; per sequence as in DeepSeek-V3, arXiv 2412.19437,
equations 17 to 20.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from forge.errors import ModelError

_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names of its factor in transformers' configs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoss:
    """How a model computes its auxiliary loss."""

    coefficient: float
    """Its factor in the loss."""
    num_experts: int
    top_k: int
    """Experts that each token is sent to."""
    function: Callable[..., Tensor]

    def row_sum(self, logits: Sequence[Tensor], *, weights: Tensor, is_token: Tensor | None) -> Tensor:
        """Return the sum over rows of weight times auxiliary loss, without the coefficient.

        Args:
            logits: of the router of each layer, float[B·T, E].
            weights: of the rows, [B].
            is_token: bool[B, T], False at padding; None if there is none.
        """
        num_rows = len(weights)
        total = torch.zeros((), dtype=torch.float32, device=weights.device)
        layers = [layer.float().reshape(num_rows, -1, layer.shape[-1]) for layer in logits]
        for index, weight in enumerate(weights.tolist()):
            if weight:
                rows = [layer[index] if is_token is None else layer[index][is_token[index]] for layer in layers]
                total = total + weight * self.function(tuple(rows), self.num_experts, self.top_k)
        return total

    def of_positions(self, logits: Sequence[Tensor], where: Tensor) -> Tensor:
        """Return the auxiliary loss of some tokens together, float32[], without the coefficient.

        Args:
            logits: of the router of each layer, float[B·T, E].
            where: int64[k], flat positions.
        """
        return self.function(tuple(layer.float()[where] for layer in logits), self.num_experts, self.top_k)


def has_router_loss(model: nn.Module) -> bool:
    """Whether transformers has an auxiliary loss for a model, whether or not it is asked for."""
    return _function_of(model) is not None and any(hasattr(model, name) for name in COEFFICIENTS)


def router_loss_of(model: nn.Module) -> RouterLoss | None:
    """Find the auxiliary loss of a transformers model with `output_router_logits`; None if it has none.

    Raises: ModelError if it has one that cannot be computed by rows.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PretrainedConfig) else None
    if not isinstance(model, PreTrainedModel) or not getattr(text, "output_router_logits", False):
        return None
    found = _function_of(model)
    coefficient = next((getattr(model, name) for name in COEFFICIENTS if hasattr(model, name)), None)
    sizes = [getattr(model, name, None) for name in ("num_experts", "num_experts_per_tok")]
    is_known = found is not None and list(inspect.signature(found).parameters) == _ARGUMENTS
    if not is_known or coefficient is None or not all(isinstance(size, int) for size in sizes):
        raise ModelError(
            f"the auxiliary loss of {type(model).__name__} is not known to forge, so it would be left out; set it "
            "to false to train without it",
            key="output_router_logits",
        )
    num_experts, top_k = (int(size or 0) for size in sizes)
    return RouterLoss(coefficient=float(coefficient), num_experts=num_experts, top_k=top_k, function=found)


def _function_of(model: nn.Module) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
