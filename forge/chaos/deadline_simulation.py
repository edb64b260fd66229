"""Simulation of a run with a deadline on spot availability, under the policies of `forge.plan.deadline`.

Time passes in intervals of one decision each. A machine is paid from its request on and works after `start_s`.
Machines beyond those available are lost at the beginning of an interval. The run of a rigid policy makes progress
only with all of its machines; that of the elastic policy in proportion to those that work.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from forge.chaos.trace import Trace
from forge.errors import ArgumentError
from forge.plan.deadline import DeadlinePolicy, MachineChoice, RegionOffer, Situation, decide


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineJob:
    """A run with a deadline. Times in seconds."""

    work_s: float
    """With all machines."""
    deadline_s: float
    num_nodes: int
    start_s: float = 180.0
    """From the request of a machine until its workers train."""
    on_demand_usd_per_hour: float
    """Of one machine."""
    interval_s: float = 60.0
    move_s: float = 0.0
    """Pause of a move to another region, in which the run has no machines."""

    def __post_init__(self) -> None:
        is_positive = 0 < self.work_s < math.inf and 0 < self.interval_s < math.inf
        if not (is_positive and 0 <= self.start_s < math.inf and 0 <= self.move_s < math.inf):
            raise ArgumentError(f"work and intervals must be above 0, starts 0 or more; got {self}")
        least_s = self.work_s + 2 * self.start_s + 2 * self.interval_s
        if not least_s <= self.deadline_s < math.inf:
            raise ArgumentError(
                f"the run takes {least_s / 3600:.2f} h on machines that are never lost, starts included; "
                f"a deadline of {self.deadline_s / 3600:.2f} h cannot be met"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionAvailability:
    """Spot machines of one region over time."""

    counts: Sequence[int]
    """Available machines in each interval; of the last one also afterwards."""
    usd_per_hour: float
    move_usd: float = 0.0
    """What a move of the run to this region costs beside machines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlineResult:
    """What a policy made of a run."""

    policy: DeadlinePolicy
    usd: float
    finished_at_s: float
    is_met: bool
    spot_node_hours: float
    on_demand_node_hours: float
    num_losses: int
    num_moves: int
    """Between regions."""


def availability_of(trace: Trace, *, interval_s: float) -> list[int]:
    """Return how many nodes of a spot trace are present at the beginning of each interval."""
    counts, present, changes = [], 0, list(reversed(trace.changes))
    for i in range(math.ceil(trace.duration_s / interval_s)):
        while changes and changes[-1].at_s <= i * interval_s:
            change = changes.pop()
            present += len(change.added) - len(change.removed)
        counts.append(present)
    return counts


def random_availability(
    *, num_nodes: int, share: float, mean_outage_s: float, num_intervals: int, interval_s: float, seed: int
) -> list[int]:
    """Make the availability of a region in which all machines are there, or none: exponential times of both.

    Args:
        share: of the time in which they are there, above 0 and below 1.
    """
    dice, counts, is_there, left_s = random.Random(seed), list[int](), seed % 2 == 0, 0.0
    mean_there_s = mean_outage_s * share / (1 - share)
    for _ in range(num_intervals):
        while left_s <= 0:
            is_there = not is_there
            left_s += dice.expovariate(1 / (mean_there_s if is_there else mean_outage_s))
        counts.append(num_nodes if is_there else 0)
        left_s -= interval_s
    return counts


def simulate_deadline(
    policy: DeadlinePolicy, job: DeadlineJob, *, regions: Sequence[RegionAvailability]
) -> DeadlineResult:
    """Simulate a run until its work is done."""
    run = _DeadlineRun(job=job, policy=policy, regions=regions)
    while run.done_s < job.work_s - 1e-6:
        run.pass_interval()
    return run.result()


def least_usd(job: DeadlineJob, *, regions: Sequence[RegionAvailability]) -> float:
    """Return a bound that no policy can undercut: the cheapest spot time until the deadline, known in advance, with
    machines that work at once, and on-demand time for the rest."""
    hours, usd = job.work_s * job.num_nodes / 3600, 0.0
    offers: list[tuple[float, float]] = []
    for i in range(math.ceil(job.deadline_s / job.interval_s)):
        length_h = min(job.interval_s, job.deadline_s - i * job.interval_s) / 3600
        # The machines of all regions, the cheapest first, up to N.
        free = job.num_nodes
        for region in sorted(regions, key=lambda region: region.usd_per_hour):
            count = min(free, _count(region, i))
            free -= count
            offers.append((region.usd_per_hour, count * length_h))
    for price, node_hours in sorted(offers):
        if price >= job.on_demand_usd_per_hour:
            break
        taken = min(hours, node_hours)
        hours, usd = hours - taken, usd + taken * price
    return usd + hours * job.on_demand_usd_per_hour


def _count(region: RegionAvailability, interval: int) -> int:
    return region.counts[min(interval, len(region.counts) - 1)]


@dataclass(slots=True, kw_only=True)
class _Machines:
    """Machines of one kind: when each begins to work, the earliest first."""

    works_at_s: list[float] = field(default_factory=list)

    def set_count(self, count: int, *, now_s: float, start_s: float) -> int:
        """Rent or return machines, those that work last of all. Returns: how many were returned."""
        returned = max(0, len(self.works_at_s) - count)
        del self.works_at_s[count:]
        self.works_at_s += [now_s + start_s] * (count - len(self.works_at_s))
        return returned

    def working(self, now_s: float) -> int:
        return sum(at_s <= now_s for at_s in self.works_at_s)


@dataclass(slots=True, kw_only=True)
class _DeadlineRun:
    job: DeadlineJob
    policy: DeadlinePolicy
    regions: Sequence[RegionAvailability]
    interval: int = 0
    done_s: float = 0.0
    region: int = 0
    spot: _Machines = field(default_factory=_Machines)
    on_demand: _Machines = field(default_factory=_Machines)
    usd: float = 0.0
    spot_node_s: float = 0.0
    on_demand_node_s: float = 0.0
    num_losses: int = 0
    num_moves: int = 0
    moves_until_s: float = 0.0
    finished_at_s: float = 0.0

    def pass_interval(self) -> None:
        """Lose machines, decide, and work until the next decision or the end."""
        job, now_s = self.job, self.interval * self.job.interval_s
        if now_s < self.moves_until_s:
            self.interval += 1
            return
        available = _count(self.regions[self.region], self.interval)
        if available < len(self.spot.works_at_s):
            self.num_losses += self.spot.set_count(available, now_s=now_s, start_s=job.start_s)
        self._apply(decide(self.policy, self._situation(now_s)), now_s=now_s)
        rate, length_s = self._rate(now_s), job.interval_s
        if rate > 0:
            length_s = min(length_s, (job.work_s - self.done_s) / rate)
        self.done_s += rate * length_s
        self.finished_at_s = now_s + length_s
        self._pay(length_s)
        self.interval += 1

    def result(self) -> DeadlineResult:
        return DeadlineResult(
            policy=self.policy,
            usd=self.usd,
            finished_at_s=self.finished_at_s,
            is_met=self.finished_at_s <= self.job.deadline_s + 1e-6,
            spot_node_hours=self.spot_node_s / 3600,
            on_demand_node_hours=self.on_demand_node_s / 3600,
            num_losses=self.num_losses,
            num_moves=self.num_moves,
        )

    def _situation(self, now_s: float) -> Situation:
        job = self.job
        return Situation(
            now_s=now_s,
            done_s=self.done_s,
            work_s=job.work_s,
            deadline_s=job.deadline_s,
            num_nodes=job.num_nodes,
            start_s=job.start_s,
            interval_s=job.interval_s,
            move_s=job.move_s,
            on_demand_usd_per_hour=job.on_demand_usd_per_hour,
            regions=[
                RegionOffer(
                    num_available=_count(region, self.interval),
                    usd_per_hour=region.usd_per_hour,
                    move_usd=region.move_usd,
                )
                for region in self.regions
            ],
            region=self.region,
            num_spot=len(self.spot.works_at_s),
            num_spot_working=self.spot.working(now_s),
            num_on_demand=len(self.on_demand.works_at_s),
            num_on_demand_working=self.on_demand.working(now_s),
            spot_node_s=self.spot_node_s,
            num_losses=self.num_losses,
        )

    def _apply(self, wanted: MachineChoice, *, now_s: float) -> None:
        start_s = self.job.start_s
        if wanted.region != self.region:
            self.spot.set_count(0, now_s=now_s, start_s=start_s)
            self.region, self.num_moves = wanted.region, self.num_moves + 1
            self.usd += self.regions[self.region].move_usd
            if self.job.move_s:  # the whole cluster ends, and the next decision is made in the new region
                self.on_demand.set_count(0, now_s=now_s, start_s=start_s)
                self.moves_until_s = now_s + self.job.move_s
                return
        available = _count(self.regions[self.region], self.interval)
        self.spot.set_count(min(wanted.num_spot, available), now_s=now_s, start_s=start_s)
        self.on_demand.set_count(wanted.num_on_demand, now_s=now_s, start_s=start_s)

    def _rate(self, now_s: float) -> float:
        """Seconds of work per second."""
        working = min(self.job.num_nodes, self.spot.working(now_s) + self.on_demand.working(now_s))
        if self.policy != "elastic" and working < self.job.num_nodes:
            return 0.0
        return working / self.job.num_nodes

    def _pay(self, length_s: float) -> None:
        num_spot, num_on_demand = len(self.spot.works_at_s), len(self.on_demand.works_at_s)
        self.spot_node_s += num_spot * length_s
        self.on_demand_node_s += num_on_demand * length_s
        price = self.regions[self.region].usd_per_hour
        self.usd += length_s / 3600 * (num_spot * price + num_on_demand * self.job.on_demand_usd_per_hour)
