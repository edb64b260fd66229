"""What a followed run does at the advice to move; the move itself is in tests/hosts/test_aws.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from forge.cli.mover import Mover
from forge.cluster.base import ClusterRecord, write_record
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.runtime.driver_process import LocalRun
from tests.support.jobs import tiny_plan
from tests.support.runs import make_run

ADVICE = {"event": "RegionMoveAdvised", "here": "us-east-1", "to": "us-west-2"}


def notes_at_advice(folder: Path, **resources: Any) -> tuple[list[str], Mover]:
    notes: list[str] = []
    plan = tiny_plan(resources={"deadline": "48h", **resources})
    mover = Mover(LocalRun(folder=folder, pid=os.getpid()), plan)
    mover.on_event({"event": "MachinesChosen"}, notes.append)
    mover.on_event(ADVICE, notes.append)
    return notes, mover


def on_cluster(folder: Path, *, provider: str, **state: Any) -> None:
    """Record that a run is on a cluster that was started from here."""
    spec: dict[str, Any] = {"name": "lab", "provider": provider}
    spec |= {"machines": ["a"]} if provider == "ssh" else {"gpu": "A10G", "regions": ["us-east-1"]}
    write_record(ClusterRecord(name="lab", provider=provider, spec=spec, state=state))
    write_remote_ref(folder, RemoteRef(cluster="lab", folder=f"/runs/{folder.name}", job="j", events=0, steps=0))


def test_advice__job_does_not_allow_moves__names_the_command_and_goes_on(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a")
    on_cluster(folder, provider="aws")
    notes, mover = notes_at_advice(folder)
    assert notes == ["forge cluster move lab --to us-west-2 moves it; resources.move_regions does so by itself"]
    assert mover.continue_elsewhere() is None


@pytest.mark.parametrize(("provider", "problem"), [("ssh", "'lab' has no region"), ("aws", "'lab' is not up")])
def test_advice__cluster_cannot_move__says_why_and_goes_on(tmp_path: Path, provider: str, problem: str) -> None:
    folder = make_run(tmp_path, "a")
    on_cluster(folder, provider=provider)
    notes, mover = notes_at_advice(folder, move_regions=True)
    assert len(notes) == 1 and "the run is not moved: " in notes[0] and problem in notes[0]
    assert mover.continue_elsewhere() is None
