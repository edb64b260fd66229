"""Offers of all clouds in one form: the shipped price list and the traps of price lists."""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ClusterError
from forge.plan.gpus import find_gpu
from forge.pricing.catalog import catalog_table, machine_types
from forge.pricing.offer import InterruptionBand, Offer, build_offer
from forge.pricing.offers import CLOUDS, load_offers, offline_offers
from forge.pricing.price_list import listed_prices, read_prices, write_prices
from forge.pricing.snapshot import Fetch, PriceSnapshot, SpotRisk
from forge.pricing.transfer import StoragePrice, storage_usd_per_gib_month
from forge.pricing.update import listed

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


def test_write_prices__shipped_list__is_read_back_the_same() -> None:
    written = write_prices(listed(offline_offers()))
    assert set(read_prices(written)) == set(listed_prices())
    assert write_prices(read_prices(written)) == written


def test_write_prices__other_clouds_and_types__are_left_out() -> None:
    known = offer(interruption=InterruptionBand(low=0.2, high=1.0), zone="use1-az4")
    others = [offer(cloud="runpod"), offer(instance="p9.big")]
    assert write_prices(listed([known, *others])).splitlines() == [
        "# aws-1,2026-11-01,test",
        "cloud,instance,region,zone,usd_per_hour,spot_usd_per_hour,interruption_percent,source",
        "aws,p5.48xlarge,us-east-1,use1-az4,55.04,20,20-100,aws-1",
    ]


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


def answer(source: str, *offers: Offer, **parts: Any) -> Mapping[str, Fetch]:
    return {source: lambda today: PriceSnapshot(source=source, observed=today, offers=offers, **parts)}


def refuse(_: date) -> PriceSnapshot:
    raise ClusterError("Azure's price list (127.0.0.1) cannot be reached: Connection refused")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    return tmp_path / "prices"


@pytest.mark.usefixtures("cache")
def test_load_offers__never_asked__shipped_list_with_its_age() -> None:
    found = load_offers()
    assert found.offers == offline_offers()
    assert found.notes[0].startswith("aws: prices as of 2025-06-28 to 2026-04-01, up to ")
    assert found.notes[0].endswith(" days old; --refresh asks for those of today")


def test_load_offers__refresh__is_kept_and_replaces_the_cloud(cache: Path) -> None:
    today = datetime.now(UTC).date()
    fresh = offer(observed=today, zone="use1-az4", interruption=InterruptionBand(low=0.05, high=0.1))
    first = load_offers(refresh=True, fetchers=answer("aws", fresh, notes=("3 entries were skipped",)))
    assert [one for one in first.offers if one.cloud == "aws"] == [fresh]
    assert any(one.cloud == "gcp" for one in first.offers), "clouds that did not answer keep the shipped list"
    assert first.notes[0] == f"aws: prices as of {today}"
    assert first.notes[-1] == "aws: 3 entries were skipped"
    assert load_offers().offers == first.offers
    assert load_offers().notes[-1] == first.notes[-1]
    assert load_offers(offline=True).offers == offline_offers()
    assert [path.name for path in cache.iterdir()] == ["aws.json"]


@pytest.mark.usefixtures("cache")
def test_load_offers__prices_of_storage__are_kept_and_go_before_those_shipped() -> None:
    today = datetime.now(UTC).date()
    places = {("aws", "us-east-1", "disk"): 0.07, ("aws", "ap-south-1", "disk"): 0.0912, ("aws", "x", "disk"): 0.0}
    storage = tuple(
        StoragePrice(cloud=cloud, region=region, kind=kind, usd_per_gib_month=price)
        for (cloud, region, kind), price in places.items()
    )
    fetched = load_offers(refresh=True, fetchers=answer("aws", offer(observed=today), storage=storage))
    assert fetched.notes[-1] == f"aws: storage prices of 3 regions as of {today}"
    assert (load_offers().offers, load_offers().storage) == (fetched.offers, fetched.storage)
    price = partial(storage_usd_per_gib_month, "aws", kind="disk", fetched=fetched.storage)
    assert [price(region) for region in ("us-east-1", "ap-south-1", "eu-west-1", "x")] == [
        0.07,
        0.0912,
        0.088,
        None,
    ]


@pytest.mark.usefixtures("cache")
def test_load_offers__no_network__says_so_and_uses_the_shipped_list() -> None:
    found = load_offers(refresh=True, fetchers={"azure": refuse})
    assert found.offers == offline_offers()
    assert found.notes[-1].startswith(
        "azure: was not asked or did not answer: Azure's price list (127.0.0.1) cannot"
    )
    assert found.notes[-1].endswith("earlier prices are used")
    assert not any("--refresh asks" in note for note in found.notes)


def test_load_offers__cache_cannot_be_written__prices_are_used_and_it_is_said(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    fresh = offer(observed=datetime.now(UTC).date())
    found = load_offers(refresh=True, fetchers=answer("aws", fresh))
    assert [one for one in found.offers if one.cloud == "aws"] == [fresh]
    assert any("cannot be kept for later" in note for note in found.notes)


@pytest.mark.usefixtures("cache")
def test_load_offers__stale_cache__gives_way_to_a_newer_shipped_list() -> None:
    load_offers(refresh=True, fetchers=answer("aws", offer(observed=date(2025, 1, 1))))
    assert load_offers().offers == offline_offers()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"form": 1}', '{"form": 99}', '{"form": 1, "observed": "x"}'])
def test_load_offers__broken_cache__is_ignored_and_said(cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "gcp.json").write_text(content)
    found = load_offers()
    assert found.offers == offline_offers()
    assert found.notes[-1].startswith("gcp: the cached prices cannot be read and are ignored:")


@pytest.mark.usefixtures("cache")
def test_load_offers__cached_prices_of_zero__stay_unknown() -> None:
    today = datetime.now(UTC).date()
    load_offers(
        refresh=True, fetchers=answer("aws", offer(observed=today, usd_per_hour=None, spot_usd_per_hour=None))
    )
    path = Path(os.environ["FORGE_CACHE"]) / "prices" / "aws.json"
    path.write_text(path.read_text().replace('"usd_per_hour": null', '"usd_per_hour": 0'))
    found = next(one for one in load_offers().offers if one.cloud == "aws")
    assert found.usd_per_hour is None


@pytest.mark.usefixtures("cache")
def test_load_offers__spot_advisor__gives_bands_and_estimates_what_is_unknown() -> None:
    today = datetime.now(UTC).date()
    band = InterruptionBand(low=0.1, high=0.15)
    risks = tuple(
        SpotRisk(instance="p5.48xlarge", region=region, interruption=band, savings=0.5)
        for region in ("us-east-1", "us-east-2")
    )
    priced = offer(observed=today, zone="use1-az4")
    unpriced = offer(observed=today, spot_usd_per_hour=None)
    elsewhere = offer(observed=today, spot_usd_per_hour=None, region="us-east-2")
    fetchers = {**answer("aws", priced, unpriced, elsewhere), **answer("spot-advisor", risks=risks)}
    found = [one for one in load_offers(refresh=True, fetchers=fetchers).offers if one.cloud == "aws"]
    assert [(one.spot_usd_per_hour, one.interruption) for one in found] == [
        (20.0, band),
        (None, None),
        (pytest.approx(27.52), band),
    ]
    assert "estimated" in found[2].source


@pytest.mark.usefixtures("cache")
def test_load_offers__gpuhunt__adds_clouds_and_never_hides_newer_prices() -> None:
    today = datetime.now(UTC).date()
    small = offer(cloud="lambdalabs", instance="gpu_8x_h100", observed=today)
    fetchers = {
        **answer("aws", offer(observed=today)),
        **answer("gpuhunt", small, offer(observed=today, region="x")),
    }
    found = load_offers(refresh=True, fetchers=fetchers).offers
    assert {one.region for one in found if one.cloud == "aws"} == {"us-east-1"}, "AWS's own answer comes first"
    assert [one.cloud for one in found][-1] == "lambdalabs"


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
