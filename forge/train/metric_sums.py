"""Sums over the rows of a step or an evaluation, which one all-reduce adds over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from forge.objective.base import WeightedSum


class MetricSums:
    """Sums and weights of the loss and of each metric, in one tensor: [loss, weight, metric, weight, ...]."""

    def __init__(self, names: Sequence[str], *, device: torch.device) -> None:
        self._names = ("loss", *names)
        self.values = torch.zeros(2 * len(self._names), dtype=torch.float64, device=device)

    def add(self, result: Mapping[str, WeightedSum]) -> None:
        """Add the results of one forward pass."""
        for index, name in enumerate(self._names):
            if name in result:
                self.values[2 * index] += result[name].sum.detach().double()
                self.values[2 * index + 1] += result[name].weight

    def means(self) -> dict[str, float]:
        """The mean of everything that has a weight."""
        values = self.values.tolist()
        pairs = zip(self._names, values[::2], values[1::2], strict=True)
        return {name: total / weight for name, total, weight in pairs if weight}
