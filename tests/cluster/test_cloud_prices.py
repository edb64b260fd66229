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
from forge.cluster.cloud.state import ClusterIdentity
from forge.cluster.registry import find_cluster
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError, JobFileError
from tests.support.cloud_box import IMAGE, PYTHON, Api, Refusal, serve_api

OURS = ClusterIdentity(name="big", id="0123456789abcdef")
THEIRS = ClusterIdentity(name="big", id="fedcba9876543210")
"""Another cluster of the same name, started from another machine."""
REGIONS = ("us-east-1", "us-west-2", "eu-west-1")


@pytest.fixture(scope="module")
def _service() -> Iterator[Api]:
    with serve_api() as api:
        yield api


@pytest.fixture
def api(_service: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """An empty cloud; this machine knows of no cluster in it."""
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr("forge.cluster.cloud.provider.require_tools", lambda _: None)  # no rsync is needed here
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


def start(
    api: Api,
    region: str,
    *,
    cluster: ClusterIdentity = OURS,
    kind: str = "worker",
    count: int = 1,
    tags: dict[str, str] | None = None,
) -> None:
    """Rent machines as Ray's launcher does.

    Args:
        tags: instead of the cluster's.
    """
    tags = cluster.tags | {"ray-cluster-name": cluster.ray_name} if tags is None else tags
    tags = tags | {"ray-node-type": kind, "ray-user-node-type": f"spot-{kind}"}
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
            spec_of(storage="s3://bucket/runs"),
            cluster=OURS,
            region="us-east-1",
            public_key=public_key,
            allow_from=address,
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
    assert aws_network.remove_network(OURS, region="us-east-1") == []
    aws_network.remove_profiles(OURS)
    assert not ec2.describe_key_pairs()["KeyPairs"]
    assert not api.client("iam").list_roles()["Roles"]
    assert not api.client("iam").list_instance_profiles()["InstanceProfiles"]


@pytest.mark.slow
def test_down__terminates_the_cluster_in_all_tried_regions_only(api: Api) -> None:
    write_record(record := _record(tried=["us-east-1", "us-west-2"]))
    start(api, "us-east-1", kind="head")
    start(api, "us-east-1", count=3)
    start(api, "us-west-2", count=2)
    start(api, "us-west-2", cluster=THEIRS)
    cluster = find_cluster("big")
    assert isinstance(cluster, CloudCluster)
    assert len(cluster.status().nodes) == 6
    assert cluster.down(on_progress=ignore) == []
    assert not api.alive("us-east-1")
    assert len(api.alive("us-west-2")) == 1
    assert record.name == "big" and list_records() == []


_COLLEAGUES = [
    {"ray-cluster-name": "big", "Owner": "colleague"},  # as a plain `ray up` makes it
    {"forge-cluster": "big", "ray-cluster-name": "big"},
    {"forge-cluster-id": OURS.id},
    {"forge-cluster": "big*", "forge-cluster-id": "0123456789abcde?"},
    {"forge-cluster": "big-2", "forge-cluster-id": OURS.id},
    THEIRS.tags | {"ray-cluster-name": THEIRS.ray_name},
]


def test_terminate_all__machines_without_both_tags__are_left_alone(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aws, "_POLL_S", 0.01)
    for tags in _COLLEAGUES:
        start(api, "us-east-1", kind="head", tags=tags)
    start(api, "us-east-1", kind="head")
    assert len(aws.list_instances(OURS, region="us-east-1")) == 1
    assert aws.terminate_all(OURS, region="us-east-1") == []
    assert len(api.alive("us-east-1")) == len(_COLLEAGUES)


@pytest.mark.parametrize("tags", [_COLLEAGUES[0], _COLLEAGUES[1], _COLLEAGUES[-1]])
def test_up__machine_of_another_cluster_of_the_name__is_refused(api: Api, tags: dict[str, str]) -> None:
    start(api, "us-east-1", kind="head", tags=tags)
    with pytest.raises(
        ClusterError, match=r"the machine i-\w+ in us-east-1 belongs to another cluster named 'big'"
    ):
        CloudCluster(spec_of(regions=["us-east-1"])).up(on_progress=ignore)
    assert list_records() == [], "nothing was begun"
    _require_untouched(api)


@pytest.mark.parametrize("kind", ["group", "key", "role", "profile"])
@pytest.mark.parametrize("owner", [THEIRS.tags, {}])
def test_prepare_network__of_another_cluster_of_the_name__is_refused_and_unchanged(
    api: Api, public_key: str, kind: str, owner: dict[str, str]
) -> None:
    ec2, iam = api.ec2("us-east-1"), api.client("iam")
    tags = [{"Key": key, "Value": value} for key, value in owner.items()]
    spec = [{"ResourceType": {"group": "security-group"}.get(kind, "key-pair"), "Tags": tags}] if tags else []
    if kind == "group":
        made = ec2.create_security_group(GroupName="forge-big", Description="theirs", TagSpecifications=spec)
        ssh = [{"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "192.0.2.1/32"}]}]
        ec2.authorize_security_group_ingress(GroupId=made["GroupId"], IpPermissions=ssh)
    elif kind == "key":
        ec2.import_key_pair(KeyName="forge-big", PublicKeyMaterial=public_key.encode(), TagSpecifications=spec)
    elif kind == "role":
        iam.create_role(RoleName="forge-big-head", AssumeRolePolicyDocument="{}", Tags=tags)
    else:
        iam.create_instance_profile(InstanceProfileName="forge-big-worker", Tags=tags)
    before = _resources(api)
    with pytest.raises(ClusterError, match=r"belongs to another cluster named 'big'.*Choose another name"):
        aws_network.prepare_network(
            spec_of(), cluster=OURS, region="us-east-1", public_key=public_key, allow_from="203.0.113.4/32"
        )
    assert aws_network.remove_network(OURS, region="us-east-1") == []
    aws_network.remove_profiles(OURS)
    assert _resources(api) == before
    _require_untouched(api)


def _require_untouched(api: Api) -> None:
    """Nothing was asked but what there is."""
    asked = {action for action, _ in api.calls}
    assert not [action for action in asked if not action.startswith(("Describe", "Get"))], asked


def _resources(api: Api) -> list[Any]:
    ec2, iam = api.ec2("us-east-1"), api.client("iam")
    found = [
        ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["forge-big"]}])["SecurityGroups"],
        ec2.describe_key_pairs()["KeyPairs"],
        iam.list_roles()["Roles"],
        iam.list_instance_profiles()["InstanceProfiles"],
    ]
    assert sum(map(len, found)) == 1
    return found


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


def test_up__limit_too_low_by_prices_of_now__rents_nothing(api: Api) -> None:
    with pytest.raises(JobFileError, match="does not pay for the head"):
        CloudCluster(spec_of(max_usd_per_hour=0.3)).up(on_progress=ignore)
    assert list_records() == []
    assert {name for name, _ in api.calls} == {"DescribeSpotPriceHistory"}


@pytest.mark.slow
def test_up__auto__keeps_its_choice_for_the_next_start_of_the_same_file(api: Api) -> None:
    api.spot_prices = {"us-west-2": {"g5.xlarge": 0.3}, "eu-west-1": {"g5.xlarge": 0.1}}
    api.refusals = [Refusal("CreateSecurityGroup", "eu-west-1", "UnauthorizedOperation")]
    spec = spec_of(regions=["auto"], storage="s3://bucket/runs")
    cluster = CloudCluster(spec)
    shown = [one.place for one in cluster.choose(is_live=True).options]
    assert shown[:2] == ["eu-west-1", "us-west-2"] and len(shown) > 2
    with pytest.raises(ClusterError, match="do not allow CreateSecurityGroup in eu-west-1"):
        cluster.up(on_progress=ignore)
    record = read_record("big")
    assert record is not None and record.state["choice"]["regions"] == shown
    api.spot_prices = {"us-west-2": {"g5.xlarge": 0.1}, "eu-west-1": {"g5.xlarge": 0.3}}
    kept = CloudCluster(spec).choose(is_live=True)
    assert [one.place for one in kept.options] == shown and kept.options[0].usd_per_hour == 0.3


def test_bucket_region__of_a_bucket__as_aws_names_it_or_unknown(api: Api) -> None:
    api.client("s3").create_bucket(Bucket="far", CreateBucketConfiguration={"LocationConstraint": "ap-northeast-1"})
    api.client("s3").create_bucket(Bucket="first")
    assert aws.bucket_region("s3://far/runs") == "ap-northeast-1"
    assert aws.bucket_region("s3://first") == "us-east-1"
    assert aws.bucket_region("s3://nobodys-bucket/runs") is None
    assert aws.bucket_region("gs://far/runs") is aws.bucket_region(None) is None


def _groups(api: Api, region: str) -> list[str]:
    return [group["GroupName"] for group in api.ec2(region).describe_security_groups()["SecurityGroups"]]


def _record(**facts: Any) -> ClusterRecord:
    spec = spec_of().model_dump(mode="json", exclude_unset=True)
    return ClusterRecord(name="big", provider="aws", spec=spec, state={"id": OURS.id} | facts)
