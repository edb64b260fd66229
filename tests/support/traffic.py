"""Bytes that a rank sends in collective operations, counted where torch is called."""

from __future__ import annotations

from collections import Counter
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor

_PASSES = {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1, "all_reduce": 2}
"""How often a ring sends the largest tensor of an operation, less the rank's own share."""


class Traffic:
    """Counts, by number of ranks of the group, the bytes that a ring algorithm sends from this rank.

    It must be made before DeepSpeed joins the process group, since DeepSpeed keeps the functions it finds then.
    """

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()
        for name in _PASSES:
            self._count(name)

    def _count(self, name: str) -> None:
        function = getattr(dist, name)

        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            num_bytes = _PASSES[name] * max(tensor.numel() * tensor.element_size() for tensor in tensors)
            num_ranks = dist.get_world_size(options.get("group"))
            self.sent[num_ranks] += num_bytes * (num_ranks - 1) // num_ranks
            return function(*arguments, **options)

        setattr(dist, name, counted)
