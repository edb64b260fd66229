"""What it costs to keep data in a cloud and to move them out of a zone or a region, from public price lists.

The figures, their days and sources are in `transfer.toml` next to this file. A price not in it is None, never
zero; a price of zero is one that the cloud publishes as free.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.resources import files
from typing import Any, Literal

from forge.pricing.catalog import area_of

INTERNET, OTHER_ZONE = "internet", "zone"
"""Destinations of traffic besides regions; another cloud is reached through the internet."""
_CLOUD_OF_SCHEME = {"s3": "aws", "gs": "gcp", "gcs": "gcp", "az": "azure", "abfs": "azure", "abfss": "azure"}
_NORTH_AMERICA = {"ca": "us"}
"""Clouds have one price for both."""
PREMIUM_DISK_GIB = 200e9 / 2**30
"""Of Azure's P15, the smallest Premium SSD that holds the 200 GB of a cluster file by default."""

StorageKind = Literal["object", "disk"]
"""`object`: S3 Standard, Cloud Storage Standard, Blob Storage Hot LRS; `disk`: the machines' own, EBS gp3,
Persistent Disk balanced or Premium SSD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoragePrice:
    """What a cloud asks for storing a GiB for a month."""

    cloud: str
    region: str
    kind: StorageKind
    usd_per_gib_month: float


StoragePrices = Mapping[tuple[str, str, str], float]
"""USD for a GiB and month by cloud, region and kind."""


def storage_usd_per_gib_month(
    cloud: str, region: str, *, kind: StorageKind = "object", fetched: StoragePrices | None = None
) -> float | None:
    """Return the price of storing a GiB for a month; None if unknown.

    Args:
        region: on GCP also a zone.
        fetched: what the clouds said, which goes first.
    """
    price = (fetched or {}).get((cloud, region_of(region), kind))
    listed: float | None = _table(cloud, kind).get(region_of(region))
    return listed if price is None else price


def egress_usd_per_gib(cloud: str, region: str, *, to: str) -> float | None:
    """Return the price of sending a GiB out of a region, in the first tier of the volume; None if unknown.

    Between machines and object storage of one region all three clouds charge nothing.

    Args:
        region: which sends; on GCP also a zone.
        to: a region of the same cloud, `INTERNET`, or `OTHER_ZONE`: a machine in another zone of the region.
    """
    region, to = region_of(region), region_of(to)
    if to == OTHER_ZONE:
        price = _table(cloud, "zones").get("all")
    elif to == INTERNET:
        price = _by_place(_table(cloud, "internet"), region)
    elif to == region:
        price = 0.0 if _table(cloud, "sources") else None
    else:
        price = _by_place(_table(cloud, "other_regions"), region)
    if isinstance(price, dict):
        price = price.get(_area(to))
    return price


def cloud_of(url: str) -> str | None:
    """Return the cloud whose object storage a URL names; None for a folder or another server."""
    scheme, separator, _ = url.partition("://")
    return _CLOUD_OF_SCHEME.get(scheme) if separator else None


def transfer_source(cloud: str, what: str) -> tuple[date, str] | None:
    """Return the day and source of a cloud's prices of `object`, `disk`, `internet`, `other_regions` or `zones`."""
    found = _table(cloud, "sources").get(what)
    return None if found is None else (date.fromisoformat(found[0]), found[1])


def region_of(place: str) -> str:
    """Return the region of a zone of GCP, such as us-central1-a; other places as they are."""
    head, _, tail = place.rpartition("-")
    return head if len(tail) == 1 and tail.isalpha() and head.count("-") == 1 else place


def _by_place(table: dict[str, Any], region: str) -> Any:
    return table.get(region, table.get(_area(region) or ""))


def _area(region: str) -> str | None:
    area = area_of(region)
    return None if area is None else _NORTH_AMERICA.get(area, area)


def _table(cloud: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = _prices().get(cloud, {}).get(name, {})
    return found


@functools.cache
def _prices() -> dict[str, dict[str, dict[str, Any]]]:
    return tomllib.loads(files("forge.pricing").joinpath("transfer.toml").read_text(encoding="utf-8"))
