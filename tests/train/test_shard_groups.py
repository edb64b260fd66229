"""Shard groups on real ranks: losses of plain ZeRO, in every layout that a run may continue in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from tests.support.jobs import tiny_plan
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


def planned(corpus: CorpusInfo, size: int | str, *, stage: int = 3, **changes: Any) -> Plan:
    keys = {"training__micro_batch_size": 1, "training__precision": "fp32"} | changes
    plan = tiny_plan(corpus, training__zero={"stage": stage, "shard_group_size": size}, **keys)
    for world in plan.worlds:  # divide small parameters too
        if stage == 3:
            world.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return plan


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_losses__two_groups_of_two__equal_those_of_all(
    corpus: CorpusInfo, tmp_path: Path, stage: int, optimizer: str
) -> None:
    changes = {"training__optimizer": {"name": optimizer}, "training__ema": {"decay": 0.5, "evaluate": "always"}}
    plans = {size: planned(corpus, size, stage=stage, **changes) for size in (2, "all")}
    assert plans[2].for_world_size(4).groups.num_shard_groups == 2
    grouped, whole = (run_ranks(plan, tmp_path / str(size), world_size=4) for size, plan in plans.items())
    assert len(whole.losses) == 6
    assert grouped.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [m.grad_norm for m in grouped.steps] == pytest.approx([m.grad_norm for m in whole.steps], rel=1e-4)
