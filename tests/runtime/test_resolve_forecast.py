"""The peak that a forecast before the first run on a CPU is based on."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from forge.limits import cpu_name, usable_cpus
from forge.plan.inputs import HardwareInfo
from forge.runtime import resolve_forecast
from forge.runtime.resolve_forecast import find_cpu_peak, with_forecast
from forge.train.kept_peak import MeasuredPeak, keep_peak
from tests.plan.test_plan import plan

HERE = HardwareInfo(device="cpu", name=cpu_name(), memory_bytes=2**34, peak_flops=None)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def keep(flops: float, *, dtype: str) -> None:
    kept = MeasuredPeak(
        processor=cpu_name(), dtype=dtype, torch=torch.__version__, flops=flops, measured_on="2026-11-29"
    )
    keep_peak(cpu_name(), dtype=dtype, torch=torch.__version__, measure=lambda: kept)


def test_find_cpu_peak__nothing_kept__measures_it_as_a_run_would_and_keeps_it(state: Path) -> None:
    found = find_cpu_peak(plan(hardware=HERE, training__precision="fp32"))
    assert found is not None and found.core_flops > 1e8
    assert found.num_cores == usable_cpus()
    (kept,) = (state / "peaks").glob("*.json")
    assert f'"flops": {found.core_flops}' in kept.read_text()
    assert version("torch") == torch.__version__  # what the kept file is found by


def test_find_cpu_peak__kept__starts_no_process(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(3e9, dtype="bfloat16")
    monkeypatch.setattr(resolve_forecast, "_measured", lambda dtype: pytest.fail(f"{dtype} is measured"))
    found = find_cpu_peak(plan(hardware=HERE))
    assert found is not None and found.core_flops == 3e9
    assert find_cpu_peak(plan(hardware=replace(HERE, name="of the cluster"))) is None
    assert find_cpu_peak(plan(hardware=replace(HERE, device="cuda"))) is None


def test_find_cpu_peak__cannot_be_measured__is_unknown(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_forecast.sys, "executable", "/bin/false")
    assert find_cpu_peak(plan(hardware=HERE)) is None


def test_with_forecast__first_run_on_a_cpu__has_hours_and_names_the_assumption(state: Path) -> None:
    keep(3e9, dtype="bfloat16")
    found = with_forecast(plan(hardware=HERE, checkpoint__to=str(state / "runs"))).forecast
    assert found is not None and [world.run_id for world in found.worlds] == [None] * 4
    assert found.notes[0].startswith("assumed: 10% to 60%, likely 35%, of the 3.0 GFLOP/s that matrix products")
