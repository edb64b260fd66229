"""Layouts of real ranks, quickly: shard groups, hpZ and shared sequences have the losses of one rank.

Each is tested alone, with every stage, optimizer and change of layout, by the slow tests of test_shard_groups.py,
test_hpz.py and test_sequence_parallel.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan, make_plan
from tests.support.jobs import CPU, tiny_facts, tiny_job
from tests.support.ranks import Recording, run_ranks

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
NUM_STEPS = 3


def planned(corpus: CorpusInfo, *, zero: dict[str, Any], degree: int = 1) -> Plan:
    job = tiny_job(
        **{f"model__{name}": count for name, count in HEADS.items()},
        training__zero=zero,
        training__sequence_parallel=degree,
        training__precision="fp32",
        training__total_steps=NUM_STEPS,
        training__evaluate_every=f"{NUM_STEPS} steps",
    )
    plan = make_plan(job, model=tiny_facts(**HEADS), corpus=corpus, hardware=CPU)
    for world in plan.worlds if zero["stage"] == 3 else ():  # divide small parameters too
        world.deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return plan


@pytest.fixture(scope="module")
def whole(corpus: CorpusInfo, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return run_ranks(planned(corpus, zero={"stage": 1}), tmp_path_factory.mktemp("whole"), world_size=1)


@pytest.mark.parametrize(
    ("world_size", "zero", "degree", "layout"),
    [
        pytest.param(2, {"stage": 1}, 2, (1, 1, 2), id="degree 2"),
        pytest.param(4, {"stage": 2, "shard_group_size": 2}, 2, (2, 1, 2), id="shard groups and degree 2"),
        pytest.param(4, {"stage": 3, "hpz_partition_size": 2}, 1, (1, 2, 1), id="hpZ"),
    ],
)
def test_losses__layout__are_those_of_one_rank(
    corpus: CorpusInfo,
    whole: Recording,
    tmp_path: Path,
    world_size: int,
    zero: dict[str, Any],
    degree: int,
    layout: tuple[int, int, int],
) -> None:
    plan = planned(corpus, zero=zero, degree=degree)
    world = plan.for_world_size(world_size)
    groups = world.groups
    assert (groups.num_shard_groups, groups.hpz_partition_size, world.batch.sequence_parallel_size) == layout
    found = run_ranks(plan, tmp_path, world_size=world_size)
    assert len(found.losses) == NUM_STEPS
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [m.grad_norm for m in found.steps] == pytest.approx([m.grad_norm for m in whole.steps], rel=1e-4)
