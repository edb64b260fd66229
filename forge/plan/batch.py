"""Split of the global batch over the workers: the optimizer sees the same sequences at every world size.

Step t (counted from 1) consumes sample positions `[(t-1)·B, t·B)`. Each rank takes a contiguous share of them in
micro-batches of one size; a short share is padded with samples of weight zero. Every world size from 1 to B is
therefore possible, divisor of B or not, at the cost of at most one wasted micro-step per rank.

With sequence parallelism of degree d, ranks `[g·d, (g+1)·d)` are group g and take the same sequences, of which each
holds a part. The ranks after the last whole group are spare: they hold their shards of the state and no sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Split of one global batch at one world size.

    DeepSpeed's identity `train_batch_size = micro · accumulation · world_size` holds for the padded batch, of which
    `padding` sequences have weight zero; with sequence parallelism it counts parts of sequences.
    """

    global_batch_size: int
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    sequence_parallel_size: int = 1
    """Ranks that share each sequence."""

    @property
    def num_groups(self) -> int:
        """Groups of ranks that take different sequences; without sequence parallelism, the ranks."""
        return self.world_size // self.sequence_parallel_size

    @property
    def num_spare_ranks(self) -> int:
        """Ranks that take no sequence, as they are too few for a group."""
        return self.world_size % self.sequence_parallel_size

    @property
    def padding(self) -> int:
        """Sequences of weight zero per step, over all groups."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_groups - self.global_batch_size

    def share(self, rank: int) -> tuple[int, int]:
        """Return the half-open interval of the step's B positions that `rank` takes: [⌊gB/G⌋, ⌊(g+1)B/G⌋) in group
        g of G; of a spare rank, an empty one.
        """
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}")
        size, groups = self.global_batch_size, self.num_groups
        group = min(rank // self.sequence_parallel_size, groups)
        return group * size // groups, min(group + 1, groups) * size // groups


def plan_batch(
    global_batch_size: int, *, world_size: int, max_micro_batch_size: int, sequence_parallel_size: int = 1
) -> BatchPlan:
    """Split one global batch over the ranks.

    The split uses the fewest micro-steps that `max_micro_batch_size` allows, then the smallest micro-batch that
    needs no more of them, which minimises padding.

    Args:
        global_batch_size: in sequences.
        max_micro_batch_size: largest that fits in one worker's memory, in sequences; at least 1.
        sequence_parallel_size: ranks that share each sequence; at most `world_size`.

    Raises: PlanError if there are more workers, or groups of them, than sequences.
    """
    num_groups = world_size // sequence_parallel_size
    if num_groups > global_batch_size:
        most = global_batch_size * sequence_parallel_size
        each = "" if sequence_parallel_size == 1 else f" at {sequence_parallel_size} workers for each sequence"
        raise PlanError(
            f"a global batch of {global_batch_size} sequences cannot feed {world_size} workers: it feeds at most "
            f"{most}{each}, and {world_size - most} of them would be idle; "
            f"raise training.global_batch_size or lower resources.workers"
        )
    largest_share = -(-global_batch_size // num_groups)
    micro = min(max_micro_batch_size, largest_share)
    accumulation = -(-largest_share // micro)
    return BatchPlan(
        global_batch_size=global_batch_size,
        world_size=world_size,
        micro_batch_size=-(-largest_share // accumulation),
        gradient_accumulation_steps=accumulation,
        sequence_parallel_size=sequence_parallel_size,
    )
