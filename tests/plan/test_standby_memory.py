"""The CUDA context of the standby process in the plan: on GPUs, under the elastic engine, named as assumed."""

from __future__ import annotations

import pytest

from forge.plan.inputs import HardwareInfo
from forge.plan.memory import STANDBY_BYTES
from forge.plan.plan import Plan, make_plan
from forge.report.text import plan_facts
from tests.support.jobs import CPU, UNPREPARED, tiny_facts, tiny_job

FACT = "512 MiB of each worker's ~total are the CUDA context of its standby process (assumed)"


def planned(*, engine: str, hardware: HardwareInfo) -> Plan:
    job = tiny_job(resources__engine=engine, training__micro_batch_size=1)
    return make_plan(job, model=tiny_facts(), corpus=UNPREPARED, hardware=hardware)


def gpu(*, memory_bytes: int | None = None) -> HardwareInfo:
    return HardwareInfo(device="cuda", name="test", memory_bytes=memory_bytes, peak_flops=None)


def test_memory__elastic_engine_on_gpus__counts_the_standby_process() -> None:
    elastic, other = (planned(engine=engine, hardware=gpu()) for engine in ("elastic", "ray-train"))
    for one, without in zip(elastic.worlds, other.worlds, strict=True):
        assert one.memory.total_bytes - without.memory.total_bytes == STANDBY_BYTES
    assert ("memory", FACT) in plan_facts(elastic)
    assert not [fact for fact in plan_facts(other) if fact[0] == "memory"]


def test_memory__gpu_with_room_for_the_model_alone__does_not_fit() -> None:
    need = planned(engine="elastic", hardware=gpu()).worlds[0].memory.total_bytes
    assert planned(engine="elastic", hardware=gpu(memory_bytes=round(need / 0.84))).worlds[0].fits
    tight = gpu(memory_bytes=round((need - STANDBY_BYTES) / 0.84))
    assert not planned(engine="elastic", hardware=tight).worlds[0].fits
    assert planned(engine="ray-train", hardware=tight).worlds[0].fits


@pytest.mark.parametrize("engine", ["elastic", "ray-train"])
def test_memory__cpu__has_no_context(engine: str) -> None:
    plan = planned(engine=engine, hardware=CPU)
    assert plan.worlds[0].memory.standby_bytes == 0
    assert "CUDA" not in str(plan_facts(plan))
