"""Choose which instance types a cluster may rent, and how many, from prices alone.

Pure: a cluster file and prices give an `InstancePlan`, which is shown before money is spent, and which
`forge.cluster.cloud.ray_config` turns into the file for Ray's launcher.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from forge.config.cluster import CloudSpec
from forge.errors import JobFileError
from forge.pricing.catalog import head_of, machine_types, workers_of

PriceOf = Callable[[str, bool], float | None]
"""USD per hour of an instance type, on demand or (True) as spot; None if unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOption:
    """An instance type, as spot or on demand, that may be rented."""

    machine_type: str
    is_spot: bool
    usd_per_hour: float | None

    @property
    def node_type(self) -> str:
        """Ray's name for it. The clouds store it as a tag's value, for which GCP allows only these characters."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.machine_type.lower())
        return f"{'spot' if self.is_spot else 'on-demand'}-{plain}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlan:
    """The instances that a cluster may rent."""

    head: InstanceOption
    workers: tuple[InstanceOption, ...]
    """The cheapest first, spot before on demand."""
    min_workers: int
    max_workers: int

    @property
    def usd_per_hour(self) -> float | None:
        """The price of the head and of all workers at the highest price; None if a price is unknown."""
        if self.max_workers == 0:
            return self.head.usd_per_hour
        highest = _highest_price(self.workers)
        if highest is None or self.head.usd_per_hour is None:
            return None
        return self.head.usd_per_hour + self.max_workers * highest

    @property
    def lowest_usd_per_hour(self) -> float | None:
        """The price of the head and the fewest workers at the lowest price; None if a price is unknown."""
        prices = [option.usd_per_hour for option in self.workers]
        if self.head.usd_per_hour is None or (self.min_workers and None in prices):
            return None
        return self.head.usd_per_hour + self.min_workers * min((price or 0.0 for price in prices), default=0.0)


def listed_price(spec: CloudSpec) -> PriceOf:
    """Prices of the cluster file, then of the catalog; an unlisted spot price counts as the on-demand price."""

    def price_of(name: str, is_spot: bool) -> float | None:
        if name in spec.usd_per_hour:
            return spec.usd_per_hour[name]
        known = machine_types(spec.provider).get(name)
        if known is None:
            return None
        return known.spot_usd_per_hour or known.usd_per_hour if is_spot else known.usd_per_hour

    return price_of


def plan_instances(spec: CloudSpec, *, price_of: PriceOf) -> InstancePlan:
    """Choose the instances: as many workers as the file asks for and `max_usd_per_hour` pays for.

    num_workers = min(workers.high, floor((max_usd_per_hour - head) / cheapest worker)). Instance types too
    expensive to reach that number are dropped, so that the limit holds whichever type is available.

    Raises: JobFileError if the limit does not pay for the minimum, or a price it depends on is unknown.
    """
    head = InstanceOption(machine_type=head_of(spec), is_spot=False, usd_per_hour=price_of(head_of(spec), False))
    names = workers_of(spec)
    kinds = ([True] if spec.spot else []) + ([False] if spec.on_demand_fallback or not spec.spot else [])
    workers = [
        InstanceOption(machine_type=name, is_spot=is_spot, usd_per_hour=price_of(name, is_spot))
        for is_spot in kinds
        for name in names
    ]
    workers.sort(key=lambda option: (not option.is_spot, option.usd_per_hour is None, option.usd_per_hour or 0.0))
    max_workers = spec.workers.high
    if spec.max_usd_per_hour is not None:
        workers = _affordable(spec, head=head, workers=workers, limit=spec.max_usd_per_hour)
        highest = _highest_price(tuple(workers))
        if highest:
            affordable = (spec.max_usd_per_hour - (head.usd_per_hour or 0.0)) / highest
            max_workers = int(min(max_workers, affordable + 1e-9))  # a tiny price makes it infinite
    return InstancePlan(head=head, workers=tuple(workers), min_workers=spec.workers.low, max_workers=max_workers)


def _affordable(
    spec: CloudSpec, *, head: InstanceOption, workers: list[InstanceOption], limit: float
) -> list[InstanceOption]:
    """Return the options for which the price limit allows as many workers as for the cheapest one."""
    unknown = sorted({option.machine_type for option in (head, *workers) if option.usd_per_hour is None})
    if unknown:
        raise JobFileError(
            f"cannot be enforced: the price of {', '.join(unknown)} is unknown; add it to usd_per_hour",
            key="max_usd_per_hour",
            value=f"{limit:g}",
        )
    minimum = min(spec.workers.high, max(1, spec.workers.low))
    left = limit - (head.usd_per_hour or 0.0)
    cheapest = min(option.usd_per_hour or 0.0 for option in workers)
    maximum = int(min(spec.workers.high, left / cheapest + 1e-9)) if cheapest and left > 0 else spec.workers.high
    count = max(minimum, maximum)
    kept = [option for option in workers if count * (option.usd_per_hour or 0.0) <= left + 1e-9]
    if not kept:
        raise JobFileError(
            f"does not pay for the head ({head.usd_per_hour:.3g} USD/h) and {minimum} of the cheapest workers "
            f"({minimum} x {cheapest:.3g} USD/h)",
            key="max_usd_per_hour",
            value=f"{limit:g}",
        )
    return kept


def _highest_price(workers: tuple[InstanceOption, ...]) -> float | None:
    prices = [option.usd_per_hour for option in workers]
    known = [price for price in prices if price is not None]
    return max(known) if known and len(known) == len(prices) else None
