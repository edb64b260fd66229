"""The links between a cluster's GPUs: of its machine type where the catalogue has it, else assumed and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.config.cluster import CloudSpec, KubernetesSpec, SshSpec
from forge.plan.cluster_links import cluster_links
from forge.plan.forecast import forecast
from tests.plan.test_forecast import A100, LONG
from tests.plan.test_hpz import planned
from tests.plan.test_plan import plan

MEASURE = "; to measure them: forge cluster probe big"
ASSUMED = "assumed: 8 GPUs in a machine, 100 Gbit/s between machines"


def cloud(**keys: Any) -> CloudSpec:
    return CloudSpec.model_validate({"name": "big", "provider": "aws", "gpu": "A100"} | keys, strict=False)


def test_links__one_machine_type__are_those_of_the_catalogue() -> None:
    found = cluster_links(cloud())
    assert found.note.removesuffix(MEASURE) == "8 GPUs in a machine, 400 Gbit/s between machines: p4d.24xlarge"
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
    assert found.note == (
        "4 GPUs in a machine by the cluster file; assumed: 100 Gbit/s between machines; to measure them: forge "
        "cluster probe pods"
    )
    assert found.interconnect.gpus_per_node == 4


def test_links__unknown_machines__are_assumed() -> None:
    own = SshSpec.model_validate({"name": "lab", "provider": "ssh", "machines": ["a", "b"]})
    unknown = cloud(gpu="X9", instance_types=["p9.huge"])
    assert cluster_links(None).note == ASSUMED
    assert cluster_links(own).note == f"{ASSUMED}; to measure them: forge cluster probe lab"
    assert cluster_links(unknown).note == ASSUMED + MEASURE


def test_links__running_nodes__their_gpus_before_those_of_the_file() -> None:
    own = SshSpec.model_validate({"name": "lab", "provider": "ssh", "machines": ["a", "b"]})
    found = cluster_links(own, gpus_of_nodes=(4, 4))
    assert found.note.startswith("4 GPUs in a machine by the nodes that run; assumed: 100 Gbit/s between machines")
    assert (found.interconnect.gpus_per_node, found.warnings) == (4, ())
    found = cluster_links(cloud(), gpus_of_nodes=(4, 8, 8))
    assert found.note.startswith("8 GPUs in a machine by the nodes that run, 400 Gbit/s between machines: p4d.24xl")
    assert found.warnings == (
        "nodes have different numbers of GPUs (2 with 8, 1 with 4): groups of ranks are planned for 8",
    )
    assert cluster_links(own, gpus_of_nodes=(8, 4)).interconnect.gpus_per_node == 4


@pytest.mark.parametrize(("workers", "size"), [(8, 4), (16, 4), (12, 4)])
def test_groups__four_gpus_in_a_running_node__are_within_it(workers: int, size: int) -> None:
    links = replace(cluster_links(None, gpus_of_nodes=(4,) * 4).interconnect, inter_node_bytes_per_s=3e9)
    world = planned(workers=str(workers), links=links, zero={"shard_group_size": "auto"}).for_world_size(workers)
    assert (world.group_size, world.node_group_size) == (size, size)
    assert planned(workers="8", links=None, zero={"shard_group_size": "auto"}).for_world_size(8).group_size == 1


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
