"""Where ranks with the same shard are, and from which node each reads."""

from __future__ import annotations

import pytest

from forge.elastic.shard_copies import parts_per_shard
from forge.elastic.source_shards import SourceReader
from forge.plan.rank_groups import most_parts_per_shard
from tests.elastic.test_supervisor import StartGroup


@pytest.mark.parametrize(
    ("nodes", "groups", "parts"),
    [
        ("aabb", 2, 1),
        ("abcd", 2, 1),
        ("aabbcc", 3, 1),
        ("aabbccdd", 4, 2),
        ("aaaabbbb", 4, 2),  # two groups on each node
        ("aaaaaabb", 4, 1),  # with two parts, both copies of the first would be on a
        ("aaaa", 2, 0),
        ("aaab", 2, 0),  # both ranks with the first shard are on a
        ("aabb", 1, 0),
        ("ab", 2, 1),
        ("".join(name * 2 for name in "abcdefghijklmnopqrst"), 20, 8),
    ],
)
def test_parts_per_shard__assignment__every_part_on_two_nodes(nodes: str, groups: int, parts: int) -> None:
    assert parts_per_shard(nodes, num_shard_groups=groups) == parts
    assert parts <= most_parts_per_shard(groups)
    size = len(nodes) // groups
    for piece in range(parts * size):
        assert len(set(nodes[piece :: parts * size])) > 1


def test_start_commands__several_copies__are_read_from_different_nodes() -> None:
    group = StartGroup([f"n{number}" for number in range(8)])
    held = [["n0", "n2", "n4", "n6"], ["n1", "n3", "n5", "n7"]]
    commands = group.start_from(held)
    read = [[shard["endpoint"][0] for shard in SourceReader().shards(command)] for command in commands.values()]
    assert read == [["host-n0", "host-n1"], ["host-n2", "host-n3"]] * 4
