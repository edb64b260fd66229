"""Where machines are for rent, and at what price: the offers of all clouds in one form.

`load_offers` returns the prices that forge can know: those fetched last (`refresh=True` asks the clouds, see
`forge.pricing.fetch`), and for clouds that were never asked those of the price list shipped with forge. What is
unknown is None, never zero; the notes of the table say how old the prices of each cloud are.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date

from forge.plan.gpus import find_gpu
from forge.pricing.catalog import MachineType, catalog_table, machine_types
from forge.pricing.price_list import listed_prices

CLOUDS = ("aws", "gcp", "azure")
_POWER_USAGE_EFFECTIVENESS = 1.09
"""Energy of the data centre ÷ energy of its machines. Source: Google's fleet-wide average of 2024."""
_SAME_PRICE = 0.999
"""A spot price above this share of the on-demand price is no discount: the zone sells no spot capacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterruptionBand:
    """Share of spot instances that the cloud interrupts in a month, as AWS Spot Advisor publishes it."""

    low: float
    high: float

    def __str__(self) -> str:
        if self.low <= 0:
            return f"<{self.high:.0%}"
        return f">{self.low:.0%}" if self.high >= 1 else f"{self.low * 100:.0f}-{self.high:.0%}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A machine type for rent in one region, or in one zone of it.

    A price that is zero, negative or not finite is unknown (None); a spot price that is not below the on-demand
    price means that no spot capacity is sold (None).
    """

    cloud: str
    instance: str
    gpu: str
    """Its name in `forge.plan.gpus` if it is there; empty for a machine without GPU."""
    num_gpus: int
    gpu_memory_gib: float
    """Of one GPU."""
    num_cpus: int
    memory_gib: float
    inter_node_gbps: float | None
    """Network to other machines in Gbit/s; None if unknown."""
    region: str
    zone: str | None
    """None: the whole region. AWS's zones by id, such as `use1-az4`, which all accounts share."""
    usd_per_hour: float | None
    """On demand, for the whole machine; None if unknown or not sold."""
    spot_usd_per_hour: float | None
    """None if unknown or not sold."""
    interruption: InterruptionBand | None
    observed: date
    source: str
    co2_g_per_hour: float | None
    """Of the machine's GPUs at their power limit; None if the region's grid is unknown."""

    def __post_init__(self) -> None:
        price, spot = _known(self.usd_per_hour), _known(self.spot_usd_per_hour)
        if price is not None and spot is not None and spot > price * _SAME_PRICE:
            spot = None
        object.__setattr__(self, "usd_per_hour", price)
        object.__setattr__(self, "spot_usd_per_hour", spot)

    def price(self, *, spot: bool) -> float | None:
        """USD per hour of the machine; None if unknown or not sold."""
        return self.spot_usd_per_hour if spot else self.usd_per_hour

    @property
    def place(self) -> str:
        """The zone if the offer is of one, else the region."""
        return self.region if self.zone is None else f"{self.region} ({self.zone})"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferTable:
    """All offers that are known, and what there is to say about them."""

    offers: tuple[Offer, ...]
    notes: tuple[str, ...] = ()
    """Age of each cloud's prices, what was not asked, and what failed."""


def load_offers() -> OfferTable:
    """Return the offers of the price list shipped with forge."""
    offers = offline_offers()
    return OfferTable(offers=offers, notes=age_notes(offers, today=date.today()))


@functools.cache
def offline_offers() -> tuple[Offer, ...]:
    """Return the offers of the price list shipped with forge, of all machine types in the catalogue."""
    sources = {name: (date.fromisoformat(day), text) for name, (day, text) in catalog_table()["sources"].items()}
    return tuple(
        build_offer(
            machine_types(price.cloud)[price.instance],
            cloud=price.cloud,
            region=price.region,
            zone=price.zone,
            usd_per_hour=price.usd_per_hour,
            spot_usd_per_hour=price.spot_usd_per_hour,
            interruption=None
            if price.interruption is None
            else InterruptionBand(low=price.interruption[0], high=price.interruption[1]),
            observed=sources[price.source][0],
            source=sources[price.source][1],
        )
        for price in listed_prices()
    )


def build_offer(
    machine: MachineType,
    *,
    cloud: str,
    region: str,
    zone: str | None = None,
    usd_per_hour: float | None,
    spot_usd_per_hour: float | None,
    interruption: InterruptionBand | None = None,
    observed: date,
    source: str,
) -> Offer:
    """Return the offer of a machine type of the catalogue."""
    gpu = find_gpu(machine.gpu) if machine.gpu else None
    return Offer(
        cloud=cloud,
        instance=machine.name,
        gpu=gpu.name if gpu else machine.gpu,
        num_gpus=machine.num_gpus,
        gpu_memory_gib=gpu.memory_gib if gpu else 0,
        num_cpus=machine.num_cpus,
        memory_gib=machine.memory_gib,
        inter_node_gbps=machine.inter_node_gbps,
        region=region,
        zone=zone,
        usd_per_hour=usd_per_hour,
        spot_usd_per_hour=spot_usd_per_hour,
        interruption=interruption,
        observed=observed,
        source=source,
        co2_g_per_hour=_co2_g_per_hour(gpu.name, machine.num_gpus, cloud=cloud, region=region) if gpu else None,
    )


def age_notes(offers: tuple[Offer, ...], *, today: date) -> tuple[str, ...]:
    """Say how old the prices of each cloud are, a line per cloud."""
    days: Mapping[str, set[date]] = defaultdict(set)
    for offer in offers:
        days[offer.cloud].add(offer.observed)
    return tuple(f"{cloud}: prices as of {_span(days[cloud], today=today)}" for cloud in days)


def _span(days: set[date], *, today: date) -> str:
    oldest, newest = min(days), max(days)
    age = (today - oldest).days
    since = f"{oldest}" if oldest == newest else f"{oldest} to {newest}"
    return f"{since}, up to {age} days old" if age > 0 else since


def _known(price: float | None) -> float | None:
    return price if price is not None and 0 < price < math.inf else None


def _co2_g_per_hour(gpu: str, num_gpus: int, *, cloud: str, region: str) -> float | None:
    """Power limit of the GPUs × the data centre's overhead × carbon intensity of the grid, which GCP publishes."""
    grid, watts = catalog_table()["grid_g_per_kwh"].get(region), catalog_table()["gpu_watts"].get(gpu)
    if cloud != "gcp" or grid is None or watts is None:
        return None
    return float(watts) / 1000 * num_gpus * _POWER_USAGE_EFFECTIVENESS * float(grid)
