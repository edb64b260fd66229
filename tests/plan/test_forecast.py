"""The hours of a job before it starts: by measured runs, by the estimate of a GPU, or by the peak of a CPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from forge.config.evaluate import EvaluateSpec
from forge.plan.forecast import (
    CPU_EFFICIENCY,
    STARTUP_S,
    CpuPeak,
    FormerRun,
    forecast,
    forecast_hours,
    step_flops,
)
from forge.plan.gpus import find_gpu
from forge.plan.inputs import HardwareInfo
from forge.plan.plan import Plan, make_draft, plan_from_json, plan_to_json
from forge.plan.throughput import Interconnect
from tests.plan.test_plan import plan
from tests.support.jobs import CPU, tiny_facts, tiny_job

A100 = HardwareInfo(device="cuda", name="NVIDIA A100-SXM4-80GB", memory_bytes=80 * 2**30, peak_flops=312e12)
LONG: dict[str, Any] = {
    "training__total_steps": 9000,
    "training__evaluate_every": "3000 steps",
    "checkpoint__every": "3000 steps",
}


def former(of: Plan, **changes: Any) -> FormerRun:
    values: dict[str, Any] = {
        "run_id": "tiny-0101",
        "step_s": {},
        "peak_flops": 1e9,
        "startup_s": 10.0,
        "ending_s": 4.0,
        "evaluation_s": 0.5,
        "stall_s": 0.1,
    }
    return FormerRun(plan=of, **values | changes)


def test_forecast__same_step_measured__adds_up_by_hand() -> None:
    made = plan(**LONG)
    found = forecast(made, former=[former(made, step_s={2: 0.4, 1: 0.7})])
    world = found.worlds[1]
    assert (world.world_size, world.run_id) == (2, "tiny-0101")
    assert world.step_s == pytest.approx(0.4)
    assert world.evaluation_s == pytest.approx(3 * 0.5)
    assert world.checkpoint_s == pytest.approx(3 * 0.1)
    assert world.hours.likely == pytest.approx((9000 * 0.4 + 1.5 + 0.3 + 10 + 4) / 3600)
    assert world.hours.low < world.hours.likely < world.hours.high < 1.25 * world.hours.likely


def test_forecast__size_that_was_not_measured__has_a_wider_range() -> None:
    made = plan(**LONG)
    two, four = (forecast(made, former=[former(made, step_s={2: 0.4})]).worlds[i] for i in (1, 3))
    assert four.step_s == pytest.approx(0.2)
    assert four.hours.high / four.hours.low > two.hours.high / two.hours.low


def test_forecast__several_runs__prefers_the_same_step_then_the_newest() -> None:
    made, other = plan(**LONG), plan(training__global_batch_size=24)
    runs = [
        former(other, run_id="newest", step_s={2: 9.0}),
        former(made, run_id="newer", step_s={2: 0.4}),
        former(made, run_id="older", step_s={2: 5.0, 3: 0.3}),
    ]
    found = forecast(made, former=runs)
    assert [world.run_id for world in found.worlds] == ["newer", "newer", "older", "newer"]
    assert forecast(made, former=runs[:1]).worlds[0].run_id == "newest"
    # Twice the batch at the same FLOP/s takes half as long.
    assert forecast(made, former=runs[:1]).worlds[1].step_s == pytest.approx(4.5)


def test_forecast__cpu_of_which_only_the_peak_was_measured__takes_a_share_of_it() -> None:
    made = plan(**LONG)
    found = forecast(made, former=[former(made, peak_flops=1e9)])
    assert found.worlds[1].step_s == pytest.approx(step_flops(made) / (2e9 * CPU_EFFICIENCY.likely))
    assert found.worlds[1].run_id is None
    assert found.notes[0] == (
        "assumed: 10% to 60%, likely 35%, of the 1.0 GFLOP/s that a former run measured on test"
    )


def test_forecast__cpu_before_a_first_run__assumes_a_share_of_the_measured_peak_of_its_cores() -> None:
    made, cpu = plan(**LONG), CpuPeak(core_flops=1e9, num_cores=2, measured_on="2026-11-29")
    found = forecast(made, cpu=cpu)
    assert [world.world_size for world in found.worlds] == [1, 2, 3, 4]
    for world in found.worlds:  # the workers share two cores; one worker computes with both
        assert world.step_s == pytest.approx(step_flops(made) / (2e9 * CPU_EFFICIENCY.likely))
        assert world.hours.low < 0.8 * world.hours.likely < world.hours.likely < world.hours.high / 2
    assert found.notes[0] == (
        "assumed: 10% to 60%, likely 35%, of the 1.0 GFLOP/s that matrix products reached on a core of test, "
        "2 cores, on 2026-11-29; no run was measured"
    )


def test_forecast__cpu_with_a_measured_run__does_not_use_the_peak() -> None:
    made, run = plan(**LONG), former(plan(**LONG), step_s={2: 0.4})
    cpu = CpuPeak(core_flops=1.0, num_cores=2, measured_on="2026-11-29")
    assert forecast(made, former=[run], cpu=cpu) == forecast(made, former=[run])


@pytest.mark.parametrize("runs", [[], [former(plan(hardware=replace(CPU, name="another")), step_s={1: 1.0})]])
def test_forecast__cpu_that_was_never_measured__is_unknown(runs: list[FormerRun]) -> None:
    found = forecast(plan(), former=runs)
    assert found.worlds == ()
    assert found.notes == ("unknown: no run on test was measured; the first one will tell",)


def test_forecast__gpu__names_the_assumed_links_and_a_measured_run_takes_precedence() -> None:
    made = plan(hardware=A100, **LONG)
    estimated = forecast(made)
    assert estimated.notes[0] == "estimated for A100-80GB, not measured"
    assert "assumed: 8 GPUs in a machine, 100 Gbit/s between machines" in estimated.notes
    assert estimated.worlds[0].startup_s == STARTUP_S
    named = plan(hardware=replace(A100, name="A100-80GB"), **LONG)
    run = former(named, step_s={2: 3 * estimated.worlds[1].step_s})
    measured = forecast(made, former=[run])
    for before, after in zip(estimated.worlds, measured.worlds, strict=True):
        assert after.step_s == pytest.approx(3 * before.step_s)
    assert measured.notes[-1] == "without preemptions and waiting for machines"


def test_forecast_hours__other_gpus_and_world_size__need_no_new_plan() -> None:
    made = plan(**LONG)
    h100, t4 = find_gpu("H100-80GB"), find_gpu("T4")
    assert h100 is not None and t4 is not None
    links = Interconnect(gpus_per_node=8, inter_node_bytes_per_s=1e10)
    fast, slow = (forecast_hours(made, world_size=6, gpu=gpu, interconnect=links).likely for gpu in (h100, t4))
    assert 0 < fast < slow


def test_forecast__draft__says_that_evaluations_are_left_out() -> None:
    job = tiny_job()
    draft = make_draft(job, model=tiny_facts(), hardware=A100)
    assert "evaluations (the corpus is not prepared)" in forecast(draft).notes[-1]


def test_plan_to_json__forecast__is_kept_and_left_out_if_there_is_none() -> None:
    made = plan()
    assert "forecast" not in plan_to_json(made)
    run = former(made, step_s={1: 0.1})
    with_forecast = replace(made, forecast=forecast(made, former=[run]))
    again = plan_from_json(plan_to_json(with_forecast)).forecast
    assert again == with_forecast.forecast
    assert again is not None
    assert all(math.isfinite(world.hours.high) for world in again.worlds)


TASK = """\
name: river
data: {files: a.jsonl}
kind: KIND
prompt: text
target: text
metrics: {METRIC: {}}
"""


def with_task(of: Plan, *, every: str = "end", limit: int | None = None, kind: str = "log-likelihood") -> Plan:
    metric = {"log-likelihood": "perplexity", "generate": "exact_match"}[kind]
    spec = EvaluateSpec.model_validate({"tasks": ["a.yaml"], "every": every, "limit": limit})
    text = TASK.replace("KIND", kind).replace("METRIC", metric)
    return replace(of, job=of.job.model_copy(update={"evaluate": spec}), tasks={"a.yaml": text})


def test_forecast__tasks_measured_by_a_run_with_the_same_ones__add_up_by_hand() -> None:
    made = with_task(plan(**LONG), every="evaluation")
    without = forecast(plan(**LONG), former=[former(made, step_s={2: 0.4}, tasks_s=7.0)]).worlds[1]
    found = forecast(made, former=[former(made, step_s={2: 0.4}, tasks_s=7.0)])
    world = found.worlds[1]
    assert world.tasks_s == pytest.approx((3 + 1) * 7.0), "three evaluations and the end"
    assert world.hours.likely - without.hours.likely == pytest.approx(28 / 3600)
    assert any(note.startswith("scoring the tasks of evaluate, 4 times, takes 28") for note in found.notes)
    assert plan_from_json(plan_to_json(replace(made, forecast=found))).forecast == found
    steps = with_task(plan(**LONG), every="1000 steps")
    assert forecast(steps, former=[former(steps, step_s={2: 0.4}, tasks_s=7.0)]).worlds[1].tasks_s == pytest.approx(
        70
    )


def test_forecast__tasks_never_measured__by_flops_with_a_wide_range() -> None:
    run = former(plan(**LONG), step_s={2: 0.4})
    bare, read, written = (
        forecast(made, former=[run]).worlds[1]
        for made in (
            plan(**LONG),
            with_task(plan(**LONG), limit=600),
            with_task(plan(**LONG), limit=600, kind="generate"),
        )
    )
    batch = plan(**LONG).job.training.global_batch_size
    assert read.tasks_s == pytest.approx(600 * 0.4 / batch * 0.4 / 3)
    assert written.tasks_s > 2 * read.tasks_s
    added = [getattr(written.hours, bound) - getattr(bare.hours, bound) for bound in ("low", "likely", "high")]
    assert added[0] < added[1] / 5 and added[2] > 5 * added[1]


def test_forecast__tasks_of_unknown_length__are_left_out_and_said() -> None:
    made = with_task(plan(**LONG))
    found = forecast(made, former=[former(plan(**LONG), step_s={2: 0.4})])
    assert found.worlds[1].tasks_s == 0
    assert found.notes[-1].endswith("the tasks of evaluate (set evaluate.limit)")
