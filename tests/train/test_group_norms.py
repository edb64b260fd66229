"""Norms of gradients that shard groups compute each for themselves."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from forge.errors import RunError
from forge.train.shard_groups import ShardGroups


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> ShardGroups:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return ShardGroups(num_groups=2, group=None, twins=None)


def test_norms__rounding__named_once(groups: ShardGroups, capfd: pytest.CaptureFixture[str]) -> None:
    groups.compare_norms([2.5, 2.5, 2.5, 2.5], step=1)
    assert capfd.readouterr().err == ""
    for step in (2, 3):
        groups.compare_norms([2.5, 2.5, 2.5000002, 2.5000002], step=step)
    assert capfd.readouterr().err == "step 2: norms of gradients differ between shard groups by 2e-07\n"


def test_norms__not_finite__is_left_to_the_loop(groups: ShardGroups, capfd: pytest.CaptureFixture[str]) -> None:
    groups.compare_norms([float("nan")] * 4, step=1)
    assert capfd.readouterr().err == ""


def test_norms__other_states__end_the_run(groups: ShardGroups) -> None:
    with pytest.raises(RunError, match=r"step 7: .* \(2.5 to 2.6\).*shard_group_size: all"):
        groups.compare_norms([2.5, 2.5, 2.6, 2.6], step=7)
