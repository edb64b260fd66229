"""AWS's on-demand prices and current spot prices by zone, which need credentials of any account.

Rights: pricing:GetProducts, ec2:DescribeSpotPriceHistory; ec2:DescribeAvailabilityZones where AWS's answers have no
zone ids.
Sources: the actions GetProducts of AWS Price List Query and DescribeSpotPriceHistory of EC2.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

from forge.aws_client import ANY_REGION, aws_errors, client
from forge.errors import ClusterError
from forge.pricing.catalog import machine_types
from forge.pricing.fetch.http_json import MALFORMED
from forge.pricing.offer import Offer, build_offer
from forge.pricing.snapshot import PriceSnapshot
from forge.pricing.transfer import StorageKind, StoragePrice

_AT_ONCE = 16
_LINUX = {
    "operatingSystem": "Linux",
    "preInstalledSw": "NA",
    "tenancy": "Shared",
    "capacitystatus": "Used",
    "marketoption": "OnDemand",
}
"""Attributes of a product that is a plain machine with Linux."""
_STORAGE: Mapping[StorageKind, tuple[str, Mapping[str, str]]] = {
    "disk": ("AmazonEC2", {"productFamily": "Storage", "volumeApiName": "gp3"}),
    "object": (
        "AmazonS3",
        {"productFamily": "Storage", "storageClass": "General Purpose", "volumeType": "Standard"},
    ),
}
"""Service and attributes of the products that store."""


def fetch_aws(today: date) -> PriceSnapshot:
    """Return the prices of the catalogue's machine types in all regions.

    The spot prices of a region that refuses, such as one that the account has not enabled, are unknown.

    Raises: ClusterError if boto3 or credentials are missing, or AWS does not answer.
    """
    names = tuple(machine_types("aws"))
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        stored = pool.map(_storage_prices, _STORAGE)
        found = dict(zip(names, pool.map(_on_demand_prices, names), strict=True))
        regions: dict[str, list[str]] = {}
        for name, prices in found.items():
            for region in prices:
                regions.setdefault(region, []).append(name)
        spot = dict(zip(regions, pool.map(_spot_by_zone_id, regions, regions.values()), strict=True))
    if not regions:
        raise ClusterError("AWS's price list has none of the machine types that forge knows")
    offers: list[Offer] = []
    for name, prices in found.items():
        for region, price in prices.items():
            zones = spot[region]
            offers += _offers(name, region, price, zones=zones if isinstance(zones, dict) else {}, today=today)
    refused = [
        f"no spot prices of {region}: {answer}" for region, answer in spot.items() if isinstance(answer, str)
    ]
    storage: list[StoragePrice] = []
    for answer in stored:
        if isinstance(answer, str):
            refused.append(f"no prices of storage: {answer}")
        else:
            storage += answer
    return PriceSnapshot(
        source="aws", observed=today, offers=tuple(offers), storage=tuple(storage), notes=tuple(refused)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ZonePrice:
    """What AWS says about the spot price of an instance type in a zone."""

    zone_id: str | None
    """None in answers of earlier forms."""
    usd_per_hour: float


def zone_spot_prices(region: str, *, names: Sequence[str]) -> dict[tuple[str, str], ZonePrice]:
    """Return the current spot prices of Linux, by instance type and name of the zone.

    Raises: ClusterError if AWS cannot be asked.
    """
    prices: dict[tuple[str, str], ZonePrice] = {}
    with aws_errors(region):
        pages = (
            client("ec2", region)
            .get_paginator("describe_spot_price_history")
            .paginate(
                InstanceTypes=list(names),
                ProductDescriptions=["Linux/UNIX"],
                StartTime=datetime.now(UTC),  # only the current price of each zone
            )
        )
        for page in pages:
            for entry in page["SpotPriceHistory"]:
                with contextlib.suppress(*MALFORMED):  # without a price or zone
                    prices[entry["InstanceType"], entry["AvailabilityZone"]] = ZonePrice(
                        zone_id=entry.get("AvailabilityZoneId"), usd_per_hour=float(entry["SpotPrice"])
                    )
    return prices


def _on_demand_prices(name: str) -> dict[str, float]:
    """Return the price of a machine type by region. Raises: ClusterError if AWS cannot be asked."""
    return _prices("AmazonEC2", _LINUX | {"instanceType": name}, unit="Hrs")


def _storage_prices(kind: StorageKind) -> list[StoragePrice] | str:
    """Return the prices of the first tier by region, or why AWS does not answer."""
    service, attributes = _STORAGE[kind]
    try:
        prices = _prices(service, attributes, unit="GB-Mo")
    except ClusterError as error:
        return str(error)
    return [
        StoragePrice(cloud="aws", region=region, kind=kind, usd_per_gib_month=price)
        for region, price in sorted(prices.items())
    ]


def _prices(service: str, attributes: Mapping[str, str], *, unit: str) -> dict[str, float]:
    """Return the price of a product by region. Raises: ClusterError if AWS cannot be asked."""
    wanted = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in attributes.items()]
    prices: dict[str, float] = {}
    with aws_errors(ANY_REGION):
        pages = client("pricing", ANY_REGION).get_paginator("get_products")
        for page in pages.paginate(ServiceCode=service, Filters=wanted):
            for text in page["PriceList"]:
                with contextlib.suppress(*MALFORMED):
                    region, price = _price(json.loads(text), unit=unit)
                    prices[region] = price
    return prices


def _price(product: Any, *, unit: str) -> tuple[str, float]:
    """Return region and USD of a product in its first tier. Raises: one of MALFORMED if it does not say them."""
    region = product["product"]["attributes"]["regionCode"]
    if not isinstance(region, str):
        raise ValueError("no region")
    for term in product["terms"]["OnDemand"].values():
        for dimension in term["priceDimensions"].values():
            is_first = dimension["unit"] == unit and dimension.get("beginRange", "0") == "0"
            if is_first and 0 < (price := float(dimension["pricePerUnit"]["USD"])) < math.inf:
                return region, price
    raise ValueError(f"no price per {unit}")


def _spot_by_zone_id(region: str, names: Sequence[str]) -> dict[tuple[str, str], float] | str:
    """Return the spot prices by machine type and zone id, or why the region does not answer."""
    try:
        prices = zone_spot_prices(region, names=names)
        ids = {} if all(one.zone_id for one in prices.values()) else _zone_ids(region)
    except ClusterError as error:
        return str(error)
    # The zone named us-east-1a is another one in another account; its id is the same for all.
    by_id = {(name, one.zone_id or ids.get(zone)): one.usd_per_hour for (name, zone), one in prices.items()}
    return {(name, zone_id): price for (name, zone_id), price in by_id.items() if zone_id}


def _zone_ids(region: str) -> dict[str, str]:
    """Return the ids of a region's zones by their names in this account."""
    with aws_errors(region):
        found = client("ec2", region).describe_availability_zones(AllAvailabilityZones=True)["AvailabilityZones"]
    return {zone["ZoneName"]: zone["ZoneId"] for zone in found if "ZoneName" in zone and "ZoneId" in zone}


def _offers(
    name: str, region: str, price: float, *, zones: Mapping[tuple[str, str], float], today: date
) -> list[Offer]:
    """Return the offer of the region, and one of each zone that sells spot capacity."""

    def offer(zone: str | None, spot: float | None) -> Offer:
        return build_offer(
            machine_types("aws")[name],
            cloud="aws",
            region=region,
            zone=zone,
            usd_per_hour=price,
            spot_usd_per_hour=spot,
            observed=today,
            source="AWS price list; spot price of the zone" if zone else "AWS price list",
        )

    in_zones = [offer(zone, spot) for (machine, zone), spot in sorted(zones.items()) if machine == name]
    return [offer(None, None), *(one for one in in_zones if one.spot_usd_per_hour is not None)]
