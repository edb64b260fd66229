"""Add the losses of a model's routers to the loss of an objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from forge.model.router_loss import RouterLoss
from forge.objective.base import WeightedSum

Routers = Mapping[str, RouterLoss]
"""The losses of a model's routers, by the names of metrics; empty without any."""


def with_router_losses(loss: WeightedSum, *, routers: Routers, sums: Mapping[str, Tensor]) -> WeightedSum:
    """Return a loss with those of routers added.

    Args:
        sums: of each loss of `routers`, over the terms of `loss`, each as often as its weight says.
    """
    reported = {name: WeightedSum(sum=sums[name].detach(), weight=loss.weight) for name in routers}
    total = loss.sum
    for name, router in routers.items():
        total = total + router.coefficient * sums[name]
    return replace(loss, sum=total, metrics={**loss.metrics, **reported})


def position_sums(routers: Routers, logits: Sequence[Tensor], groups: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the sum of each loss over groups of tokens.

    Args:
        logits: of the router of each layer, float[..., E].
        groups: flat positions of the tokens that are taken together, int64[k].
    """
    zero = torch.zeros(())
    return {
        name: sum((router.of_positions(logits, where) for where in groups), zero)
        for name, router in routers.items()
    }


def perplexity(means: Mapping[str, float], *, routers: Routers) -> float:
    """`exp` of a mean loss without those of routers, infinite where that overflows."""
    entropy = means["loss"] - sum(router.coefficient * means[name] for name, router in routers.items())
    return math.exp(entropy) if entropy < 700 else math.inf
