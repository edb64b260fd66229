"""The catalogue of machine types, and the choice of workers from it."""

from __future__ import annotations

from typing import Any

import pytest

from forge.config import cluster_names
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError
from forge.plan.gpus import find_gpu
from forge.pricing.catalog import catalog_table, head_of, machine_types, size_of, workers_of

CLOUDS = ("aws", "gcp", "azure")


def spec_of(cloud: str = "aws", **keys: Any) -> CloudSpec:
    project = {"aws": {}, "gcp": {"project": "my-project"}, "azure": {"project": f"{0:08}-0000-0000-0000-{0:012}"}}[
        cloud
    ]
    return CloudSpec.model_validate({"name": "spot", "provider": cloud} | project | keys)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_machine_types__every_entry__is_plausible(cloud: str) -> None:
    for machine in machine_types(cloud).values():
        assert bool(machine.gpu) == (machine.num_gpus > 0), machine
        assert machine.num_cpus >= 2, machine
        assert machine.memory_gib >= 4, machine
        assert not machine.gpu or find_gpu(machine.gpu), "the plan knows memory and peak of every GPU for rent"
        if machine.usd_per_hour is not None and machine.spot_usd_per_hour is not None:
            assert 0 < machine.spot_usd_per_hour <= machine.usd_per_hour, machine


@pytest.mark.parametrize("cloud", CLOUDS)
def test_head_of__default__is_in_the_catalogue_without_gpu(cloud: str) -> None:
    assert machine_types(cloud)[head_of(spec_of(cloud))].gpu == ""


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_of__every_gpu_for_rent__finds_types_with_it(cloud: str) -> None:
    for gpu in {machine.gpu for machine in machine_types(cloud).values() if machine.gpu}:
        assert {machine_types(cloud)[name].gpu for name in workers_of(spec_of(cloud, gpu=gpu))} == {gpu}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_workers_of__no_gpu__finds_types_with_eight_cpus(cloud: str) -> None:
    found = [machine_types(cloud)[name] for name in workers_of(spec_of(cloud))]
    assert found
    assert all(not machine.gpu and machine.num_cpus >= 8 for machine in found)


def test_workers_of__listed_type_outside_the_catalogue__is_used() -> None:
    assert workers_of(spec_of(gpu="X9", instance_types=["new.large"])) == ("new.large",)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_catalogue__names__are_valid_in_a_cluster_file(cloud: str) -> None:
    names = cluster_names.CLOUDS[cloud]
    assert cluster_names.require_names(tuple(machine_types(cloud)), names.machine_type, what="a type") is None
    places = (catalog_table()["home"][cloud],) if cloud != "gcp" else tuple(catalog_table()["gcp_zones"])
    assert cluster_names.require_names(places, names.region, what="a region") is None
    assert all(cluster_names.GPU.fullmatch(machine.gpu or "none") for machine in machine_types(cloud).values())


def test_size_of__unknown_type__suggests_similar_names() -> None:
    with pytest.raises(ClusterError, match="'g2-standard-7'; similar names are g2-standard"):
        size_of("g2-standard-7", cloud="gcp")
