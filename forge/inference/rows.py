"""Compute many sequences in batches of fixed shapes, so that the result of one depends on itself alone.

A sequence is padded at the end to the length of its bucket, and a bucket is computed in batches of a fixed number
of rows, the last one filled with copies. The arithmetic of a row is then the same for any place and neighbours, as
matrix products of one shape treat all rows alike: scores are equal bit for bit at every order, batch and number
of workers on the same kind of machine. Products with few outputs differ, so `widen_products` makes them larger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Row = TypeVar("_Row")

_MIN_OUTPUTS = 16
"""On an Intel CPU with AVX-512, MKL 2024.2 in fp32: with 1 to 3 outputs and 2, 3 or 8 rows, equal rows give results
that differ in the last bits by their place; with 5 or more they do not (18 widths from 1 to 768, 7 numbers of
rows)."""
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


def widen_products(model: nn.Module) -> None:
    """Compute the linear layers of a model that have very few outputs, such as heads, with outputs of zero besides.

    Their weights stay as they are. A model may be given more than once.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.out_features < _MIN_OUTPUTS:
            module.forward = partial(_widened, module)  # type: ignore[method-assign]


def _widened(module: nn.Linear, inputs: Tensor) -> Tensor:
    missing = _MIN_OUTPUTS - module.out_features
    bias = None if module.bias is None else F.pad(module.bias, (0, missing))
    return F.linear(inputs, F.pad(module.weight, (0, 0, 0, missing)), bias)[..., : module.out_features]
