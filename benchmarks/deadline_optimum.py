"""The cheapest way to meet a deadline that a policy can find which knows all rates, but not the future.

Each region has spot machines for the whole run, or none; both last exponential times. The best choices are found
by dynamic programming over the time that is left, the work that is left, the regions that have machines, and the
machines that work. There is one decision in each `start_s`, after which rented machines work. No policy that
decides so often does better on average, so what a policy costs more is about what better ideas can save.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_IMPOSSIBLE = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class OnOffSpot:
    """Spot machines that are there for a run or not at all. Times in seconds, prices of all machines of the run."""

    usd_per_hour: tuple[float, ...]
    """By region."""
    on_demand_usd_per_hour: float
    mean_there_s: float
    mean_outage_s: float
    start_s: float

    @property
    def availabilities(self) -> list[tuple[bool, ...]]:
        """Every combination of regions with machines."""
        return list(itertools.product((False, True), repeat=len(self.usd_per_hour)))

    def transitions(self) -> NDArray[np.float32]:
        """Probability of each availability after each other one."""
        lost = -math.expm1(-self.start_s / self.mean_there_s)
        back = -math.expm1(-self.start_s / self.mean_outage_s)
        stays = {(True, True): 1 - lost, (True, False): lost, (False, True): back, (False, False): 1 - back}
        states = self.availabilities
        chances = [[math.prod(map(stays.get, zip(a, b, strict=True))) for b in states] for a in states]  # type: ignore[arg-type]
        return np.array(chances, dtype=np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The best choices for a run: by intervals left, availability, spot region (0: none), on demand, work left."""

    spot: OnOffSpot
    num_intervals: int
    num_work: int
    choices: NDArray[np.uint8]

    def usd(self, counts: Sequence[Sequence[int]]) -> float:
        """Return what a run costs on recorded availability.

        Args:
            counts: machines in each interval, by region; all or none.
        """
        spot, left, region, on_demand, usd = self.spot, self.num_work, 0, 0, 0.0
        for passed in range(self.num_intervals):
            if left == 0:
                break
            there = tuple(count[min(passed, len(count) - 1)] > 0 for count in counts)
            region = region if region and there[region - 1] else 0
            choice = int(
                self.choices[self.num_intervals - passed, spot.availabilities.index(there), region, on_demand, left]
            )
            new_region, new_on_demand = choice >> 1, choice & 1
            usd += _interval_usd(spot, new_region, new_on_demand)
            left -= _works(region, new_region, on_demand, new_on_demand)
            region, on_demand = new_region, new_on_demand
        assert left == 0, "a choice that misses the deadline has an infinite cost"
        return usd


def find_optimum(spot: OnOffSpot, *, work_s: float, deadline_s: float) -> Optimum:
    """Return the best choices for a run."""
    num_work, num_intervals = math.ceil(work_s / spot.start_s - 1e-9), int(deadline_s / spot.start_s + 1e-9)
    states, chances = spot.availabilities, spot.transitions()
    num_regions = len(spot.usd_per_hour)
    shape = (len(states), num_regions + 1, 2, num_work + 1)
    costs = np.full(shape, _IMPOSSIBLE, np.float32)
    costs[..., 0] = 0
    choices = np.zeros((num_intervals + 1, *shape), np.uint8)
    for left in range(1, num_intervals + 1):
        after = costs.copy()
        for state, region in itertools.product(range(len(states)), range(1, num_regions + 1)):
            if not states[state][region - 1]:  # its machines are lost
                after[state, region] = costs[state, 0]
        expected = np.tensordot(chances, after, axes=(1, 0))
        costs = np.full(shape, _IMPOSSIBLE, np.float32)
        costs[..., 0] = 0
        for state, there in enumerate(states):
            regions = [0, *(i + 1 for i, is_there in enumerate(there) if is_there)]
            for region, on_demand in itertools.product(regions, (0, 1)):
                best, choice = costs[state, region, on_demand], choices[left, state, region, on_demand]
                for new_region, new_on_demand in itertools.product(regions, (0, 1)):
                    works = _works(region, new_region, on_demand, new_on_demand)
                    then = expected[state, new_region, new_on_demand]
                    cost = (then[:-1] if works else then[1:]) + _interval_usd(spot, new_region, new_on_demand)
                    is_better = cost < best[1:] - 1e-6
                    best[1:][is_better] = cost[is_better]
                    choice[1:][is_better] = 2 * new_region + new_on_demand
    return Optimum(spot=spot, num_intervals=num_intervals, num_work=num_work, choices=choices)


def _interval_usd(spot: OnOffSpot, region: int, on_demand: int) -> float:
    rate = (spot.usd_per_hour[region - 1] if region else 0.0) + on_demand * spot.on_demand_usd_per_hour
    return rate * spot.start_s / 3600


def _works(region: int, new_region: int, on_demand: int, new_on_demand: int) -> int:
    """Whether machines that were rented before are kept; new ones only start."""
    return int((new_region > 0 and region == new_region) or (on_demand and new_on_demand))
