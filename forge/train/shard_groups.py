"""Groups of ranks that each divide the whole training state among themselves, and hold equal states.

DeepSpeed divides the state over its data-parallel group. It is given the ranks of one group as that (`mpu` of
`deepspeed.initialize`, `data_parallel_group` of `zero.Init`), so that it gathers weights and reduces gradients
within the group alone. Before each update the gradients of a rank's shard are summed over the ranks that have the
same shard in the other groups. torch calls this `ShardingStrategy.HYBRID_SHARD`, DeepSpeed had it as MiCS.

    rank = number of the group · ranks of a group + number of the shard

Source: MiCS, arXiv 2205.00119.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forge.errors import RunError

_BUCKET_NUMEL = 50_000_000
"""Gradients that are summed at a time, as DeepSpeed's `reduce_bucket_size` in `forge.plan.deepspeed_config`."""


_MOST_DIFFERENCE = 1e-3
"""Of norms that differ by rounding alone, relative; far above that of bf16 sums in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardGroups:
    """The groups of a rank. Its methods are those that DeepSpeed calls of an `mpu`, a model parallel unit."""

    num_groups: int
    group: Any
    """Of torch.distributed: the ranks that divide the state with this one."""
    twins: Any
    """Of torch.distributed: the ranks that have the same shard."""
    notes: list[str] = field(default_factory=list)
    """What the log says already."""

    @classmethod
    def join(cls, num_groups: int) -> ShardGroups | None:
        """Join this rank's groups; collective within them. Returns: None if there is one group, of all ranks."""
        if num_groups == 1:
            return None
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size % num_groups:
            raise ValueError(f"{world_size} ranks cannot form {num_groups} groups of equal size")
        size = world_size // num_groups
        first, number = rank - rank % size, rank % size
        return cls(
            num_groups=num_groups,
            group=dist.new_group(range(first, first + size), use_local_synchronization=True),
            twins=dist.new_group(range(number, world_size, size), use_local_synchronization=True),
        )

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.group)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.group)

    def get_model_parallel_group(self) -> Any:
        return None

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    @torch.no_grad()
    def sum_gradients(self, engine: Any) -> None:
        """Add up the gradients of this rank's shard over all groups, before the update; collective.

        Raises: RuntimeError if this release of DeepSpeed keeps them elsewhere.
        """
        for bucket in _buckets(gradients_of(engine)):
            flat = torch.cat([gradient.view(-1) for gradient in bucket])
            dist.all_reduce(flat, group=self.twins)
            for gradient, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
                gradient.view(-1).copy_(total)

    def compare_norms(self, norms: Sequence[float], *, step: int) -> None:
        """Compare the norms by which the ranks clip; rank 0's log says once that they differ.

        Raises: RunError if they differ by more than rounding: the groups' states are no copies any more.
        """
        least, most = min(norms), max(norms)
        if not least < most:  # nan too, of which the loop takes care
            return
        if most - least > _MOST_DIFFERENCE * most:
            raise RunError(
                f"step {step}: norms of gradients differ between shard groups ({least:g} to {most:g}), so their "
                "states do too; resume the run, or set training.zero.shard_group_size: all"
            )
        if not self.notes and dist.get_rank() == 0:
            self.notes.append(f"step {step}: norms of gradients differ between shard groups by {most - least:.1g}")
            sys.stderr.write(self.notes[0] + "\n")


def gradients_of(engine: Any) -> list[Tensor]:
    """Return the reduced gradients of this rank's shard, which the next update uses; without offload.

    Raises: RuntimeError if this release of DeepSpeed keeps them elsewhere.
    """
    averaged = getattr(engine.optimizer, "averaged_gradients", None)
    if not averaged or any(gradients is None for gradients in averaged.values()):
        raise RuntimeError("this release of DeepSpeed keeps reduced gradients elsewhere than 0.19.8")
    return [gradient for number in sorted(averaged) for gradient in averaged[number]]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Divide gradients of one type into lists of at most `_BUCKET_NUMEL` elements, or of one larger one."""
    bucket: list[Tensor] = []
    numel = 0
    for gradient in gradients:
        if bucket and (numel + gradient.numel() > _BUCKET_NUMEL or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, numel = [], 0
        bucket.append(gradient)
        numel += gradient.numel()
    if bucket:
        yield bucket
