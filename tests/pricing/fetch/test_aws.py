"""AWS's prices: its two services on loopback, asked by boto3, in pages, throttled, with absent fields."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from forge.errors import ClusterError
from forge.pricing.fetch.aws import fetch_aws
from tests.support.price_server import Answer, as_json, serve_prices

pytest.importorskip("boto3")

TODAY = date(2026, 11, 28)


@dataclass
class FakeAws:
    """What AWS sells: on-demand prices by type and region, spot prices by region, and its zones."""

    on_demand: dict[str, list[Any]] = field(default_factory=dict)
    spot: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    """By region: type, name of the zone, price."""
    zones: dict[str, dict[str, str]] = field(default_factory=dict)
    """By region: id of a zone by its name."""
    has_ids: bool = False
    """Whether the spot prices have the zones' ids, as AWS's have by now."""
    refused: set[str] = field(default_factory=set)
    throttled: int = 0
    """Requests for on-demand prices that are refused first."""
    storage: dict[str, list[Any]] = field(default_factory=lambda: {"AmazonEC2": [], "AmazonS3": []})
    """Products by service; others are refused."""
    asked: Counter[str] = field(default_factory=Counter)

    def reply(self, _: str, headers: dict[str, str], body: bytes) -> Answer:
        region = headers["Authorization"].split("/")[2]
        if headers.get("X-Amz-Target") == "AWSPriceListService.GetProducts":
            return self._products(json.loads(body))
        values = {name: found[0] for name, found in parse_qs(body.decode()).items()}
        self.asked[values["Action"]] += 1
        if region in self.refused:
            return _xml(
                "<Response><Errors><Error><Code>OptInRequired</Code><Message>not subscribed</Message></Error>"
                "</Errors></Response>",
                status=403,
            )
        return (
            self._history(region, values) if values["Action"] == "DescribeSpotPriceHistory" else self._zones(region)
        )

    def _products(self, request: dict[str, Any]) -> Answer:
        wanted = {one["Field"]: one["Value"] for one in request["Filters"]}
        if wanted.get("productFamily") == "Storage":
            return self._storage(request["ServiceCode"], wanted)
        self.asked["GetProducts"] += 1
        if self.asked["GetProducts"] <= self.throttled:
            return as_json({"__type": "ThrottlingException", "message": "Rate exceeded"}, status=400)
        assert (wanted["operatingSystem"], wanted["tenancy"], wanted["preInstalledSw"]) == ("Linux", "Shared", "NA")
        products = self.on_demand.get(wanted["instanceType"], [])
        first = int(request.get("NextToken", "0"))
        answer = {"FormatVersion": "aws_v1", "PriceList": [json.dumps(one) for one in products[first : first + 1]]}
        if first + 1 < len(products):
            answer["NextToken"] = str(first + 1)
        return as_json(answer)

    def _storage(self, service: str, wanted: dict[str, str]) -> Answer:
        if service not in self.storage:
            return as_json({"__type": "AccessDeniedException", "message": "no right"}, status=400)
        assert wanted.items() >= WANTED_STORAGE[service].items()
        products = [
            one
            for one in self.storage[service]
            if all(one["product"]["attributes"].get(name, "Storage") == value for name, value in wanted.items())
        ]
        return as_json({"FormatVersion": "aws_v1", "PriceList": [json.dumps(one) for one in products]})

    def _history(self, region: str, values: dict[str, str]) -> Answer:
        names = {value for name, value in values.items() if name.startswith("InstanceType.")}
        entries = [one for one in self.spot.get(region, []) if one[0] in names]
        first = int(values.get("NextToken", "0"))
        items = "".join(
            f"<item><instanceType>{name}</instanceType><productDescription>Linux/UNIX</productDescription>"
            f"<spotPrice>{price}</spotPrice><timestamp>2026-11-28T10:00:00.000Z</timestamp>"
            f"<availabilityZone>{zone}</availabilityZone>"
            + (f"<availabilityZoneId>{self.zones[region][zone]}</availabilityZoneId>" if self.has_ids else "")
            + "</item>"
            for name, zone, price in entries[first : first + 2]
        )
        token = str(first + 2) if first + 2 < len(entries) else ""
        return _xml(
            "<DescribeSpotPriceHistoryResponse xmlns='http://ec2.amazonaws.com/doc/2016-11-15/'>"
            f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken>{token}</nextToken>"
            "</DescribeSpotPriceHistoryResponse>"
        )

    def _zones(self, region: str) -> Answer:
        items = "".join(
            f"<item><zoneName>{name}</zoneName><zoneId>{zone}</zoneId><regionName>{region}</regionName></item>"
            for name, zone in self.zones.get(region, {}).items()
        )
        return _xml(
            "<DescribeAvailabilityZonesResponse xmlns='http://ec2.amazonaws.com/doc/2016-11-15/'>"
            f"<availabilityZoneInfo>{items}</availabilityZoneInfo></DescribeAvailabilityZonesResponse>"
        )


def _xml(text: str, *, status: int = 200) -> Answer:
    return status, {"Content-Type": "text/xml"}, text.encode()


def product(region: str | None, usd: str | None, *, unit: str = "Hrs") -> dict[str, Any]:
    """One product with the keys that AWS sends; those with None are absent."""
    attributes = {"instanceType": "p5.48xlarge", "operatingSystem": "Linux", "locationType": "AWS Region"}
    price = {} if usd is None else {"USD": usd}
    dimension = {"unit": unit, "endRange": "Inf", "beginRange": "0", "description": "…", "pricePerUnit": price}
    terms = {"SKU.JRTCKXETXF": {"priceDimensions": {"SKU.JRTCKXETXF.6YS6EN2CT7": dimension}, "sku": "SKU"}}
    return {
        "product": {
            "productFamily": "Compute Instance",
            "attributes": attributes | ({} if region is None else {"regionCode": region}),
            "sku": "SKU",
        },
        "serviceCode": "AmazonEC2",
        "terms": {"OnDemand": terms},
        "version": "20261127180000",
        "publicationDate": "2026-11-27T18:00:00Z",
    }


WANTED_STORAGE = {
    "AmazonEC2": {"volumeApiName": "gp3"},
    "AmazonS3": {"storageClass": "General Purpose", "volumeType": "Standard"},
}


def stored(service: str, region: str | None, *tiers: tuple[str, str], **attributes: str) -> dict[str, Any]:
    """A product that stores, its tiers as (first GB, USD) in the order of AWS, which is any."""
    found = product(region, None)
    found["product"]["productFamily"] = "Storage"
    found["product"]["attributes"] = WANTED_STORAGE[service] | {"regionCode": region} | attributes
    [term] = found["terms"]["OnDemand"].values()
    term["priceDimensions"] = {
        f"SKU.JRTCKXETXF.{first}": {"unit": "GB-Mo", "beginRange": first, "pricePerUnit": {"USD": usd}}
        for first, usd in tiers
    }
    return found


@contextmanager
def serving(fake: FakeAws) -> Iterator[FakeAws]:
    with serve_prices(fake.reply) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        yield fake


P5 = "p5.48xlarge"


def test_fetch__pages_of_both_services__zones_by_id_and_spot_like_on_demand_dropped() -> None:
    fake = FakeAws(
        on_demand={P5: [product("us-east-1", "55.0400000000"), product("eu-north-1", "60.5440000000")]},
        spot={
            "us-east-1": [
                (P5, "us-east-1a", "21.154300"),
                (P5, "us-east-1b", "55.040000"),
                (P5, "us-east-1c", "17.628900"),
                (P5, "us-east-1z", "1.000000"),
            ]
        },
        zones={"us-east-1": {"us-east-1a": "use1-az6", "us-east-1b": "use1-az1", "us-east-1c": "use1-az2"}},
        throttled=1,
    )
    with serving(fake):
        found = fetch_aws(TODAY)
    assert {(one.region, one.zone): (one.usd_per_hour, one.spot_usd_per_hour) for one in found.offers} == {
        ("us-east-1", None): (55.04, None),
        ("us-east-1", "use1-az6"): (55.04, 21.1543),
        ("us-east-1", "use1-az2"): (55.04, 17.6289),
        ("eu-north-1", None): (60.544, None),
    }
    assert {(one.gpu, one.inter_node_gbps, one.observed) for one in found.offers} == {("H100-80GB", 3200, TODAY)}
    assert not found.notes
    assert fake.asked["DescribeSpotPriceHistory"] == 3, "two pages of one region and one of the other"


def test_fetch__zone_ids_in_the_prices__need_no_list_of_zones() -> None:
    fake = FakeAws(
        on_demand={P5: [product("us-east-1", "55.04")]},
        spot={"us-east-1": [(P5, "us-east-1a", "21.15")]},
        zones={"us-east-1": {"us-east-1a": "use1-az6"}},
        has_ids=True,
    )
    with serving(fake):
        found = fetch_aws(TODAY)
    assert [(one.zone, one.spot_usd_per_hour) for one in found.offers] == [(None, None), ("use1-az6", 21.15)]
    assert not fake.asked["DescribeAvailabilityZones"]


def test_fetch__absent_fields_zero_and_a_region_not_enabled__stay_unknown_and_the_region_is_named() -> None:
    broken = [product(None, "1.0"), product("us-west-2", None), product("us-west-1", "0.0000000000"), {}]
    other_unit = product("us-east-2", "3.0", unit="Quantity")
    fake = FakeAws(on_demand={P5: [*broken, other_unit, product("ap-east-1", "70.0")]}, refused={"ap-east-1"})
    with serving(fake):
        found = fetch_aws(TODAY)
    assert [(one.region, one.usd_per_hour, one.spot_usd_per_hour) for one in found.offers] == [
        ("ap-east-1", 70.0, None)
    ]
    assert found.notes[0].startswith(
        "no spot prices of ap-east-1: AWS does not accept the credentials in ap-east-1"
    )


def test_fetch__no_credentials__says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(ClusterError, match=r"no AWS credentials were found: .*; run `aws configure`"):
        fetch_aws(TODAY)


def test_fetch__storage__is_the_first_tier_of_each_region() -> None:
    tiers = (("51200", "0.0240000000"), ("0", "0.0250000000"), ("512000", "0.0230000000"))
    fake = FakeAws(
        on_demand={P5: [product("ap-south-1", "55.04")]},
        storage={
            "AmazonEC2": [
                stored("AmazonEC2", "ap-south-1", ("0", "0.0912000000")),
                stored("AmazonEC2", "us-gov-west-1", ("0", "0.0960000000")),
                stored("AmazonEC2", "eu-west-1", ("0", "0.0000000000")),
                stored("AmazonEC2", None, ("0", "0.1")),
                stored("AmazonEC2", "ap-south-1", ("0", "0.1"), volumeApiName="gp2"),
            ],
            "AmazonS3": [stored("AmazonS3", "ap-south-1", *tiers)],
        },
    )
    with serving(fake):
        found = fetch_aws(TODAY)
    prices = {(one.region, one.kind): one.usd_per_gib_month for one in found.storage}
    assert prices == {
        ("ap-south-1", "disk"): 0.0912,
        ("us-gov-west-1", "disk"): 0.096,
        ("ap-south-1", "object"): 0.025,
    }


def test_fetch__storage_refused__keeps_the_prices_of_machines() -> None:
    with serving(FakeAws(on_demand={P5: [product("us-east-1", "55.04")]}, storage={})):
        found = fetch_aws(TODAY)
    assert len(found.offers) == 1 and found.storage == ()
    assert sum(note.startswith("no prices of storage: ") for note in found.notes) == 2
