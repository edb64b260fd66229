"""Shard groups at every number of workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from forge.config.zero import ZeroSpec
from forge.plan.by_world_size import ByWorldSize
from forge.plan.inputs import HardwareInfo
from forge.plan.machines import interconnect
from forge.plan.memory import estimate_memory
from forge.plan.parameter_groups import OptimizerState
from forge.plan.plan import Plan, make_plan, plan_from_json, plan_to_json
from forge.plan.rank_groups import RankGroups
from forge.plan.throughput import Interconnect, StepWork, bytes_moved, estimate_step
from forge.report.text import plan_facts
from tests.plan.test_hpz import GPU, H100, LARGE, SLOW
from tests.support.jobs import CPU, UNPREPARED, tiny_job


def planned(
    size: int | str = "auto",
    *,
    workers: str = "1..32",
    hardware: HardwareInfo = GPU,
    links: Interconnect = SLOW,
    stage: int = 3,
    zero: dict[str, Any] | None = None,
    **changes: Any,
) -> Plan:
    keys = {"training__global_batch_size": 64, "training__total_steps": 10} | changes
    if hardware.device == "cuda":
        keys["resources__gpu"] = "auto"
    values = {"stage": stage, "shard_group_size": size} | (zero or {})
    job = tiny_job(training__zero=values, resources__workers=workers, **keys)
    return make_plan(job, model=LARGE, corpus=UNPREPARED, hardware=hardware, links=links)


def sizes(plan: Plan) -> dict[int, int]:
    """Number of workers → ranks among which the state is divided."""
    return {world.batch.world_size: world.shard_group_size for world in plan.worlds}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_auto__slow_network__gpus_of_a_machine(stage: int) -> None:
    plan = planned(stage=stage, workers="8..32")
    found = sizes(plan)
    assert [found[workers] for workers in (8, 16, 24, 32)] == [8, 8, 8, 8]
    world = plan.for_world_size(32)
    assert (world.groups, world.node_group_size) == (RankGroups(num_shard_groups=4), 8)
    batch = world.batch
    assert world.deepspeed["train_batch_size"] == 8 * batch.micro_batch_size * batch.gradient_accumulation_steps
    assert plan_from_json(plan_to_json(plan)).worlds == plan.worlds


def test_auto__state_of_a_machine_does_not_fit__several_machines_or_all() -> None:
    small = replace(GPU, memory_bytes=17 * 2**30)
    found = planned(hardware=small, workers="8..64", training__activation_checkpointing=True)
    assert found.for_world_size(8).fits is False
    assert found.for_world_size(64).shard_group_size > 8
    assert all(world.fits for world in found.worlds if world.batch.world_size >= 32)


def test_auto__odd_numbers__spare_workers_or_no_groups() -> None:
    plan = planned()
    assert plan.for_world_size(17).num_ranks == 16
    for world in plan.worlds:
        assert world.batch.world_size % world.groups.num_shard_groups == 0
    number = ByWorldSize(plan, number=lambda world: world.groups.num_shard_groups)
    assert number[plan.for_world_size(17).num_ranks] == 2


@pytest.mark.parametrize(
    "given",
    [
        {"hardware": CPU},
        {"stage": 0},
        {"zero": {"offload": "cpu"}},
        {"zero": {"quantized_gradients": True}},
        {"zero": {"hpz_partition_size": 8}},
        {"links": interconnect(gpus_per_node=8, gbps=1e6)},
        {"links": interconnect(gpus_per_node=1, gbps=25)},
        {"size": "all"},
    ],
)
def test_auto__excluded_or_no_gain__no_groups(given: dict[str, Any]) -> None:
    assert {world.groups.num_shard_groups for world in planned(**given).worlds} == {1}


def test_given_size__other_numbers__next_larger_divisor() -> None:
    plan = planned(2, workers="1..9", hardware=CPU)
    assert sizes(plan) == {1: 1, 2: 2, 3: 3, 4: 2, 5: 5, 6: 2, 7: 7, 8: 2, 9: 3}
    assert all(world.num_spare == 0 for world in plan.worlds)
    assert sizes(planned(4, workers="6..12", hardware=CPU)) == {6: 6, 7: 7, 8: 4, 9: 9, 10: 5, 11: 11, 12: 4}


def test_memory__groups__state_divided_among_fewer_and_less_in_host_memory() -> None:
    job = tiny_job(training__zero={"stage": 3})
    given: dict[str, Any] = {
        "world_size": 64, "micro_batch_size": 1, "seq_len": 16, "is_on_host": False, "num_copies": 4,
        "state": OptimizerState(sharded_bytes=8 * LARGE.num_parameters, replicated_bytes=0),
    }  # fmt: skip
    whole, two, eight = (
        estimate_memory(LARGE, job.training, **given, groups=RankGroups(num_shard_groups=count))
        for count in (1, 2, 8)
    )
    assert eight.optimizer_bytes == pytest.approx(8 * whole.optimizer_bytes, rel=1e-6)
    assert eight.weights_bytes == pytest.approx(8 * whole.weights_bytes, rel=1e-6)
    # Two groups: all of a shard twice, where it was half of one four times. Eight: a quarter twice.
    assert (two.host_bytes, eight.host_bytes) == pytest.approx((whole.host_bytes, whole.host_bytes), rel=1e-6)


def work(groups: int, *, stage: int = 3) -> StepWork:
    return StepWork(
        tokens=2048, num_micro_batches=4, matmul_flops=1e10, attention_flops=0.0, hidden_size=4096,
        activation_bytes=1e6, logit_bytes=1e5, weight_bytes=1600.0, gradient_bytes=800.0, state_bytes=1e9,
        stage=stage, world_size=16, peak_flops=989.5e12, num_shard_groups=groups,
    )  # fmt: skip


def test_bytes_moved__groups__all_but_a_sum_of_shards_within_a_group() -> None:
    found = bytes_moved(work(2))
    assert found.sharing == 7 / 8 * 4 * (800 + 2 * 1600)
    assert found.between_groups == 2 * 1 / 2 * 800 / 8
    assert bytes_moved(work(1)).between_groups == 0
    assert bytes_moved(work(4, stage=2)).sharing == 3 / 4 * (2 * 4 * 800 + 1600)


def test_estimate__rings_of_a_machine__share_its_network_cards() -> None:
    assert H100 is not None
    large = {groups: replace(work(groups), weight_bytes=14e9, gradient_bytes=14e9) for groups in (1, 2, 4)}
    seconds = {n: estimate_step(one, gpu=H100, interconnect=SLOW).communication_s for n, one in large.items()}
    assert seconds[2] < 0.3 * seconds[1]
    # Half of the ranks of a group, each with twice the shard: as much through the cards, and more to sum over.
    assert 1.0 < seconds[4] / seconds[2] < 2.0


def test_facts__groups__are_shown() -> None:
    facts = dict(plan_facts(planned(workers="16..17")))
    text = "groups of 8 at 16 workers (by the estimated step); each group holds all of the state"
    assert facts["shard groups"] == text
    assert facts["spare workers"].startswith("up to 1, which get no rank, at 17 workers")
    assert "shard groups" not in dict(plan_facts(planned("all", workers="16")))
    assert "hpZ" not in dict(plan_facts(planned(workers="16..20")))  # of 20 workers 16 get a rank
    assert "no groups at any" in dict(plan_facts(planned(4, workers="1..3", hardware=CPU)))["shard groups"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"stage": 2, "shard_group_size": 1}, "auto, all, or at least 2"),
        ({"stage": 2, "shard_group_size": -8}, "auto, all, or at least 2"),
        ({"stage": 2, "shard_group_size": "node"}, "must be auto, all or a whole number"),
        ({"stage": 2, "shard_group_size": True}, "must be auto, all or a whole number"),
        ({"stage": 2, "shard_group_size": 2.5}, "must be auto, all or a whole number"),
        ({"stage": 0, "shard_group_size": 4}, "needs stage 1, 2 or 3"),
        ({"stage": 2, "offload": "cpu", "shard_group_size": 4}, "cannot be used with offload: cpu"),
        ({"stage": 3, "hpz_partition_size": 4, "shard_group_size": 8}, "cannot be used with hpz_partition_size"),
        (
            {"stage": 3, "quantized_gradients": True, "shard_group_size": 8},
            "cannot be used with quantized_gradients",
        ),
    ],
)
def test_config__wrong_values__are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ZeroSpec.model_validate(given)
