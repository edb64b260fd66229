"""Groups of hpZ at every number of workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from forge.config.zero import ZeroSpec
from forge.errors import PlanError
from forge.plan.by_world_size import ByWorldSize
from forge.plan.cluster_links import ClusterLinks
from forge.plan.forecast import forecast, gpu_hardware
from forge.plan.gpus import find_gpu
from forge.plan.inputs import HardwareInfo, ModelInfo
from forge.plan.machines import interconnect
from forge.plan.memory import estimate_memory
from forge.plan.parameter_groups import OptimizerState
from forge.plan.plan import Plan, make_plan, plan_from_json, plan_to_json
from forge.plan.rank_groups import RankGroups
from forge.plan.throughput import Interconnect, StepWork, bytes_moved, estimate_step
from forge.report.text import plan_facts
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job

H100 = find_gpu("H100")
assert H100 is not None
GPU = gpu_hardware(H100)
SLOW = interconnect(gpus_per_node=8, gbps=25)
LARGE = tiny_facts(
    num_parameters=7_000_000_000, num_trainable_parameters=7_000_000_000, num_matmul_parameters=6_700_000_000,
    largest_module_parameters=200_000_000, num_layers=32, hidden_size=4096, intermediate_size=11008,
    attention_width=4096,
)  # fmt: skip


def planned(
    size: int | str = "auto",
    *,
    workers: str = "1..32",
    hardware: HardwareInfo = GPU,
    links: Interconnect | None = SLOW,
    model: ModelInfo = LARGE,
    **changes: Any,
) -> Plan:
    zero = {"stage": 3, "hpz_partition_size": size, "shard_group_size": "all"} | changes.pop("zero", {})
    keys = {"training__global_batch_size": 64, "training__total_steps": 10} | changes
    if hardware.device == "cuda":
        keys["resources__gpu"] = "auto"
    job = tiny_job(training__zero=zero, resources__workers=workers, **keys)
    return make_plan(job, model=model, corpus=UNPREPARED, hardware=hardware, links=links)


def test_by_world_size__unlisted_size__is_planned_with_the_links_of_the_plan() -> None:
    keys = {"training__global_batch_size": 16_384}
    made, full = planned(workers="1..10000", **keys), planned(workers="1800..2010", **keys)
    read = plan_from_json(plan_to_json(made))
    for number in (lambda world: world.groups.hpz_partition_size, lambda world: world.num_spare):
        found = ByWorldSize(read, number=number)
        expected = {world.batch.world_size: number(world) for world in full.worlds[190:]}
        assert {size: found.get(size, 0) for size in expected} == expected
        assert len(set(expected.values())) > 1 and found.get(10_001, 7) == 7 and len(found) == 10_000


def groups(plan: Plan) -> dict[int, int]:
    return {world.batch.world_size: world.groups.hpz_partition_size for world in plan.worlds}


def test_auto__several_machines__gpus_of_a_machine() -> None:
    plan = planned()
    sizes = groups(plan)
    assert {size for workers, size in sizes.items() if workers <= 8} == {1}
    assert (sizes[16], sizes[24], sizes[32]) == (8, 8, 8)
    assert plan.for_world_size(16).deepspeed["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert "zero_hpz_partition_size" not in plan.for_world_size(8).deepspeed["zero_optimization"]
    assert plan_from_json(plan_to_json(plan)).worlds == plan.worlds


def test_auto__odd_numbers__smaller_groups_or_spare_workers() -> None:
    plan = planned()
    for world in plan.worlds:
        assert world.batch.world_size % world.groups.hpz_partition_size == 0
        assert world.num_ranks >= 1
        if world.num_spare:
            assert world.num_ranks % 8 == 0
    assert plan.for_world_size(17).num_ranks == 16  # prime: whole machines, or no groups
    assert plan.for_world_size(28).groups.hpz_partition_size == 4


def test_auto__minimum_above_whole_machines__no_spare_worker() -> None:
    assert all(world.num_spare == 0 for world in planned(workers="17..23").worlds)


def test_auto__fast_network_or_one_gpu_per_machine__plain() -> None:
    fast = interconnect(gpus_per_node=8, gbps=1e6)
    sizes = groups(planned(links=fast))
    assert (sizes[16], sizes[24], sizes[32]) == (1, 1, 1)
    assert set(groups(planned(links=interconnect(gpus_per_node=1, gbps=25))).values()) == {1}


@pytest.mark.parametrize("given", [{"hardware": CPU}, {"zero": {"stage": 2}}])
def test_auto__cpu_or_another_stage__plain(given: dict[str, Any]) -> None:
    assert set(groups(planned(**given)).values()) == {1}


def test_auto__second_copy_does_not_fit__plain() -> None:
    small = replace(GPU, memory_bytes=round(12.6 * 2**30))
    plan = planned(workers="16", hardware=small)
    assert plan.for_world_size(16).fits
    assert groups(plan) == {16: 1}


def test_given_size__cpu__common_divisor_without_an_estimate() -> None:
    plan = planned(2, workers="1..6", hardware=CPU)
    assert groups(plan) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 1, 6: 2}
    assert all(world.num_spare == 0 for world in plan.worlds)
    assert groups(planned(4, workers="6..12", hardware=CPU)) == {6: 2, 7: 1, 8: 4, 9: 1, 10: 2, 11: 1, 12: 4}


def test_memory__second_copy__weights_divided_by_the_group() -> None:
    job = tiny_job(training__zero={"stage": 3})
    given: dict[str, Any] = {
        "world_size": 16, "micro_batch_size": 1, "seq_len": 16, "is_on_host": False,
        "state": OptimizerState(sharded_bytes=8 * LARGE.num_parameters, replicated_bytes=0),
    }  # fmt: skip
    both = (RankGroups(), RankGroups(hpz_partition_size=8))
    plain, grouped = (estimate_memory(LARGE, job.training, **given, groups=groups) for groups in both)
    assert grouped.weights_bytes - plain.weights_bytes == 2 * LARGE.num_parameters // 8
    assert grouped.optimizer_bytes == plain.optimizer_bytes
    assert grouped.host_bytes == plain.host_bytes  # snapshots do not contain it


def work(group: int, *, micro_batches: int = 4) -> StepWork:
    return StepWork(
        tokens=2048, num_micro_batches=micro_batches, matmul_flops=1e10, attention_flops=0.0, hidden_size=4096,
        activation_bytes=1e6, logit_bytes=1e5, weight_bytes=1600.0, gradient_bytes=800.0, state_bytes=1e9, stage=3,
        world_size=16, peak_flops=989.5e12, hpz_partition_size=group,
    )  # fmt: skip


def test_bytes_moved__groups__first_forward_and_gradients_between_machines() -> None:
    plain, grouped = bytes_moved(work(1)), bytes_moved(work(8))
    assert (plain.sharing, plain.in_groups) == (15 / 16 * 4 * (800 + 2 * 1600), 0)
    assert grouped.sharing == 15 / 16 * (4 * 800 + 1600)
    assert grouped.in_groups == 7 / 8 * 7 * 1600


def test_estimate__slow_network__groups_are_faster() -> None:
    assert H100 is not None
    large = [replace(work(group), weight_bytes=14e9, gradient_bytes=14e9) for group in (1, 8)]
    plain, grouped = (estimate_step(one, gpu=H100, interconnect=SLOW) for one in large)
    assert grouped.communication_s < 0.7 * plain.communication_s


def test_forecast__spare_workers__as_long_as_without_them() -> None:
    plan = planned(workers="16..17")
    assert plan.for_world_size(17).num_spare == 1
    found = forecast(plan, links=ClusterLinks(interconnect=SLOW, note=""))
    first, second = (world.step_s for world in found.worlds)
    assert first == second


def test_facts__groups_and_spare_workers__are_shown() -> None:
    facts = dict(plan_facts(planned(workers="16..17")))
    assert facts["hpZ"].startswith("groups of 8 at 16 workers (by the estimated step)")
    assert "1.63 GiB" in facts["hpZ"]
    assert facts["spare workers"].startswith("up to 1, which get no rank, at 17 workers")
    assert "hpZ" not in dict(plan_facts(planned(workers="1..8")))
    assert "no groups at any" in dict(plan_facts(planned(4, workers="1..3", hardware=CPU)))["hpZ"]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"stage": 2, "hpz_partition_size": 4}, "needs stage: 3"),
        ({"stage": 3, "hpz_partition_size": 0}, "must be auto, 1 .no groups. or the workers of a group"),
        ({"stage": 3, "hpz_partition_size": -2}, "must be auto, 1"),
        ({"stage": 3, "hpz_partition_size": "node"}, "'auto' or a whole number"),
        ({"stage": 1, "quantized_weights": True}, "needs stage: 3"),
        ({"stage": 0, "quantized_gradients": True}, "needs stage: 3"),
    ],
)
def test_config__wrong_values__are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ZeroSpec.model_validate(given)


@pytest.mark.parametrize("key", ["quantized_weights", "quantized_gradients"])
def test_quantized__cpu__is_refused_by_name(key: str) -> None:
    with pytest.raises(PlanError, match=f"training.zero.{key}: needs GPUs") as caught:
        planned(hardware=CPU, zero={key: True})
    assert caught.value.job_key == f"training.zero.{key}"
    config = planned(workers="16", zero={key: True}).for_world_size(16).deepspeed["zero_optimization"]
    assert config[f"zero_{key}"] is True


def test_quantized_gradients__part_of_a_machine__not_quantised_there_and_shown() -> None:
    plan = planned(1, workers="7..24", zero={"quantized_gradients": True})
    without = [n for n in range(7, 25) if n not in (7, 8, 16, 24)]
    for world in plan.worlds:
        zero = world.deepspeed["zero_optimization"]
        assert zero.get("zero_quantized_gradients", False) == (world.batch.world_size not in without)
    assert dict(plan_facts(plan))["qgZ"].startswith("gradients are not quantised at 9, 10, 11, 12, ..., 23 workers")
    assert "qgZ" not in dict(plan_facts(planned(1, workers="16", zero={"quantized_gradients": True})))
    found = forecast(plan, links=ClusterLinks(interconnect=SLOW, note=""))
    seconds = {world.world_size: world.step_s for world in found.worlds}
    assert seconds[24] < 0.8 * seconds[23]
