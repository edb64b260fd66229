"""The links between a cluster's GPUs: of its machine type where the catalogue has it, else assumed and named."""

from __future__ import annotations

from typing import Any

import pytest

from forge.config.cluster import CloudSpec, KubernetesSpec, SshSpec
from forge.plan.cluster_links import cluster_links
from forge.plan.forecast import forecast
from tests.plan.test_forecast import A100, LONG
from tests.plan.test_plan import plan

ASSUMED = "assumed: 8 GPUs in a machine, 100 Gbit/s between machines"


def cloud(**keys: Any) -> CloudSpec:
    return CloudSpec.model_validate({"name": "big", "provider": "aws", "gpu": "A100"} | keys, strict=False)


def test_links__one_machine_type__are_those_of_the_catalogue() -> None:
    found = cluster_links(cloud())
    assert found.note == "8 GPUs in a machine, 400 Gbit/s between machines: p4d.24xlarge"
    assert (found.interconnect.gpus_per_node, found.interconnect.inter_node_bytes_per_s) == (8, 50e9)


def test_links__several_types__are_of_the_cheapest_that_is_rented_first() -> None:
    found = cluster_links(cloud(gpu="A10G"))
    assert found.note.startswith("1 GPU in a machine, 2.5 Gbit/s between machines: g5.xlarge, the cheapest of the ")
    dear = {"g5.xlarge": 9.0, "g5.2xlarge": 9.0, "g5.12xlarge": 1.0, "g5.48xlarge": 9.0}
    assert cluster_links(cloud(gpu="A10G", usd_per_hour=dear)).interconnect.gpus_per_node == 4


def test_links__pods__have_their_gpus_and_an_assumed_network() -> None:
    pods = KubernetesSpec.model_validate(
        {"name": "pods", "provider": "kubernetes", "image": "forge:1", "gpu": "A100", "gpus_per_worker": 4}
    )
    found = cluster_links(pods)
    assert found.note == "4 GPUs in a machine by the cluster file; assumed: 100 Gbit/s between machines"
    assert found.interconnect.gpus_per_node == 4


def test_links__unknown_machines__are_assumed() -> None:
    own = SshSpec.model_validate({"name": "lab", "provider": "ssh", "machines": ["a", "b"]})
    unknown = cloud(gpu="X9", instance_types=["p9.huge"])
    assert [cluster_links(spec).note for spec in (None, own, unknown)] == [ASSUMED] * 3


@pytest.mark.parametrize(("spec", "note"), [(None, ASSUMED), (cloud(), cluster_links(cloud()).note)])
def test_forecast__names_its_links(spec: CloudSpec | None, note: str) -> None:
    made = plan(hardware=A100, **LONG)
    assert note in forecast(made, links=cluster_links(spec)).notes


def test_forecast__slow_network__takes_longer_only_beyond_one_machine() -> None:
    made = plan(hardware=A100, **LONG)
    fast, slow = (
        forecast(made, links=cluster_links(cloud(provider=cloud_, project=project)))
        for cloud_, project in (("aws", None), ("gcp", "my-project"))  # 8 GPUs at 400 Gbit/s, 1 at 24
    )
    assert slow.worlds[0].hours == fast.worlds[0].hours
    assert slow.worlds[-1].hours.likely > fast.worlds[-1].hours.likely
