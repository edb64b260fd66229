"""Offers of all clouds in one form: the shipped price list and the traps of price lists."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from forge.plan.gpus import find_gpu
from forge.pricing.catalog import catalog_table, machine_types
from forge.pricing.offers import CLOUDS, InterruptionBand, Offer, age_notes, build_offer, offline_offers
from forge.pricing.price_list import listed_prices

SHARED = Path(__file__).parents[3] / "shared" / "prices"


def offer(**changes: object) -> Offer:
    base = build_offer(
        machine_types("aws")["p5.48xlarge"],
        cloud="aws",
        region="us-east-1",
        usd_per_hour=55.04,
        spot_usd_per_hour=20.0,
        observed=date(2026, 11, 1),
        source="test",
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("price", [0.0, -1.0, math.nan, math.inf, None])
def test_offer__price_of_zero_or_nonsense__is_unknown(price: float | None) -> None:
    found = offer(usd_per_hour=price, spot_usd_per_hour=price)
    assert found.usd_per_hour is None and found.spot_usd_per_hour is None
    assert found.price(spot=True) is None and found.price(spot=False) is None


@pytest.mark.parametrize("spot", [55.04, 55.03, 60.0])
def test_offer__spot_price_like_on_demand__sells_no_spot(spot: float) -> None:
    assert offer(spot_usd_per_hour=spot).spot_usd_per_hour is None
    assert offer(spot_usd_per_hour=54.0).spot_usd_per_hour == 54.0


def test_offer__spot_without_on_demand__is_kept() -> None:
    assert offer(usd_per_hour=None).spot_usd_per_hour == 20.0


def test_offline_offers__every_line__has_a_known_type_source_and_plausible_price() -> None:
    for found in offline_offers():
        price, spot = found.usd_per_hour, found.spot_usd_per_hour
        assert price is not None and 0.03 < price / max(1, found.num_gpus) < 25, found
        assert spot is None or 0.05 * price < spot < price, found
        assert not found.gpu or find_gpu(found.gpu), found
        assert date(2025, 1, 1) < found.observed < date(2026, 12, 1)
        assert found.source
    used = {price.source for price in listed_prices()}
    assert used == catalog_table()["sources"].keys()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_offline_offers__common_gpus__are_sold_in_eight_regions(cloud: str) -> None:
    regions: dict[str, set[str]] = defaultdict(set)
    for found in offline_offers():
        if found.cloud == cloud:
            regions[found.gpu].add(found.region)
    common = {
        "aws": ("T4", "L4", "A10G", "L40S", "A100-40GB", "H100-80GB", "H200"),
        "gcp": ("L4", "A100-40GB", "H100-80GB"),
        "azure": ("T4", "A10", "A100-80GB", "H100-NVL", "H100-80GB", "H200"),
    }[cloud]
    assert {gpu: len(regions[gpu]) for gpu in common if len(regions[gpu]) < 8} == {}


def test_offline_offers__aws_zones__are_ids_and_each_place_stands_once() -> None:
    zones = {found.zone for found in offline_offers() if found.zone is not None}
    assert zones and all("-az" in zone for zone in zones), (
        "an id, not a name such as us-east-1a, which varies by account"
    )
    places = [(found.cloud, found.instance, found.region, found.zone) for found in offline_offers()]
    assert len(places) == len(set(places))


def test_offline_offers__every_type_of_the_catalogue__has_a_price() -> None:
    assert all(machine.usd_per_hour for cloud in CLOUDS for machine in machine_types(cloud).values())


def test_co2__h100_in_the_netherlands__is_power_times_grid() -> None:
    found = next(one for one in offline_offers() if (one.instance, one.region) == ("a3-highgpu-8g", "europe-west4"))
    grid = catalog_table()["grid_g_per_kwh"]["europe-west4"]
    assert found.co2_g_per_hour == pytest.approx(0.7 * 8 * 1.09 * grid)
    assert all(one.co2_g_per_hour is None for one in offline_offers() if one.cloud != "gcp" or not one.gpu)


def test_interruption_band__is_shown_as_the_advisor_does() -> None:
    bands = [(0.0, 0.05), (0.05, 0.1), (0.15, 0.2), (0.2, 1.0)]
    assert [str(InterruptionBand(low=low, high=high)) for low, high in bands] == ["<5%", "5-10%", "15-20%", ">20%"]


def test_age_notes__old_prices__say_their_age() -> None:
    offers = (offer(observed=date(2026, 11, 1)), offer(observed=date(2026, 10, 1)), offer(cloud="gcp"))
    assert age_notes(offers, today=date(2026, 11, 1)) == (
        "aws: prices as of 2026-10-01 to 2026-11-01, up to 31 days old",
        "gcp: prices as of 2026-11-01",
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="no price lists beside this checkout")
@pytest.mark.parametrize(
    ("name", "on_demand", "spot"),
    [
        ("aws_gpu.csv", "ondemand_usd_h", "spot_usd_h_est"),
        ("aws_gpu_spot_az.csv", "ondemand_usd_h", "spot_usd_h"),
        ("azure_gpu.csv", "ondemand_usd_h", "spot_usd_h_us_regions"),
        ("gcp_gpu.csv", "ondemand_usd_h", "spot_usd_h"),
    ],
)
def test_offline_offers__public_price_lists__agree(name: str, on_demand: str, spot: str) -> None:
    known = {(one.cloud, one.instance, one.region, one.zone): one for one in offline_offers()}
    checked = 0
    for row in csv.DictReader((SHARED / name).read_text().splitlines()):
        found = known.get((row["cloud"], row["instance_type"], row["region"], row.get("zone_id") or None))
        if found is None:
            continue
        checked += 1
        assert found.num_gpus == int(row["gpu_count"])
        assert found.gpu_memory_gib == pytest.approx(float(row["gpu_mem_gib"]), rel=0.01)
        assert found.num_cpus == int(row.get("vcpus") or found.num_cpus)
        assert found.memory_gib == float(row.get("mem_gib") or found.memory_gib)
        assert found.usd_per_hour == pytest.approx(float(row[on_demand]), abs=1e-4)
        if found.spot_usd_per_hour is not None:
            assert found.spot_usd_per_hour == pytest.approx(float(row[spot]), abs=1e-4)
    assert checked > 80
