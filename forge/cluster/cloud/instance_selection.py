"""What may be rented for a cluster, and at most for how much: decided from prices, before anything is rented.

Pure: a cluster file and what machines cost go in, a `InstancePlan` comes out. It is shown before money is
spent, and rendered by `forge.cluster.cloud.ray_config` into what Ray's launcher reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from forge.config.cluster import CloudSpec
from forge.errors import JobFileError
from forge.pricing.catalog import head_of, machine_types, workers_of

PriceOf = Callable[[str, bool], float | None]
"""USD per hour of a machine type, on demand or (True) as spot; None if it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceOption:
    """One kind of machine that may be rented."""

    machine_type: str
    is_spot: bool
    usd_per_hour: float | None

    @property
    def node_type(self) -> str:
        """What Ray calls it; the clouds take it as a tag's value, GCP in this alphabet alone."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.machine_type.lower())
        return f"{'spot' if self.is_spot else 'on-demand'}-{plain}"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePlan:
    """What a cluster may rent."""

    head: InstanceOption
    workers: tuple[InstanceOption, ...]
    """The cheapest first, spot before on-demand."""
    min_workers: int
    max_workers: int

    @property
    def usd_per_hour(self) -> float | None:
        """The most that it can cost: the head, and every worker at the dearest price; None if not all is known."""
        if self.max_workers == 0:
            return self.head.usd_per_hour
        dearest = _dearest(self.workers)
        if dearest is None or self.head.usd_per_hour is None:
            return None
        return self.head.usd_per_hour + self.max_workers * dearest


def listed_price(spec: CloudSpec) -> PriceOf:
    """Prices from the cluster file, else from the price list; a spot price that is not listed is the full one."""

    def price_of(name: str, is_spot: bool) -> float | None:
        if name in spec.usd_per_hour:
            return spec.usd_per_hour[name]
        known = machine_types(spec.provider).get(name)
        if known is None:
            return None
        return known.spot_usd_per_hour or known.usd_per_hour if is_spot else known.usd_per_hour

    return price_of


def plan_purchase(spec: CloudSpec, *, price_of: PriceOf) -> InstancePlan:
    """Choose what may be rented: as many workers as the file asks for and `max_usd_per_hour` pays for.

    num_workers = min(workers.high, floor((max_usd_per_hour - head) / cheapest worker)); machine types so dear that
    there could not be so many of them are left out, so that it holds whichever are to be had.

    Raises: JobFileError if the limit does not pay for the fewest, or a price for it is not known.
    """
    head = InstanceOption(machine_type=head_of(spec), is_spot=False, usd_per_hour=price_of(head_of(spec), False))
    names = workers_of(spec)
    kinds = ([True] if spec.spot else []) + ([False] if spec.on_demand_fallback or not spec.spot else [])
    workers = [
        InstanceOption(machine_type=name, is_spot=is_spot, usd_per_hour=price_of(name, is_spot))
        for is_spot in kinds
        for name in names
    ]
    workers.sort(key=lambda offer: (not offer.is_spot, offer.usd_per_hour is None, offer.usd_per_hour or 0.0))
    max_workers = spec.workers.high
    if spec.max_usd_per_hour is not None:
        workers = _affordable(spec, head=head, workers=workers, limit=spec.max_usd_per_hour)
        dearest = _dearest(tuple(workers))
        if dearest:
            room = (spec.max_usd_per_hour - (head.usd_per_hour or 0.0)) / dearest
            max_workers = min(max_workers, int(room + 1e-9))
    return InstancePlan(head=head, workers=tuple(workers), min_workers=spec.workers.low, max_workers=max_workers)


def order_by_price(
    regions: Sequence[str], *, spot: Mapping[str, Mapping[str, float]], names: Sequence[str], listed: PriceOf
) -> dict[str, PriceOf]:
    """The regions by what their cheapest worker costs as spot, each with its prices; without any the last.

    Args:
        spot: USD per hour by region and machine type, as the cloud tells now.
        listed: What holds where the cloud tells nothing.
    """

    def cheapest(region: str) -> float:
        return min((spot.get(region, {}).get(name, math.inf) for name in names), default=math.inf)

    def price_in(region: str) -> PriceOf:
        told = spot.get(region, {})
        return lambda name, is_spot: told[name] if is_spot and name in told else listed(name, is_spot)

    return {region: price_in(region) for region in sorted(regions, key=cheapest)}


def _affordable(
    spec: CloudSpec, *, head: InstanceOption, workers: list[InstanceOption], limit: float
) -> list[InstanceOption]:
    """The offers that leave room for as many workers as the cheapest of them does."""
    unknown = sorted({offer.machine_type for offer in (head, *workers) if offer.usd_per_hour is None})
    if unknown:
        raise JobFileError(
            f"cannot be kept: the price of {', '.join(unknown)} is not known; write it into usd_per_hour",
            key="max_usd_per_hour",
            value=f"{limit:g}",
        )
    fewest = min(spec.workers.high, max(1, spec.workers.low))
    left = limit - (head.usd_per_hour or 0.0)
    cheapest = min(offer.usd_per_hour or 0.0 for offer in workers)
    most = int(left / cheapest + 1e-9) if cheapest and left > 0 else spec.workers.high
    wanted = max(fewest, min(spec.workers.high, most))
    kept = [offer for offer in workers if wanted * (offer.usd_per_hour or 0.0) <= left + 1e-9]
    if not kept:
        raise JobFileError(
            f"does not pay for the head ({head.usd_per_hour:.3g} USD/h) and {fewest} of the cheapest workers "
            f"({fewest} x {cheapest:.3g} USD/h)",
            key="max_usd_per_hour",
            value=f"{limit:g}",
        )
    return kept


def _dearest(workers: tuple[InstanceOption, ...]) -> float | None:
    prices = [offer.usd_per_hour for offer in workers]
    known = [price for price in prices if price is not None]
    return max(known) if known and len(known) == len(prices) else None
