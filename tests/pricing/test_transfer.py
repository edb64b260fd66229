"""Prices of storage and traffic: the table as a whole, hand-checked figures, and what is unknown."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from forge.pricing.catalog import area_of
from forge.pricing.offers import CLOUDS, offline_offers
from forge.pricing.transfer import (
    INTERNET,
    OTHER_ZONE,
    _prices,
    egress_usd_per_gib,
    storage_usd_per_gib_month,
    transfer_source,
)

SHARED = Path(__file__).parents[3] / "shared" / "prices"


@pytest.mark.parametrize(
    ("cloud", "region", "to", "price"),
    [
        ("aws", "us-east-1", INTERNET, 0.09),
        ("aws", "ap-southeast-2", INTERNET, 0.114),
        ("aws", "us-east-1", "eu-west-1", 0.02),
        ("aws", "sa-east-1", "us-east-1", 0.138),
        ("aws", "us-east-1", OTHER_ZONE, 0.02),
        ("gcp", "us-central1", "us-west1", 0.02),
        ("gcp", "us-central1-a", "us-central1-b", 0.0),
        ("gcp", "us-central1", OTHER_ZONE, 0.01),
        ("gcp", "europe-west4", "northamerica-northeast1", 0.05),
        ("gcp", "europe-west4", "australia-southeast1", 0.10),
        ("gcp", "asia-northeast3", INTERNET, 0.15),
        ("azure", "westeurope", INTERNET, 0.087),
        ("azure", "japaneast", INTERNET, 0.12),
        ("azure", "brazilsouth", "eastus", 0.16),
        ("azure", "eastus", "westus3", 0.02),
        ("azure", "eastus", "uksouth", 0.05),
        ("azure", "eastus", "eastus", 0.0),
        ("azure", "eastus", OTHER_ZONE, 0.0),
    ],
)
def test_egress__known_places__is_the_published_price(cloud: str, region: str, to: str, price: float) -> None:
    assert egress_usd_per_gib(cloud, region, to=to) == price


def test_storage__known_regions__is_the_published_price() -> None:
    assert storage_usd_per_gib_month("aws", "us-east-1") == 0.023
    assert storage_usd_per_gib_month("aws", "eu-central-1", kind="disk") == 0.0952
    assert storage_usd_per_gib_month("aws", "sa-east-1", kind="disk") == 0.152
    assert storage_usd_per_gib_month("gcp", "us-central1-a", kind="disk") == 0.1
    assert storage_usd_per_gib_month("azure", "eastus2") == 0.0184
    disk = storage_usd_per_gib_month("azure", "eastus", kind="disk")
    assert disk is not None and disk * 200e9 / 2**30 == pytest.approx(38.01, rel=1e-3)


@pytest.mark.parametrize("cloud", ["aws", "gcp", "azure", "lambdalabs", ""])
def test_prices__unknown_place__are_none_not_zero(cloud: str) -> None:
    assert storage_usd_per_gib_month(cloud, "atlantis-1") is None
    assert storage_usd_per_gib_month(cloud, "", kind="disk") is None
    assert egress_usd_per_gib(cloud, "atlantis-1", to=INTERNET) is None
    assert egress_usd_per_gib(cloud, "atlantis-1", to="atlantis-2") is None


def test_egress__destination_unknown__is_none_where_it_decides() -> None:
    assert egress_usd_per_gib("gcp", "us-central1", to="atlantis-1") is None
    assert egress_usd_per_gib("aws", "us-east-1", to="xx-new-1") == 0.02  # AWS charges by the region that sends


def test_table__every_figure__is_positive_and_has_a_day_and_source() -> None:
    today = datetime.now(UTC).date()
    for cloud, tables in _prices().items():
        for name, table in tables.items():
            if name == "sources":
                assert set(table) == set(tables) - {"sources"}
                continue
            source = transfer_source(cloud, name)
            assert source is not None and source[0] <= today and len(source[1]) > 10
            for place, price in table.items():
                for figure in price.values() if isinstance(price, dict) else [price]:
                    assert 0 < figure < 0.5 or (cloud, name, place) == ("azure", "zones", "all")


def test_table__areas__have_a_price_to_each_other() -> None:
    for cloud in ("gcp", "azure"):
        table = _prices()[cloud]["other_regions"]
        assert all(set(row) == set(table) for row in table.values())


def test_area__every_region_that_sells_machines__is_in_one() -> None:
    assert {offer.region for offer in offline_offers() if area_of(offer.region) is None} == set()
    assert [area_of(name) for name in ("ap-southeast-2", "australiaeast", "southafricanorth", "westus2")] == [
        "oceania",
        "oceania",
        "africa",
        "us",
    ]


@pytest.mark.skipif(not SHARED.is_dir(), reason="no price lists beside this checkout")
def test_table__shared_snapshot__agrees_in_the_home_regions() -> None:
    egress = json.loads((SHARED / "egress_prices.json").read_text())
    storage = json.loads((SHARED / "object_storage_prices.json").read_text())
    for cloud in CLOUDS:
        region, tiers = egress[cloud]["region"], egress[cloud]["tiers"]
        other = {"aws": "us-west-2", "gcp": "us-west1", "azure": "westus2"}[cloud]
        assert egress_usd_per_gib(cloud, region, to=INTERNET) == tiers[0]["price_per_gb_usd"]
        assert egress_usd_per_gib(cloud, region, to=other) == egress[cloud]["inter_region_per_gb_usd"]
        hot = storage[cloud]["tiers"][0]["price_per_gb_month_usd"]
        found = storage_usd_per_gib_month(cloud, storage[cloud]["region"])
        assert found is not None and hot <= found <= 1.2 * hot  # of sources that differ the higher one stands
