"""Finding offers: the cheapest first, and what is said where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from forge.errors import ArgumentError
from forge.pricing.choose import OfferFilter, find_offers, usd_per_exaflop
from forge.pricing.offers import Offer, offline_offers


def found(**wanted: Any) -> list[Offer]:
    return find_offers(offline_offers(), wanted=OfferFilter(**wanted))


@pytest.mark.parametrize("spot", [True, False])
@pytest.mark.parametrize("name", ["H100", "h100-80gb", "A100-80GB", "L4", "v100"])
def test_find__gpu__cheapest_first_and_each_region_once(name: str, spot: bool) -> None:
    offers = found(gpu=name, spot=spot)
    prices = [offer.price(spot=spot, per_gpu=True) or 0.0 for offer in offers]
    assert len(offers) > 3 and prices == sorted(prices) and prices[0] > 0
    assert len({offer.gpu for offer in offers}) == 1
    places = [(offer.cloud, offer.instance, offer.region) for offer in offers]
    assert len(places) == len(set(places))
    best = min(
        offer.price(spot=spot, per_gpu=True) or 99 for offer in offline_offers() if offer.gpu == offers[0].gpu
    )
    assert prices[0] == best


def test_find__no_gpu_named__machines_without_gpu_are_left_out() -> None:
    assert all(offer.num_gpus for offer in found())


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ("eu", {"eu-west-1", "europe-west4", "swedencentral", "uksouth", "northeurope"}),
        ("us", {"us-east-1", "us-central1", "eastus", "westus3", "southcentralus"}),
        ("asia", {"ap-northeast-1", "asia-southeast1", "japaneast", "southeastasia", "centralindia"}),
        ("oceania", {"ap-southeast-2", "australia-southeast1", "australiaeast"}),
    ],
)
def test_find__part_of_the_world__has_the_regions_of_all_clouds(region: str, expected: set[str]) -> None:
    regions = {offer.region for offer in found(region=region)}
    assert expected <= regions
    others = {"eu": "eastus", "us": "australiaeast", "asia": "us-east-1", "oceania": "us-east-1"}
    assert others[region] not in regions


def test_areas__every_shipped_region__is_in_one() -> None:
    areas = ("us", "ca", "eu", "asia", "oceania", "sa", "me", "africa")
    covered = {offer.region for area in areas for offer in _or_nothing(area)}
    assert {offer.region for offer in offline_offers() if offer.num_gpus} == covered


def _or_nothing(area: str) -> Sequence[Offer]:
    try:
        return found(region=area)
    except ArgumentError:
        return ()


def test_find__zone_id__finds_the_zone() -> None:
    assert {offer.zone for offer in found(gpu="H100", spot=True, region="use2-az1")} == {"use2-az1"}


def test_find__max_interruption__keeps_known_bands_below_it() -> None:
    offers = found(gpu="T4", spot=True, max_interruption=0.1)
    assert offers and all(offer.interruption and offer.interruption.high <= 0.1 for offer in offers)
    assert {str(offer.interruption) for offer in offers} == {"<5%", "5-10%"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"gpu": "H-100"}, "did you mean H100-80GB"),
        ({"gpu": "B200", "region": "antarctica"}, "Regions with it are us-.*, in us"),
        ({"gpu": "H101"}, "no cloud that forge knows sells the GPU 'H101'; did you mean H100-(80GB|NVL)"),
        ({"gpu": "\x1b[31mx"}, "Sold are A10, "),
        ({"gpu": "H200", "region": "us-eest-1"}, "'H200' is not sold in the region 'us-eest-1'; did you mean us-"),
        ({"gpu": "L40S", "region": "africa"}, "Regions with it are ap-northeast-1"),
        ({"region": "mars"}, "nothing is sold in the region 'mars'"),
        ({"gpu": "H100-NVL", "spot": True}, "no spot price is known for H100-NVL; try it without --spot"),
        ({"gpu": "H100", "max_interruption": 0.1}, "add --spot"),
        ({"gpu": "A10", "spot": True, "max_interruption": 0.1}, "none of them publishes its interruptions"),
        ({"gpu": "T4", "spot": True, "max_interruption": 0.01}, "the least is below 5%"),
    ],
)
def test_find__nothing_fits__says_what_there_is(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        found(**wanted)


def test_usd_per_exaflop__h100__hand_computed() -> None:
    offer = next(one for one in offline_offers() if (one.instance, one.region) == ("p5.48xlarge", "us-east-1"))
    # 55.04 USD ÷ 8 GPUs ÷ (989.5e12 FLOP/s × 45 % × 3600 s) × 1e18
    assert usd_per_exaflop(offer, spot=False) == pytest.approx(6.88 / 1.602990, rel=1e-5)
