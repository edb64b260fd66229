"""Azure's retail prices: the form of its answers in 2026, in pages, throttled, with absent fields."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from forge.errors import ClusterError
from forge.pricing.fetch.azure import fetch_azure
from forge.pricing.fetch.http_json import JsonClient
from tests.support.price_server import Answer, PriceServer, as_json, serve_prices

TODAY = date(2026, 11, 28)
H100 = "Standard_ND96isr_H100_v5"


def item(**changes: Any) -> dict[str, Any]:
    """One entry with all keys that Azure sends."""
    return {
        "currencyCode": "USD",
        "tierMinimumUnits": 0.0,
        "retailPrice": 98.32,
        "unitPrice": 98.32,
        "armRegionName": "eastus",
        "location": "US East",
        "effectiveStartDate": "2023-11-01T00:00:00Z",
        "meterId": "8b2a6bd6-0a5c-5a2b-8b8c-0c1f8d2f3f3e",
        "meterName": "ND96isrH100v5",
        "productId": "DZH318Z0BPPK",
        "skuId": "DZH318Z0BPPK/0046",
        "productName": "Virtual Machines NDsr H100 v5 Series",
        "skuName": "Standard_ND96isr_H100_v5",
        "serviceName": "Virtual Machines",
        "serviceId": "DZH313Z7MMC8",
        "serviceFamily": "Compute",
        "unitOfMeasure": "1 Hour",
        "type": "Consumption",
        "isPrimaryMeterRegion": True,
        "armSkuName": H100,
    } | changes


def page(items: list[Any], *, next_page: str | None = None) -> Answer:
    return as_json(
        {
            "BillingCurrency": "USD",
            "CustomerEntityId": "Default",
            "CustomerEntityType": "Retail",
            "Items": items,
            "NextPageLink": next_page,
            "Count": len(items),
        }
    )


def num_asked(server: PriceServer) -> int:
    """Return how many requests were about machines."""
    return sum("Virtual Machines" in unquote(path) for path in server.asked)


def fetch(server: PriceServer, *, sleep: Callable[[float], None] = lambda _: None) -> Any:
    return fetch_azure(
        TODAY, url=server.url + "/api/retail/prices", client=JsonClient(name="Azure", headers={}, sleep=sleep)
    )


def test_fetch__two_pages__prices_of_linux_on_demand_and_spot() -> None:
    spot = {"meterName": "ND96isrH100v5 Spot", "skuName": "Standard_ND96isr_H100_v5 Spot"}
    first = [
        item(),
        item(productName="Virtual Machines NDsr H100 v5 Series Windows", retailPrice=102.736),
        item(retailPrice=18.169536, **spot),
        item(armRegionName="westus3", retailPrice=98.32),
        item(armRegionName="westus3", retailPrice=98.32, **spot),
        item(armRegionName="uksouth", meterName="ND96isrH100v5 Low Priority", retailPrice=9.0),
    ]
    second = [
        item(armRegionName="swedencentral", retailPrice=105.0),
        item(armSkuName="Standard_X9", retailPrice=1.0),
    ]

    def reply(path: str, _: dict[str, str], __: bytes) -> Answer:
        if "Storage" in path:
            return page([])
        if "skip" in path:
            return page(second)
        return page(first, next_page=f"{server.url}/api/retail/prices?currencyCode=USD&%24skip=1000")

    with serve_prices(reply) as server:
        found = fetch(server)
    prices = {offer.region: (offer.usd_per_hour, offer.spot_usd_per_hour) for offer in found.offers}
    assert prices == {"eastus": (98.32, 18.169536), "westus3": (98.32, None), "swedencentral": (105.0, None)}
    assert {(offer.gpu, offer.num_gpus, offer.observed) for offer in found.offers} == {("H100-80GB", 8, TODAY)}
    wanted = unquote(parse_qs(urlsplit(server.asked[0]).query)["$filter"][0])
    assert "priceType eq 'Consumption'" in wanted and f"armSkuName eq '{H100}'" in wanted
    assert len(server.asked) == 3  # two pages, and storage


def test_fetch__absent_fields_and_zero__are_unknown_and_counted() -> None:
    broken: list[Any] = [item(armRegionName=""), item(retailPrice=None), {"armSkuName": H100}, None]
    free = item(armRegionName="westeurope", retailPrice=0.0)
    no_day = item(armRegionName="eastus2")
    del no_day["effectiveStartDate"]
    with serve_prices(lambda *_: page([*broken, free, no_day])) as server:
        found = fetch(server)
    assert [(offer.region, offer.usd_per_hour) for offer in found.offers] == [("eastus2", 98.32)]
    assert found.notes == ("4 entries without a name, region or price were skipped",)


def test_fetch__full_page_without_a_link__asks_for_the_next_one() -> None:
    def reply(path: str, *_: Any) -> Answer:
        return page([item(armRegionName="uksouth")] if "$skip=100" in unquote(path) else [item()] * 100)

    with serve_prices(reply) as server:
        assert {offer.region for offer in fetch(server).offers} == {"eastus", "uksouth"}
        assert num_asked(server) == 2


def test_fetch__two_prices_of_a_place__takes_the_one_that_took_effect_last() -> None:
    newer = item(retailPrice=90.0, effectiveStartDate="2026-03-01T00:00:00Z")
    with serve_prices(lambda *_: page([newer, item()])) as server:
        assert [offer.usd_per_hour for offer in fetch(server).offers] == [90.0]


def test_fetch__throttled__waits_as_told_and_repeats() -> None:
    waited: list[float] = []

    def reply(path: str, *_: Any) -> Answer:
        if server.times[path] == 1:
            return as_json({"Error": {"Code": "TooManyRequests"}}, status=429, Retry_After="7")
        return as_json({}, status=503) if server.times[path] == 2 else page([item()])

    with serve_prices(reply) as server:
        assert len(fetch(server, sleep=waited.append).offers) == 1
    assert waited == 2 * [7.0, 2.0]  # for the machines, and for storage


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (as_json({}, status=429), "answered 429 5 times"),
        (as_json({}, status=403), "answered 403"),
        (as_json([1, 2]), "changed its form"),
        ((200, {}, b"<html>"), "did not answer JSON"),
        (page([]), "none of the machine types"),
        (page([item()], next_page="https://elsewhere.example/api"), "leads to another server"),
    ],
)
def test_fetch__bad_answer__says_what(answer: Answer, message: str) -> None:
    with serve_prices(lambda *_: answer) as server, pytest.raises(ClusterError, match=message):
        fetch(server)


def test_fetch__endless_pages__stops() -> None:
    def reply(*_: Any) -> Answer:
        return page([], next_page=f"{server.url}/api/retail/prices")

    with serve_prices(reply) as server, pytest.raises(ClusterError, match="more than 500 pages"):
        fetch(server)


def test_fetch__no_network__says_so() -> None:
    with serve_prices(lambda *_: page([])) as server:
        pass
    with pytest.raises(ClusterError, match=r"cannot be reached: .*refused"):
        fetch(server)


def test_client__huge_answer__is_not_read() -> None:
    client = JsonClient(name="Azure", headers={}, max_bytes=1000)
    with serve_prices(lambda *_: (200, {}, b" " * 2000)) as server, pytest.raises(ClusterError, match="more than"):
        client.get(server.url)


def test_fetch__storage__first_tier_of_blobs_and_the_disk_of_a_machine() -> None:
    hot = {
        "meterName": "Hot LRS Data Stored",
        "productName": "General Block Blob v2",
        "skuName": "Hot LRS",
        "serviceName": "Storage",
        "serviceFamily": "Storage",
        "unitOfMeasure": "1 GB/Month",
        "armSkuName": "",
    }
    disk = hot | {
        "meterName": "P15 LRS Disk",
        "productName": "Premium SSD Managed Disks",
        "skuName": "P15 LRS",
        "unitOfMeasure": "1/Month",
    }
    meters = [
        item(**hot, retailPrice=0.0208),
        item(**hot, retailPrice=0.02, tierMinimumUnits=51200.0),
        item(**hot | {"productName": "Blob Storage"}, retailPrice=0.0184),
        item(**hot | {"productName": "Files v2"}, retailPrice=0.0287),
        item(**hot, retailPrice=0.0, armRegionName="freeland"),
        item(**hot, retailPrice=0.019, armRegionName=""),
        {name: value for name, value in item(**hot, armRegionName="broken").items() if name != "retailPrice"},
        item(**disk, retailPrice=38.01),
        item(**disk | {"meterName": "P15 LRS Disk Mount"}, retailPrice=2.19),
        item(**disk, retailPrice=45.6, armRegionName="westeurope"),
        item(**disk, retailPrice=45.6, armRegionName="chinanorth", currencyCode="CNY"),
    ]

    def reply(path: str, _: dict[str, str], __: bytes) -> Answer:
        wanted = parse_qs(urlsplit(path).query)["$filter"][0]
        return page(meters if "serviceName eq 'Storage'" in wanted else [item()])

    with serve_prices(reply) as server:
        found = fetch(server)
    prices = {(one.region, one.kind): one.usd_per_gib_month for one in found.storage}
    assert prices == {
        ("eastus", "object"): 0.0208,
        ("eastus", "disk"): pytest.approx(0.2041, rel=1e-3),  # what forge ships
        ("westeurope", "disk"): pytest.approx(45.6 / 186.26, rel=1e-3),
    }


def test_fetch__storage_does_not_answer__keeps_the_prices_of_machines() -> None:
    def reply(path: str, _: dict[str, str], __: bytes) -> Answer:
        return as_json({}, status=404) if "Storage" in unquote(path) else page([item()])

    with serve_prices(reply) as server:
        found = fetch(server)
    assert len(found.offers) == 1 and found.storage == ()
    assert [note for note in found.notes if note.startswith("no prices of storage: Azure")] == list(found.notes)
