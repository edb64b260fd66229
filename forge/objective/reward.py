"""A reward model: one number for a prompt with its answer, larger for the answer that is preferred.

The probability that an answer is preferred is the sigmoid of the difference of the rewards (Bradley and Terry,
"Rank analysis of incomplete block designs", 1952). The reward is the output of a classifier of transformers with
one label, so decoders give it at the last token that is not padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge.model.router_loss import recorded_router_logits, router_losses_of
from forge.objective.base import Arrays, ObjectiveContext, WeightedSum
from forge.objective.classification import classifier_logits
from forge.objective.pairs import PairRows
from forge.objective.preference import pair_sums
from forge.objective.registry import OBJECTIVES, Direction
from forge.objective.router import position_sums, with_router_losses


class Reward:
    """The loss of each pair: `-log σ(chosen - rejected)`."""

    metric_directions: ClassVar[Mapping[str, Direction]] = OBJECTIVES["reward"].metrics

    def __init__(self, *, context: ObjectiveContext) -> None:
        self._center = context.training.reward.center_coefficient

    def batch(self, rows: Arrays) -> dict[str, Tensor]:
        """One padded sequence for each side, with the token that ends the answer, and `num_sides` int64[1]."""
        pairs = PairRows.of(rows)
        arrays = pairs.separated(with_last=True)
        arrays["num_sides"] = np.array([len(pairs.starts)])
        return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """The loss of each pair, and the rewards. The model runs even if there is no pair."""
        routers = router_losses_of(model)
        with recorded_router_logits(model) as router_logits:
            scores = classifier_logits(model, batch).float().squeeze(-1)
        is_filler = not int(batch["num_sides"])
        rewards = scores.new_zeros(0, 2) + scores.sum() if is_filler else scores.reshape(-1, 2)
        losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
        if self._center:
            losses = losses + self._center * rewards.sum(dim=1) ** 2
        summed = pair_sums(losses, rewards=rewards.detach())
        pairs = () if is_filler else batch["attention_mask"].flatten().reshape(len(rewards), -1)
        at = [torch.nonzero(pair).flatten() + number * len(pair) for number, pair in enumerate(pairs)]
        return with_router_losses(summed, routers=routers, sums=position_sums(routers, router_logits, at))

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}
