"""Adafactor on sharded weights: of a matrix only the mean squares of rows and columns are stored.

Every rank updates its own shard. Sums over rows, columns and whole parameters are added up over the ranks, in two
all-reduces of a few numbers per row and column, so the result is torch.optim.Adafactor's at every ZeRO stage within
rounding. Row and column means are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forge.plan.parameter_groups import factor_sizes
from forge.train.flat_layout import FlatLayout, FlatPiece

_EPS_SCALE = 1e-3
"""Lower limit of a parameter's root mean square, by which the rate is multiplied: torch's second `eps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Means of the squared gradient of a matrix, or of a batch of matrices."""

    row_var: Tensor
    col_var: Tensor


class Adafactor(torch.optim.Optimizer):
    """torch.optim.Adafactor: relative step sizes, clipped updates, no first moment.

    Source: arXiv 1804.04235, algorithms 4 and 5.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, beta2_decay: float, clip_threshold: float) -> None:
        super().__init__(list(params), {"lr": 0.0, "weight_decay": 0.0})
        self._beta2_decay, self._clip_threshold = beta2_decay, clip_threshold
        self._layouts: dict[int, FlatLayout] = {}
        self.factors: dict[str, Factors] = {}
        """By parameter; the same on every rank."""

    def bind(self, layouts: Sequence[FlatLayout]) -> None:
        """Set the layout of each tensor to step on; steps before it change nothing."""
        self._layouts = {id(layout.owner): layout for layout in layouts}
        for layout in layouts:
            for piece in layout.pieces:
                if len(piece.shape) >= 2 and piece.name not in self.factors:
                    sizes = factor_sizes(piece.shape)
                    rows, columns = (torch.zeros(size, device=layout.owner.device) for size in sizes)
                    self.factors[piece.name] = Factors(row_var=rows, col_var=columns)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                layout = self._layouts.get(id(flat))
                if layout is not None and flat.grad is not None:
                    self._update(flat, layout, lr=group["lr"], decay=group["weight_decay"])

    def _update(self, flat: Tensor, layout: FlatLayout, *, lr: float, decay: float) -> None:
        assert flat.grad is not None
        state = self.state[flat]
        state["step"] += 1
        step = float(state["step"])
        weight = step**self._beta2_decay
        gradients = [piece.view(flat.grad) for piece in layout.pieces]
        weights = [piece.view(flat) for piece in layout.pieces]
        norms = self._update_variances(flat, layout, gradients, weights, weight=weight)
        eps = torch.finfo(flat.dtype).eps
        updates = [
            _variance(piece, state.get("variance"), self.factors.get(piece.name), eps=eps)
            .clamp_(min=eps * eps)
            .rsqrt_()
            .mul_(gradient)
            for piece, gradient in zip(layout.pieces, gradients, strict=True)
        ]
        sizes = _summed([update.square().sum().view(1) for update in updates], layout)
        for piece, values, update, norm, size in zip(layout.pieces, weights, updates, norms, sizes, strict=True):
            rms = max(_EPS_SCALE, float(norm) ** 0.5 / piece.numel**0.5)
            clip = max(1.0, float(size) ** 0.5 / (piece.numel**0.5 * self._clip_threshold))
            values.mul_(1 - lr * decay).add_(update, alpha=-min(lr, step**-0.5) * rms / clip)

    def _update_variances(
        self, flat: Tensor, layout: FlatLayout, gradients: list[Tensor], weights: list[Tensor], *, weight: float
    ) -> list[Tensor]:
        """Update the second moments. Returns: the sum of squares of each weight, over all ranks."""
        sums: list[Tensor] = []
        for piece, gradient, values in zip(layout.pieces, gradients, weights, strict=True):
            sums.append(values.square().sum().view(1))
            if piece.name in self.factors:
                sums += _row_and_column_sums(gradient.square(), piece)
            else:
                piece.view(self.state[flat]["variance"]).lerp_(gradient.square(), weight)
        added = iter(_summed(sums, layout))
        norms = []
        for piece in layout.pieces:
            norms.append(next(added))
            factors = self.factors.get(piece.name)
            if factors is not None:
                factors.row_var.lerp_(next(added) / piece.shape[-1], weight)
                factors.col_var.lerp_(next(added) / piece.shape[-2], weight)
        return norms


def _row_and_column_sums(squares: Tensor, piece: FlatPiece) -> list[Tensor]:
    """Sum a piece of a matrix along its rows and its columns, with zeros for what other ranks have."""
    num_rows, num_columns = factor_sizes(piece.shape)
    rows = torch.zeros(num_rows, device=squares.device)
    columns = torch.zeros(num_columns, device=squares.device)
    if piece.start < piece.stop:
        first, lines = _as_rows(squares, piece)
        last = first + len(lines)
        rows[first:last] = lines.sum(dim=1)
        columns.view(-1, piece.shape[-1]).index_add_(0, _matrix_of(piece, first, last, squares.device), lines)
    return [rows, columns]


def _variance(piece: FlatPiece, elementwise: Tensor | None, factors: Factors | None, *, eps: float) -> Tensor:
    """Return the second moment of a piece: `row ⊗ column / mean(row)` of a matrix."""
    if factors is None:
        assert elementwise is not None
        return piece.view(elementwise).clone()
    if piece.start == piece.stop:
        return torch.empty(0, device=factors.row_var.device)
    width, height = piece.shape[-1], piece.shape[-2]
    means = factors.row_var.view(-1, height).mean(dim=1).clamp_(min=eps)
    first, last = piece.start // width, -(-piece.stop // width)
    matrices = _matrix_of(piece, first, last, factors.row_var.device)
    lines = factors.row_var[first:last, None] * factors.col_var.view(-1, width)[matrices]
    lines /= means[matrices, None]
    return lines.view(-1)[piece.start - first * width : piece.stop - first * width]


def _as_rows(values: Tensor, piece: FlatPiece) -> tuple[int, Tensor]:
    """Return the number of the first row that a piece touches, and its rows, filled up with zeros."""
    width = piece.shape[-1]
    first, last = piece.start // width, -(-piece.stop // width)
    if (last - first) * width == len(values):
        return first, values.view(-1, width)
    padded = values.new_zeros((last - first) * width)
    padded[piece.start - first * width : piece.stop - first * width] = values
    return first, padded.view(-1, width)


def _matrix_of(piece: FlatPiece, first: int, last: int, device: torch.device) -> Tensor:
    """Return, for rows `[first, last)`, the matrix of the batch that each belongs to."""
    return torch.arange(first, last, device=device) // piece.shape[-2]


def _summed(values: list[Tensor], layout: FlatLayout) -> list[Tensor]:
    """Add up over the ranks; collective unless every rank has everything."""
    if layout.is_whole:
        return values
    flat = torch.cat(values).to(layout.device)
    dist.all_reduce(flat, group=layout.group)
    return list(torch.split(flat.to(values[0].device), [len(one) for one in values]))
