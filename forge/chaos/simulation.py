"""What a simulation of a training run takes and gives; `forge.chaos.simulate` computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from forge.errors import ArgumentError, printable
from forge.plan.recovery import LOSS_PAUSE_S, NODE_START_S, PLANNED_PAUSE_S, RESTART_S

Policy = Literal["elastic", "restart", "rigid"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


def read_policy(name: str) -> Policy:
    """Return the policy of this name. Raises: ArgumentError if there is none."""
    for policy in POLICIES:
        if name == policy:
            return policy
    raise ArgumentError(f"no policy '{printable(name, limit=40)}'; there are {', '.join(POLICIES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """What a change costs, and what is trained. Times in seconds; `forge.plan.recovery` has the sources."""

    step_s: float = 10.0
    """A step on the largest number of nodes of the trace; on fewer it takes proportionally longer."""
    scaling: float = 1.0
    """How the time of a step depends on the nodes n: ∝ n^-scaling. 0: it does not, as where simulated nodes share
    the cores of one machine."""
    total_steps: float = math.inf
    """The run ends after these steps, or with the trace."""
    min_nodes: int = 1
    num_nodes: int | None = None
    """Of `rigid`: how many train. None: half of the trace's largest number, at least `min_nodes`."""
    node_start_s: float = NODE_START_S
    """From the arrival of a machine until its workers can train."""
    loss_pause_s: float = LOSS_PAUSE_S
    """`elastic`: from the loss of a machine to the next step."""
    planned_pause_s: float = PLANNED_PAUSE_S
    """`elastic`: when machines join, or leave with notice."""
    notice_s: float | None = 30.0
    """`elastic`: how long before it leaves a machine is announced; it is not used from then on. The clouds give
    30 s (Azure, GCP) to 120 s (AWS). None: no notice. The other policies ignore notices."""
    snapshot_every: int = 1
    """`elastic`: steps between two copies of the state in the memory of other machines."""
    restart_s: float = RESTART_S
    """From a change to the next step where processes are started and a checkpoint is read, as for `restart` and
    `rigid`, and for `elastic` if the copies in memory are lost too."""
    checkpoint_every_s: float = 600.0
    usd_per_node_hour: float | None = None
    usd_per_hour: float = 0.0
    """Of what is rented as long as the run lasts, such as the head node."""

    def __post_init__(self) -> None:
        not_negative = ("node_start_s", "loss_pause_s", "planned_pause_s", "notice_s", "restart_s")
        for name in (*not_negative, "usd_per_node_hour", "usd_per_hour"):
            self._require(name, lambda value: 0 <= value < math.inf, "0 or more")
        for name in ("step_s", "checkpoint_every_s"):
            self._require(name, lambda value: 0 < value < math.inf, "above 0")
        for name in ("total_steps", "min_nodes", "snapshot_every"):
            self._require(name, lambda value: value >= 1, "1 or more")
        self._require("scaling", lambda value: 0 <= value <= 1, "0 to 1")
        self._require("num_nodes", lambda value: value >= self.min_nodes, f"at least min_nodes, {self.min_nodes}")

    def _require(self, name: str, holds: Callable[[float], bool], expected: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise ArgumentError(f"{name} of a simulation is {value:g}; expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """The result of a simulation. Times in seconds, of the trace's clock."""

    policy: Policy
    steps: float
    """Done and not lost."""
    finished_at_s: float | None
    """None: the trace ended before the last step."""
    duration_s: float
    node_hours: float
    """Available: what is paid for."""
    node_goodput: float
    """Node-seconds of steps done for the first time ÷ node-seconds available, as `forge runs show` counts it."""
    seconds: dict[str, float]
    """`training`, `repeated` (work that was lost), `pausing`, `waiting` for machines; together `duration_s`."""
    num_changes: int
    """Pauses and restarts."""
    num_from_checkpoint: int
    """Those of them that went back to a checkpoint."""
    usd: float | None
