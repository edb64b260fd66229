"""The ranks of `forge cluster probe`, on loopback and without Ray."""

from __future__ import annotations

import pytest

from forge.runtime.link_probe import rounds
from tests.support.ranks import on_ranks


@pytest.mark.parametrize("num_nodes", range(9))
def test_rounds__any_number_of_nodes__each_meets_both_neighbours_and_one_at_a_time(num_nodes: int) -> None:
    found = rounds(num_nodes)
    for pairs in found:
        met = [node for pair in pairs for node in pair]
        assert len(met) == len(set(met))
    pairs = {frozenset(pair) for pairs in found for pair in pairs}
    assert pairs == {frozenset((i, (i + 1) % num_nodes)) for i in range(num_nodes) if num_nodes > 1}
    assert len(found) <= 3


def measure(rank: int, nodes: list[list[int]]) -> dict[str, list[float]]:
    import torch

    from forge.runtime.link_probe import _measure_all
    from forge.train.process_group import join_process_group

    join_process_group(device=torch.device("cpu"))
    return _measure_all(rank, nodes, device=torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [[[0, 1], [2, 3]], [[0, 1], [2], [3]], [[0]], [[0, 1]]])
def test_measure__any_nodes__every_rank_has_its_rates(nodes: list[list[int]]) -> None:
    world_size = sum(map(len, nodes))
    found = on_ranks(measure, nodes, world_size=world_size)
    for ranks in nodes:
        for at, rank in enumerate(ranks):
            rates = found[rank]
            assert len(rates["within"]) == (len(ranks) > 1)
            assert len(rates["all"]) == (world_size > 1)
            if at == 0:
                assert len(rates["between"]) == min(len(nodes) - 1, 2)
            assert all(1e5 < rate < 1e12 for each in rates.values() for rate in each)
