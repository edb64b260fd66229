"""Bytes that a rank sends in collective operations, counted where torch is called."""

from __future__ import annotations

from collections import Counter
from functools import wraps
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor

_PASSES = {
    "all_gather": 1, "all_gather_into_tensor": 1, "all_reduce": 2, "all_to_all": 1, "all_to_all_single": 1,
    "broadcast": 1, "reduce": 1, "reduce_scatter": 1, "reduce_scatter_tensor": 1,
}  # fmt: skip
"""How often a ring sends the larger of what goes in and what comes out, less the rank's own share."""


class Traffic:
    """Counts, by operation and ranks of the group, the bytes that a ring algorithm sends from this rank.

    It must be made before DeepSpeed joins the process group, since DeepSpeed keeps the functions it finds then.
    """

    def __init__(self) -> None:
        self.sent: Counter[tuple[str, tuple[int, ...]]] = Counter()
        for name in _PASSES:
            self._count(name)

    def _count(self, name: str) -> None:
        function = getattr(dist, name)

        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            group = options.get("group") or dist.group.WORLD
            assert not any(isinstance(value, dist.ProcessGroup) for value in arguments), "the group has no name"
            ranks = tuple(dist.get_process_group_ranks(group))
            num_bytes = _PASSES[name] * max(map(_bytes_of, chain(arguments, options.values())))
            self.sent[name, ranks] += num_bytes * (len(ranks) - 1) // len(ranks)
            return function(*arguments, **options)

        setattr(dist, name, counted)


def _bytes_of(value: Any) -> int:
    """Of a tensor, or of a list of them; 0 of everything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, list) else 0
