"""One machine type for rent in one place, in the form that all clouds and price lists share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import date

from forge.plan.gpus import find_gpu
from forge.pricing.catalog import MachineType, catalog_table

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

    def price(self, *, spot: bool, per_gpu: bool = False) -> float | None:
        """USD per hour of the machine, or of one of its GPUs; None if unknown or not sold."""
        price = self.spot_usd_per_hour if spot else self.usd_per_hour
        if not per_gpu:
            return price
        return price / self.num_gpus if price is not None and self.num_gpus else None

    @property
    def place(self) -> str:
        """The zone if the offer is of one, else the region."""
        return self.region if self.zone is None else f"{self.region} ({self.zone})"


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
        co2_g_per_hour=co2_g_per_hour(gpu.name, machine.num_gpus, cloud=cloud, region=region) if gpu else None,
    )


def _known(price: float | None) -> float | None:
    return price if price is not None and 0 < price < math.inf else None


def co2_g_per_hour(gpu: str, num_gpus: int, *, cloud: str, region: str) -> float | None:
    """Power limit of the GPUs × the data centre's overhead × carbon intensity of the grid, which GCP publishes."""
    grid, watts = catalog_table()["grid_g_per_kwh"].get(region), catalog_table()["gpu_watts"].get(gpu)
    if cloud != "gcp" or grid is None or watts is None:
        return None
    return float(watts) / 1000 * num_gpus * _POWER_USAGE_EFFECTIVENESS * float(grid)
