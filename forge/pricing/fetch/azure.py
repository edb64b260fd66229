"""Azure's retail prices, which anyone may ask for.

Source: https://learn.microsoft.com/rest/api/cost-management/retail-prices/azure-retail-prices
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any
from urllib.parse import quote, urlsplit

from forge.errors import ClusterError
from forge.pricing.catalog import machine_types
from forge.pricing.fetch.http_json import MALFORMED, JsonClient
from forge.pricing.offer import build_offer
from forge.pricing.snapshot import PriceSnapshot

_URL = "https://prices.azure.com/api/retail/prices"
_MAX_PAGES = 500
_FULL_PAGES = (100, 1000)
"""Entries of a page that may not be the last: in 2023 Azure left out the links to next pages for a time."""
_NOT_LINUX_VMS = ("Windows", "Low Priority", "Dedicated", "Cloud Services", "CloudServices")
"""Words in the name of a product or meter that is no virtual machine with Linux, on demand or spot."""


def fetch_azure(today: date, *, url: str = _URL, client: JsonClient | None = None) -> PriceSnapshot:
    """Return the prices of the catalogue's machine types in all regions.

    Raises: ClusterError as `JsonClient.get`, or if no type is in the answer.
    """
    known = machine_types("azure")
    prices: dict[tuple[str, str, bool], tuple[str, float]] = {}
    skipped = 0
    for item in _items(url, client or JsonClient(name="Azure's price list", headers={})):
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
    return PriceSnapshot(
        source="azure",
        observed=today,
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
        notes=(f"{skipped} entries without a name, region or price were skipped",) if skipped else (),
    )


def _items(url: str, client: JsonClient) -> Iterator[Any]:
    """Yield the entries of all pages. Raises: ClusterError if a page is not of the documented form."""
    names = " or ".join(f"armSkuName eq '{name}'" for name in machine_types("azure"))
    wanted = f"serviceName eq 'Virtual Machines' and priceType eq 'Consumption' and ({names})"
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
