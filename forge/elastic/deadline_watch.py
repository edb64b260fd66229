"""Watches whether a run is done by its deadline, and rents machines accordingly where the cluster can rent any.

Every minute the progress is compared with the deadline. A verdict that changes is an event. `resources.max_hours`
is watched in the same way: the run is to be done before it has run for so long. For a deadline, on a cluster with
spot and on-demand machines, the policy of `forge.plan.deadline` chooses how many of each the run is to have:

    more of a kind    `MachineLimits` tells the autoscaler how many of each kind it may rent
    spot again        slots beyond the job's most are requested while on-demand machines fill in, so that spot
                      machines are looked for; when one works, an on-demand machine is returned as on a notice

Where the cluster may be in another region, `RegionWatch` advises to move when spot machines stay away.

Work is measured in worker-seconds of a step, so it is assumed to be done in proportion to the number of workers.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.placement import Placement
from forge.elastic.region_watch import RegionWatch
from forge.elastic.states import MembershipState
from forge.events import DeadlineForecast, Event, MachinesChosen
from forge.plan.deadline import MachineChoice, RegionOffer, Situation, decide

_EVERY_S = 60.0
_START_S = 180.0
"""From the request of a machine until it trains; see `forge.plan.recovery.BOOT_S`."""
_RETURN_NOTICE_S = 30.0
"""Between the notice of an on-demand machine and its end: enough for a planned change."""
_MARGIN = 0.02
"""Of the time that is left: a verdict that was bad is good again only with this much to spare."""
_SPOT_SHARE = 0.4
"""Of the on-demand price, where no spot machine has told its price yet."""


class MachineLimits(Protocol):
    """Machines that a cluster may rent for the run."""

    def write(self, *, num_spot: int, num_on_demand: int) -> None:
        """Set how many of each kind the run may have. Raises: OSError."""

    def clear(self) -> None:
        """Let the cluster rent as it does without this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineTerms:
    """A run and when it must be done. Times in seconds since the epoch."""

    started_at: float
    """When the run was first started."""
    deadline_at: float
    total_steps: int
    max_workers: int
    step_worker_s: float | None
    """Workers times seconds of a step, as forecast; None if unknown."""
    overhead: float = 1.0
    """Time with evaluations and checkpoints, as a multiple of that of the steps."""
    limit: Literal["deadline", "max_hours"] = "deadline"
    """Key in `resources` that says when."""


class DeadlineWatch:
    """The deadline of one run."""

    def __init__(
        self,
        terms: DeadlineTerms,
        *,
        placement: Placement,
        record_event: Callable[[Event], None],
        machines: MachineLimits | None = None,
        regions: RegionWatch | None = None,
        was_met: bool | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Args:
        machines: None where the cluster cannot rent spot and on-demand machines.
        regions: None where the cluster cannot move.
        was_met: whether the run's last recorded forecast met the deadline; None if there is none.
        """
        self._terms, self._placement, self._record_event = terms, placement, record_event
        self._machines, self.regions, self._clock = machines, regions, clock
        self._checked_at = -math.inf
        self._verdict = was_met
        self._choice: MachineChoice | None = None
        self._returned: set[str] = set()
        self._spot_s = 0.0
        self._num_losses = 0
        self._spot: set[str] = set()
        self._sought_since, self._num_spot = math.inf, 0

    def close(self) -> None:
        """Drop the limits on the cluster's machines."""
        if self._machines is not None:
            with contextlib.suppress(OSError):
                self._machines.clear()

    def has_returned(self, node: str) -> bool:
        """Whether the node's machine is being returned, because a spot machine works in its place."""
        return node in self._returned

    def check(
        self,
        *,
        state: MembershipState,
        connections: Mapping[str, AgentConnection],
        step: int,
        step_worker_s: float | None,
    ) -> None:
        """Compare the progress with the deadline, and choose machines; once a minute, and once there are workers.

        Args:
            step: the last step that was done.
            step_worker_s: workers times seconds of a step; None if none was measured.
        """
        now = self._clock()
        has_workers, is_first = bool(state.assignment), math.isinf(self._checked_at)
        lacks_choice = self._choice is None and self._machines is not None
        is_due = has_workers and (self._verdict is None or lacks_choice)  # both need workers
        if now - self._checked_at < _EVERY_S and not is_due:
            return
        worker_s = step_worker_s or self._terms.step_worker_s
        if worker_s is None or state.is_stopping:
            return
        passed_s = 0.0 if is_first else now - self._checked_at
        self._checked_at = now
        worker_s *= self._terms.overhead
        self._judge(now, worker_s=worker_s, num_workers=len(state.assignment), step=step)
        if self._machines is None and self.regions is None:
            return
        nodes = self._nodes(state, connections, passed_s=passed_s)
        situation = self._situation(now, nodes=nodes, worker_s=worker_s, step=step)
        # On-demand machines that have not joined yet must not be limited to none.
        if self._machines is not None and (has_workers or not is_first):
            self._choose(situation, nodes=nodes)
        else:
            self._num_found(situation, num_sought=situation.num_nodes)
        if self.regions is not None:
            since_s = situation.now_s - self._sought_since
            self.regions.check(situation, now=now, missing_s=max(0.0, since_s))

    def _judge(self, now: float, *, worker_s: float, num_workers: int, step: int) -> None:
        """Record the forecast when it is first known and when its verdict changes.

        Args:
            worker_s: worker-seconds of a step.
        """
        terms = self._terms
        left_s = (terms.total_steps - step) * worker_s
        remaining_s = terms.deadline_at - now
        ends_at = now + left_s / num_workers if num_workers else math.inf
        margin_s = 0.0 if self._verdict is not False else _MARGIN * max(0.0, remaining_s)
        verdict = ends_at + margin_s <= terms.deadline_at
        if verdict == self._verdict or (not num_workers and remaining_s > 0):
            return
        self._verdict = verdict
        needed = math.ceil(left_s / remaining_s) if remaining_s > 0 else None
        self._record_event(
            DeadlineForecast(
                deadline=terms.deadline_at,
                ends_at=ends_at if num_workers else None,
                step=step,
                num_workers=num_workers,
                needed_workers=needed,
                max_workers=terms.max_workers,
                can_rent=self._machines is not None,
                limit=terms.limit,
            )
        )

    def _nodes(
        self, state: MembershipState, connections: Mapping[str, AgentConnection], *, passed_s: float
    ) -> dict[str, _Node]:
        """The machines that will stay; counts how long spot machines have worked, and how many were lost."""
        nodes = {
            name: _Node(
                num_slots=node.num_slots,
                is_working=node.is_ready,
                usd_per_hour=connections[name].usd_per_hour,
                saving_usd_per_hour=connections[name].saving_usd_per_hour,
            )
            for name, node in state.nodes.items()
            if name in connections and node.preempted_at is None and name not in self._returned
        }
        spot = {name for name, node in nodes.items() if node.is_spot}
        self._num_losses += len(self._spot - spot)
        self._spot_s += passed_s * len(self._spot & spot)
        self._spot = spot
        return nodes

    def _choose(self, situation: Situation, *, nodes: Mapping[str, _Node]) -> None:
        """Have the machines that the policy chooses."""
        assert self._machines is not None
        sought = decide("elastic", situation)
        # Whether spot machines can be had is known only by asking for them; on-demand ones fill what does not come.
        num_found = self._num_found(situation, num_sought=sought.num_spot)
        found = [replace(offer, num_available=num_found) for offer in situation.regions]
        filled = decide("elastic", replace(situation, regions=found))
        choice = replace(sought, num_on_demand=filled.num_on_demand)
        if choice != self._choice:
            self._choice = choice
            chosen = {"num_spot": choice.num_spot, "num_on_demand": choice.num_on_demand}
            self._record_event(MachinesChosen(**chosen, slack_s=situation.slack_s))
        try:
            self._machines.write(num_spot=choice.num_spot, num_on_demand=choice.num_on_demand)
        except OSError as error:  # the next call tries again
            sys.stderr.write(f"cannot limit the machines of the cluster: {error}\n")
        on_demand = sorted(name for name, node in nodes.items() if not node.is_spot)
        missing = choice.num_spot - situation.num_spot if on_demand else 0
        self._placement.request_extra(max(0, missing) * _slots(nodes))
        excess = min(len(on_demand) - choice.num_on_demand, len(nodes) - situation.num_nodes)
        for name in on_demand[: max(0, excess)]:
            self._returned.add(name)
            self._placement.replace_node(name, seconds_left=_RETURN_NOTICE_S)

    def _num_found(self, situation: Situation, *, num_sought: int) -> int:
        """Spot machines that can be had: all that are sought, unless some have not come in time."""
        if situation.num_spot >= num_sought or situation.num_spot > self._num_spot:
            self._sought_since = math.inf
        elif math.isinf(self._sought_since):
            self._sought_since = situation.now_s
        self._num_spot = situation.num_spot
        is_late = situation.now_s - self._sought_since > _START_S
        return situation.num_spot if is_late else situation.num_nodes

    def _situation(self, now: float, *, nodes: Mapping[str, _Node], worker_s: float, step: int) -> Situation:
        terms, known = self._terms, [node for node in nodes.values() if node.usd_per_hour is not None]
        listed = None if self.regions is None else self.regions.terms
        full = max(((node.usd_per_hour or 0.0) + node.saving_usd_per_hour for node in known), default=0.0)
        full = full or (listed and listed.on_demand_usd_per_hour) or 1.0
        usual = (listed and listed.usd_per_hour) or _SPOT_SHARE * full
        spot = min((node.usd_per_hour or 0.0 for node in known if node.is_spot), default=usual)
        num_nodes = math.ceil(terms.max_workers / _slots(nodes))
        return Situation(
            now_s=now - terms.started_at,
            done_s=step * worker_s / terms.max_workers,
            work_s=terms.total_steps * worker_s / terms.max_workers,
            deadline_s=terms.deadline_at - terms.started_at,
            num_nodes=num_nodes,
            start_s=_START_S,
            interval_s=_EVERY_S,
            on_demand_usd_per_hour=full,
            regions=[RegionOffer(num_available=num_nodes, usd_per_hour=spot)],
            region=0,
            num_spot=sum(node.is_spot for node in nodes.values()),
            num_spot_working=sum(node.is_spot and node.is_working for node in nodes.values()),
            num_on_demand=sum(not node.is_spot for node in nodes.values()),
            num_on_demand_working=sum(not node.is_spot and node.is_working for node in nodes.values()),
            spot_node_s=self._spot_s,
            num_losses=self._num_losses,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    num_slots: int
    is_working: bool
    usd_per_hour: float | None
    saving_usd_per_hour: float

    @property
    def is_spot(self) -> bool:
        """Only a spot machine knows that it costs less than on demand."""
        return self.saving_usd_per_hour > 0


def _slots(nodes: Mapping[str, _Node]) -> int:
    """Workers on a machine."""
    return max((node.num_slots for node in nodes.values()), default=1) or 1
