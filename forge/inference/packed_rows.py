"""Keys and values of the running sequences, one row each, and attention over the rows.

A step of the engine is one packed batch of T tokens without padding between sequences: first the newest token of
every decoding sequence, in the order of the rows, then pieces of prompts. `rows_attention`, an attention function
of transformers' `AttentionInterface`, appends each token's key and value to its row and attends to that row alone.
A row stays where it is while its sequence decodes, so that attention reads it without copying.

The result for a token depends on its own row alone, bit for bit where the library's kernels allow it: rows are read
up to a multiple of `ALIGN` positions, and prompts are attended in pieces whose borders are multiples of `ALIGN`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ALIGN = 64
"""Lengths that attention reads are multiples of this, since softmax's order of summation depends on the length."""
ATTENTION = "forge_rows"
_QUERIES = 2 * ALIGN
"""Queries of a prompt that are attended at once; fewer than 192 keep the kernel's tiles the same in every piece."""


def aligned(length: int) -> int:
    """Round a number of positions up to a multiple of `ALIGN`."""
    return -(-length // ALIGN) * ALIGN


class UnsupportedAttention(Exception):
    """The model's attention is more than scaled dot products over a row; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPiece:
    """Tokens `[start, stop)` of one row's prompt, which stand at `offset` in the packed batch."""

    row: int
    start: int
    stop: int
    offset: int


class Rows:
    """Keys and values of every layer, allocated when a layer is first used."""

    def __init__(self) -> None:
        self._layers: dict[int, list[Tensor]] = {}
        self.num_rows = 0
        self.length = 0

    @property
    def layers(self) -> Mapping[int, Sequence[Tensor]]:
        """Keys and values of the layers that were used."""
        return self._layers

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for layer in self._layers.values() for tensor in layer)

    def resize(self, *, num_rows: int, length: int) -> None:
        """Allocate as many rows of a length; what they hold stays, as far as it fits."""
        if (num_rows, length) == (self.num_rows, self.length):
            return
        self.num_rows, self.length = num_rows, length
        for layer in self._layers.values():  # one tensor at a time, so that little is held twice
            for index, old in enumerate(layer):
                layer[index] = new = self._allocate(old)
                kept = old[:num_rows, :, :length]
                new[: kept.shape[0], :, : kept.shape[2]] = kept

    def layer(self, index: int, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """Keys and values of one layer: two tensors [rows, heads, length, dim]."""
        if index not in self._layers:
            self._layers[index] = [self._allocate(key), self._allocate(value)]
        return self._layers[index]

    def copy(self, *, source: int, to: int, length: int) -> None:
        """Copy the first positions of a row to another."""
        for layer in self._layers.values():
            for tensor in layer:
                tensor[to, :, :length] = tensor[source, :, :length]

    def read(self, row: int, *, start: int, stop: int) -> list[Tensor]:
        """Copy positions of a row out of all layers."""
        return [tensor[row, :, start:stop].clone() for layer in self._layers.values() for tensor in layer]

    def write(self, row: int, block: Sequence[Tensor], *, start: int) -> None:
        """Write what `read` returned to positions of a row."""
        tensors = (tensor for layer in self._layers.values() for tensor in layer)
        for tensor, held in zip(tensors, block, strict=True):
            tensor[row, :, start : start + held.shape[1]] = held

    def _allocate(self, like: Tensor) -> Tensor:
        # Zeros, because a masked NaN is still NaN; the kernel maps untouched pages to no memory.
        return like.new_zeros(self.num_rows, like.shape[1], self.length, like.shape[3])


class RowsFrom:
    """The rows from one on, as if it were the first; writing to them writes to the others' tensors.

    Args:
        rows: whose layers have all been used.
    """

    def __init__(self, rows: Rows, *, first: int) -> None:
        self.layers: Mapping[int, Sequence[Tensor]] = {
            index: [tensor[first:] for tensor in layer] for index, layer in rows.layers.items()
        }

    def layer(self, index: int, key: Tensor, value: Tensor) -> Sequence[Tensor]:
        """As `Rows.layer`."""
        return self.layers[index]


class StepLayout:
    """Which token of a packed batch belongs to which position of which row.

    Args:
        positions: the position of the newest token of row 0, 1, ... A - 1.
        pieces: of prompts; they follow the A tokens in the batch.
        like: a tensor of the model's type and device.
        is_one_text: the positions are of row 0, each after the other and in the same `ALIGN` positions.
    """

    def __init__(
        self,
        rows: Rows | RowsFrom,
        *,
        positions: Sequence[int],
        pieces: Sequence[PromptPiece],
        like: Tensor,
        is_one_text: bool = False,
    ) -> None:
        self.rows = rows
        self.num_decoding = len(positions)
        self.positions = torch.tensor(positions, dtype=torch.int64, device=like.device)
        self.indices = torch.arange(1 if is_one_text else self.num_decoding, device=like.device)
        self.pieces = pieces
        self.length = aligned(max(positions) + 1) if positions else 0
        self._dtype = like.dtype
        self._masks: dict[Any, Tensor] = {}

    @property
    def decoding_masks(self) -> list[tuple[int | None, int]]:
        """Windows and groups that `decoding_mask` was asked for."""
        return [key for key in self._masks if len(key) == 2]

    def decoding_mask(self, *, window: int | None, group: int) -> Tensor:
        """0 at the positions that a row's newest token reads and -inf elsewhere: [A, 1, group, length]."""
        key = (window, group)
        if key not in self._masks:
            at = torch.arange(self.length, device=self.positions.device)
            last = self.positions[:, None]
            seen = at <= last if window is None else (at <= last) & (at > last - window)
            self._masks[key] = self._additive(seen)[:, None, None].expand(-1, -1, group, -1)
        return self._masks[key]

    def prompt_mask(self, *, start: int, stop: int, window: int | None) -> Tensor:
        """The same of the positions `[start, stop)` of a prompt: [stop - start, stop]."""
        key = (window, start, stop)
        if key not in self._masks:
            at = torch.arange(stop, device=self.positions.device)
            last = at[start:, None]
            seen = at <= last if window is None else (at <= last) & (at > last - window)
            self._masks[key] = self._additive(seen)
        return self._masks[key]

    def _additive(self, seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=seen.device)
        return mask.masked_fill_(~seen, float("-inf"))


_LAYOUT: ContextVar[StepLayout | TracedLayout | None] = ContextVar("forge_layout", default=None)


@contextmanager
def using(layout: StepLayout | TracedLayout) -> Iterator[None]:
    """Let attention use a layout during a forward pass of this thread."""
    token = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(token)


def rows_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend each token of a packed batch to its row, after adding its key and value to the row.

    Outside of `using` it is transformers' `sdpa`, so that the model can be called as usual beside the engine.

    Shapes: query: [1, H, T, D]; key: [1, K, T, D]; value: [1, K, T, E]; result: [1, T, H, E].
    """
    layout = _LAYOUT.get()
    if layout is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **options
        )
        return plain
    if isinstance(layout, TracedLayout):
        mask, state = layout.masks[sliding_window], layout.layers[module.layer_idx]
        return layout.attend(query, key, value, *state, layout.indices, layout.positions, mask, scaling)[None], None
    beyond = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if beyond or query.shape[0] != 1 or query.shape[1] % key.shape[1]:
        raise UnsupportedAttention(f"its attention uses {beyond[0]}" if beyond else "its heads cannot be grouped")
    keys, values = layout.rows.layer(module.layer_idx, key, value)
    num_decoding, heads = layout.num_decoding, query.shape[1]
    parts = []
    if num_decoding:
        mask = layout.decoding_mask(window=sliding_window, group=heads // key.shape[1])
        new = query[:, :, :num_decoding]
        parts.append(attend_newest(new, key, value, keys, values, layout.indices, layout.positions, mask, scaling))
    for piece in layout.pieces:
        here = slice(piece.offset, piece.offset + piece.stop - piece.start)
        keys[piece.row, :, piece.start : piece.stop] = key[0, :, here]
        values[piece.row, :, piece.start : piece.stop] = value[0, :, here]
        for start in range(piece.start, piece.stop, _QUERIES):
            stop = min(start + _QUERIES, piece.stop)
            at = here.start + start - piece.start
            groups = query[0, :, at : at + stop - start].reshape(key.shape[1], -1, stop - start, query.shape[3])
            mask = layout.prompt_mask(start=start, stop=stop, window=sliding_window)
            found = scaled_dot_product_attention(
                groups,
                keys[piece.row, :, None, :stop].expand(-1, groups.shape[1], -1, -1),
                values[piece.row, :, None, :stop].expand(-1, groups.shape[1], -1, -1),
                attn_mask=mask,
                scale=scaling,
            )
            parts.append(found.flatten(0, 1).transpose(0, 1))
    padding = query.shape[2] - sum(len(part) for part in parts)
    if padding:
        parts.append(value.new_zeros(padding, heads, value.shape[3]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def attend_newest(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    positions: Tensor,
    mask: Tensor,
    scale: float | None,
) -> Tensor:
    """Add the first A tokens of a batch to the rows 0 to A - 1, and attend each to its row; other tokens get zeros.

    With one index all of the A tokens are of row 0. TorchScript can run it.

    Shapes: query: [1, H, T, D]; keys, values: of a layer; indices: int64[A] or int64[1]; positions: int64[A];
    mask: [A, 1, group, length]; result: [T, H, E].
    """
    num = positions.size(0)
    keys.transpose(1, 2).index_put_([indices, positions], key[0, :, :num].transpose(0, 1))
    values.transpose(1, 2).index_put_([indices, positions], value[0, :, :num].transpose(0, 1))
    groups = query[0, :, :num].transpose(0, 1).reshape(num, key.size(1), -1, query.size(3))
    held, read = indices.size(0), mask.size(3)
    found = scaled_dot_product_attention(
        groups,
        keys[:held, :, :read].expand(num, -1, -1, -1),
        values[:held, :, :read].expand(num, -1, -1, -1),
        attn_mask=mask,
        scale=scale,
    )
    found = found.reshape(num, query.size(1), -1)
    padding = query.size(2) - num
    if padding:
        found = torch.cat([found, found.new_zeros([padding, found.size(1), found.size(2)])])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedLayout:
    """What attention reads in a step without prompts: inputs of a trace, which may differ in each step."""

    indices: Tensor
    positions: Tensor
    masks: Mapping[int | None, Tensor]
    """By window, as `StepLayout.decoding_mask` returns them."""
    layers: Mapping[int, Sequence[Tensor]]
    attend: Any
    """`attend_newest` as a script, whose control flow is part of the trace."""


AttentionInterface.register(ATTENTION, rows_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
