"""Ranks that share each sequence (Ulysses): every rank holds a part of its positions.

All layers but attention compute each position by itself. Before attention the ranks of a group exchange queries,
keys and values, so that each has all positions of a part of the heads, and afterwards the outputs, so that each has
its positions of all heads again. The loss of a rank is the sum over its positions, so DeepSpeed's average over all
ranks is exact without knowing of it, and the state stays sharded over all ranks at every ZeRO stage.

DeepSpeed's own `UlyssesSPAttentionHF` does the same exchange. It is not used, because it drops masks, so that
packed examples would see each other under sdpa, and gathers position ids in every layer; here each rank has read
the whole row and knows where its examples begin.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from forge.train.windowed_attention import windowed_attention

_NAME = "ulysses"
"""As transformers knows the attention; without a mask function of this name its models build no masks."""


class SequenceParallel:
    """The part of this rank in the sequences of its group."""

    def __init__(self, degree: int) -> None:
        """Join the group of `degree` consecutive ranks; collective within it. A rank after the last whole group is
        spare: it computes parts of rows without a loss, by itself, to take part in DeepSpeed's collectives.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        first = rank - rank % degree
        self._degree = degree
        self.part = rank - first
        """Number of the part, from 0."""
        self._group: Any = None
        if first + degree <= world_size:
            self._group = dist.new_group(list(range(first, first + degree)), use_local_synchronization=True)
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered for each exchange within the group."""
        self._examples: list[list[int]] | None = None
        """The lengths of the examples in each row; None where every row is one sequence."""

    @classmethod
    def of(cls, model: nn.Module, degree: int) -> SequenceParallel | None:
        """Have a transformers model compute its attention over the parts of all ranks; None at degree 1."""
        if degree == 1:
            return None
        sequence = cls(degree)
        AttentionInterface.register(_NAME, sequence._attention)
        model.set_attn_implementation(_NAME)  # type: ignore[operator]
        return sequence

    def split(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of the rows of a micro-batch, with the positions of its tokens.

        Shapes: inputs: `tokens`, `targets`, and where rows have several examples or padding `position_ids` and
            `segment_ids`, int64[m, T], T a multiple of the degree → int64[m, T / degree].
        """
        num_rows, length = inputs["tokens"].shape
        positions = inputs.get("position_ids")
        is_whole = positions is None or self._group is None
        self._examples = None if is_whole else example_lengths(inputs["position_ids"], inputs.get("segment_ids"))
        if positions is None:
            positions = torch.arange(length).expand(num_rows, length)
        own = slice(self.part * (length // self._degree), (self.part + 1) * (length // self._degree))
        return {name: values[:, own].contiguous() for name, values in {**inputs, "position_ids": positions}.items()}

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attention over whole sequences; called by transformers.

        Shapes: query: [m, H, T / degree, D]; key, value: [m, K, T / degree, D] → [m, T / degree, H, D].
        """
        assert attention_mask is None and not dropout, "the plan refuses such models"
        if self._group is None:
            return _causal(module, query, key, value, scaling=scaling, window=sliding_window), None
        with self.waiting():
            whole = [self._to_heads(one) for one in (query, key, value)]
        if self._examples is None:
            out = _causal(module, *whole, scaling=scaling, window=sliding_window)
        else:
            rows = []
            for row, lengths in enumerate(self._examples):
                parts = zip(*(torch.split(one[row : row + 1], lengths, dim=2) for one in whole), strict=True)
                found = [_causal(module, *part, scaling=scaling, window=sliding_window) for part in parts]
                rows.append(torch.cat(found, dim=1))
            out = torch.cat(rows)
        with self.waiting():
            return self._to_positions(out), None

    def _to_heads(self, values: Tensor) -> Tensor:
        """Exchange a part of the positions for a part of the heads. Shapes: [m, H, t, D] → [m, H / d, d·t, D]."""
        rows, heads, length, width = values.shape
        sent = values.reshape(rows, self._degree, heads // self._degree, length, width).movedim(1, 0)
        got = _exchange(sent.contiguous(), self._group)
        return got.movedim(0, 2).reshape(rows, heads // self._degree, self._degree * length, width)

    def _to_positions(self, values: Tensor) -> Tensor:
        """The reverse, of an output. Shapes: [m, d·t, H / d, D] → [m, t, H, D]."""
        rows, length, heads, width = values.shape
        sent = values.reshape(rows, self._degree, length // self._degree, heads, width).movedim(1, 0)
        got = _exchange(sent.contiguous(), self._group)
        return got.movedim(0, 2).reshape(rows, length // self._degree, self._degree * heads, width)


class _Exchange(torch.autograd.Function):
    """All-to-all of the first dimension: what rank i has at j goes to i at rank j. Its gradient is the same."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: Any) -> Tensor:
        ctx.group = group
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchange(grads[0].contiguous(), ctx.group), None


def _exchange(sent: Tensor, group: Any) -> Tensor:
    return cast(Tensor, _Exchange.apply(sent, group))  # type: ignore[no-untyped-call]


def example_lengths(position_ids: Tensor, segment_ids: Tensor | None) -> list[list[int]]:
    """Return the lengths of the examples of each row, in order; padding at the end of a row is one more.

    Shapes: position_ids: int64[m, T], 0 where an example begins; segment_ids: int64[m, T], 0 at padding.
    """
    begins = position_ids == 0
    begins[:, 0] = True
    if segment_ids is not None:
        is_padding = segment_ids == 0
        begins[:, 1:] &= ~(is_padding[:, 1:] & is_padding[:, :-1])
        begins[:, 1:] |= is_padding[:, 1:] & ~is_padding[:, :-1]
    found = []
    for row in begins:
        starts = [*row.nonzero().flatten().tolist(), len(row)]
        found.append([stop - start for start, stop in pairwise(starts)])
    return found


def _causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int | None
) -> Tensor:
    """Causal attention of one example. Shapes: [m, H, T, D], [m, K, T, D] → [m, T, H, D]."""
    if window is not None and query.shape[2] > window:
        return windowed_attention(query, key, value, scaling=scaling, window=window)
    out, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    return cast(Tensor, out)
