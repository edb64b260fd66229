"""Rates of a trace, and the closed form of a bill against the simulation of the same model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from forge.chaos.simulate import simulate
from forge.chaos.simulation import SimulationSettings
from forge.chaos.trace import TraceBuilder, poisson
from forge.chaos.trace_file import read_trace
from forge.chaos.trace_rates import trace_interruptions
from forge.errors import ArgumentError
from forge.plan.recovery import ChangeCosts, interrupted_run

RECORDED = Path(__file__).parents[3] / "shared" / "traces"


def test_trace_interruptions__by_hand() -> None:
    builder = TraceBuilder()
    builder.add(at_s=0, added=("a", "b"))
    builder.add(at_s=3600, removed=("a",))
    builder.add(at_s=7200, added=("a",), lasts_s=3600)
    found = trace_interruptions(builder.build(), name="t")
    assert found.per_machine_hour.likely == pytest.approx(1 / 5)
    assert found.available == pytest.approx(5 / 6)
    assert found.per_machine_hour.low == 0.0 < found.per_machine_hour.high


def test_trace_interruptions__no_time__is_refused() -> None:
    builder = TraceBuilder()
    builder.add(at_s=0, added=("a",))
    with pytest.raises(ArgumentError, match=r"^t has no time between its changes"):
        trace_interruptions(builder.build(), name="t")


def test_trace_interruptions__bamboo__as_counted() -> None:
    path = RECORDED / "bamboo-p3.csv"
    if not path.is_file():
        pytest.skip("no bamboo-p3.csv beside this checkout")
    found = trace_interruptions(read_trace(path), name="bamboo")
    assert found.per_machine_hour.likely == pytest.approx(0.61, abs=0.005)
    assert found.available == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize(
    ("num_machines", "min_machines", "mtbf_h", "start_s"),
    [(8, 1, 4.0, 200.0), (64, 1, 1.6, 200.0), (4, 3, 2.0, 600.0)],
)
def test_closed_form__elastic_with_notice__agrees_with_the_simulation(
    num_machines: int, min_machines: int, mtbf_h: float, start_s: float
) -> None:
    hours = 150.0
    trace = poisson(num_nodes=num_machines, mtbf_s=3600 * mtbf_h, down_s=0, duration_s=1e7, seed=7)
    # Replacements are seen `start_s` after they are rented; notices come at the loss itself.
    settings = SimulationSettings(
        step_s=10.0, total_steps=hours * 360, node_start_s=start_s, notice_s=0.0, min_nodes=min_machines
    )
    simulated = simulate(trace, "elastic", settings=settings)
    expected = interrupted_run(
        hours,
        num_machines=num_machines,
        min_machines=min_machines,
        losses_per_hour=1 / mtbf_h,
        start_s=start_s,
        costs=ChangeCosts(pause_s=settings.planned_pause_s * 2),
    )
    assert simulated.finished_at_s is not None
    assert expected.hours == pytest.approx(simulated.finished_at_s / 3600, rel=0.02)
    assert expected.pausing_hours == pytest.approx(simulated.seconds["pausing"] / 3600, abs=0.001 * hours)


def test_closed_form__restarts_from_checkpoints__agrees_with_the_simulation() -> None:
    hours, mtbf_h = 300.0, 6.0
    trace = poisson(num_nodes=4, mtbf_s=3600 * mtbf_h, down_s=0, duration_s=1e7, seed=3)
    settings = SimulationSettings(
        step_s=1.0,
        total_steps=hours * 3600,
        node_start_s=0.0,
        notice_s=None,
        restart_s=120.0,
        checkpoint_every_s=600,
    )
    simulated = simulate(trace, "restart", settings=settings)
    # The replacement is there at once, so that a loss is one restart.
    costs = ChangeCosts(pause_s=120.0, saved_every_s=600.0)
    expected = interrupted_run(
        hours, num_machines=4, min_machines=1, losses_per_hour=1 / mtbf_h, start_s=0.0, costs=costs
    )
    assert simulated.finished_at_s is not None and math.isfinite(expected.hours)
    assert expected.hours == pytest.approx(simulated.finished_at_s / 3600, rel=0.02)
    assert expected.repeated_hours == pytest.approx(simulated.seconds["repeated"] / 3600, rel=0.15)


def test_closed_form__restarts_at_losses_and_replacements__agrees_with_the_simulation() -> None:
    hours, mtbf_h = 200.0, 8.0
    trace = poisson(num_nodes=4, mtbf_s=3600 * mtbf_h, down_s=0, duration_s=1e7, seed=5)
    settings = SimulationSettings(step_s=1.0, total_steps=hours * 3600, node_start_s=300.0, restart_s=60.0)
    simulated = simulate(trace, "restart", settings=settings)
    costs = ChangeCosts(pause_s=2 * 60.0, saved_every_s=settings.checkpoint_every_s, changes_per_loss=2)
    expected = interrupted_run(
        hours, num_machines=4, min_machines=1, losses_per_hour=1 / mtbf_h, start_s=300.0, costs=costs
    )
    assert simulated.finished_at_s is not None
    # Replacements follow their losses after 300 s, not at random: they lose less.
    assert simulated.finished_at_s / 3600 == pytest.approx(expected.hours, rel=0.03)
