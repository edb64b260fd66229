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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from forge.errors import ModelError

_BALANCE = "load_balancing_loss_func"
_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
_SWITCH_ARGUMENTS = ["router_probs", "expert_indices"]
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names of its factor in transformers' configs."""
AUXILIARY, Z_LOSS = "router_aux_loss", "router_z_loss"
"""Names of the losses as metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLoss:
    """How a model computes a loss of its routers."""

    coefficient: float
    """Its factor in the loss."""
    function: Callable[[tuple[Tensor, ...]], Tensor]
    """The loss of some tokens together, without the coefficient, from the logits of each layer, float[k, E]."""

    def row_sum(
        self, logits: Sequence[Tensor] | None, *, weights: Tensor, is_token: Tensor | None = None
    ) -> Tensor:
        """Return the sum over rows of weight times loss, without the coefficient.

        Args:
            logits: of the router of each layer, float[B·T, E]; nothing if no layer has experts.
            weights: of the rows, [B].
            is_token: bool[B, T], False at padding; None if there is none.
        """
        num_rows = len(weights)
        total = torch.zeros((), dtype=torch.float32, device=weights.device)
        layers = [layer.float().reshape(num_rows, -1, layer.shape[-1]) for layer in logits or ()]
        for index, weight in enumerate(weights.tolist()):
            if weight and layers:
                rows = [layer[index] if is_token is None else layer[index][is_token[index]] for layer in layers]
                total = total + weight * self.function(tuple(rows))
        return total

    def of_positions(self, logits: Sequence[Tensor], where: Tensor) -> Tensor:
        """Return the loss of some tokens together, float32[], without the coefficient.

        Args:
            logits: of the router of each layer, float[..., E].
            where: int64[k], flat positions.
        """
        return self.function(tuple(layer.float().flatten(0, -2)[where] for layer in logits))


def has_router_loss(model: nn.Module) -> bool:
    """Whether transformers has an auxiliary loss for a model, whether or not it is asked for."""
    return _BALANCE in _names(model) and _value(model, *COEFFICIENTS) is not None


def require_routing_by_row(model: PreTrainedModel, *, key: str) -> None:
    """Raises: ModelError if experts leave out tokens depending on the other rows of a batch, as in NLLB-MoE."""
    if hasattr(model.config, "moe_eval_capacity_token_fraction"):
        raise ModelError(
            f"the experts of {type(model).__name__} take a limited number of tokens of a whole batch and leave out "
            "the others, so losses would depend on the number of workers",
            key=key,
        )


def router_losses_of(model: nn.Module) -> dict[str, RouterLoss]:
    """Find the losses of the routers of a transformers model with `output_router_logits`, by the names of metrics.

    Classifiers and models without a head have none in transformers. They get that of the causal language model with
    the same config, from the router logits of their base model.

    Raises: ModelError if it has one that cannot be computed by rows.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model, "config"):
        return {}
    if not getattr(model.config.get_text_config(), "output_router_logits", False):
        return {}
    names, coefficient = _names(model), _value(model, *COEFFICIENTS)
    found = names.get(_BALANCE)
    arguments = None if found is None else list(inspect.signature(found).parameters)
    sizes = [_value(model, "num_experts", "num_local_experts"), _value(model, "num_experts_per_tok")]
    gives_logits = "router_logits" in (model.base_model._can_record_outputs or {})
    if coefficient is not None and arguments == _SWITCH_ARGUMENTS:
        return _switch_losses(names, auxiliary=coefficient, z_loss=_value(model, "router_z_loss_coef") or 0.0)
    if arguments != _ARGUMENTS or coefficient is None or not gives_logits or None in sizes:
        lacks = "transformers has no auxiliary loss for" if arguments is None else "forge does not know that of"
        raise ModelError(
            f"adds the auxiliary loss of experts, and {lacks} {type(model).__name__}; set it to false to train "
            "without one",
            key="output_router_logits",
        )
    num_experts, top_k = (int(size or 0) for size in sizes)
    return {
        AUXILIARY: RouterLoss(
            coefficient=coefficient,
            function=lambda layers: cast(Tensor, names[_BALANCE](layers, num_experts, top_k)),
        )
    }


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router logits of a model whose output leaves them out, for the duration of a context.

    Yields: after a forward pass those of each layer, float[B·T, E].
    """
    found: list[Tensor] = []

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        found[:] = getattr(output, "router_logits", None) or ()

    base: Any = model.base_model
    handle = base.register_forward_hook(record)
    try:
        yield found
    finally:
        handle.remove()


def _switch_losses(names: Mapping[str, Any], *, auxiliary: float, z_loss: float) -> dict[str, RouterLoss]:
    """Those of Switch Transformers, which take the tokens of all layers together."""
    balance, norm = names[_BALANCE], names["router_z_loss_func"]

    def balanced(layers: tuple[Tensor, ...]) -> Tensor:
        every = torch.cat(layers)[None]
        return cast(Tensor, balance(every.softmax(dim=-1), every.argmax(dim=-1)))

    def normed(layers: tuple[Tensor, ...]) -> Tensor:
        return cast(Tensor, norm(torch.cat(layers)[None]))

    return {
        AUXILIARY: RouterLoss(coefficient=auxiliary, function=balanced),
        Z_LOSS: RouterLoss(coefficient=z_loss, function=normed),
    }


def _names(model: nn.Module) -> dict[str, Any]:
    """What is defined beside the class of a model."""
    return vars(sys.modules[type(model).__module__])


def _value(model: nn.Module, *names: str) -> float | None:
    """The first of some settings that a model or its config has; a head may not keep them."""
    config: Any = getattr(model, "config", None)
    places = (model, config.get_text_config() if isinstance(config, PretrainedConfig) else None)
    found = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in found if isinstance(value, (int, float))), None)
