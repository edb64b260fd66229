"""Keys and values of prompts that were computed, by their text, for prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from torch import Tensor

from forge.inference.packed_rows import ALIGN, Rows


class Prefixes:
    """Blocks of `ALIGN` tokens, named by a digest of all tokens up to their end; the oldest used are dropped.

    Args:
        max_tokens: how many tokens are held; 0 disables it.
    """

    def __init__(self, *, max_tokens: int) -> None:
        self._max_blocks = max_tokens // ALIGN
        self._blocks: OrderedDict[bytes, list[Tensor]] = OrderedDict()

    @property
    def num_tokens(self) -> int:
        return len(self._blocks) * ALIGN

    def load(self, rows: Rows, *, row: int, tokens: Sequence[int], adapter: str | None) -> int:
        """Write the longest known beginning of a prompt to a row; return its length, below that of the prompt."""
        length = 0
        for name in _names(tokens[: len(tokens) - 1], adapter=adapter) if self._blocks else ():
            block = self._blocks.get(name)
            if block is None:
                break
            self._blocks.move_to_end(name)
            rows.write(row, block, start=length)
            length += ALIGN
        return length

    def save(self, rows: Rows, *, row: int, tokens: Sequence[int], adapter: str | None) -> None:
        """Keep the whole blocks of a prompt that was computed."""
        names = _names(tokens, adapter=adapter)[: self._max_blocks]
        for index, name in enumerate(names):
            if name not in self._blocks:
                start = index * ALIGN
                self._blocks[name] = rows.read(row, start=start, stop=start + ALIGN)
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)


def _names(tokens: Sequence[int], *, adapter: str | None) -> list[bytes]:
    digest = blake2b((adapter or "").encode(), digest_size=16)
    names = []
    for start in range(0, len(tokens) - ALIGN + 1, ALIGN):
        digest.update(np.asarray(tokens[start : start + ALIGN], dtype=np.int64).tobytes())
        names.append(digest.digest())
    return names
