"""What a move to another region costs: traffic worked out by hand, and what is unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.config.cluster import CloudSpec
from forge.config.load import load_job
from forge.errors import JobFileError
from forge.plan.move_costs import DEAREST_USD_PER_GIB, describe_move, move_costs, moving_note
from forge.plan.plan import Plan
from forge.plan.space import checkpoint_bytes
from tests.support.jobs import tiny_plan

PLAN = tiny_plan()
GIB = checkpoint_bytes(PLAN.model, PLAN.job.training) / 2**30


def planned(**changes: Any) -> Plan:
    return tiny_plan(resources__deadline="48h", **changes)


def file_of(**keys: Any) -> CloudSpec:
    values = {"name": "big", "provider": "aws", "gpu": "A10G", "storage": "s3://bucket/runs", **keys}
    return CloudSpec.model_validate(values, strict=False)


def test_move__bucket_stays__is_read_from_its_region_and_written_from_the_new_one() -> None:
    costs = move_costs(PLAN, cloud="aws", storage_region="us-east-1", to="ap-south-1")
    assert costs.read_usd == pytest.approx(0.02 * GIB)
    assert costs.write_usd == pytest.approx(0.086 * GIB)
    back = move_costs(PLAN, cloud="aws", storage_region="us-east-1", to="us-east-1")
    assert (back.read_usd, back.write_usd) == (0.0, 0.0)


def test_move__zone_of_gcp__counts_as_its_region() -> None:
    same = move_costs(PLAN, cloud="gcp", storage_region="us-central1", to="us-central1-b")
    other = move_costs(PLAN, cloud="gcp", storage_region="us-central1", to="europe-west4-a")
    assert same.read_usd == 0.0 and other.read_usd == pytest.approx(0.05 * GIB)


def test_move__bucket_in_another_cloud__is_read_through_the_internet() -> None:
    plan = tiny_plan(checkpoint__to="gs://bucket/runs")
    costs = move_costs(plan, cloud="aws", storage_region="us-central1", to="us-west-2")
    assert (costs.read_usd, costs.write_usd) == (pytest.approx(0.12 * GIB), pytest.approx(0.09 * GIB))


def test_move__unknown_region_of_the_bucket__is_unknown_and_never_zero() -> None:
    costs = move_costs(PLAN, cloud="aws", storage_region=None, to="us-west-2")
    assert (costs.read_usd, costs.write_usd) == (None, None)
    assert describe_move(costs).count("an unknown price") == 2
    assert DEAREST_USD_PER_GIB > 0


def test_note__several_regions__has_price_and_pause() -> None:
    spec = file_of(storage_region="us-east-1")
    note = moving_note(planned(), spec, regions=["us-east-1", "us-west-2", "us-west-2"])
    assert note and "2 regions by forge cluster move: 15m 00s without machines, and up to 0.00 USD" in note
    follows = moving_note(planned(resources__move_regions=True), spec, regions=["us-east-1", "us-west-2"])
    assert follows and "by itself while it is followed" in follows


def test_note__one_region_or_unknown_bucket__says_so() -> None:
    one = moving_note(planned(), file_of(), regions=["us-east-1"])
    assert one == "the run stays in one region: 'big' allows us-east-1 alone"
    unknown = moving_note(planned(), file_of(), regions=["us-east-1", "us-west-2"])
    assert unknown and "unknown price" in unknown and "give storage_region" in unknown
    assert moving_note(PLAN, file_of(), regions=["us-east-1", "us-west-2"]) is None


def test_move_regions__without_deadline__is_refused(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: a\nmodel: {architecture: llama}\ndata: {files: a.txt}\nresources: {move_regions: true}\n")
    with pytest.raises(JobFileError, match=r"requires resources\.deadline"):
        load_job(job)
