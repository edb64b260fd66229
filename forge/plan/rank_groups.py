"""How the ranks of a generation divide the training state and the weights.

    no groups      every rank holds 1/W of what its ZeRO stage divides
    shard groups   ranks divide the state within a group, and every group holds all of it; weights are gathered, and
                   gradients reduced, within a group: torch's HYBRID_SHARD, once DeepSpeed's MiCS (arXiv 2205.00119)
    hpZ            the state is divided among all ranks; of the weights a group has a second copy (arXiv 2306.10209)

Both kinds of groups need a number of ranks that the size of a group divides. At other numbers a plan chooses among
the sizes that are given here, fewer ranks, and no groups, by the estimate of a step (`forge.plan.world_size`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from forge.config.zero import ZeroSpec

_MOST_SIZES = 8
_MOST_PARTS = 8
"""A rank reads its shard from so many others after a change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankGroups:
    """The groups of a generation."""

    num_shard_groups: int = 1
    """Groups that each hold the whole state, a divisor of the number of ranks; 1: no groups."""
    hpz_partition_size: int = 1
    """Ranks in a group of hpZ, a divisor of the number of ranks; 1: no groups."""


NO_GROUPS = RankGroups()


def most_parts_per_shard(num_shard_groups: int) -> int:
    """Return the largest number of parts into which a shard may be divided in memory, one for each of its ranks.

    At least two copies of each part exist then; 0 without shard groups.
    """
    return min(num_shard_groups // 2, _MOST_PARTS)


def unit_of(zero: ZeroSpec, *, gpus_per_node: int, can_choose: bool) -> int:
    """Return the number of ranks of which a multiple can form the groups that a job asks for; 1: it has no groups.

    Args:
        can_choose: whether `auto` may choose groups, since a step can be estimated.
    """
    if isinstance(zero.shard_group_size, int):
        return zero.shard_group_size
    if isinstance(zero.hpz_partition_size, int) and zero.hpz_partition_size > 1:
        return zero.hpz_partition_size
    may_have_hpz = zero.stage == 3 and zero.hpz_partition_size == "auto"
    return gpus_per_node if can_choose and (may_have_hpz or may_have_shard_groups(zero)) else 1


def may_have_shard_groups(zero: ZeroSpec) -> bool:
    """Whether `auto` may choose shard groups."""
    is_open = zero.shard_group_size == "auto" and zero.hpz_partition_size in ("auto", 1)
    return is_open and zero.stage > 0 and shard_groups_problem(zero) is None


def shard_groups_problem(zero: ZeroSpec) -> str | None:
    """Return why a job's settings exclude shard groups; None if they do not."""
    if zero.offload != "none":
        return "offload: cpu takes the norms of gradients before they are summed over groups"
    if zero.quantized_gradients:
        return "quantized_gradients reduces over all workers in groups of its own"
    return None


def asked_groups(zero: ZeroSpec, *, world_size: int) -> RankGroups | None:
    """Return the groups of the size that a job names; None if it names none, or the ranks cannot form them."""
    shards, hpz = zero.shard_group_size, zero.hpz_partition_size
    if isinstance(shards, int):
        return RankGroups(num_shard_groups=world_size // shards) if world_size % shards == 0 else None
    if isinstance(hpz, int) and hpz > 1 and world_size > hpz and world_size % hpz == 0:
        return RankGroups(hpz_partition_size=hpz)
    return None


def possible_hpz(zero: ZeroSpec, *, world_size: int, unit: int) -> RankGroups | None:
    """Return the largest group of hpZ at a number of ranks, the greatest common divisor; None if there is none."""
    if zero.stage != 3 or zero.hpz_partition_size == 1 or isinstance(zero.shard_group_size, int):
        return None
    size = math.gcd(unit, world_size)
    return RankGroups(hpz_partition_size=size) if 1 < size < world_size else None


def possible_shard_groups(zero: ZeroSpec, *, world_size: int, unit: int, can_choose: bool) -> Iterator[RankGroups]:
    """Yield shard groups at a number of ranks, the smallest first, which take the most memory.

    Where the job names a size, these are the next larger divisors of the number of ranks; with `auto`, its divisors
    that are whole machines, or multiples of them.
    """
    is_asked = isinstance(zero.shard_group_size, int)
    if not is_asked and not (can_choose and may_have_shard_groups(zero)):
        return
    num_found = 0
    for size in range(unit, world_size // 2 + 1, 1 if is_asked else unit):
        if world_size % size == 0:
            yield RankGroups(num_shard_groups=world_size // size)
            num_found += 1
            if num_found == _MOST_SIZES:
                return
