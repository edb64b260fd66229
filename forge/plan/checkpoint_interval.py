"""The interval between durable checkpoints with `checkpoint.every: auto`: Young's and Daly's optimum. Pure.

More checkpoints cost more waiting, fewer lose more training when the state is lost. With forge's replicas in memory
a lost machine does not lose the state; only losing a machine together with the one that keeps its copy does, so
that is the time between losses which the formula takes. Under `resources.engine: ray-train`, which has no copies,
and on a single machine it is every loss.

The time between losses is estimated as the mean of a gamma distribution: a prior that counts as one loss, and the
losses that the run has seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from forge.plan.interruptions import ASSUMED
from forge.plan.plan import DraftPlan
from forge.plan.space import checkpoint_bytes
from forge.units import Every, format_duration

ASSUMED_NODE_MTBF_S = 3600 / ASSUMED.per_machine_hour.likely
"""Mean time until a machine is lost, where nothing is known: 9.5 days, as in the bill. Spot machines lasted an
hour in Bamboo's trace (NSDI 2023), Meta's H100 machines nine months (Llama 3, 2024, section 3.3.4)."""
GROUP_LOSS_SHARE = 0.07
"""Share of losses in which the machine with the copy is lost too, since machines of a zone are lost together.

Source: 204 losses in the traces of Bamboo (p3) and Parcae (HH, LH), machines lost within 15 s of each other counted
as lost at once, copies on the next machine of a ring in random order: 0.06 to 0.09."""
MIN_S, MAX_S = 60.0, 2 * 3600.0
"""Bounds of the interval: fewer files than one a minute, and never more to repeat than two hours."""
_WRITES_PER_INTERVAL = 10
"""The interval is at least this many times as long as the writing of a checkpoint, which takes disk and network."""
_KEEP_WITHIN = 1.5
"""An interval is kept while the best one is not shorter or longer by more than this factor, which costs at most 8 %
more than the best one: (1.5 + 1 / 1.5) / 2."""
_STALL_S_PER_BYTE = 0.008 / 1.06e9
"""Source: benchmarks/RESULTS.md, "Checkpoints", 2026-11-25: 8 ms for 1.06 GB."""
_GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRisk:
    """What the interval depends on, as far as the run has measured it."""

    mtbf_s: float
    """Mean time until the state in memory is lost."""
    cost_s: float | None = None
    """Waiting for one checkpoint; None before the first one."""
    every_s: float | None = None
    """The interval that was used last; None if it is the plan's."""


def young_daly_s(*, cost_s: float, mtbf_s: float) -> float:
    """Return the time between two checkpoints that loses the least: Daly's higher-order estimate.

    sqrt(2 C M) * (1 + sqrt(C / 2M) / 3 + (C / 2M) / 9) - C, or M if C >= 2M.

    Source: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006, equation 37;
    its first term is Young, "A first order approximation to the optimum checkpoint interval", 1974.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def state_mtbf_s(*, num_nodes: int, node_mtbf_s: float, has_replicas: bool) -> float:
    """Return the mean time until the state in memory of all nodes together is lost."""
    share = GROUP_LOSS_SHARE if has_replicas and num_nodes > 1 else 1.0
    return node_mtbf_s / (num_nodes * share)


def posterior_s(prior_s: float, *, seen_s: float, num_losses: int) -> float:
    """Return the mean time between losses after `num_losses` in `seen_s`; the prior counts as one loss."""
    return (prior_s + seen_s) / (1 + num_losses)


def best_interval_s(*, cost_s: float, mtbf_s: float, written_s: float = 0.0) -> float:
    """Return Young's and Daly's optimum, within bounds and at most every tenth of the time writing."""
    low = max(MIN_S, _WRITES_PER_INTERVAL * written_s)
    return min(max(young_daly_s(cost_s=cost_s, mtbf_s=mtbf_s), low), max(low, MAX_S))


def is_worth_a_change(before_s: float, after_s: float) -> bool:
    """Whether a new optimum differs enough from the interval in use."""
    return max(before_s, after_s) > _KEEP_WITHIN * min(before_s, after_s)


def checkpoint_stall_s(plan: DraftPlan, *, world_size: int) -> float:
    """Return the estimated time that training waits for one checkpoint."""
    return checkpoint_bytes(plan.model, plan.job.training) * _STALL_S_PER_BYTE / world_size


def planned_risk(plan: DraftPlan, *, world_size: int) -> CheckpointRisk:
    """Return what is assumed before the run."""
    per_node = _GPUS_PER_NODE if plan.hardware.device == "cuda" else 1
    mtbf_s = state_mtbf_s(
        num_nodes=math.ceil(world_size / per_node),
        node_mtbf_s=ASSUMED_NODE_MTBF_S,
        has_replicas=plan.job.resources.engine == "elastic",
    )
    return CheckpointRisk(mtbf_s=mtbf_s, cost_s=checkpoint_stall_s(plan, world_size=world_size))


def planned_every(plan: DraftPlan, *, world_size: int) -> Every:
    """Return the interval that the job asks for, with `auto` the one that a run begins with."""
    every = plan.job.checkpoint.every
    if every != "auto":
        return every
    risk = planned_risk(plan, world_size=world_size)
    return Every(seconds=round(best_interval_s(cost_s=risk.cost_s or 0.0, mtbf_s=risk.mtbf_s)))


def interval_text(plan: DraftPlan) -> str | None:
    """Describe the interval that a run with most workers begins with; None if the job states it."""
    if plan.job.checkpoint.every != "auto" or not plan.worlds:
        return None
    world_size = plan.worlds[-1].batch.world_size
    risk, every = planned_risk(plan, world_size=world_size), planned_every(plan, world_size=world_size)
    return (
        f"auto: every {format_duration(every.seconds or 0.0)} at first, then by what the run measures; estimated: "
        f"{format_duration(risk.cost_s or 0.0)} of waiting each; assumed: a machine lost every "
        f"{format_duration(ASSUMED_NODE_MTBF_S)}, the state in memory every {format_duration(risk.mtbf_s)}"
    )
