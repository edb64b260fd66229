"""Losses counted from a run's recorded events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.elastic.loss_history import LossHistory
from forge.plan.checkpoint_interval import ASSUMED_NODE_MTBF_S, GROUP_LOSS_SHARE

DAY = ASSUMED_NODE_MTBF_S
PRIOR = DAY / (2 * GROUP_LOSS_SHARE)


class Events:
    """A run of two machines."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "events.jsonl"
        self.history = LossHistory(self.path)

    def write(self, at: float, event: str, **fields: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": at, "event": event, **fields}) + "\n")

    def start(self, at: float, *, source: str = "memory") -> None:
        self.write(at, "GenerationStarting", source=source)
        self.write(at, "GenerationStarted", ranks=[{"node": "a"}, {"node": "b"}])

    def lose(self, at: float) -> None:
        self.write(at, "MembershipChangeStarted", cause="loss")

    @property
    def mtbf_s(self) -> float:
        return self.history.risk(nodes_mtbf_s=[None, None]).mtbf_s


@pytest.fixture
def events(tmp_path: Path) -> Events:
    return Events(tmp_path)


def test_risk__no_events__is_what_is_assumed(events: Events) -> None:
    risk = events.history.risk(nodes_mtbf_s=[None, None])
    assert (risk.mtbf_s, risk.cost_s, risk.every_s) == (pytest.approx(PRIOR), None, None)
    known = events.history.risk(nodes_mtbf_s=[DAY / 2, DAY / 2])
    assert known.mtbf_s == pytest.approx(PRIOR / 2)


def test_risk__a_machine_lost_with_its_copy_elsewhere__only_the_machines_rate_rises(events: Events) -> None:
    events.start(0)
    events.lose(100)
    events.start(101)
    assert events.mtbf_s == pytest.approx((DAY + 2 * 101) / 2 / (2 * GROUP_LOSS_SHARE) + 101)


def test_risk__state_lost__counts_once_across_readers(events: Events) -> None:
    events.start(0)
    events.lose(100)
    events.start(101, source="storage")
    expected = ((DAY + 2 * 101) / 2 / (2 * GROUP_LOSS_SHARE) + 101) / 2
    assert events.mtbf_s == pytest.approx(expected)
    assert events.mtbf_s == pytest.approx(expected)  # nothing is read twice
    assert LossHistory(events.path).risk(nodes_mtbf_s=[None, None]).mtbf_s == pytest.approx(expected)


def test_risk__state_written_after_a_loss_or_the_run_stopped__is_not_lost(events: Events) -> None:
    events.start(0)
    events.lose(100)
    events.write(101, "CheckpointSaved", step=3, stall_s=None)  # from the copies in memory
    events.start(200, source="storage")
    events.write(300, "RunStopped")
    events.write(10_000, "GenerationStarting", source="storage")
    assert events.mtbf_s == pytest.approx((DAY + 2 * 300) / 2 / (2 * GROUP_LOSS_SHARE) + 300)


def test_risk__checkpoints_and_former_interval__are_taken(events: Events) -> None:
    for stall_s in (0.1, 0.5, 0.3):
        events.write(1, "CheckpointSaved", stall_s=stall_s)
    events.write(2, "CheckpointIntervalChanged", seconds=90.0)
    risk = events.history.risk(nodes_mtbf_s=[None])
    assert (risk.cost_s, risk.every_s) == (0.3, 90.0)


def test_risk__broken_lines__are_skipped(events: Events) -> None:
    events.path.write_bytes(
        b'{"event": 3}\n[]\nnull\n\xff\xfe\n{"event": "GenerationStarted", "time": "x"}\n' + b"[" * 9999
    )
    assert events.mtbf_s == pytest.approx(PRIOR)
    events.path.write_bytes(events.path.read_bytes() + b"\n")
    assert events.mtbf_s == pytest.approx(PRIOR)
