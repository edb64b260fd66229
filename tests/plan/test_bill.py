"""Candidates of a job, their hours and USD by hand, and what is chosen of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from forge.config.cluster import CloudSpec
from forge.config.resources import ResourcesSpec
from forge.plan.bill import Bill, frontier, is_priced, make_bill
from forge.plan.candidates import find_candidates, machine_counts
from forge.plan.data_costs import data_costs
from forge.plan.forecast import forecast_hours
from forge.plan.gpus import find_gpu
from forge.plan.inputs import CorpusFiles, PatternFiles
from forge.plan.interruptions import HOURS_PER_MONTH, Interruptions
from forge.plan.machines import interconnect
from forge.plan.plan import Plan
from forge.plan.recovery import LOSS_PAUSE_S, PLANNED_PAUSE_S, RESTART_S, change_costs
from forge.plan.space import checkpoint_bytes
from forge.plan.throughput import Estimate
from forge.pricing.catalog import head_price
from forge.pricing.offer import Offer
from forge.pricing.offers import OfferTable
from forge.pricing.transfer import cloud_of
from tests.plan.test_plan import plan
from tests.support.offers import offer


def job(**changes: Any) -> Plan:
    return plan(
        **{"resources__gpu": "auto", "resources__workers": "1..4", "training__total_steps": 10**7} | changes
    )


def bill(*offers: Offer, **changes: Any) -> Bill:
    return make_bill(job(**changes), OfferTable(offers=offers))


def reasons(found: Bill) -> dict[str, int]:
    return {one.reason: one.num_offers for one in found.left_out}


def test_candidates__on_demand__hours_and_usd_by_hand() -> None:
    [found] = [one for one in bill(offer()).candidates if one.num_machines == 2 and not one.is_spot]
    gpu = find_gpu("A10G")
    assert gpu is not None
    links = interconnect(gpus_per_node=1, gbps=5)
    trained = forecast_hours(job(), world_size=2, gpu=gpu, interconnect=links)
    assert found.hours.likely == pytest.approx(trained.likely + 180 / 3600)
    assert found.hours.low == pytest.approx(trained.low + 60 / 3600)
    assert found.hours.high == pytest.approx(trained.high + 600 / 3600)
    head = head_price("aws")
    assert head is not None
    assert found.cost.machines_usd == pytest.approx(2 * 1.0 * found.hours.likely)
    assert found.cost.head_usd == pytest.approx(head * found.hours.likely)
    # 200 GB of disk in us-east-1 cost 0.08 USD a GiB and month, for two machines and the head.
    assert found.cost.disks_usd == pytest.approx(3 * 200e9 / 2**30 * 0.08 / 730.5 * found.hours.likely)
    assert found.usd.likely == pytest.approx(sum(part for part in found.cost.parts.values() if part is not None))
    assert found.cost.unknown == ()
    assert found.num_interruptions.high == 0.0


def test_data_costs__checkpoints_and_weights__by_hand() -> None:
    made = job(checkpoint__keep=2, checkpoint__keep_best=1)
    size = checkpoint_bytes(made.model, made.job.training) / 2**30
    found = data_costs(made, cloud="aws", region="us-east-1", num_checkpoints=50)
    assert found.storage_usd_per_hour == pytest.approx(3 * size * 0.023 / 730.5)
    weights = made.model.num_trainable_parameters * 2 / 2**30
    assert found.egress_usd == pytest.approx(weights * 0.09)
    to_gcp = job(checkpoint__to="gs://bucket/runs")
    away = data_costs(to_gcp, cloud="aws", region="us-east-1", num_checkpoints=50)
    assert away.storage_usd_per_hour is None
    assert away.egress_usd == pytest.approx((weights + 50 * size) * 0.09)


def test_data_costs__unknown_prices__are_unknown_and_not_zero() -> None:
    nowhere = data_costs(job(), cloud="lambda", region="us", num_checkpoints=1)
    assert (nowhere.disk_usd_per_machine_hour, nowhere.storage_usd_per_hour, nowhere.egress_usd) == (None,) * 3
    [found, *_] = bill(offer(cloud="azure", instance="Standard_NC24ads_A100_v4", region="uaenorth")).candidates
    assert found.cost.unknown == ("disks", "storage")
    fetched = {("azure", "uaenorth", "disk"): 0.25}
    table = OfferTable(offers=(found.offer,), storage=fetched)
    [known, *_] = make_bill(job(), table).candidates
    assert known.cost.unknown == ("storage",)
    machine_hours = (known.num_machines + 1) * known.hours.likely  # and the head
    gib = CloudSpec.model_fields["disk"].default / 2**30
    assert known.cost.disks_usd == pytest.approx(0.25 * gib * machine_hours / HOURS_PER_MONTH, rel=0.01)
    pattern = PatternFiles(pattern="gs://b/*.txt", num_files=1, size_bytes=2**30, kinds={}, examples=())
    read = replace(job(), files=CorpusFiles(patterns=(pattern,), num_sampled=0))
    assert data_costs(read, cloud="aws", region="us-east-1", num_checkpoints=1).egress_usd is None
    assert data_costs(read, cloud="gcp", region="us-central1", num_checkpoints=1).egress_usd is not None
    assert [cloud_of(url) for url in ("s3://a/b", "abfs://a", "runs", "https://a")] == ["aws", "azure", None, None]


def test_candidates__spot__is_interrupted_as_often_as_its_band_says() -> None:
    [found] = [one for one in bill(offer()).candidates if one.num_machines == 4 and one.is_spot]
    running = found.hours.likely - 180 / 3600
    losses = -math.log(1 - 0.075) / 730.5 * 4 * running
    assert found.num_interruptions.likely == pytest.approx(losses)
    assert found.cost.machines_usd == pytest.approx(4 * 0.4 * found.hours.likely)
    assert found.num_restarts.likely == 0.0 < found.num_restarts.high < found.num_interruptions.high
    slower = found.uninterrupted_hours.likely + found.pausing_hours + found.waiting_hours
    assert running == pytest.approx(slower)
    assert found.waiting_hours == pytest.approx(losses / 4 * (180 + 14) / 3600, rel=0.01)


def test_candidates__trace__takes_the_place_of_the_band() -> None:
    rate = Estimate(low=0.5, likely=0.5, high=0.5)
    trace = Interruptions(per_machine_hour=rate, available=0.8, basis="trace.csv")
    found = make_bill(job(), OfferTable(offers=(offer(),)), trace=trace)
    [one] = [one for one in found.candidates if one.num_machines == 4 and one.is_spot]
    running = one.hours.likely - 180 / 3600
    assert one.num_interruptions.likely == pytest.approx(0.5 * 4 * 0.8 * running)
    assert one.cost.machines_usd == pytest.approx(4 * 0.4 * (0.8 * running + 180 / 3600))
    assert any("trace.csv: 0.5 in an hour of a machine, 80% of the machines" in note for note in found.notes)


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [
        ("1..8", 1, (1, 2, 4, 8)),
        ("3..6", 1, (3, 4, 6)),
        ("1..4", 8, ()),
        ("3", 2, ()),
        ("12", 4, (3,)),
        ("1..20", 8, (1, 2)),
        ("1..4096", 1, tuple(2**power for power in range(12))),
    ],
)
def test_machine_counts__fewest_most_and_powers_of_two(workers: str, gpus: int, expected: tuple[int, ...]) -> None:
    resources = ResourcesSpec.model_validate({"workers": workers})
    assert machine_counts(resources, gpus_per_machine=gpus) == expected


def test_change_costs__each_engine_and_number_of_machines() -> None:
    elastic = job(checkpoint__every="100 steps", checkpoint__snapshot_every=3)
    with_notice = change_costs(elastic, num_machines=4, step_s=2.0, level="likely")
    assert (with_notice.pause_s, with_notice.saved_every_s) == (2 * PLANNED_PAUSE_S, 0.0)
    without = change_costs(elastic, num_machines=4, step_s=2.0, level="high")
    # In 7 % of the losses the copy is lost, too: a restart, and half of 100 steps of 2 s.
    assert without.pause_s == pytest.approx(LOSS_PAUSE_S + PLANNED_PAUSE_S + 0.07 * (RESTART_S + 100.0))
    assert (without.saved_every_s, without.restarts_per_loss) == (6.0, 0.07)
    alone = change_costs(elastic, num_machines=1, step_s=2.0, level="high")
    assert (alone.pause_s, alone.saved_every_s, alone.restarts_per_loss) == (RESTART_S, 200.0, 1.0)
    restarting = job(resources__engine="ray-train", checkpoint__every="10m")
    found = change_costs(restarting, num_machines=4, step_s=2.0, level="likely")
    assert (found.pause_s, found.saved_every_s, found.changes_per_loss) == (2 * RESTART_S, 600.0, 2)


def test_candidates__offers_that_cannot_be_used__are_left_out_with_the_reason() -> None:
    found = bill(
        offer(),
        offer(instance="g4dn.xlarge", gpu="T4"),
        offer(instance="mi300", gpu="MI300X"),
        offer(instance="p4d.24xlarge", gpu="A100-40GB", num_gpus=8),
        offer(instance="free", region="us-west-1", usd_per_hour=0.0, spot_usd_per_hour=0.0),
        offer(instance="same", spot_usd_per_hour=1.0),
        offer(instance="m6i.xlarge", gpu="", num_gpus=0),
    )
    assert reasons(found) == {
        "the GPU does not compute in bf16, the job's precision": 1,
        "forge does not know the GPU's speed": 1,
        "their GPUs cannot be the workers of resources.workers: 1..4": 1,
        "no price is known": 1,
        "no spot machines, or none with a known price": 1,
    }
    [unpriced] = [one for one in found.left_out if one.reason == "no price is known"]
    assert unpriced.examples == ("free in us-west-1",)
    assert {one.offer.instance for one in found.candidates} == {"g5.2xlarge", "same"}
    assert not any(one.is_spot for one in found.candidates if one.offer.instance == "same")


def test_candidates__other_gpu_and_rate_above_the_limit__are_left_out() -> None:
    found = bill(offer(), offer(instance="b", gpu="L4"), resources__gpu="A10G", resources__max_usd_per_hour=2.5)
    assert reasons(found) == {
        "another GPU than resources.gpu: A10G": 1,
        "above resources.max_usd_per_hour: 2.5": 1,
    }
    assert max(one.usd_per_hour for one in found.candidates) == 2.0


def test_candidates__model_too_large_for_a_gpu__does_not_fit() -> None:
    made = job()
    large = replace(made, model=replace(made.model, num_parameters=10**10, num_trainable_parameters=10**10))
    found, left_out = find_candidates(large, [offer()])
    assert found == ()
    assert [(one.reason, one.examples) for one in left_out] == [
        ("the job does not fit in the GPU's memory", ("A10G (24 GiB)",))
    ]


def test_candidates__zones_of_a_region__only_the_cheapest_remains() -> None:
    zones = [offer(zone=f"use1-az{i}", spot_usd_per_hour=price) for i, price in enumerate((0.5, 0.3, 0.4))]
    found = bill(*zones, resources__workers="1")
    assert [(one.offer.zone, one.is_spot) for one in found.candidates] == [("use1-az1", True), ("use1-az0", False)]


def test_frontier__no_candidate_on_it_is_beaten() -> None:
    found = bill(offer(), offer(instance="fast", gpu="A100-80GB", usd_per_hour=3.0, spot_usd_per_hour=1.5))
    line = found.frontier
    assert [one.usd.likely for one in line] == sorted(one.usd.likely for one in line)
    assert [one.hours.likely for one in line] == sorted((one.hours.likely for one in line), reverse=True)
    for one in found.candidates:
        assert any(
            other.usd.likely <= one.usd.likely and other.hours.likely <= 1.01 * one.hours.likely for other in line
        )
    assert frontier(()) == ()


def test_choices__limits_that_can_be_met__are_met_at_the_least_cost() -> None:
    free = bill(offer()).candidates
    hours, usd = sorted(one.hours.likely for one in free)[2], sorted(one.usd.likely for one in free)[3]
    found = bill(offer(), resources__max_hours=hours, resources__max_usd=usd)
    cheapest, fastest = found.choices
    assert cheapest.candidate is not None and fastest.candidate is not None
    assert cheapest.candidate.usd.likely == min(one.usd.likely for one in free if one.hours.likely <= hours)
    assert fastest.candidate.usd.likely <= usd
    least = min(one.hours.likely for one in free if one.usd.likely <= usd)
    assert fastest.candidate.hours.likely <= 1.01 * least
    assert cheapest.question == f"cheapest within {hours:.2f} h"


def test_choices__limits_that_cannot_be_met__say_what_is_possible() -> None:
    slow, dear = bill(offer(), resources__max_hours=0.01, resources__max_usd=0.01).choices
    assert slow.candidate is None and dear.candidate is None
    assert slow.problem is not None and dear.problem is not None
    assert slow.problem.startswith("no candidate is likely to take at most 36s; the fastest takes ")
    assert slow.problem.endswith(" x g5.2xlarge (A10G), spot, aws us-east-1")
    assert dear.problem.startswith("no candidate is likely to cost at most 0.01 USD; the cheapest takes ")


def test_bill__no_offers__has_no_choice() -> None:
    found = bill()
    assert (found.candidates, found.frontier, found.choices) == ((), (), ())
    assert not is_priced(plan())
    assert is_priced(job())
