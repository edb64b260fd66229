"""Where a rented cluster is tried: order by price of training, locality of the storage, limits, and bad input."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from forge.cli.app import app
from forge.cli.cluster_table import region_lines
from forge.cluster.cloud.other_regions import read_regions, regions_of, to_variable
from forge.cluster.cloud.region_choice import (
    TRAFFIC_SHARE_PER_HOUR,
    MarketToday,
    choice_record,
    choose_regions,
    earlier_regions,
    places_to_move,
)
from forge.config.cluster import CloudSpec
from forge.errors import ArgumentError, ClusterError, JobFileError
from forge.pricing.catalog import machine_types
from forge.pricing.choose import usd_per_exaflop
from forge.pricing.offer import Offer, build_offer
from forge.pricing.offers import offline_offers

PROJECT = {"gcp": "my-project", "azure": "12345678-1234-1234-1234-123456789abc"}
TODAY = datetime.now(UTC).date()


def spec_of(provider: str = "aws", **keys: Any) -> CloudSpec:
    values = {"name": "big", "provider": provider, "gpu": "H100", "project": PROJECT.get(provider)}
    return CloudSpec.model_validate({k: v for k, v in (values | keys).items() if v is not None}, strict=False)


def offer(
    region: str,
    price: float | None,
    spot: float | None = None,
    *,
    instance: str = "p5.48xlarge",
    cloud: str = "aws",
    zone: str | None = None,
    day: date = TODAY,
) -> Offer:
    return build_offer(
        machine_types(cloud)[instance],
        cloud=cloud,
        region=region,
        zone=zone,
        usd_per_hour=price,
        spot_usd_per_hour=spot,
        observed=day,
        source="test",
    )


def places(spec: CloudSpec, offers: list[Offer], **keys: Any) -> list[str]:
    return [one.place for one in choose_regions(spec, offers=offers, **keys).options]


def test_auto__spot_file__is_ordered_by_spot_price_and_on_demand_by_the_other() -> None:
    offers = [offer("us-east-1", 50.0, 30.0), offer("us-west-2", 60.0, 20.0), offer("eu-west-1", 40.0, None)]
    assert places(spec_of(), offers) == ["us-west-2", "us-east-1", "eu-west-1"], "without spot capacity last"
    assert places(spec_of(spot=False), offers) == ["eu-west-1", "us-east-1", "us-west-2"]


def test_auto__machines_of_two_sizes__are_compared_per_flop() -> None:
    offers = [
        offer("us-east-1", 55.0, 24.0),  # 3.0 for a GPU
        offer("us-west-2", 6.0, 3.5, instance="p5.4xlarge"),
        offer("us-west-2", 55.0, 32.0),
    ]
    first, second = choose_regions(spec_of(), offers=offers).options
    assert (first.place, first.machine, first.usd_per_hour) == ("us-east-1", "p5.48xlarge", 24.0)
    assert (second.machine, second.usd_per_exaflop) == (
        "p5.4xlarge",
        pytest.approx(usd_per_exaflop(offers[1], spot=True)),
    )


def test_auto__spot_equal_to_on_demand__counts_as_no_spot_capacity() -> None:
    offers = [offer("us-east-1", 20.0, 20.0), offer("us-west-2", 60.0, 30.0)]
    choice = choose_regions(spec_of(), offers=offers)
    assert [(one.place, one.is_spot) for one in choice.options] == [("us-west-2", True), ("us-east-1", False)]


def test_auto__price_zero_or_unknown__is_not_the_cheapest() -> None:
    offers = [offer("us-east-1", 0.0, 0.0), offer("us-west-2", 60.0, 30.0), offer("eu-west-1", None, None)]
    choice = choose_regions(spec_of(), offers=offers)
    assert [one.place for one in choice.options] == ["us-west-2", "eu-west-1", "us-east-1"]
    assert choice.options[1].usd_per_hour is None and "unknown" in region_lines(choice)[1]


def test_auto__zones_by_id__the_cheapest_stands_for_its_region() -> None:
    offers = [
        offer("us-east-1", 55.0),
        offer("us-east-1", 55.0, 30.0, zone="use1-az4"),
        offer("us-east-1", 55.0, 22.0, zone="use1-az6"),
        offer("us-west-2", 55.0, 25.0, zone="usw2-az1"),
    ]
    choice = choose_regions(spec_of(), offers=offers)
    assert [(one.place, one.usd_per_hour) for one in choice.options] == [("us-east-1", 22.0), ("us-west-2", 25.0)]


def test_auto__storage_region_known__near_region_wins_unless_it_costs_more_than_the_traffic() -> None:
    gib = 8 * 80 * TRAFFIC_SHARE_PER_HOUR
    spec = spec_of(storage="s3://bucket/runs", storage_region="eu-west-1")
    dear = 24.0 + gib * 0.02
    near = choose_regions(spec, offers=[offer("us-east-1", 55.0, 24.0), offer("eu-west-1", 55.0, dear - 0.01)])
    assert near.options[0].place == "eu-west-1" and near.options[0].traffic_usd_per_hour == 0.0
    assert near.options[1].traffic_usd_per_hour == pytest.approx(gib * 0.02)
    assert places(spec, [offer("us-east-1", 55.0, 24.0), offer("eu-west-1", 55.0, dear + 0.01)])[0] == "us-east-1"
    assert any("assumed traffic of a worker to the storage in eu-west-1: 17%" in line for line in near.notes)


def test_auto__storage_in_another_cloud__counts_internet_traffic_and_unknown_as_the_dearest() -> None:
    spec = spec_of(storage="gs://bucket/runs", storage_region="us-central1")
    offers = [offer("us-east-1", 55.0, 24.0), offer("eu-north-1", 55.0, 24.1)]
    choice = choose_regions(spec, offers=offers)  # the price of traffic from eu-north-1 is not known
    assert [one.traffic_usd_per_hour is None for one in choice.options] == [False, True]
    assert choice.options[0].place == "us-east-1"


def test_auto__machines_without_gpu__are_compared_per_cpu_and_count_a_gib_of_traffic() -> None:
    spec = spec_of(gpu="none", storage="s3://bucket/runs", storage_region="us-east-1")
    offers = [
        offer("us-east-1", 0.4, 0.16, instance="m6i.2xlarge"),
        offer("us-west-2", 0.4, 0.15, instance="m6i.2xlarge"),
    ]
    choice = choose_regions(spec, offers=offers)
    assert [(one.place, one.traffic_usd_per_hour) for one in choice.options] == [
        ("us-east-1", 0.0),
        ("us-west-2", 0.02),
    ]
    assert choice.options[0].usd_per_exaflop is None
    assert "if it has no capacity (USD an hour): us-west-2 0.15" in region_lines(choice)
    assert any("1 GiB an hour" in line for line in choice.notes)


def test_auto__aws_not_asked__says_so() -> None:
    offers = [offer("us-east-1", 1, 0.5)]
    assert any("AWS was not asked" in line for line in choose_regions(spec_of(), offers=offers).notes)
    asked = MarketToday(spot={"us-east-1": {}}, storage_region=None)
    assert not any("not asked" in line for line in choose_regions(spec_of(), offers=offers, market=asked).notes)


def test_auto__storage_region_unknown__says_so() -> None:
    choice = choose_regions(
        spec_of(storage="s3://bucket/runs"), offers=[offer("us-east-1", 1, 0.5), offer("us-west-2", 2, 0.6)]
    )
    assert any("give storage_region" in line for line in choice.notes)


def test_market__prices_of_now__win_and_only_the_accounts_regions_are_tried() -> None:
    offers = [offer("us-east-1", 55.0, 10.0), offer("us-west-2", 55.0, 20.0), offer("eu-west-1", 55.0, 5.0)]
    market = MarketToday(
        spot={"ap-south-1": {}, "us-east-1": {"p5.48xlarge": 30.0}, "us-west-2": {"p5.48xlarge": 25.0}},
        storage_region=None,
    )
    offers.append(offer("ap-south-1", 20.0, 2.0))  # where AWS sells no spot capacity now
    choice = choose_regions(spec_of(instance_types=["p5.48xlarge"]), offers=offers, market=market)
    assert [(one.place, one.usd_per_hour, one.is_spot) for one in choice.options] == [
        ("us-west-2", 25.0, True),
        ("us-east-1", 30.0, True),
        ("ap-south-1", 20.0, False),
    ]
    assert choice.options[0].plan.workers[0].usd_per_hour == 25.0


def test_file__own_prices__override_all() -> None:
    spec = spec_of(usd_per_hour={"p5.48xlarge": 7.0, "p5.4xlarge": 8.0})
    market = MarketToday(spot={"us-east-1": {"p5.48xlarge": 30.0}}, storage_region=None)
    first = choose_regions(spec, offers=[offer("us-east-1", 55.0, 10.0)], market=market).options[0]
    assert (first.machine, first.usd_per_hour) == ("p5.48xlarge", 7.0)


@pytest.mark.parametrize("provider", ["gcp", "azure"])
def test_given_regions__order_of_the_file__is_kept_where_the_cloud_is_not_asked(provider: str) -> None:
    given = {"gcp": ["us-east4-a", "us-central1-a"], "azure": ["westeurope", "eastus"]}[provider]
    choice = choose_regions(spec_of(provider, regions=given), offers=offline_offers())
    assert [one.place for one in choice.options] == given and not choice.is_chosen


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
@pytest.mark.parametrize("spot", [True, False])
def test_auto__shipped_prices__chooses_places_that_sell_the_gpu(provider: str, spot: bool) -> None:
    choice = choose_regions(spec_of(provider, spot=spot), offers=offline_offers())
    orders = [one.order(unknown_traffic=0.0) for one in choice.options if one.is_spot == spot]
    assert 1 < len(choice.options) <= 12 and orders == sorted(orders) and choice.is_chosen
    assert choice.options[0].usd_per_hour is not None and choice.options[0].usd_per_exaflop is not None


def test_auto__gcp__tries_zones_whose_region_sells_the_type_and_zones_of_offers() -> None:
    cheap = offer("europe-west9", 80.0, 20.0, instance="a3-highgpu-8g", cloud="gcp", zone="europe-west9-b")
    offers = [offer("us-east5", 80.0, 30.0, instance="a3-highgpu-8g", cloud="gcp"), cheap]
    assert places(spec_of("gcp"), offers) == ["europe-west9-b", "us-east5-a", "us-east5-b"]


def test_auto__no_price_known__tries_the_home_region_and_says_so() -> None:
    choice = choose_regions(spec_of(instance_types=["p9.huge"], gpu="X9"), offers=offline_offers())
    assert [one.place for one in choice.options] == ["us-east-1"]
    assert any("no price of p9.huge is known" in line for line in choice.notes)


def test_limit__regions_too_expensive__are_left_out_and_all_of_them_is_an_error() -> None:
    offers = [offer("us-east-1", 55.0, 24.0), offer("us-west-2", 90.0, 60.0)]
    names = ["p5.48xlarge"]
    spec = spec_of(instance_types=names, workers="1..4", max_usd_per_hour=40)
    choice = choose_regions(spec, offers=offers)
    assert [one.place for one in choice.options] == ["us-east-1"]
    assert "1 places are left out: too expensive for max_usd_per_hour" in choice.notes
    with pytest.raises(JobFileError, match="does not pay for the head"):
        choose_regions(spec_of(instance_types=names, workers="1..4", max_usd_per_hour=20), offers=offers)


def test_plan__lowest_and_highest__are_of_the_fewest_and_most_workers() -> None:
    spec = spec_of(instance_types=["p5.48xlarge"], workers="1..4")
    plan = choose_regions(spec, offers=[offer("us-east-1", 55.0, 24.0)]).options[0].plan
    head = plan.head.usd_per_hour
    assert head is not None
    assert plan.lowest_usd_per_hour == pytest.approx(head + 24.0)
    assert plan.usd_per_hour == pytest.approx(head + 4 * 24.0)
    assert replace(plan, min_workers=0).lowest_usd_per_hour == pytest.approx(head)


def test_old_table__its_age__is_said_with_what_to_do() -> None:
    old = [offer("us-east-1", 55.0, 24.0, day=TODAY - timedelta(days=100))]
    assert any("100 days old; they are old: forge prices --refresh" in line for line in _notes(old))
    fresh = [offer("us-east-1", 55.0, 24.0, day=TODAY - timedelta(days=3))]
    assert any(line.endswith("3 days old") for line in _notes(fresh))


def _notes(offers: list[Offer]) -> tuple[str, ...]:
    return choose_regions(spec_of(), offers=offers).notes


def test_region__misspelt__names_the_nearest() -> None:
    with pytest.raises(JobFileError) as caught:
        choose_regions(spec_of(regions=["eu-nroth-1"]), offers=offline_offers())
    assert (caught.value.key, caught.value.nearest) == ("regions", "eu-north-1")
    choose_regions(spec_of(regions=["xx-newland-1"]), offers=offline_offers())  # of which no list knows


def test_gpu__that_the_cloud_does_not_sell__names_those_that_do() -> None:
    with pytest.raises(JobFileError, match="aws, azure"):
        choose_regions(spec_of("gcp", gpu="H200"), offers=offline_offers())
    with pytest.raises(JobFileError) as caught:
        choose_regions(spec_of("gcp", gpu="H10O"), offers=offline_offers())
    assert caught.value.nearest == "H100"


def test_earlier_choice__same_file__keeps_its_order_until_the_file_asks_for_something_else() -> None:
    offers = [offer("us-east-1", 55.0, 24.0), offer("us-west-2", 90.0, 60.0)]
    state = {"choice": choice_record(spec_of(), choose_regions(spec_of(), offers=offers))}
    assert earlier_regions(spec_of(workers="0..9"), state) == ("us-east-1", "us-west-2")
    assert earlier_regions(spec_of(gpu="H200"), state) == ()
    turned = [offer("us-east-1", 55.0, 50.0), offer("us-west-2", 90.0, 2.0)]
    kept = choose_regions(spec_of(), offers=turned, earlier=earlier_regions(spec_of(), state))
    assert [one.place for one in kept.options] == ["us-east-1", "us-west-2"] and not kept.is_chosen
    assert any("first start" in line for line in kept.notes)
    assert earlier_regions(spec_of(), state | {"region": "us-west-2"}) == ("us-west-2",)


@pytest.mark.parametrize("choice", [None, [], {"regions": ["a"]}, {"for": {}, "regions": ["a"]}])
def test_earlier_choice__broken_or_of_another_file__is_ignored(choice: object) -> None:
    assert earlier_regions(spec_of(), {"choice": choice}) == ()


def test_lines__runners_up__are_named_with_their_prices() -> None:
    offers = [offer("us-east-1", 55.0, 24.0), offer("us-west-2", 90.0, 60.0)]
    first, second, *_ = region_lines(choose_regions(spec_of(), offers=offers))
    assert first == (
        "region us-east-1, the cheapest of 2: p5.48xlarge at 24.00 USD an hour as spot, 1.872 USD per EFLOP"
    )
    assert second == "if it has no capacity (USD per EFLOP): us-west-2 4.68"


@pytest.fixture
def auto_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cluster file for GCP, which forge does not ask before the start; nothing is known of earlier starts."""
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "auto.yaml"
    file.write_text(
        "name: auto\nprovider: gcp\nproject: my-project\ngpu: L4\nregions: auto\nworkers: 1..4\n"
        "storage: gs://bucket/runs\nstorage_region: europe-west4\npython: /opt/forge/bin/python\n"
    )
    return file


def up(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["cluster", "up", *arguments])


def test_cluster_up__dry_run__shows_choice_and_runners_up_beside_the_launch_file(auto_file: Path) -> None:
    result = up(str(auto_file), "--dry-run")
    assert result.exit_code == 0
    shown = " ".join(result.stderr.split())
    first = yaml.safe_load(result.stdout)["provider"]["availability_zone"]
    assert f"region {first}, the cheapest of 12: g2-standard" in shown and "USD per EFLOP" in shown
    assert "if it has no capacity (USD per EFLOP):" in shown and "prices as of" in shown
    assert "assumed traffic of a worker to the storage in europe-west4" in shown


def test_cluster_up__without_yes_or_terminal__shows_lowest_and_highest_price_and_stops(auto_file: Path) -> None:
    result = up(str(auto_file))
    assert isinstance(result.exception, ArgumentError) and "pass --yes" in str(result.exception)
    low, high = result.stderr.split("'auto' costs ")[1].split(" USD an hour")[0].split(" to ")
    assert 0 < float(low) < float(high)
    assert not list((auto_file.parent / "state").rglob("*.json")), "nothing was started"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"storage_region": "us-east-1"}, "give its URL as storage"),
        ({"storage": "/shared", "storage_region": "us-east-1"}, "give its URL as storage"),
        ({"storage": "s3://b/r", "storage_region": "US East"}, "String should match pattern"),
    ],
)
def test_file__storage_region__wrong_is_refused(keys: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        spec_of(**keys)


THREE = [offer("us-east-1", 55.0, 22.0), offer("us-west-2", 55.0, 25.0), offer("eu-west-1", 55.0, 30.0)]


def test_move__no_place_named__others_by_price_and_back_as_the_last_resort() -> None:
    found = places_to_move(spec_of(), state={"region": "us-east-1"}, to=None, offers=THREE)
    assert [one.place for one in found.options] == ["us-west-2", "eu-west-1", "us-east-1"]
    chosen = places_to_move(spec_of(), state={"region": "us-west-2"}, to="eu-west-1", offers=THREE)
    assert [one.place for one in chosen.options] == ["eu-west-1", "us-east-1", "us-west-2"]


@pytest.mark.parametrize(
    ("regions", "state", "to", "problem"),
    [
        ("auto", {}, None, "is not up"),
        ("auto", {"region": "us-east-1"}, "us-east-1", "is in us-east-1 already"),
        (["us-east-1"], {"region": "us-east-1"}, None, "its file allows us-east-1 alone"),
        (
            ["us-east-1", "us-west-2"],
            {"region": "us-east-1"},
            "eu-west-1",
            "allows the regions us-east-1, us",
        ),
        ("auto", {"region": "us-east-1"}, "us-wset-2", "is no region of aws"),
    ],
)
def test_move__place_not_possible__says_what_is(
    regions: Any, state: dict[str, Any], to: str | None, problem: str
) -> None:
    with pytest.raises((ArgumentError, ClusterError, JobFileError), match=problem):
        places_to_move(spec_of(regions=regions), state=state, to=to, offers=THREE)


def test_regions_of_the_head__written_and_read__have_the_prices_of_spot_machines() -> None:
    offers = [*THREE, offer("eu-north-1", 40.0)]
    spec = spec_of(on_demand_fallback=True, storage="s3://bucket/runs", storage_region="eu-west-1")
    regions = regions_of(choose_regions(spec, offers=offers), here="us-west-2")
    found = read_regions({"FORGE_REGIONS": to_variable(regions)})
    assert found == regions
    assert (found.storage_region, found.on_demand_usd_per_hour) == ("eu-west-1", 55.0)
    assert list(found.others) == ["us-east-1", "eu-west-1"], "eu-north-1 sells no spot machines"
    alone = regions_of(choose_regions(spec, offers=THREE[:1]), here="us-east-1")
    assert read_regions({"FORGE_REGIONS": to_variable(alone)}) is None
    assert read_regions({"FORGE_REGIONS": '{"here": 3}'}) is None and read_regions({}) is None
