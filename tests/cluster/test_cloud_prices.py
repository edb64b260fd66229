"""What AWS answers, by a service on loopback: prices, regions, refusals; and what is ended when a cluster ends.

No machine is ever started here by Ray's launcher, for its addresses would be somebody's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import ClusterRecord, NodeProgress, cluster_lock, list_records, read_record, write_record
from forge.cluster.cloud import aws, aws_network
from forge.cluster.cloud.provider import CloudCluster
from forge.cluster.registry import find_cluster
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError, JobFileError
from tests.support.cloud_box import IMAGE, PYTHON, Api, Refusal, serve_api

REGIONS = ("us-east-1", "us-west-2", "eu-west-1")


@pytest.fixture(scope="module")
def _service() -> Iterator[Api]:
    with serve_api() as api:
        yield api


@pytest.fixture
def api(_service: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """An empty cloud; this machine knows of no cluster in it."""
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    _service.reset()
    return _service


@pytest.fixture(scope="module")
def public_key(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("key") / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True, timeout=30)
    return " ".join(Path(f"{file}.pub").read_text().split()[:2])


def spec_of(**keys: Any) -> CloudSpec:
    values = {
        "name": "big",
        "provider": "aws",
        "gpu": "A10G",
        "instance_types": ["g5.xlarge"],
        "regions": list(REGIONS),
        "allow_from": "203.0.113.4/32",
        "image": IMAGE,
        "python": PYTHON,
    }
    return CloudSpec.model_validate(values | keys, strict=False)


def start(api: Api, region: str, *, name: str = "big", kind: str = "worker", count: int = 1) -> None:
    """Rent machines as Ray's launcher does."""
    tags = {"ray-cluster-name": name, "ray-node-type": kind, "ray-user-node-type": f"spot-{kind}"}
    api.ec2(region).run_instances(
        ImageId=IMAGE,
        InstanceType="g5.xlarge",
        MinCount=count,
        MaxCount=count,
        TagSpecifications=[
            {"ResourceType": "instance", "Tags": [{"Key": key, "Value": value} for key, value in tags.items()]}
        ],
    )


def ignore(stage: NodeProgress) -> None:
    """News that nobody waits for."""


@pytest.mark.slow
def test_the_regions_are_tried_in_order_of_the_spot_price_of_now(api: Api) -> None:
    api.spot_prices = {
        "us-east-1": {"g5.xlarge": 0.5},
        "us-west-2": {"g5.xlarge": 0.3},
        "eu-west-1": {"g5.xlarge": 0.4},
    }
    api.refusals = [Refusal("RunInstances", region, "InsufficientInstanceCapacity") for region in REGIONS]
    stages: list[NodeProgress] = []
    with pytest.raises(ClusterError) as caught:
        CloudCluster(spec_of()).up(on_progress=stages.append)
    failed = [stage.name for stage in stages if stage.is_failure]
    assert failed == ["us-west-2", "eu-west-1", "us-east-1"]
    assert "no region has machines to rent now (us-west-2: InsufficientInstanceCapacity, eu-" in str(caught.value)
    assert all(not api.instances(region) and _groups(api, region) == ["default"] for region in REGIONS)
    assert not api.client("iam").list_roles()["Roles"]
    assert list_records() == []


@pytest.mark.slow
def test_the_next_region_is_tried_for_want_of_room_and_for_nothing_else(api: Api) -> None:
    api.spot_prices = {region: {"g5.xlarge": price} for region, price in zip(REGIONS, (0.5, 0.3, 0.6), strict=True)}
    api.refusals = [
        Refusal("RunInstances", "us-west-2", "MaxSpotInstanceCountExceeded"),
        Refusal("RunInstances", "us-east-1", "InvalidParameterValue"),
    ]
    cluster, stages = CloudCluster(spec_of()), list[NodeProgress]()
    with pytest.raises(ClusterError, match=r"could not be started.*InvalidParameterValue.*forge cluster down big"):
        cluster.up(on_progress=stages.append)
    assert [stage.name for stage in stages if stage.is_failure] == ["us-west-2"]
    assert _groups(api, "us-west-2") == ["default"], "what was made in vain is taken away"
    assert not api.calls["RunInstances", "eu-west-1"]
    assert read_record("big") is not None
    assert cluster.down(on_progress=ignore) == []
    assert list_records() == []
    assert _groups(api, "us-east-1") == ["default"]


@pytest.mark.slow
def test_auto_means_every_region_that_has_the_machine(api: Api) -> None:
    everywhere = aws.find_regions(spec_of(regions=["auto"]), names=["g5.xlarge"])
    assert {"us-east-1", "eu-west-1"} <= set(everywhere)
    rare = aws.find_regions(spec_of(regions=["auto"]), names=["p4de.24xlarge"])
    assert "us-east-1" in rare and len(rare) < len(everywhere)
    with pytest.raises(ClusterError, match=r"no region of AWS that this account may use has g99\.huge"):
        aws.find_regions(spec_of(regions=["auto"]), names=["g99.huge"])


def test_of_several_zones_the_cheapest_price_counts_and_a_region_may_have_none(api: Api) -> None:
    api.spot_prices = {"us-east-1": {"g5.xlarge": 0.5}}
    found = aws.spot_prices(["us-east-1", "us-west-2"], names=["g5.xlarge", "g5.2xlarge"])
    assert found == {"us-east-1": {"g5.xlarge": 0.5}, "us-west-2": {}}


def test_a_place_made_twice_is_one_and_lets_in_whoever_asked_last(api: Api, public_key: str) -> None:
    for address in ("203.0.113.4/32", "198.51.100.0/24"):
        place = aws_network.prepare(
            spec_of(storage="s3://bucket/runs"), region="us-east-1", public_key=public_key, allow_from=address
        )
    ec2 = api.ec2("us-east-1")
    (group,) = ec2.describe_security_groups(GroupIds=[place.security_group])["SecurityGroups"]
    own, ssh = group["IpPermissions"]
    assert (own["IpProtocol"], [pair["GroupId"] for pair in own["UserIdGroupPairs"]]) == (
        "-1",
        [place.security_group],
    )
    assert (ssh["FromPort"], ssh["ToPort"], [entry["CidrIp"] for entry in ssh["IpRanges"]]) == (
        22,
        22,
        ["198.51.100.0/24"],
    )
    assert not own["IpRanges"] and len(place.subnets) > 1
    assert [pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]] == ["forge-big"]
    assert aws_network.remove_place("big", region="us-east-1") == []
    aws_network.remove_profiles("big")
    assert not ec2.describe_key_pairs()["KeyPairs"]
    assert not api.client("iam").list_roles()["Roles"]
    assert not api.client("iam").list_instance_profiles()["InstanceProfiles"]


@pytest.mark.slow
def test_down_ends_all_machines_in_every_region_that_was_tried_and_no_others(api: Api) -> None:
    write_record(record := _record(tried=["us-east-1", "us-west-2"]))
    start(api, "us-east-1", kind="head")
    start(api, "us-east-1", count=3)
    start(api, "us-west-2", count=2)
    start(api, "us-west-2", name="another")
    cluster = find_cluster("big")
    assert isinstance(cluster, CloudCluster)
    assert len(cluster.status().nodes) == 6
    assert cluster.down(on_progress=ignore) == []
    assert not api.alive("us-east-1")
    assert len(api.alive("us-west-2")) == 1
    assert record.name == "big" and list_records() == []


@pytest.mark.slow
def test_a_cluster_that_cannot_be_asked_about_is_not_forgotten(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(_record(tried=["us-east-1"]))
    start(api, "us-east-1", kind="head")
    api.refusals = [Refusal("TerminateInstances", "us-east-1", "UnauthorizedOperation")]
    with pytest.raises(ClusterError, match=r"may not do TerminateInstances in us-east-1"):
        find_cluster("big").down(on_progress=ignore)
    assert read_record("big") is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="AWS's service in us-east-1 cannot be reached"):
        find_cluster("big").down(on_progress=ignore)
    assert read_record("big") is not None


def test_the_status_of_a_cluster_shows_what_each_machine_costs(api: Api) -> None:
    prices = {"spot-worker": 0.4, "spot-head": 0.192}
    write_record(_record(tried=["us-east-1"], region="us-east-1", private_address="10.0.0.1", prices=prices))
    start(api, "us-east-1", kind="head")
    start(api, "us-east-1", count=2)
    status = find_cluster("big").status()
    assert [node.kind for node in status.nodes] == ["head", "worker", "worker"]
    assert [node.machine_type for node in status.nodes] == ["g5.xlarge"] * 3
    assert status.usd_per_hour == pytest.approx(0.992)
    assert status.address == "10.0.0.1:6379"


def test_without_credentials_it_says_how_to_give_them_and_remembers_nothing(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no credentials for AWS.*aws configure") as caught:
        CloudCluster(spec_of()).up(on_progress=ignore)
    assert caught.value.exit_code == 3
    assert list_records() == []


def test_credentials_that_are_refused_are_told_apart_from_rights_that_are_missing(api: Api) -> None:
    api.refusals = [Refusal("DescribeSpotPriceHistory", "us-east-1", "AuthFailure")]
    with pytest.raises(ClusterError, match="does not accept the credentials in us-east-1: AuthFailure"):
        CloudCluster(spec_of()).up(on_progress=ignore)
    api.refusals = [Refusal("CreateSecurityGroup", "us-east-1", "UnauthorizedOperation")]
    with pytest.raises(ClusterError, match=r"may not do CreateSecurityGroup in us-east-1.*docs/operations\.md"):
        CloudCluster(spec_of()).up(on_progress=ignore)


def test_a_second_up_meanwhile_is_refused(api: Api) -> None:
    with cluster_lock("big"), pytest.raises(ClusterError, match="another forge process is starting or stopping"):
        CloudCluster(spec_of()).up(on_progress=ignore)
    assert not api.instances("us-east-1")


def test_the_name_of_a_cluster_elsewhere_is_not_taken(api: Api) -> None:
    write_record(ClusterRecord(name="big", provider="ssh", spec={}))
    with pytest.raises(ClusterError, match="a cluster 'big' on ssh is known already; give this one another name"):
        CloudCluster(spec_of()).up(on_progress=ignore)
    record = read_record("big")
    assert record is not None and record.provider == "ssh"
    assert not api.calls


def test_a_file_that_asks_for_what_cannot_be_had_costs_nothing(api: Api) -> None:
    with pytest.raises(JobFileError, match="does not pay for the head"):
        CloudCluster(spec_of(max_usd_per_hour=0.3)).up(on_progress=ignore)
    assert list_records() == []
    assert not api.calls


def _groups(api: Api, region: str) -> list[str]:
    return [group["GroupName"] for group in api.ec2(region).describe_security_groups()["SecurityGroups"]]


def _record(**facts: Any) -> ClusterRecord:
    spec = spec_of().model_dump(mode="json", exclude_unset=True)
    return ClusterRecord(name="big", provider="aws", spec=spec, state=facts)
