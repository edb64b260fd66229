"""Muon on sharded weights: momentum on each rank's shard, orthogonalised updates of whole matrices.

The momentum is elementwise, so it is sharded, saved and loaded like AdamW's. Only a matrix that is orthogonalised
must be whole: each rank assembles some matrices from the shards of all ranks, computes their updates, and sends
every rank its part. That costs two exchanges of 2 bytes per element and step; every stage of ZeRO computes the
same. DeepSpeed's Muon instead orthogonalises before gradients are clipped, keeps the momentum in the gradient's
precision, and gives other losses at other stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forge.train.flat_layout import FlatLayout, FlatPiece

_DTYPE = torch.bfloat16
"""In which torch's Muon iterates, so an exchange in it loses nothing."""
_RMS = 0.2
"""Of an update, about that of AdamW; see arXiv 2502.16982, equation 4."""


class Muon(torch.optim.AdamW):
    """Muon for groups whose algorithm is `muon`, torch's AdamW for the others.

    `m ← μ·m + (1 - μ)·g`, `O` = Newton–Schulz of `(1 - μ)·g + μ·m`, and for a matrix of A x B
    `p ← (1 - lr·decay)·p - 0.2·√max(A, B)·lr·O`: torch's Muon with `adjust_lr_fn="match_rms_adamw"`.

    Source: https://kellerjordan.github.io/posts/muon, arXiv 2502.16982.
    """

    def __init__(self, params: Iterable[dict[str, Any]], *, momentum: float, **adamw: Any) -> None:
        super().__init__(list(params), **adamw)
        self._momentum = momentum
        self._layouts: dict[int, FlatLayout] = {}

    def bind(self, layouts: Sequence[FlatLayout]) -> None:
        """Set the layout of each tensor to step on; steps before it change no matrix."""
        self._layouts = {id(layout.owner): layout for layout in layouts}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["algorithm"] != "muon"]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["algorithm"] == "muon":
                for flat in group["params"]:
                    layout = self._layouts.get(id(flat))
                    if layout is not None and flat.grad is not None:
                        self._update(flat, layout, lr=group["lr"], decay=group["weight_decay"])

    def _update(self, flat: Tensor, layout: FlatLayout, *, lr: float, decay: float) -> None:
        assert flat.grad is not None
        buffer = self.state[flat]["momentum_buffer"]
        buffer.lerp_(flat.grad, 1 - self._momentum)
        updates = flat.grad.lerp(buffer, self._momentum).to(_DTYPE)
        if layout.is_whole:
            for piece in layout.pieces:
                piece.view(updates).copy_(_orthogonalised(piece.view(updates), piece).view(-1))
        else:
            _orthogonalise_shards(updates, layout)
        flat.mul_(1 - lr * decay)
        for piece in layout.pieces:
            scale = _RMS * math.sqrt(max(piece.shape[-2:]))
            piece.view(flat).add_(piece.view(updates), alpha=-lr * scale)


def _orthogonalised(values: Tensor, piece: FlatPiece) -> Tensor:
    """Return the orthogonalised matrix; of a parameter with more dimensions, each matrix of its last two."""
    matrices = values.view(-1, *piece.shape[-2:])
    return torch.stack([newton_schulz(matrix) for matrix in matrices])


def newton_schulz(matrix: Tensor) -> Tensor:
    """Return torch's approximation of the nearest orthogonal matrix.

    torch offers it only as part of its Muon, whose first step without momentum from a weight of zero is exactly it,
    with the opposite sign; the rate of a matrix that is not taller than wide is not adjusted.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if is_tall else matrix
    weight = nn.Parameter(torch.zeros_like(wide), requires_grad=True)
    weight.grad = wide
    scratch: Any = torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False)
    scratch.step()
    found = weight.detach().neg_()
    return found.T if is_tall else found


def _orthogonalise_shards(updates: Tensor, layout: FlatLayout) -> None:
    """Replace the shards of matrices by those of the orthogonalised ones; collective."""
    rank, world_size = dist.get_rank(layout.group), dist.get_world_size(layout.group)
    by_rank = _assign(layout.pieces, world_size=world_size)
    own = [[piece.view(updates) for piece in pieces] for pieces in by_rank]
    mine = by_rank[rank]
    lengths = [
        [piece.ranges[source][1] - piece.ranges[source][0] for piece in mine] for source in range(world_size)
    ]
    received = _exchange(own, [sum(numels) for numels in lengths], layout=layout)
    wholes = [torch.empty(piece.numel, dtype=_DTYPE, device=layout.device) for piece in mine]
    parts = [
        [whole[slice(*piece.ranges[source])] for whole, piece in zip(wholes, mine, strict=True)]
        for source in range(world_size)
    ]
    for flat, into in zip(received, parts, strict=True):
        _fill(into, flat)
    for whole, piece in zip(wholes, mine, strict=True):
        whole.copy_(_orthogonalised(whole, piece).view(-1))
    returned = _exchange(parts, [sum(view.numel() for view in views) for views in own], layout=layout)
    for flat, views in zip(returned, own, strict=True):
        _fill(views, flat)


def _assign(pieces: Iterable[FlatPiece], *, world_size: int) -> list[list[FlatPiece]]:
    """Divide matrices among ranks, the largest first to the rank with the least; equal on every rank."""
    by_rank: list[list[FlatPiece]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for piece in sorted(pieces, key=lambda piece: (-piece.numel, piece.name)):
        rank = loads.index(min(loads))
        loads[rank] += piece.numel
        by_rank[rank].append(piece)
    return by_rank


def _exchange(outgoing: list[list[Tensor]], sizes: list[int], *, layout: FlatLayout) -> list[Tensor]:
    """Send each rank a list of flat tensors. Returns: what each rank sent, `sizes` elements; collective."""
    empty = torch.empty(0, dtype=_DTYPE, device=layout.device)
    flats = [torch.cat([empty, *(values.to(layout.device) for values in each)]) for each in outgoing]
    sent = torch.cat(flats)
    received = torch.empty(sum(sizes), dtype=_DTYPE, device=layout.device)
    # As bytes, because not every backend sends bf16.
    dist.all_to_all_single(
        received.view(torch.uint8),
        sent.view(torch.uint8),
        output_split_sizes=[size * _DTYPE.itemsize for size in sizes],
        input_split_sizes=[flat.numel() * _DTYPE.itemsize for flat in flats],
        group=layout.group,
    )
    return list(torch.split(received, sizes))


def _fill(parts: list[Tensor], flat: Tensor) -> None:
    """Copy consecutive elements of a flat tensor to flat tensors."""
    for part, values in zip(parts, torch.split(flat, [part.numel() for part in parts]), strict=True):
        part.copy_(values)
