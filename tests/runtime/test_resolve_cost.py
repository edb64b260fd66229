"""The cost that a plan carries: of a cluster that was started from here, or of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from forge.cluster.base import ClusterRecord, write_record
from forge.cluster.registry import running_spec
from forge.errors import ArgumentError
from forge.plan.forecast import forecast
from forge.plan.plan import Plan
from forge.runtime.resolve_cost import with_cost, with_own_cost
from tests.plan.test_bill import job
from tests.plan.test_forecast import A100


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORGE_USD_PER_HOUR", raising=False)


def planned() -> Plan:
    made = replace(job(), hardware=A100)
    return replace(made, forecast=forecast(made))


def test_with_own_cost__machine_with_a_price__is_its_price_for_the_likely_hours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = planned()
    assert with_own_cost(made) == made
    monkeypatch.setenv("FORGE_USD_PER_HOUR", "2.5")
    found = with_own_cost(made).forecast
    assert found is not None and found.cost is not None
    assert found.cost.usd.likely == pytest.approx(2.5 * found.worlds[-1].hours.likely)
    assert found.cost.machines == "this machine"
    monkeypatch.setenv("FORGE_USD_PER_HOUR", "cheap")
    with pytest.raises(ArgumentError, match="must be a price"):
        with_own_cost(made)


def test_with_cost__cluster_that_is_up__is_priced_in_its_region() -> None:
    spec = {"name": "spot", "provider": "aws", "gpu": "L4", "workers": "0..2", "instance_types": ["g6.xlarge"]}
    write_record(ClusterRecord(name="spot", provider="aws", spec=spec, state={"region": "us-west-2"}))
    found = with_cost(planned(), running_spec("spot"), usd_per_hour=4.0).forecast
    assert found is not None and found.cost is not None
    assert found.cost.machines.startswith("2 x g6.xlarge (L4), spot, aws us-west-2")
    assert running_spec("other") is None
    assert with_cost(planned(), None, usd_per_hour=4.0) == planned()
