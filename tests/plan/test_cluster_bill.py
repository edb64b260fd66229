"""What a job costs on a cluster that is described by a file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.config.cluster import CloudSpec, SshSpec
from forge.plan.cluster_bill import cluster_cost
from forge.plan.durations import Forecast
from forge.plan.forecast import forecast
from forge.plan.plan import plan_from_json, plan_to_json
from forge.plan.search import SearchPlan
from forge.pricing.offers import OfferTable
from tests.plan.test_bill import bill, job
from tests.plan.test_forecast import A100
from tests.plan.test_plan import plan
from tests.support.offers import offer


def spec(**changes: Any) -> CloudSpec:
    body = {"name": "spot", "provider": "aws", "gpu": "A10G", "workers": "0..3", "regions": ["us-east-1"]}
    return CloudSpec.model_validate(body | changes)


def test_cluster_cost__rented__as_many_machines_as_the_file_and_the_job_allow() -> None:
    offers = [offer(), offer(instance="g5.xlarge", spot_usd_per_hour=0.3), offer(region="eu-west-1")]
    found = cluster_cost(job(), spec(), OfferTable(offers=offers), usd_per_hour=2.0)
    assert found is not None
    assert found.machines == "3 x g5.xlarge (A10G), spot, aws us-east-1"
    assert found.usd_per_hour == 2.0
    on_demand = cluster_cost(job(), spec(spot=False), OfferTable(offers=offers), usd_per_hour=2.0)
    assert on_demand is not None
    assert "on demand" in on_demand.machines and on_demand.usd.likely > found.usd.likely


def test_cluster_cost__price_in_the_file__takes_the_place_of_the_list() -> None:
    stated = cluster_cost(
        job(), spec(usd_per_hour={"g5.2xlarge": 10.0}), OfferTable(offers=(offer(),)), usd_per_hour=None
    )
    [listed] = [one for one in bill(offer(), resources__workers="3").candidates if one.is_spot]
    assert stated is not None
    assert stated.usd.likely - listed.usd.likely == pytest.approx(3 * 9.6 * stated.hours.likely)


def test_cluster_cost__machines_of_the_user__hours_at_their_price() -> None:
    machines = SshSpec.model_validate({"name": "lab", "provider": "ssh", "machines": ["a", "b"], "usd_per_hour": 3})
    made = plan(hardware=A100)
    made = replace(made, forecast=forecast(made))
    found = cluster_cost(made, machines, OfferTable(offers=()), usd_per_hour=6.0)
    assert found is not None and made.forecast is not None
    assert found.usd.likely == pytest.approx(6.0 * made.forecast.worlds[-1].hours.likely)
    assert cluster_cost(made, machines, OfferTable(offers=()), usd_per_hour=None) is None
    unknown = replace(made, forecast=Forecast(worlds=(), notes=()))
    assert cluster_cost(unknown, machines, OfferTable(offers=()), usd_per_hour=6.0) is None
    written = replace(made, forecast=replace(made.forecast, cost=found))
    assert plan_from_json(plan_to_json(written)) == written


def test_cluster_cost__search__counts_every_trial() -> None:
    machines = SshSpec.model_validate({"name": "lab", "provider": "ssh", "machines": ["a", "b"], "usd_per_hour": 3})
    made = plan(hardware=A100)
    made = replace(made, forecast=forecast(made))
    search = SearchPlan(num_trials=10, num_combinations=None, trials_at_once=4, num_slots=4)
    found = cluster_cost(replace(made, search=search), machines, OfferTable(offers=()), usd_per_hour=6.0)
    once = cluster_cost(made, machines, OfferTable(offers=()), usd_per_hour=6.0)
    assert found is not None and once is not None
    assert found.usd.likely == pytest.approx(3 * once.usd.likely)
    assert found.machines.endswith("for 10 trials, if none is stopped early")


def test_cluster_cost__limit_of_the_file__is_kept() -> None:
    found = cluster_cost(job(), spec(max_usd_per_hour=1.1), OfferTable(offers=(offer(),)), usd_per_hour=None)
    assert found is not None
    assert found.machines.startswith("2 x g5.2xlarge")
