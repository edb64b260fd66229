"""GCP's Cloud Billing Catalog: the form of its answers in 2026, in pages, with absent fields."""

from __future__ import annotations

from datetime import date
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from forge.errors import ClusterError
from forge.pricing.catalog import machine_types
from forge.pricing.fetch.gcp import _FAMILIES, API_KEY, fetch_gcp
from tests.support.price_server import Answer, as_json, serve_prices

TODAY = date(2026, 11, 28)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "planted-key-of-a-project")


def sku(description: str, price: float | None, *, spot: bool = False, **changes: Any) -> dict[str, Any]:
    """One entry with all keys that GCP sends; a price of None has neither units nor nanos."""
    units, nanos = divmod(round((price or 0) * 1e9), 10**9)
    rate = {"currencyCode": "USD", "units": str(units), "nanos": nanos} if price is not None else {}
    return {
        "name": "services/6F81-5844-456A/skus/0009-6F35-3126",
        "skuId": "0009-6F35-3126",
        "description": description,
        "category": {
            "serviceDisplayName": "Compute Engine",
            "resourceFamily": "Compute",
            "resourceGroup": "CPU",
            "usageType": "Preemptible" if spot else "OnDemand",
        },
        "serviceRegions": ["us-central1"],
        "pricingInfo": [
            {
                "summary": "",
                "pricingExpression": {
                    "usageUnit": "h",
                    "displayQuantity": 1,
                    "tieredRates": [{"startUsageAmount": 0, "unitPrice": rate}],
                    "usageUnitDescription": "hour",
                    "baseUnit": "s",
                    "baseUnitDescription": "second",
                    "baseUnitConversionFactor": 3600,
                },
                "currencyConversionRate": 1,
                "effectiveTime": "2026-11-27T12:00:00Z",
            }
        ],
        "serviceProviderName": "Google",
        "geoTaxonomy": {"type": "REGIONAL", "regions": ["us-central1"]},
    } | changes


def a3(*, spot: bool) -> list[dict[str, Any]]:
    before, attached = ("Spot Preemptible ", " attached to Spot Preemptible VMs") if spot else ("", "")
    return [
        sku(f"{before}A3 Instance Core running in Americas", 0.01 if spot else 0.03, spot=spot),
        sku(f"{before}A3 Instance Ram running in Americas", 0.001 if spot else 0.0026, spot=spot),
        sku(f"Nvidia H100 80GB GPU{attached} running in Americas", 2.25 if spot else 9.79655, spot=spot),
        sku(f"SSD backed Local Storage{attached}", 0.032 if spot else 0.08, spot=spot),
    ]


def skus(*entries: Any, token: str = "") -> Answer:
    return as_json({"skus": list(entries), "nextPageToken": token})


def test_fetch__two_pages__composes_machines_from_their_parts() -> None:
    def reply(path: str, *_: Any) -> Answer:
        if parse_qs(urlsplit(path).query).get("pageToken") == ["AB/c="]:
            return skus(*a3(spot=True))
        other = [
            sku("Commitment v1: A3 Cpu in Americas for 1 Year", 0.01),
            sku("A3 Custom Instance Core running in Americas", 0.5),
            sku("Reserved Nvidia H100 80GB GPU in Americas", 0.5),
            sku("DWS Defined Duration A3 Instance Core running in Americas", 0.5),
        ]
        return skus(*other, *a3(spot=False), token="AB/c=")

    with serve_prices(reply) as server:
        found = fetch_gcp(TODAY, url=f"{server.url}/v1/services/6F81-5844-456A/skus")
    assert [offer.instance for offer in found.offers] == ["a3-highgpu-8g"]
    offer = found.offers[0]
    ssd_gib = 16 * 375
    assert offer.usd_per_hour == pytest.approx(208 * 0.03 + 1872 * 0.0026 + 8 * 9.79655 + ssd_gib * 0.08 / 730)
    assert offer.spot_usd_per_hour == pytest.approx(208 * 0.01 + 1872 * 0.001 + 8 * 2.25 + ssd_gib * 0.032 / 730)
    assert (offer.region, offer.gpu, offer.observed) == ("us-central1", "H100-80GB", TODAY)
    assert offer.co2_g_per_hour is not None
    assert server.headers[0]["X-Goog-Api-Key"] == "planted-key-of-a-project"
    assert all("planted" not in path for path in server.asked), "an address is written into logs; a header is not"


def test_fetch__throttled__asks_the_same_page_again() -> None:
    def reply(path: str, *_: Any) -> Answer:
        if server.times[path] == 1:
            return as_json({"error": {"code": 429, "status": "RESOURCE_EXHAUSTED"}}, status=429, Retry_After="0")
        if path.endswith("pageToken=next"):
            return skus(*a3(spot=True))
        return skus(*a3(spot=False), token="next")

    with serve_prices(reply) as server:
        (offer,) = fetch_gcp(TODAY, url=server.url).offers
    assert len(server.asked) == 4
    assert offer.usd_per_hour is not None and offer.spot_usd_per_hour is not None


def test_fetch__a_part_without_price__machine_is_left_out() -> None:
    entries = a3(spot=False)
    g2 = [sku("G2 Instance Core running in Americas", 0.025), sku("G2 Instance Ram running in Americas", 0.003)]
    l4 = [sku("Nvidia L4 GPU running in Americas", 0.56, serviceRegions=["us-central1", "us-east4"])]
    with serve_prices(
        lambda *_: skus(*entries[:2], sku("Nvidia H100 80GB GPU", 0.0), *entries[3:], *g2, *l4)
    ) as server:
        found = fetch_gcp(TODAY, url=server.url)
    assert {(offer.instance, offer.region) for offer in found.offers} == {
        (f"g2-standard-{cpus}", "us-central1") for cpus in (4, 8, 48, 96)
    }
    assert all(offer.spot_usd_per_hour is None for offer in found.offers)


def test_fetch__absent_fields__are_counted() -> None:
    broken: list[Any] = [{}, None, sku("A3 Instance Core", 1.0, pricingInfo=[]), sku("N2 Instance Core", None)]
    del broken[3]["serviceRegions"]
    n2 = [sku("N2 Instance Core running in Americas", 0.03), sku("N2 Instance Ram running in Americas", 0.004)]
    with serve_prices(lambda *_: skus(*broken, *n2)) as server:
        found = fetch_gcp(TODAY, url=server.url)
    assert [(offer.instance, offer.usd_per_hour) for offer in found.offers] == [
        ("n2-standard-8", pytest.approx(8 * 0.03 + 32 * 0.004))
    ]
    assert found.notes == ("3 entries without a price or region were skipped",)


def test_families__every_type_of_the_catalogue__is_composed() -> None:
    assert {name.rpartition("-")[0] for name in machine_types("gcp")} == _FAMILIES.keys()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (as_json({"error": {"code": 403, "status": "PERMISSION_DENIED"}}, status=403), "answered 403"),
        (as_json({"skus": {}}), "changed its form"),
        (skus(), "none of the machine types"),
        (skus(token="again"), "more than 200 pages"),
    ],
)
def test_fetch__bad_answer__says_what_without_the_key(answer: Answer, message: str) -> None:
    with serve_prices(lambda *_: answer) as server, pytest.raises(ClusterError, match=message) as caught:
        fetch_gcp(TODAY, url=server.url)
    assert "planted" not in str(caught.value)


def test_fetch__no_key__says_which_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY)
    with pytest.raises(ClusterError, match=f"set {API_KEY}"):
        fetch_gcp(TODAY)


def test_fetch__disks__of_one_zone_by_region() -> None:
    balanced = [
        sku("Balanced PD Capacity", 0.1, serviceRegions=["us-central1", "us-east1"]),
        sku("Balanced PD Capacity in Japan", 0.13, serviceRegions=["asia-northeast1"]),
        sku("Regional Balanced PD Capacity", 0.2),
        sku("Balanced PD Capacity", None, serviceRegions=["europe-west1"]),
    ]
    with serve_prices(lambda *_: skus(*a3(spot=False), *balanced)) as server:
        found = fetch_gcp(TODAY, url=f"{server.url}/v1/services/6F81-5844-456A/skus")
    prices = {one.region: one.usd_per_gib_month for one in found.storage}
    assert prices == pytest.approx({"us-central1": 0.1, "us-east1": 0.1, "asia-northeast1": 0.13})
    assert {one.kind for one in found.storage} == {"disk"}
