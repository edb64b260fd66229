"""Where the ranks with the same shard are, for generations in shard groups.

Their snapshots need no replicas, as long as every piece of the state is on at least two nodes
(`forge.train.snapshot_pieces`).
"""

from __future__ import annotations

from collections.abc import Sequence

from forge.plan.rank_groups import most_parts_per_shard


def parts_per_shard(assignment: Sequence[str], *, num_shard_groups: int) -> int:
    """Return into how many parts shards are divided in memory, if every part is then on two nodes; else 0.

    Fewer and larger parts might be on two nodes where these are not, but take more host memory than the plan says.

    Args:
        assignment: rank → node.
        num_shard_groups: groups that each hold the whole state, a divisor of the number of ranks.
    """
    parts = most_parts_per_shard(num_shard_groups)
    nodes: list[set[str]] = [set() for _ in range(parts * len(assignment) // num_shard_groups)]
    if not nodes:
        return 0
    for rank, node in enumerate(assignment):
        nodes[rank % len(nodes)].add(node)
    return parts if all(len(each) > 1 for each in nodes) else 0
