"""A language-model loss with label smoothing (arXiv 1512.00567), and the accuracy of the next token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forge.objective.base import WeightedSum

IGNORED = -100


class SmoothedLm:
    """Cross entropy against a target that gives the right token 90 % of the probability, the rest to all tokens."""

    smoothing = 0.1
    metric_directions: ClassVar[dict[str, str]] = {"accuracy": "max"}

    def batch(self, rows: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(rows[name]) for name in ("tokens", "targets")}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> WeightedSum:
        """Sums over the predicted tokens of the rows; forge divides by their number over all workers."""
        targets = batch["targets"].flatten()
        logits = model(input_ids=batch["tokens"]).logits.flatten(0, 1).float()
        total = F.cross_entropy(
            logits, targets, ignore_index=IGNORED, reduction="sum", label_smoothing=self.smoothing
        )
        weight = (targets != IGNORED).sum()
        hits = (logits.argmax(dim=-1) == targets).sum()  # no prediction equals IGNORED
        return WeightedSum(sum=total, weight=weight, metrics={"accuracy": WeightedSum(sum=hits, weight=weight)})

    def metrics(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, WeightedSum]:
        return {}  # what needs a forward pass of its own at evaluations: nothing here
