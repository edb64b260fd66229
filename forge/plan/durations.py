"""How long a job takes: the forecast that a plan carries, and the former runs that it can be based on."""

from __future__ import annotations

from dataclasses import dataclass

from forge.plan.throughput import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldHours:
    """The forecast at one world size."""

    world_size: int
    hours: Estimate
    """From the start of the driver to the end of the run, without preemptions or waiting for machines."""
    step_s: float
    """Likely, as are all of the following."""
    evaluation_s: float
    """Of all evaluations on held-out data together."""
    checkpoint_s: float
    """Training waits for checkpoints, and the run for the last one."""
    startup_s: float
    """Until the first step."""
    tasks_s: float = 0.0
    """Of all scorings of the tasks of `evaluate` together; 0 if it is not known."""
    run_id: str | None = None
    """The former run whose measured speed it is based on; None if it is an estimate alone."""

    @property
    def beyond_steps_s(self) -> float:
        """What is added to the steps between the first and the last."""
        return self.evaluation_s + self.tasks_s + self.checkpoint_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterCost:
    """What a job costs on one cluster."""

    machines: str
    hours: Estimate
    """Starts of machines and interruptions included."""
    usd: Estimate
    usd_per_hour: float
    """The most that the cluster costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The hours of a job at each world size."""

    worlds: tuple[WorldHours, ...]
    """Ascending; empty if nothing is known of the device's speed."""
    notes: tuple[str, ...]
    """What it is based on, and what it assumes or leaves out."""
    cost: ClusterCost | None = None
    """On the cluster that the run was sent to; None on this machine, or if a price is unknown."""
