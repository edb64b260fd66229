"""A tensor with a row for each token, enlarged for a larger vocabulary: added rows are the mean of those it has.

A new token then begins in the middle of what the model knows, instead of at random values that its head would
prefer or avoid.

Source: https://nlp.stanford.edu/~johnhew/vocab-expansion.html (transformers' `mean_resizing` adds noise around it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from forge.model.weight_files import TensorReader

_PIECE_NUMEL = 4 * 2**20


@dataclass(slots=True, kw_only=True)
class GrownTensor:
    """A tensor of pretrained weights with more rows than are stored."""

    stored: TensorReader
    num_rows: int
    _mean: Tensor | None = field(default=None, repr=False)
    """Of the stored rows, in fp64; read when an added row is."""

    @property
    def row_numel(self) -> int:
        """Elements of one row."""
        return math.prod(self.stored.shape[1:])

    def read_into(self, out: Tensor, *, start: int = 0) -> None:
        """Fill a flat tensor with the elements from `start` on, converted to its type.

        Raises: OSError, EOFError, CheckpointError.
        """
        num_stored = min(max(self.stored.numel - start, 0), out.numel())
        if num_stored:
            self.stored.read_into(out[:num_stored], start=start)
        if num_stored < out.numel():
            first = start + num_stored
            columns = torch.arange(first, start + out.numel()) % self.row_numel
            out[num_stored:].copy_(self._mean_row()[columns])

    def _mean_row(self) -> Tensor:
        """Return the mean of the stored rows, summed in their order: the same on every rank."""
        if self._mean is None:
            num_rows, size = self.stored.shape[0], self.row_numel
            total = torch.zeros(size, dtype=torch.float64)
            step = max(1, _PIECE_NUMEL // size)
            for first in range(0, num_rows, step):
                piece = torch.empty(min(step, num_rows - first) * size, dtype=self.stored.dtype)
                self.stored.read_into(piece, start=first * size)
                total += piece.view(-1, size).sum(dim=0, dtype=torch.float64)
            self._mean = total / num_rows
        return self._mean
