"""Where ranks with the same shard are, and from which node each reads."""

from __future__ import annotations

import pytest

from forge.elastic.membership import newest_complete_step
from forge.elastic.shard_copies import parts_per_shard
from forge.elastic.source_shards import SourceReader, holders
from forge.elastic.states import MemberNode, MembershipState, ReplicaLocation, ReplicatedStep
from forge.plan.parameter_groups import OptimizerState
from forge.plan.rank_groups import RankGroups, most_parts_per_shard
from forge.plan.snapshot_memory import num_copies_in_memory, snapshot_bytes
from tests.elastic.test_supervisor import StartGroup
from tests.support.jobs import tiny_facts, tiny_job


@pytest.mark.parametrize(
    ("nodes", "groups", "parts"),
    [
        ("aabb", 2, 1),
        ("abcd", 2, 1),
        ("aabbcc", 3, 1),
        ("aabbccdd", 4, 2),
        ("aaaabbbb", 4, 2),  # two groups on each node
        (
            "aaaaaabb",
            4,
            0,
        ),  # both copies of the first of two parts are on a; one part takes more memory than planned
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


@pytest.mark.parametrize("groups", range(2, 40))
def test_parts_per_shard__none__planned_memory_is_enough_for_copies_that_are_sent(groups: int) -> None:
    state = OptimizerState(sharded_bytes=10**6, replicated_bytes=0)
    copies = num_copies_in_memory(engine="elastic", world_size=4 * groups)
    sent, planned = (
        snapshot_bytes(
            tiny_facts(),
            tiny_job().training,
            state=state,
            num_copies=copies,
            world_size=4 * groups,
            groups=RankGroups(num_shard_groups=number),
        )
        for number in (1, groups)
    )
    assert sent <= planned + 1


def test_newest_complete_step__numbers_beyond_the_pieces__do_not_count() -> None:
    def held(*numbers: int, step: int) -> frozenset[ReplicaLocation]:
        return frozenset(ReplicaLocation(generation=1, rank=number, world_size=2, step=step) for number in numbers)

    node = MemberNode(num_slots=1, replicas=held(0, 1, 2, step=3) | held(0, 2, step=4) | held(-1, 1, step=5))
    state = MembershipState(min_workers=1, max_workers=1, nodes={"a": node})
    assert newest_complete_step(state) == ReplicatedStep(step=3, generation=1, world_size=2)
    assert holders(1, world_size=2, step=3, state=state) == {0: ["a"], 1: ["a"]}


def test_start_commands__several_copies__are_read_from_different_nodes() -> None:
    group = StartGroup([f"n{number}" for number in range(8)])
    held = [["n0", "n2", "n4", "n6"], ["n1", "n3", "n5", "n7"]]
    commands = group.start_from(held)
    read = [[shard["endpoint"][0] for shard in SourceReader().shards(command)] for command in commands.values()]
    assert read == [["host-n0", "host-n1"], ["host-n2", "host-n3"]] * 4
