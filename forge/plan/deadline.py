"""When to use spot machines, on-demand machines or none, so that a run ends by its deadline at the least cost.

A run of N machines needs `work_s` seconds on all of them. Its *slack* is the time that remains until the deadline
less the work that remains. Slack only shrinks: while machines are missing or starting. At zero every machine must
work all the time; below, the deadline is missed. On-demand machines are taken to be available always, spot
machines are not.

    on-demand         N on-demand machines until the end
    greedy            spot; when the slack is used up, on-demand until the end
    uniform-progress  spot; on-demand while less is done than a constant rate would have done (Wu et al., "Can't Be
                      Late", NSDI 2024, section 4)
    elastic           forge's: spot as far as there is any; on-demand machines only to fill what is missing, and
                      only when the slack is down to a reserve

Why `elastic` waits: with constant prices a run costs the least if it uses all spot time until the deadline, and
fills the rest with on-demand time. When the rest is filled does not change its length, but filling it early may
prove to have been unnecessary. A rigid run cannot wait so long, because every loss near the deadline costs a
restart on all machines. An elastic run trains on with those that are left, and keeps an on-demand machine until
its replacement has started, so a small reserve is enough: the time in which on-demand machines replace the spot
losses still to be expected.

The policies are pure: a decision depends on the situation alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

DeadlinePolicy = Literal["on-demand", "greedy", "uniform-progress", "elastic"]
DEADLINE_POLICIES: tuple[DeadlinePolicy, ...] = get_args(DeadlinePolicy)

_PRIOR_LIFE_S = 3600.0
"""Of a spot machine, before there is anything to count: the median of Bamboo's trace (NSDI 2023) is 59 minutes."""
_PRIOR_LIVES = 4
"""How many such lives of each machine the prior counts as: the machines of a zone are often lost together, so a few
losses say little."""
_LARGEST_RESERVE = 0.5
"""Of the slack that the run began with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOffer:
    """Spot machines in one region now."""

    num_available: int
    """Those that are rented included."""
    usd_per_hour: float
    """Of one machine."""
    move_usd: float = 0.0
    """What moving the run there costs beside machines, such as the traffic of its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a policy decides by. Times in seconds since the start of the run."""

    now_s: float
    done_s: float
    """Work done, in seconds of all N machines."""
    work_s: float
    deadline_s: float
    num_nodes: int
    """N."""
    start_s: float
    """From the request of a machine until it works."""
    interval_s: float
    """Until the next decision."""
    move_s: float = 0.0
    """Pause of a move to another region, in which no machine is rented, before machines start there."""
    on_demand_usd_per_hour: float
    """Of one machine."""
    regions: Sequence[RegionOffer]
    region: int
    """Index of the region that the run is in."""
    num_spot: int
    """Rented spot machines, those that start included."""
    num_spot_working: int
    num_on_demand: int
    num_on_demand_working: int
    spot_node_s: float = 0.0
    """Time of all spot machines until now."""
    num_losses: int = 0
    """Spot machines that were lost until now."""

    @property
    def slack_s(self) -> float:
        return (self.deadline_s - self.now_s) - (self.work_s - self.done_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineChoice:
    """The machines that a run is to have until the next decision."""

    region: int
    num_spot: int
    num_on_demand: int


def decide(policy: DeadlinePolicy, situation: Situation) -> MachineChoice:
    """Return the machines that the run is to have now."""
    if situation.done_s >= situation.work_s:
        return MachineChoice(region=situation.region, num_spot=0, num_on_demand=0)
    match policy:
        case "on-demand":
            return _on_demand(situation)
        case "greedy":
            return _greedy(situation)
        case "uniform-progress":
            return _uniform_progress(situation)
        case "elastic":
            return _elastic(situation)


def _on_demand(now: Situation) -> MachineChoice:
    return MachineChoice(region=now.region, num_spot=0, num_on_demand=now.num_nodes)


def _spot(now: Situation, *, region: int | None = None) -> MachineChoice:
    return MachineChoice(region=now.region if region is None else region, num_spot=now.num_nodes, num_on_demand=0)


def _greedy(now: Situation) -> MachineChoice:
    if now.num_on_demand or (now.num_spot < now.num_nodes and now.slack_s <= now.start_s + now.interval_s):
        return _on_demand(now)
    return _all_or_nothing(now)


def _all_or_nothing(now: Situation) -> MachineChoice:
    """Spot machines where all N are available, the present region first; none else."""
    region = _full_region(now)
    if region is None:
        return MachineChoice(region=now.region, num_spot=0, num_on_demand=0)
    return _spot(now, region=region)


def _full_region(now: Situation) -> int | None:
    if now.regions[now.region].num_available >= now.num_nodes:
        return now.region
    full = [i for i, offer in enumerate(now.regions) if offer.num_available >= now.num_nodes]
    return min(full, key=lambda i: now.regions[i].usd_per_hour, default=None)


def _uniform_progress(now: Situation) -> MachineChoice:
    """Section 4 of the paper: exploitation, safety net, uniform progress and hysteresis, in this order."""
    if now.num_spot >= now.num_nodes and now.regions[now.region].num_available >= now.num_nodes:
        return _spot(now)
    if now.slack_s <= 2 * now.start_s + now.interval_s:
        return _on_demand(now)
    rate = now.work_s / now.deadline_s
    region = _full_region(now)
    if now.num_on_demand:
        is_ahead = now.done_s >= rate * (now.now_s + 2 * now.start_s)
        return _on_demand(now) if region is None or not is_ahead else _spot(now, region=region)
    if region is not None:
        return _spot(now, region=region)
    return _on_demand(now) if now.done_s < rate * now.now_s else _all_or_nothing(now)


def _elastic(now: Situation) -> MachineChoice:
    if now.slack_s <= now.start_s + now.interval_s:
        # Every machine must work from now on: none that may be lost. Spot ones work until those have started.
        kept = min(now.num_spot, now.regions[now.region].num_available, now.num_nodes - now.num_on_demand_working)
        return MachineChoice(region=now.region, num_spot=kept, num_on_demand=now.num_nodes)
    region = _best_region(now)
    # On-demand machines that were paid for are kept until spot machines work in their place.
    is_filling = now.num_on_demand > 0 or now.slack_s <= _reserve_s(now)
    num_spot = min(now.num_nodes, now.regions[region].num_available)
    if not _is_spot_worth_it(now, price=now.regions[region].usd_per_hour, is_filling=is_filling):
        num_spot = min(num_spot, now.num_spot) if region == now.region else 0  # those that run may go on
    if not is_filling:
        return MachineChoice(region=region, num_spot=num_spot, num_on_demand=0)
    return MachineChoice(
        region=region, num_spot=num_spot, num_on_demand=_filling(now, region=region, num_spot=num_spot)
    )


def _filling(now: Situation, *, region: int, num_spot: int) -> int:
    """Return the on-demand machines that fill what is missing.

    Those that run are kept until a spot machine works in their place. New ones are not rented for spot machines
    that are starting, since they would work no sooner, unless there is no slack for a loss of those.
    """
    working = min(num_spot, now.num_spot_working) if region == now.region else 0
    missing = now.num_nodes - working
    if now.slack_s <= 2 * now.start_s + now.interval_s:
        return missing
    return max(min(now.num_on_demand, missing), missing - (num_spot - working))


def _losses_per_s(now: Situation) -> float:
    """Estimated rate at which one spot machine is lost."""
    lives = _PRIOR_LIVES * now.num_nodes
    return (now.num_losses + lives) / (now.spot_node_s + lives * _PRIOR_LIFE_S)


def _is_spot_worth_it(now: Situation, *, price: float, is_filling: bool) -> bool:
    """Whether a spot machine can be expected to work long enough to pay for its start, and if it takes the place of
    an on-demand one, for the start of the one that follows it."""
    life_s, saved = 1 / _losses_per_s(now), now.on_demand_usd_per_hour - price
    paid_for_starts = price + now.on_demand_usd_per_hour if is_filling else now.on_demand_usd_per_hour
    return life_s * saved > now.start_s * paid_for_starts


def _best_region(now: Situation) -> int:
    """Choose the region. A move restarts all machines, so another region needs twice as many machines for the run,
    or as many at a price that pays for their start in the time that they can be expected to last. It also has to
    pay for the traffic and the pause of a move, and the slack has to last for the pause."""

    def count(i: int) -> int:
        return min(now.num_nodes, now.regions[i].num_available)

    best = max(range(len(now.regions)), key=lambda i: (count(i), -now.regions[i].usd_per_hour))
    here, there = count(now.region), count(best)
    if now.move_s and now.slack_s - now.move_s <= 4 * now.start_s + now.interval_s:
        return now.region
    if there >= max(1, 2 * here) and _pays_for_machines(now, to=best, num_more=there - here):
        return best
    if there >= here > 0 and _pays_for_move(now, to=best):
        return best
    return now.region


def _pays_for_machines(now: Situation, *, to: int, num_more: int) -> bool:
    """Whether more spot machines save more than a move costs: its traffic, and the work of its pause on demand."""
    saved = now.on_demand_usd_per_hour - now.regions[to].usd_per_hour
    paid_usd = now.regions[to].move_usd + saved * now.num_nodes * now.move_s / 3600
    return paid_usd == 0 or saved * num_more * _lasts_s(now) / 3600 > paid_usd


def _pays_for_move(now: Situation, *, to: int) -> bool:
    """Whether a lower price saves more than the start costs: the machines, and the slack if it is scarce."""
    price = now.regions[to].usd_per_hour
    is_scarce = now.slack_s <= _reserve_s(now) + 2 * now.start_s
    paid = price + now.on_demand_usd_per_hour if is_scarce else price
    pause = (now.on_demand_usd_per_hour - price) * now.move_s
    saved = (now.regions[now.region].usd_per_hour - price) * _lasts_s(now)
    return saved > paid * now.start_s + pause + 3600 * now.regions[to].move_usd / now.num_nodes


def _lasts_s(now: Situation) -> float:
    """For how long a spot machine can be expected to work."""
    return min(1 / _losses_per_s(now), now.work_s - now.done_s)


def _reserve_s(now: Situation) -> float:
    """Slack to keep for the losses that are still to be expected: each costs its share of the machines a start."""
    # A loss takes one of N machines for one start; N machines are lost N times as often as one.
    expected_s = _losses_per_s(now) * (now.work_s - now.done_s) * now.start_s
    largest_s = _LARGEST_RESERVE * (now.deadline_s - now.work_s)
    return 2 * now.start_s + now.interval_s + min(expected_s, largest_s)
