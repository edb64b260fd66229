"""Compute many sequences in batches of fixed shapes, so that the result of one depends on itself alone.

A sequence is padded at the end to the length of its bucket, and a bucket is computed in batches of a fixed number
of rows, the last one filled with copies. The arithmetic of a row is then the same for any place and neighbours, as
matrix products of one shape treat all rows alike: scores are equal bit for bit at every order, batch and number
of workers on the same kind of machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

_Row = TypeVar("_Row")

_TOKENS = {"cpu": 256, "cuda": 8192}
"""Of a batch: from about 256 rows on a product of matrices takes time in proportion to them."""


def bucket_length(length: int, *, limit: int | None = None) -> int:
    """Round a length up: to a multiple of 16 until 128, of 64 until 1024, and of 256 beyond.

    Args:
        limit: most positions of the model.
    """
    step = 16 if length <= 128 else 64 if length <= 1024 else 256
    rounded = -(-max(1, length) // step) * step
    return rounded if limit is None else max(length, min(rounded, limit))


def fixed_batches(
    rows: Sequence[_Row], *, key: Callable[[_Row], tuple[int, ...]], device: torch.device
) -> Iterator[tuple[tuple[int, ...], list[int]]]:
    """Divide rows into batches of fixed shapes.

    Args:
        key: the shape of a row, the length of its bucket first; rows of one shape share a batch.

    Yields: the shape, and the numbers of the rows; the last one is repeated to fill a batch.
    """
    buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        buckets[key(row)].append(number)
    for shape, numbers in sorted(buckets.items(), reverse=True):
        size = max(1, _TOKENS.get(device.type, 256) // shape[0])
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            yield shape, batch + batch[-1:] * (size - len(batch))
