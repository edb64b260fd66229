"""Bytes that a rank sends in a step and the state it holds, counted on real ranks, against the plan's formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.plan.inputs import CorpusInfo
from forge.plan.plan import plan_from_json, plan_to_json
from forge.plan.rank_groups import NO_GROUPS, RankGroups
from forge.plan.throughput import StepWork, bytes_moved
from tests.support.jobs import tiny_plan
from tests.support.ranks import on_ranks, train_one_rank
from tests.support.traffic import Traffic

pytestmark = pytest.mark.slow

WORLD_SIZE, STEPS, MICRO_BATCHES = 4, 4, 3


def traffic_of_a_step(rank: int, plan_json: str, folder: str) -> tuple[dict[int, float], int]:
    """Train. Returns: bytes sent per step by size of the group, of the last steps, and the number of parameters."""
    from forge.train.engine import Engine

    traffic = Traffic()
    before: list[dict[int, int]] = []
    sizes: list[int] = []
    step_of = Engine.step

    def counted(engine: Engine, *arguments: Any, **options: Any) -> Any:
        before.append(dict(traffic.sent))
        sizes.append(sum(getattr(p, "ds_numel", p.numel()) for p in engine._module.parameters()))
        return step_of(engine, *arguments, **options)

    Engine.step = counted  # type: ignore[method-assign]
    train_one_rank(rank, plan_json, folder, WORLD_SIZE, STEPS + 1)
    first, last = before[1], before[-1]  # in the first step DeepSpeed learns the order of modules
    steps = len(before) - 2
    return {size: (last[size] - first.get(size, 0)) / steps for size in last}, sizes[0]


@pytest.mark.parametrize(
    ("stage", "groups"),
    [
        *((stage, NO_GROUPS) for stage in range(4)),
        (3, RankGroups(hpz_partition_size=2)),
        *((stage, RankGroups(num_shard_groups=2)) for stage in (1, 2, 3)),
    ],
)
def test_traffic__step__is_that_of_the_plan(
    corpus: CorpusInfo, tmp_path: Path, stage: int, groups: RankGroups
) -> None:
    size = WORLD_SIZE // groups.num_shard_groups
    plan = tiny_plan(
        corpus,
        training__zero={
            "stage": stage,
            "hpz_partition_size": groups.hpz_partition_size,
            "shard_group_size": "all" if size == WORLD_SIZE else size,
        },
        training__micro_batch_size=1,
        training__precision="bf16",
        training__evaluate_every="100 steps",
        model__hidden_size=128,
        model__intermediate_size=256,
    )
    for world in plan.worlds:  # as in a model that is larger than what DeepSpeed keeps of it between two passes
        if stage == 3:
            world.deepspeed["zero_optimization"] |= {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_live_parameters": 0,
                "stage3_max_reuse_distance": 0,
            }
    answers = on_ranks(traffic_of_a_step, plan_to_json(plan), str(tmp_path), world_size=WORLD_SIZE)
    numel = answers[0][1]
    assert plan_from_json(plan_to_json(plan)).for_world_size(WORLD_SIZE).groups == groups
    expected = bytes_moved(
        StepWork(
            tokens=1,
            num_micro_batches=MICRO_BATCHES,
            matmul_flops=1.0,
            attention_flops=1.0,
            hidden_size=128,
            activation_bytes=1.0,
            logit_bytes=1.0,
            weight_bytes=2.0 * numel,
            gradient_bytes=2.0 * numel,
            state_bytes=1.0,
            stage=stage,
            world_size=WORLD_SIZE,
            peak_flops=1.0,
            hpz_partition_size=groups.hpz_partition_size,
            num_shard_groups=groups.num_shard_groups,
        )
    )
    for sent, _ in answers:
        if size == WORLD_SIZE:
            assert sent[WORLD_SIZE] == pytest.approx(expected.sharing, rel=0.05)
            assert sent.get(2, 0.0) == pytest.approx(expected.in_groups, rel=0.05)
        else:  # two groups of two: twins are two as well
            assert sent[2] == pytest.approx(expected.sharing + expected.between_groups, rel=0.05)
            assert sent.get(WORLD_SIZE, 0.0) < 0.01 * sent[2]
