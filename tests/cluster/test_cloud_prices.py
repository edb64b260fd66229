"""What AWS answers, by a service on loopback: prices, regions, refusals; and what is ended when a cluster ends.

Ray's launcher starts no machine here, because moto's addresses could exist on the internet.
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


def ignore(_: NodeProgress) -> None:
    pass


@pytest.mark.slow
def test_up__regions__are_tried_by_current_spot_price(api: Api) -> None:
    api.spot_prices = {
        "us-east-1": {"g5.xlarge": 0.5},
        "us-west-2": {"g5.xlarge": 0.3},
        "eu-west-1": {"g5.xlarge": 0.4},
    }
    api.refusals = [Refusal("RunInstances", region, "InsufficientInstanceCapacity") for region in REGIONS]
    progress: list[NodeProgress] = []
    with pytest.raises(ClusterError) as caught:
        CloudCluster(spec_of()).up(on_progress=progress.append)
    failed = [one.name for one in progress if one.is_failure]
    assert failed == ["us-west-2", "eu-west-1", "us-east-1"]
    assert "no region has capacity now (us-west-2: InsufficientInstanceCapacity, eu-" in str(caught.value)
    assert all(not api.instances(region) and _groups(api, region) == ["default"] for region in REGIONS)
    assert not api.client("iam").list_roles()["Roles"]
    assert list_records() == []


@pytest.mark.slow
def test_up__next_region__is_tried_only_for_lack_of_capacity(api: Api) -> None:
    api.spot_prices = {region: {"g5.xlarge": price} for region, price in zip(REGIONS, (0.5, 0.3, 0.6), strict=True)}
    api.refusals = [
        Refusal("RunInstances", "us-west-2", "MaxSpotInstanceCountExceeded"),
        Refusal("RunInstances", "us-east-1", "InvalidParameterValue"),
    ]
    cluster, progress = CloudCluster(spec_of()), list[NodeProgress]()
    with pytest.raises(ClusterError, match=r"could not be started.*InvalidParameterValue.*forge cluster down big"):
        cluster.up(on_progress=progress.append)
    assert [one.name for one in progress if one.is_failure] == ["us-west-2"]
    assert _groups(api, "us-west-2") == ["default"], "what was created without success is deleted"
    assert not api.calls["RunInstances", "eu-west-1"]
    assert read_record("big") is not None
    assert cluster.down(on_progress=ignore) == []
    assert list_records() == []
    assert _groups(api, "us-east-1") == ["default"]


@pytest.mark.slow
def test_find_regions__auto__is_every_region_with_the_type(api: Api) -> None:
    everywhere = aws.find_regions(spec_of(regions=["auto"]), names=["g5.xlarge"])
    assert {"us-east-1", "eu-west-1"} <= set(everywhere)
    rare = aws.find_regions(spec_of(regions=["auto"]), names=["p4de.24xlarge"])
    assert "us-east-1" in rare and len(rare) < len(everywhere)
    with pytest.raises(ClusterError, match=r"no AWS region of this account has g99\.huge"):
        aws.find_regions(spec_of(regions=["auto"]), names=["g99.huge"])


def test_spot_prices__cheapest_zone__and_regions_without(api: Api) -> None:
    api.spot_prices = {"us-east-1": {"g5.xlarge": 0.5}}
    found = aws.spot_prices(["us-east-1", "us-west-2"], names=["g5.xlarge", "g5.2xlarge"])
    assert found == {"us-east-1": {"g5.xlarge": 0.5}, "us-west-2": {}}


def test_prepare_network__twice__is_one_with_the_last_allow_from(api: Api, public_key: str) -> None:
    for address in ("203.0.113.4/32", "198.51.100.0/24"):
        network = aws_network.prepare_network(
            spec_of(storage="s3://bucket/runs"), region="us-east-1", public_key=public_key, allow_from=address
        )
    ec2 = api.ec2("us-east-1")
    (group,) = ec2.describe_security_groups(GroupIds=[network.security_group])["SecurityGroups"]
    own, ssh = group["IpPermissions"]
    assert (own["IpProtocol"], [pair["GroupId"] for pair in own["UserIdGroupPairs"]]) == (
        "-1",
        [network.security_group],
    )
    assert (ssh["FromPort"], ssh["ToPort"], [entry["CidrIp"] for entry in ssh["IpRanges"]]) == (
        22,
        22,
        ["198.51.100.0/24"],
    )
    assert not own["IpRanges"] and len(network.subnets) > 1
    assert [pair["KeyName"] for pair in ec2.describe_key_pairs()["KeyPairs"]] == ["forge-big"]
    assert aws_network.remove_network("big", region="us-east-1") == []
    aws_network.remove_profiles("big")
    assert not ec2.describe_key_pairs()["KeyPairs"]
    assert not api.client("iam").list_roles()["Roles"]
    assert not api.client("iam").list_instance_profiles()["InstanceProfiles"]


@pytest.mark.slow
def test_down__terminates_the_cluster_in_all_tried_regions_only(api: Api) -> None:
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
def test_down__aws_does_not_answer__keeps_the_record(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(_record(tried=["us-east-1"]))
    start(api, "us-east-1", kind="head")
    api.refusals = [Refusal("TerminateInstances", "us-east-1", "UnauthorizedOperation")]
    with pytest.raises(ClusterError, match=r"do not allow TerminateInstances in us-east-1"):
        find_cluster("big").down(on_progress=ignore)
    assert read_record("big") is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ClusterError, match="AWS's service in us-east-1 cannot be reached"):
        find_cluster("big").down(on_progress=ignore)
    assert read_record("big") is not None


def test_status__shows_the_price_of_each_machine(api: Api) -> None:
    prices = {"spot-worker": 0.4, "spot-head": 0.192}
    write_record(_record(tried=["us-east-1"], region="us-east-1", private_address="10.0.0.1", prices=prices))
    start(api, "us-east-1", kind="head")
    start(api, "us-east-1", count=2)
    status = find_cluster("big").status()
    assert [node.kind for node in status.nodes] == ["head", "worker", "worker"]
    assert [node.machine_type for node in status.nodes] == ["g5.xlarge"] * 3
    assert status.usd_per_hour == pytest.approx(0.992)
    assert status.address == "10.0.0.1:6379"


def test_up__no_credentials__says_what_to_do_and_keeps_no_record(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ClusterError, match=r"no AWS credentials were found.*aws configure") as caught:
        CloudCluster(spec_of()).up(on_progress=ignore)
    assert caught.value.exit_code == 3
    assert list_records() == []


def test_up__credentials_or_rights_refused__are_told_apart(api: Api) -> None:
    api.refusals = [Refusal("DescribeSpotPriceHistory", "us-east-1", "AuthFailure")]
    with pytest.raises(ClusterError, match="does not accept the credentials in us-east-1: AuthFailure"):
        CloudCluster(spec_of()).up(on_progress=ignore)
    api.refusals = [Refusal("CreateSecurityGroup", "us-east-1", "UnauthorizedOperation")]
    with pytest.raises(ClusterError, match=r"do not allow CreateSecurityGroup in us-east-1.*docs/operations\.md"):
        CloudCluster(spec_of()).up(on_progress=ignore)


def test_up__another_up_is_running__is_refused(api: Api) -> None:
    with cluster_lock("big"), pytest.raises(ClusterError, match="another forge process is starting or stopping"):
        CloudCluster(spec_of()).up(on_progress=ignore)
    assert not api.instances("us-east-1")


def test_up__name_of_another_providers_cluster__is_refused(api: Api) -> None:
    write_record(ClusterRecord(name="big", provider="ssh", spec={}))
    with pytest.raises(ClusterError, match="a cluster 'big' on ssh exists already; choose another name"):
        CloudCluster(spec_of()).up(on_progress=ignore)
    record = read_record("big")
    assert record is not None and record.provider == "ssh"
    assert not api.calls


def test_up__limit_too_low__asks_aws_nothing(api: Api) -> None:
    with pytest.raises(JobFileError, match="does not pay for the head"):
        CloudCluster(spec_of(max_usd_per_hour=0.3)).up(on_progress=ignore)
    assert list_records() == []
    assert not api.calls


def _groups(api: Api, region: str) -> list[str]:
    return [group["GroupName"] for group in api.ec2(region).describe_security_groups()["SecurityGroups"]]


def _record(**facts: Any) -> ClusterRecord:
    spec = spec_of().model_dump(mode="json", exclude_unset=True)
    return ClusterRecord(name="big", provider="aws", spec=spec, state=facts)
