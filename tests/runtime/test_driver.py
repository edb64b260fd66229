"""forge.runtime.driver: what the driver itself records."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from forge.events import CheckpointSaved, Event
from forge.plan.plan import Plan
from forge.runtime.driver import Driver
from tests.support.checkpoints import write
from tests.support.jobs import tiny_plan


def driver_of(folder: Path, plan: Plan) -> tuple[Driver, list[Event]]:
    """A driver before it has connected, and what it records."""
    driver, recorded = Driver(folder, address=None), list[Event]()
    driver._plan = plan
    driver._recorder = SimpleNamespace(event=SimpleNamespace(remote=recorded.append))
    return driver, recorded


def test_record_stored__complete_and_damaged_checkpoints__reports_the_complete(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(str(tmp_path / "checkpoints"), step)
    torn = next((tmp_path / "checkpoints" / "step-00000020").glob("part-00001-*"))
    torn.write_bytes(torn.read_bytes()[:-1])
    driver, recorded = driver_of(tmp_path, tiny_plan())
    driver._record_stored()
    assert [event.step for event in recorded if isinstance(event, CheckpointSaved)] == [10, 30]
    (first, _) = recorded
    assert isinstance(first, CheckpointSaved)
    assert first.folder == str(tmp_path / "checkpoints" / "step-00000010")
    assert math.isnan(first.seconds) and math.isnan(first.stall_s)
    folder = Path(first.folder)
    assert first.size_bytes == sum(path.stat().st_size for path in folder.iterdir() if "manifest" not in path.name)


def test_record_stored__storage_cannot_be_listed__only_prints_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny_plan()
    checkpoint = plan.job.checkpoint.model_copy(update={"to": "nonsense://place"})
    job = plan.job.model_copy(update={"checkpoint": checkpoint})
    driver, recorded = driver_of(tmp_path, replace(plan, job=job))
    driver._record_stored()
    assert recorded == []
    assert "nonsense" in capsys.readouterr().err
