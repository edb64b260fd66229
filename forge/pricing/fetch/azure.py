"""Azure's retail prices, which anyone may ask for.

Source: https://learn.microsoft.com/rest/api/cost-management/retail-prices/azure-retail-prices
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import quote, urlsplit

from forge.errors import ClusterError
from forge.pricing.catalog import machine_types
from forge.pricing.fetch.http_json import MALFORMED, JsonClient
from forge.pricing.offer import build_offer
from forge.pricing.snapshot import PriceSnapshot
from forge.pricing.transfer import PREMIUM_DISK_GIB, StorageKind, StoragePrice

_URL = "https://prices.azure.com/api/retail/prices"
_MAX_PAGES = 500
_FULL_PAGES = (100, 1000)
"""Entries of a page that may not be the last: in 2023 Azure left out the links to next pages for a time."""
_NOT_LINUX_VMS = ("Windows", "Low Priority", "Dedicated", "Cloud Services", "CloudServices")
"""Words in the name of a product or meter that is no virtual machine with Linux, on demand or spot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageMeter:
    """A meter of Azure that charges for storage."""

    kind: StorageKind
    products: tuple[str, ...]
    unit: str
    gib: float
    """Of one unit."""


_STORAGE = {
    "Hot LRS Data Stored": StorageMeter(
        kind="object", products=("Blob Storage", "General Block Blob v2"), unit="1 GB/Month", gib=1.0
    ),
    "P15 LRS Disk": StorageMeter(
        kind="disk", products=("Premium SSD Managed Disks",), unit="1/Month", gib=PREMIUM_DISK_GIB
    ),
}
"""By name."""


def fetch_azure(today: date, *, url: str = _URL, client: JsonClient | None = None) -> PriceSnapshot:
    """Return the prices of the catalogue's machine types in all regions.

    Raises: ClusterError as `JsonClient.get`, or if no type is in the answer.
    """
    known, client = machine_types("azure"), client or JsonClient(name="Azure's price list", headers={})
    prices: dict[tuple[str, str, bool], tuple[str, float]] = {}
    names = " or ".join(f"armSkuName eq '{name}'" for name in known)
    skipped = 0
    for item in _items(url, f"serviceName eq 'Virtual Machines' and ({names})", client=client):
        try:
            key, price = _price(item)
        except MALFORMED:
            skipped += 1
            continue
        if key is not None and key[0] in known and price[1] > 0:
            prices[key] = max(price, prices.get(key, price))  # the price that took effect last
    places = sorted({(name, region) for name, region, _ in prices})
    if not places:
        raise ClusterError("Azure's price list has none of the machine types that forge knows")
    notes = [f"{skipped} entries without a name, region or price were skipped"] if skipped else []
    storage: tuple[StoragePrice, ...] = ()
    try:
        storage = _storage_prices(url, client)
    except ClusterError as error:
        notes.append(f"no prices of storage: {error}")
    return PriceSnapshot(
        source="azure",
        observed=today,
        storage=storage,
        offers=tuple(
            build_offer(
                known[name],
                cloud="azure",
                region=region,
                usd_per_hour=prices.get((name, region, False), ("", None))[1],
                spot_usd_per_hour=prices.get((name, region, True), ("", None))[1],
                observed=today,
                source="Azure retail prices",
            )
            for name, region in places
        ),
        notes=tuple(notes),
    )


def _storage_prices(url: str, client: JsonClient) -> tuple[StoragePrice, ...]:
    """Return the prices of storage by kind and region; of two products with one meter the dearer.

    Raises: ClusterError as `JsonClient.get`.
    """
    meters = " or ".join(f"meterName eq '{meter}'" for meter in _STORAGE)
    found: dict[tuple[StorageKind, str], float] = {}
    for item in _items(url, f"serviceName eq 'Storage' and ({meters})", client=client):
        with contextlib.suppress(*MALFORMED):  # of another form
            meter = _STORAGE.get(str(item["meterName"]))
            if meter is None or item["productName"] not in meter.products or item["currencyCode"] != "USD":
                continue
            price, region = float(item["retailPrice"]) / meter.gib, item["armRegionName"]
            if item["unitOfMeasure"] != meter.unit or float(item["tierMinimumUnits"]) or not region:
                continue
            if isinstance(region, str) and 0 < price < math.inf:
                found[meter.kind, region] = max(price, found.get((meter.kind, region), 0.0))
    prices = (
        StoragePrice(cloud="azure", region=region, kind=kind, usd_per_gib_month=price)
        for (kind, region), price in sorted(found.items())
    )
    return tuple(prices)


def _items(url: str, wanted: str, *, client: JsonClient) -> Iterator[Any]:
    """Yield the entries of all pages. Raises: ClusterError if a page is not of the documented form.

    Args:
        wanted: a filter in the form of the API.
    """
    wanted = f"priceType eq 'Consumption' and {wanted}"
    first = f"{url}?currencyCode=USD&$filter={quote(wanted)}"
    page: Any = first
    num_items = 0
    for _ in range(_MAX_PAGES):
        answer = client.get(page)
        if not isinstance(answer, dict) or not isinstance(answer.get("Items"), list):
            raise ClusterError("Azure's price list has changed its form: no Items")
        yield from answer["Items"]
        num_items += len(answer["Items"])
        page = answer.get("NextPageLink")
        if not page and len(answer["Items"]) in _FULL_PAGES:
            page = f"{first}&$skip={num_items}"
        if not page:
            return
        if not isinstance(page, str) or urlsplit(page)[:2] != urlsplit(url)[:2]:
            raise ClusterError("Azure's price list leads to another server")
    raise ClusterError(f"Azure's price list has more than {_MAX_PAGES} pages")


def _price(item: Mapping[str, Any]) -> tuple[tuple[str, str, bool] | None, tuple[str, float]]:
    """Return (machine type, region, whether it is spot) and (day, price); no key if it is another product.

    Raises: one of MALFORMED if something is missing.
    """
    product, meter = str(item["productName"]), str(item["meterName"])
    price = str(item.get("effectiveStartDate") or ""), float(item["retailPrice"])
    is_other = any(word in product or word in meter for word in _NOT_LINUX_VMS)
    if is_other or item["unitOfMeasure"] != "1 Hour" or item["currencyCode"] != "USD":
        return None, price
    name, region = item["armSkuName"], item["armRegionName"]
    if not (isinstance(name, str) and isinstance(region, str) and name and region):
        raise ValueError("no name or region")
    return (name, region, "Spot" in meter), price
