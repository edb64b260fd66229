"""Causal attention with a sliding window, without a mask of all pairs of positions.

A mask of all pairs of T positions takes T² bytes, and torch's fused attention keeps a copy of it in the precision
of the model for each layer: 4 GB and 8 GB at 65,536 tokens. Here a chunk of queries at a time attends the keys that
its windows reach. All chunks and layers share one mask of a chunk, of chunk × (window + chunk) values, and the keys
and values of a chunk are views. Keys and values are repeated for all heads, since torch's fused attention takes a
mask with as many heads only; `forge.plan.window_memory` counts both.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from forge.plan.window_memory import WINDOW_CHUNK, window_mask_shape


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None, window: int, chunk: int = WINDOW_CHUNK
) -> Tensor:
    """Return the attention of each position to itself and the `window - 1` positions before it.

    Args:
        scaling: of the scores; by default 1 ÷ √D.
        chunk: queries at a time.

    Shapes: query: [m, H, T, D]; key, value: [m, K, T, D], K a divisor of H → [m, T, H, D].
    """
    length, num_repeats = query.shape[2], query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, num_repeats), repeat_kv(value, num_repeats)
    mask = _window_mask(window=window, chunk=chunk, dtype=query.dtype, device=query.device)
    lead = mask.shape[1] - chunk
    outputs = []
    for start, queries in zip(range(0, length, chunk), torch.split(query, chunk, dim=2), strict=True):
        stop, first = min(start + chunk, length), max(0, start - lead)
        columns = slice(lead - (start - first), lead - start + stop)
        keys, key = _part(key, first, stop)
        values, value = _part(value, first, stop)
        added = mask[: stop - start, columns]
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=added, scale=scaling)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


class _Part(torch.autograd.Function):
    """Takes a part of keys or values, and returns the whole again, from which the next part is to be taken.

    So the gradients of overlapping parts are added into one tensor, the last part first. A slice by itself would
    make a tensor of the whole for each part, and T² ÷ chunk bytes would be written.
    """

    @staticmethod
    def forward(ctx: Any, whole: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.first, ctx.stop = whole.shape, first, stop
        return whole[:, :, first:stop], whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        of_part, of_whole = grads
        if of_part is None:
            return of_whole, None, None
        if of_whole is None:  # the last part
            of_whole = of_part.new_zeros(ctx.shape)
        of_whole[:, :, ctx.first : ctx.stop] += of_part
        return of_whole, None, None


def _part(whole: Tensor, first: int, stop: int) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], _Part.apply(whole, first, stop))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=1)
def _window_mask(*, window: int, chunk: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores of a chunk and the keys before it: 0 within the window, else -inf.

    Shapes: → [chunk, lead + chunk].
    """
    num_queries, num_keys = window_mask_shape(window=window, chunk=chunk)
    queries = torch.arange(num_keys - num_queries, num_keys, dtype=torch.int32, device=device)
    distance = queries[:, None] - torch.arange(num_keys, dtype=torch.int32, device=device)
    mask = torch.zeros(num_queries, num_keys, dtype=dtype, device=device)
    return mask.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
