"""Describe simulated runs for a terminal."""

from __future__ import annotations

import math

from forge.chaos.simulation import SimulatedRun, SimulationSettings
from forge.chaos.trace import Trace
from forge.report.text import number
from forge.units import counted, format_duration

SIMULATION_COLUMNS = (
    "policy",
    "#node goodput",
    "#steps",
    "end",
    "#training",
    "#repeated",
    "#pausing",
    "#waiting",
    "#changes",
    "#USD",
)


def simulation_row(run: SimulatedRun, *, total_steps: int | None) -> list[str]:
    """One line of the table."""
    if run.finished_at_s is not None:
        end = f"done after {format_duration(run.finished_at_s)}"
    elif total_steps is not None:
        end = f"{run.steps / total_steps:.0%} done when the trace ends"
    else:
        end = f"with the trace, after {format_duration(run.duration_s)}"
    shares = [f"{run.seconds[name] / run.duration_s:.1%}" if run.duration_s else "-" for name in run.seconds]
    return [
        run.policy,
        number(run.node_goodput, ".1%"),
        f"{math.floor(run.steps):,}",
        end,
        *shares,
        f"{run.num_changes:,}",
        "-" if run.usd is None else f"{run.usd:,.2f}",
    ]


def simulation_settings_text(settings: SimulationSettings, *, trace: Trace) -> str:
    """What was assumed, in one line."""
    notice = "no notice" if settings.notice_s is None else f"{settings.notice_s:g} s notice"
    num_losses = sum(len(change.removed) for change in trace.changes)
    return (
        f"{num_losses:,} {'loss' if num_losses == 1 else 'losses'} in {format_duration(trace.duration_s)}, up to "
        f"{counted(trace.max_nodes, 'machine')}. "
        f"Assumed: {settings.step_s:g} s a step on all of them; elastic pauses {settings.loss_pause_s:g} s after a "
        f"loss and {settings.planned_pause_s:g} s otherwise, {notice}; a restart takes {settings.restart_s:g} s, a "
        f"checkpoint is made every {format_duration(settings.checkpoint_every_s)}"
    )
