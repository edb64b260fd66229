"""What former runs measured, as the forecast of the next run uses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forge.events import CheckpointSaved, GenerationStarted, RunFinished
from forge.plan.inputs import HardwareInfo
from forge.plan.plan import plan_to_json
from forge.runs.former_runs import former_runs
from tests.support.jobs import CPU, tiny_plan
from tests.support.runs import make_run


def endings(step: int) -> list[GenerationStarted | CheckpointSaved | RunFinished]:
    started = GenerationStarted(
        generation=1, world_size=2, device="cpu", peak_flops=4e9, peak_source="test", seconds={}
    )
    saved = CheckpointSaved(step=step, folder="f", size_bytes=1, seconds=1.0, stall_s=0.25)
    return [started, saved, RunFinished(step=step)]


def test_former_runs__a_finished_run__gives_its_times(tmp_path: Path) -> None:
    make_run(tmp_path, steps=8, endings=endings(8))
    (run,) = former_runs(tmp_path, hardware=CPU)
    assert run.step_s == {2: pytest.approx(0.2)}
    assert run.peak_flops == 2e9
    assert (run.evaluation_s, run.stall_s) == (0.1, 0.25)
    assert run.startup_s is not None and run.ending_s is not None


def test_former_runs__too_few_steps_no_end_damaged_or_another_device__give_nothing_of_it(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    damaged = make_run(tmp_path, "tiny-0101-000001-abcd")
    (damaged / "plan.json").write_text("{")
    (run,) = former_runs(tmp_path, hardware=CPU)
    assert (run.step_s, run.peak_flops, run.ending_s) == ({}, None, None)
    assert former_runs(tmp_path / "absent", hardware=CPU) == []


def test_former_runs__any_gpu__leaves_out_cpus(tmp_path: Path) -> None:
    make_run(tmp_path, steps=8, endings=endings(8))
    on_gpu = make_run(tmp_path, "tiny-0101-000001-abcd", steps=8, endings=endings(8))
    hardware = HardwareInfo(device="cuda", name="NVIDIA L4", memory_bytes=2**34, peak_flops=121e12)
    (on_gpu / "plan.json").write_text(plan_to_json(replace(tiny_plan(), hardware=hardware)))
    (run,) = former_runs(tmp_path, hardware=None)
    assert run.plan.hardware == hardware
