"""The interval between checkpoints follows what they cost."""

from __future__ import annotations

from forge.plan.checkpoint_interval import CheckpointRisk
from forge.train.async_checkpoint import CheckpointWritten
from forge.train.checkpoint_interval import CheckpointInterval
from forge.units import Every

MINUTE = Every(seconds=60.0)


def written(*, stall_s: float, seconds: float = 1.0) -> CheckpointWritten:
    return CheckpointWritten(step=1, folder="x", size_bytes=1, seconds=seconds, stall_s=stall_s)


def adapted(**risk: float) -> CheckpointInterval:
    return CheckpointInterval(MINUTE, risk=CheckpointRisk(**{"mtbf_s": 1e6} | risk))


def test_update__fixed_interval__never_changes() -> None:
    interval = CheckpointInterval(Every(steps=7))
    interval.record_checkpoint(written(stall_s=100.0))
    assert interval.update() is None
    assert interval.is_due(step=14, since_s=0.0)


def test_update__measured_waiting__changes_once_and_says_why() -> None:
    interval = adapted()
    assert interval.update() is None  # nothing is known yet
    interval.record_checkpoint(written(stall_s=0.1))
    changed = interval.update()
    assert changed is not None
    assert (changed.seconds, changed.before_s, changed.cost_s, changed.mtbf_s) == (447.0, 60.0, 0.1, 1e6)
    assert interval.every == Every(seconds=447.0)
    for stall_s in (0.2, 0.05, 0.21, 0.1, 0.11):  # noise
        interval.record_checkpoint(written(stall_s=stall_s))
        assert interval.update() is None


def test_update__before_the_first_checkpoint__snapshots_tell_the_cost() -> None:
    interval = adapted()
    interval.record_snapshot_cost(0.0)
    assert interval.update() is None
    interval.record_snapshot_cost(0.4)
    assert interval.update() is not None
    interval.record_snapshot_cost(4.0)
    assert interval.update() is None
    interval.record_checkpoint(written(stall_s=0.1))
    assert interval.update() is not None
    assert interval.every == Every(seconds=447.0)


def test_update__slow_storage__writes_at_most_a_tenth_of_the_time() -> None:
    interval = adapted()
    interval.record_checkpoint(written(stall_s=0.1, seconds=90.0))
    assert interval.update() is not None
    assert interval.every == Every(seconds=900.0)


def test_update__unknown_times__are_ignored() -> None:
    interval = adapted()
    interval.record_checkpoint(written(stall_s=float("nan"), seconds=float("nan")))
    assert interval.update() is None


def test_init__next_generation__continues_with_what_the_run_knows() -> None:
    interval = adapted(cost_s=0.1, every_s=447.0)
    assert interval.every == Every(seconds=447.0)
    assert interval.update() is None
    riskier = adapted(cost_s=0.1, every_s=447.0, mtbf_s=1e5)
    assert riskier.update() is not None
    assert riskier.every == Every(seconds=141.0)
