"""What interruptions of spot machines do to the duration of a run, in closed form.

N machines are rented; each is interrupted at a constant rate λ and replaced at once by one that must start for R
seconds. Lives are exponential, so a rented machine trains for the share e^(-λR) of its time, and whether it does is
independent of the others: the number of machines that train is binomial. Fewer than the minimum train nothing.

Losses come at the rate Λ = λ·N·e^(-λR) of all training machines together. Each loss and each replacement pauses all
machines for c seconds; what was not saved is repeated. If a copy of the state is saved every C seconds, the share
of the time that remains for new work is

    e^(-Λc) · ΛC ÷ (e^(ΛC) - 1)        (without the second factor if nothing is repeated)

Source: J. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006),
section 3, whose run on one machine is the case N = 1. `forge.chaos.simulate` simulates the same model event by
event; tests/chaos/test_trace_rates.py compares both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from forge.plan.checkpoint_interval import GROUP_LOSS_SHARE, planned_every
from forge.plan.plan import DraftPlan
from forge.plan.throughput import Estimate
from forge.units import Every

Level = Literal["low", "likely", "high"]
LEVELS: tuple[Level, ...] = ("low", "likely", "high")

NODE_START_S = 14.0
"""From the arrival of a machine until its workers can train. Source: RESULTS.md, "cold start", 2026-11-23."""
LOSS_PAUSE_S = 0.48
"""From a loss without notice to the next step. Source: RESULTS.md, "Losing a machine", 2026-11-25."""
PLANNED_PAUSE_S = 0.30
"""When machines join, or leave with notice. Source: RESULTS.md, "Growth, notices", 2026-11-25."""
AUTO_REPEATED_STEPS = 11
"""Steps between two snapshots at `checkpoint.snapshot_every: auto`; the most that a loss repeated.

Source: RESULTS.md, "Losing a machine", `forge_auto`, 2026-11-25."""
RESTART_S = 120.0
"""From a change to the next step where processes are started and a checkpoint is read. Assumed; Ray Train took 80 s
(RESULTS.md, "Losing a machine", 2026-11-25), without the time to read a large checkpoint."""
BOOT_S = Estimate(low=60.0, likely=180.0, high=600.0)
"""From the request of a machine until Ray runs on it. Assumed: measured times until a machine can be reached are
below 100 s (Hao et al., arXiv 2107.03467, 2021); drivers and the installation of forge follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeCosts:
    """What a change of the machines costs a run. Times in seconds."""

    pause_s: float
    """All pauses for a loss and its replacement together."""
    saved_every_s: float = 0.0
    """Interval between copies of the state that survive the change; 0 if nothing is repeated."""
    changes_per_loss: int = 1
    """How often the work since the last copy is repeated: 2 if the replacement restarts the run, too."""
    restarts_per_loss: float = 0.0
    """How often a loss makes the run start its processes again, from a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterruptedRun:
    """The expected course of a run; hours, and numbers of machines."""

    hours: float
    """From the first step to the end."""
    num_interruptions: float
    num_restarts: float
    """Of all processes, from a checkpoint."""
    pausing_hours: float
    repeated_hours: float
    waiting_hours: float
    """Until machines are replaced; while a part of them is missing, that part of the time."""


_MOST_HOURS = 876_000.0
"""A hundred years; a run that takes longer, because its machines are hardly ever all there, does not end."""
_ENDLESS = InterruptedRun(
    hours=math.inf,
    num_interruptions=math.inf,
    num_restarts=math.inf,
    pausing_hours=math.inf,
    repeated_hours=0.0,
    waiting_hours=0.0,
)


def interrupted_run(
    hours: float,
    *,
    num_machines: int,
    min_machines: int,
    losses_per_hour: float,
    start_s: float,
    costs: ChangeCosts,
    available: float = 1.0,
) -> InterruptedRun:
    """Return what a run of `hours` on uninterrupted machines becomes.

    Args:
        min_machines: fewer train nothing.
        losses_per_hour: of one rented machine.
        start_s: from the request of a machine until it trains.
        available: mean share of the machines that can be rented.
    """
    share = available * math.exp(-losses_per_hour * start_s / 3600)
    capacity = training_capacity(share, num_machines=num_machines, min_machines=min_machines)
    losses_per_s = losses_per_hour * num_machines * share / 3600
    paused = math.exp(-min(700.0, losses_per_s * costs.pause_s))
    exponent = min(700.0, losses_per_s * costs.changes_per_loss * costs.saved_every_s)
    kept = exponent / math.expm1(exponent) if exponent > 0 else 1.0
    # Of the whole time a share is paused, of the rest a share lacks machines, of that work a share is repeated.
    useful = capacity * paused * kept
    total = hours / useful if useful > 0 else math.inf
    if total > _MOST_HOURS:
        return _ENDLESS
    return InterruptedRun(
        hours=total,
        num_interruptions=losses_per_hour * num_machines * available * total,
        num_restarts=3600 * losses_per_s * costs.restarts_per_loss * total,
        pausing_hours=total * (1 - paused),
        repeated_hours=total * paused * capacity * (1 - kept),
        waiting_hours=total * paused * (1 - capacity),
    )


def training_capacity(share: float, *, num_machines: int, min_machines: int) -> float:
    """Return the mean share of the machines that trains, if each is there for `share` of the time.

    Below the minimum none does: Σ n·P(n) ÷ N over n ≥ minimum, with binomial P.
    """
    if min_machines <= 1 or share >= 1:
        return share
    if share <= 0:
        return 0.0
    log_share, log_missing = math.log(share), math.log1p(-share)
    total = 0.0
    for count in range(min_machines, num_machines + 1):
        missing = num_machines - count
        ways = math.lgamma(num_machines + 1) - math.lgamma(count + 1) - math.lgamma(missing + 1)
        total += count * math.exp(ways + count * log_share + missing * log_missing)
    return min(share, total / num_machines)


def change_costs(plan: DraftPlan, *, num_machines: int, step_s: float, level: Level) -> ChangeCosts:
    """Return what the loss of one of `num_machines` costs. The high value is that of losses without notice."""
    checkpoint_s = _seconds(planned_every(plan, world_size=plan.worlds[-1].batch.world_size), step_s=step_s)
    if plan.job.resources.engine == "ray-train":
        return ChangeCosts(
            pause_s=2 * RESTART_S, saved_every_s=checkpoint_s, changes_per_loss=2, restarts_per_loss=2.0
        )
    if num_machines == 1:  # no other machine has the state; with notice it is saved first
        saved_every_s = checkpoint_s if level == "high" else 0.0
        return ChangeCosts(pause_s=RESTART_S, saved_every_s=saved_every_s, restarts_per_loss=1.0)
    if level != "high":
        return ChangeCosts(pause_s=2 * PLANNED_PAUSE_S)
    every = plan.job.checkpoint.snapshot_every
    steps = every if isinstance(every, int) else AUTO_REPEATED_STEPS
    # Sometimes the machine with the copy is lost as well: a restart, and half of the interval between checkpoints.
    both_lost_s = GROUP_LOSS_SHARE * (RESTART_S + checkpoint_s / 2)
    return ChangeCosts(
        pause_s=LOSS_PAUSE_S + PLANNED_PAUSE_S + both_lost_s,
        saved_every_s=steps * step_s,
        restarts_per_loss=GROUP_LOSS_SHARE,
    )


def _seconds(every: Every, *, step_s: float) -> float:
    return every.steps * step_s if every.steps is not None else every.seconds or 0.0
