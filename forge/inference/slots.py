"""A key-value cache with one slot per sequence, whose sequences end at the same column.

    slot 0   . . . . a b c d|        the next token of every slot is written to one column, so that a step is one
    slot 1   . e f g h i j k|        slice assignment per layer, and no cache is copied
    slot 2   . . . . . . l m|

A sequence that is finished leaves its slot, and the next one is written into it so that it ends at the current
column. Attention reads the columns from the start of the longest sequence on. When the buffer is full, the columns
in use are moved to its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

_SPARE_COLUMNS = 256


class SlotCache(Cache):  # type: ignore[misc]
    """The cache of all layers; a transformers model writes to it as to any other."""

    def __init__(self, *, num_slots: int) -> None:
        self.num_slots = num_slots
        self.lengths = [0] * num_slots
        """Tokens of the sequence in each slot; 0: free."""
        self.end = 0
        """The column of the next token."""
        self.slots: list[_SlotLayer] = []
        super().__init__(layers=self.slots)

    @property
    def start(self) -> int:
        """The first column that any sequence uses."""
        return self.end - max(self.lengths, default=0)

    def mask(self) -> Tensor:
        """Which columns a step sees. Shapes: int64[num_slots, end - start + 1]; a free slot sees its own token."""
        columns = torch.arange(self.start, self.end + 1)
        first = torch.tensor([self.end - length for length in self.lengths])
        return (columns >= first[:, None]).long()

    def positions(self) -> Tensor:
        """The position of the next token. Shapes: int64[num_slots, 1]."""
        return torch.tensor(self.lengths)[:, None]

    def step(self) -> None:
        """Count the column that a forward pass has written."""
        self.end += 1
        self.lengths = [length + 1 if length else 0 for length in self.lengths]

    def put(self, slot: int, parts: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> None:
        """Fill a free slot with a sequence: for each layer the keys and values of its parts, in order.

        Shapes: every key and value: [heads, tokens, head_dim].
        """
        length = sum(keys.shape[1] for keys, _ in parts[0])
        if not self.slots:
            self.slots.extend(_SlotLayer(self) for _ in parts)
            self.layers = self.slots
        if self.end < length or self.slots[0].keys is None:
            self._move(end=max(length, max(self.lengths)), like=parts)
        for layer, pieces in zip(self.slots, parts, strict=True):
            at = self.end - length
            for keys, values in pieces:
                layer.keys[slot, :, at : at + keys.shape[1]] = keys
                layer.values[slot, :, at : at + keys.shape[1]] = values
                at += keys.shape[1]
        self.lengths[slot] = length

    def free(self, slot: int) -> None:
        self.lengths[slot] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all other slots, so that a step computes fewer rows."""
        for layer in self.slots:
            layer.keys, layer.values = layer.keys[list(slots)], layer.values[list(slots)]
        self.lengths = [self.lengths[slot] for slot in slots]
        self.num_slots = len(slots)

    def make_room(self) -> None:
        """Move the columns in use if there is none for the next token."""
        if self.slots and self.end == self.slots[0].keys.shape[2]:
            self._move(end=max(1, max(self.lengths)))

    def _move(self, *, end: int, like: Sequence[Sequence[tuple[Tensor, Tensor]]] = ()) -> None:
        """Place the columns in use so that they end at `end`, in a buffer with columns to spare."""
        used = max(self.lengths)
        for number, layer in enumerate(self.slots):
            keys, values = (layer.keys, layer.values) if layer.keys is not None else like[number][0]
            moved = []
            for old, is_new in ((keys, layer.keys is None), (values, layer.keys is None)):
                heads, width = old.shape[-3], old.shape[-1]
                fresh = old.new_zeros(self.num_slots, heads, end + max(_SPARE_COLUMNS, end // 2), width)
                if not is_new and used:
                    fresh[:, :, end - used : end] = old[:, :, self.end - used : self.end]
                moved.append(fresh)
            layer.keys, layer.values = moved
        self.end = end


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer. Shapes: keys, values: [num_slots, heads, columns, head_dim]."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        start, end = self._cache.start, self._cache.end
        self.keys[:, :, end] = key_states[:, :, 0]
        self.values[:, :, end] = value_states[:, :, 0]
        return self.keys[:, :, start : end + 1], self.values[:, :, start : end + 1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.end - self._cache.start + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.end - self._cache.start

    def get_max_length(self) -> int:
        return -1


def layers_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each layer. Shapes: [batch, heads, tokens, head_dim]."""
    return [(layer.keys, layer.values) for layer in cache.layers]
