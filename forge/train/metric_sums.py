"""Sums over the rows of a step or an evaluation, which one all-reduce adds over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from forge.objective.base import WeightedSum


class MetricSums:
    """Sums and weights of the loss and of each metric, then counts, in one tensor: [loss, weight, metric, weight,
    ..., count, ...]."""

    def __init__(
        self, names: Sequence[str], *, device: torch.device, count_sizes: Mapping[str, int] | None = None
    ) -> None:
        self._names = ("loss", *names)
        self._sizes = dict(count_sizes or {})
        size = 2 * len(self._names) + sum(self._sizes.values())
        self.values = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, result: Mapping[str, WeightedSum]) -> None:
        """Add the results of one forward pass."""
        for index, name in enumerate(self._names):
            if name in result:
                self.values[2 * index] += result[name].sum.detach().double()
                self.values[2 * index + 1] += result[name].weight
        given = result["loss"].counts if "loss" in result else {}
        for name, total in self.counts().items():
            if name in given:
                total += given[name].detach().double()

    def means(self) -> dict[str, float]:
        """The mean of everything that has a weight."""
        values = self.values[: 2 * len(self._names)].tolist()
        pairs = zip(self._names, values[::2], values[1::2], strict=True)
        return {name: total / weight for name, total, weight in pairs if weight}

    def counts(self) -> dict[str, Tensor]:
        """Views of the counts by name."""
        parts = torch.split(self.values[2 * len(self._names) :], list(self._sizes.values())) if self._sizes else ()
        return dict(zip(self._sizes, parts, strict=True))
