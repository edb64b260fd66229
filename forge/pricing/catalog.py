"""Catalogue of the machine types that clouds rent: GPUs, size and list price.

The data and their sources are in `catalog.toml` next to this file, the prices in `prices.csv`. The catalogue finds
machine types by GPU, gives Ray their size where Ray's cloud provider does not know it, and the list price of the
cloud's home region where no region is chosen yet; `forge.pricing.offers` has the prices of all regions.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

from forge.config.cluster import CloudSpec
from forge.errors import ClusterError, JobFileError
from forge.pricing.price_list import ListedPrice, listed_prices

_HEADS = {"aws": "m6i.xlarge", "gcp": "e2-standard-4", "azure": "Standard_D4s_v5"}
"""Four CPUs and 16 GiB are enough for Ray's control store, the supervisor and the recorder."""

_SMALLEST_WORKER_CPUS = 8
"""For workers without GPU, if the cluster file lists no `instance_types`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineType:
    """One machine type of a cloud."""

    name: str
    gpu: str
    """Its name in a cluster file; empty for a machine without GPU."""
    num_gpus: int
    num_cpus: int
    memory_gib: float
    inter_node_gbps: float | None
    """Network to other machines in Gbit/s; None if unknown."""
    usd_per_hour: float | None
    """On-demand price in the cloud's home region, or the highest of all if it has none; None if unknown."""
    spot_usd_per_hour: float | None
    """Of the region's most expensive zone."""


@functools.cache
def machine_types(cloud: str) -> Mapping[str, MachineType]:
    """Return all machine types of a cloud, by name."""
    prices: dict[str, list[ListedPrice]] = {}
    for price in listed_prices():
        if price.cloud == cloud:
            prices.setdefault(price.instance, []).append(price)
    home = catalog_table()["home"][cloud]
    return {
        name: _machine_type(name, values, prices.get(name, []), home=home)
        for name, values in catalog_table()[cloud].items()
    }


def workers_of(spec: CloudSpec) -> tuple[str, ...]:
    """Return the names of the machine types that a worker may have.

    Raises: JobFileError if the GPU is unknown and the file lists no types, or if a listed type has another GPU.
    """
    known = machine_types(spec.provider)
    wanted = "" if spec.gpu == "none" else spec.gpu
    for name in spec.instance_types:
        if name in known and known[name].gpu != wanted:
            has = known[name].gpu or "no GPU"
            raise JobFileError(f"has {has}; the file asks for {spec.gpu}", key="instance_types", value=name)
    if spec.instance_types:
        return spec.instance_types
    found = tuple(
        name
        for name, machine in known.items()
        if machine.gpu == wanted and (wanted or machine.num_cpus >= _SMALLEST_WORKER_CPUS)
    )
    if not found:
        gpus = sorted({machine.gpu for machine in known.values() if machine.gpu})
        near = difflib.get_close_matches(spec.gpu.upper(), gpus, n=1)
        others = [cloud for cloud in _HEADS if any(one.gpu == wanted for one in machine_types(cloud).values())]
        sold = f" ({', '.join(others)} sell{'s' * (len(others) == 1)} it)" if others else ""
        raise JobFileError(
            f"is not in forge's catalogue for {spec.provider}, which has {', '.join(gpus)}{sold}; "
            "for other machines list instance_types",
            key="gpu",
            value=spec.gpu,
            nearest=near[0] if near else None,
        )
    return found


def head_of(spec: CloudSpec) -> str:
    """Return the machine type of the head."""
    return spec.head or _HEADS[spec.provider]


def head_price(cloud: str) -> float | None:
    """Return the price of the default head in the cloud's home region, in USD per hour; None if unknown.

    On other clouds than forge rents from, the first machine is the head, so that it costs nothing more.
    """
    return machine_types(cloud)[_HEADS[cloud]].usd_per_hour if cloud in _HEADS else 0.0


def size_of(name: str, *, cloud: str) -> MachineType:
    """Return a machine type, for the clouds whose Ray provider cannot look up its size.

    Raises: ClusterError if the catalogue does not have it.
    """
    known = machine_types(cloud)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        similar = f"; similar names are {', '.join(near)}" if near else ""
        raise ClusterError(f"forge's catalogue does not have {cloud}'s machine type '{name}'{similar}")
    return known[name]


@functools.cache
def area_of(region: str) -> str | None:
    """Return the part of the world in which a region is, a key of the catalogue's `areas`; None if unknown."""
    areas: dict[str, list[str]] = catalog_table()["areas"]
    # The largest parts of the world have patterns that also fit regions of smaller ones.
    names = sorted(areas, key=lambda area: area in ("asia", "us"))
    return next((area for area in names if any(fnmatchcase(region, pattern) for pattern in areas[area])), None)


def _machine_type(name: str, values: Sequence[Any], prices: Sequence[ListedPrice], *, home: str) -> MachineType:
    """Args:
    prices: of all regions; where the home region does not sell it, the most expensive one stands for it.
    """
    gpu, num_gpus, num_cpus, memory_gib, *network = values
    listed = [price for price in prices if price.region == home] or prices
    return MachineType(
        name=name,
        gpu=gpu,
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        memory_gib=memory_gib,
        inter_node_gbps=network[0] if network else None,
        usd_per_hour=max((price.usd_per_hour for price in listed if price.usd_per_hour), default=None),
        spot_usd_per_hour=max(
            (price.spot_usd_per_hour for price in listed if price.spot_usd_per_hour), default=None
        ),
    )


@functools.cache
def catalog_table() -> dict[str, Any]:
    """Return `catalog.toml` as it is."""
    text = files("forge.pricing").joinpath("catalog.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
