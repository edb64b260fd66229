"""Which instances are rented and the file for Ray's launcher, for every cloud, from the file and prices alone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from forge.cluster.cloud.aws_network import head_rights, ingress, storage_rights
from forge.cluster.cloud.instance_selection import InstancePlan, listed_price, plan_instances
from forge.cluster.cloud.other_regions import ClusterRegions, read_regions
from forge.cluster.cloud.provider import CloudCluster
from forge.cluster.cloud.ray_config import HEAD, ForgeInstall, RegionContext, build_ray_config
from forge.cluster.cloud.ray_launcher import current_step, find_capacity_error, parse_result
from forge.cluster.cloud.state import ClusterIdentity
from forge.config.cluster import CloudSpec
from forge.config.load import load_cluster
from forge.errors import ClusterError, ForgeError, JobFileError
from forge.pricing.catalog import machine_types, workers_of

ROOT = Path(__file__).parents[2]
FILES = ["aws-spot", "gcp-spot", "azure-spot"]
OURS = ClusterIdentity(name="big", id="0123456789abcdef")
PROJECT = {
    "aws": {},
    "gcp": {"project": "my-project"},
    "azure": {"project": "12345678-1234-1234-1234-123456789abc"},
}
GPU = {"aws": "A10G", "gcp": "L4", "azure": "T4"}
CONTEXT = RegionContext(
    region="us-east-1",
    key_file="/home/me/key",
    public_key_file="/home/me/key.pub",
    public_key="ssh-rsa AAAA",
    token_file="/home/me/token",
    image="ami-gpu",
    cpu_image="ami-cpu",
    key_name="forge-big",
    subnets=("subnet-a", "subnet-b"),
    security_group="sg-1",
    head_profile="forge-big-head",
    worker_profile="forge-big-worker",
)


def spec_of(provider: str = "aws", **keys: Any) -> CloudSpec:
    """A cluster file with these keys."""
    values = {"name": "big", "provider": provider, "gpu": GPU[provider], **PROJECT[provider], **keys}
    return CloudSpec.model_validate(values, strict=False)


def rendered(spec: CloudSpec, *, context: RegionContext = CONTEXT) -> dict[str, Any]:
    plan = plan_instances(spec, price_of=listed_price(spec))
    install = ForgeInstall(python="/opt/forge/bin/python")
    return build_ray_config(spec, cluster=OURS, plan=plan, context=context, install=install)


def validated(values: dict[str, Any]) -> dict[str, Any]:
    """Read the file as `ray up` does, up to where it asks the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(yaml.safe_dump(values)))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("provider", PROJECT)
@pytest.mark.parametrize("gpu", [True, False])
def test_build_ray_config__any_cloud__is_valid_by_rays_schema(provider: str, gpu: bool) -> None:
    spec = spec_of(provider, on_demand_fallback=True, storage="s3://b/r", **({} if gpu else {"gpu": "none"}))
    prepared = validated(rendered(spec))
    assert prepared["max_workers"] == 4
    assert prepared["setup_commands"] == ["chmod 700 ~/.forge && chmod 600 ~/.forge/token"]


@pytest.mark.parametrize("name", FILES)
def test_shipped_files__render_within_their_limit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path))
    spec = load_cluster(ROOT / "cluster" / f"{name}.yaml")
    assert isinstance(spec, CloudSpec)
    cluster = CloudCluster(spec.model_copy(update={"python": "/opt/forge/bin/python"}))
    validated(yaml.safe_load(cluster.to_yaml()))
    price = cluster.price()
    assert price is not None and spec.max_usd_per_hour is not None
    assert 0 < price <= spec.max_usd_per_hour
    assert not list(tmp_path.rglob("*.token")), "a dry run creates nothing"


def test_build_ray_config__head_is_on_demand_without_cpus_and_workers_are_spot() -> None:
    values = rendered(spec_of())
    types = values["available_node_types"]
    assert types[HEAD]["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in types[HEAD]["node_config"]
    workers = {name: kind for name, kind in types.items() if name != HEAD}
    assert len(workers) > 1
    for kind in workers.values():
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
        assert kind["node_config"]["SubnetIds"] == ["subnet-a", "subnet-b"]


def test_build_ray_config__on_demand_fallback__has_lower_priority() -> None:
    assert all(option.is_spot for option in plan_instances(spec_of(), price_of=listed_price(spec_of())).workers)
    types = rendered(spec_of(on_demand_fallback=True))["available_node_types"]
    spot = [kind["priority"] for name, kind in types.items() if name.startswith("spot-")]
    full = [kind["priority"] for name, kind in types.items() if name.startswith("on-demand-")]
    assert len(spot) == len(full) > 1
    assert min(spot) > max(full)
    assert all("InstanceMarketOptions" not in types[name]["node_config"] for name in types if "demand" in name)


def test_plan_instances__spot_false__has_no_spot() -> None:
    workers = plan_instances(spec_of(spot=False), price_of=listed_price(spec_of())).workers
    assert workers and not any(option.is_spot for option in workers)


def test_build_ray_config__every_node_type__has_cluster_and_owner_tags() -> None:
    own = {"forge-cluster": "big", "forge-cluster-id": OURS.id, "owner": "forge"}
    for kind in rendered(spec_of())["available_node_types"].values():
        (tags,) = (
            given["Tags"]
            for given in kind["node_config"]["TagSpecifications"]
            if given["ResourceType"] == "instance"
        )
        assert {tag["Key"]: tag["Value"] for tag in tags} == own
    for kind in rendered(spec_of("gcp"))["available_node_types"].values():
        assert kind["node_config"]["labels"] == own
    for kind in rendered(spec_of("azure"))["available_node_types"].values():
        assert kind["node_config"]["tags"] == own
    assert {rendered(spec_of(cloud))["cluster_name"] for cloud in PROJECT} == {"big-01234567"}


@pytest.mark.parametrize("provider", PROJECT)
def test_build_ray_config__ray_has_a_token_and_a_loopback_dashboard(provider: str) -> None:
    values = rendered(spec_of(provider, storage="s3://bucket/runs", max_usd_per_hour=50))
    (_, head, _), (_, worker) = values["head_start_ray_commands"], values["worker_start_ray_commands"]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert values["file_mounts"] == {"~/.forge/token": "/home/me/token"}
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command
        assert 'RAY_AUTH_TOKEN_PATH="$HOME"/.forge/token' in command


@pytest.mark.parametrize("node_type", ["head", "spot-g5-xlarge", "unheard-of"])
def test_start_commands__environment_has_cloud_price_and_storage(node_type: str, tmp_path: Path) -> None:
    spec = spec_of(storage="s3://a bucket/$runs", max_usd_per_hour=50, usd_per_hour={"g5.xlarge": 0.25})
    command = rendered(spec)["worker_start_ray_commands"][1].partition("ulimit")[0]
    done = subprocess.run(
        ["bash", "-c", f"{command} env"],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_NODE_TYPE_NAME": node_type},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert found["FORGE_CLOUD"] == "aws"
    assert found["FORGE_STORAGE"] == "s3://a bucket/$runs"
    assert found["FORGE_MAX_USD_PER_HOUR"] == "50"
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.forge/token"
    on_demand = {"spot-g5-xlarge": f"{machine_types('aws')['g5.xlarge'].usd_per_hour:.6g}"}
    assert found.get("FORGE_ON_DEMAND_USD_PER_HOUR") == on_demand.get(node_type)
    assert ("FORGE_MTBF_HOURS" in found) is (node_type == "spot-g5-xlarge")
    assert found.get("FORGE_USD_PER_HOUR") == {"head": "0.192", "spot-g5-xlarge": "0.25"}.get(node_type)


def test_start_commands__every_ray__is_the_one_without_open_ports(tmp_path: Path) -> None:
    """As Ray's launcher runs them: in a subshell of an interactive bash, after other commands."""
    spec = spec_of()
    python = tmp_path / "env" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    plan = plan_instances(spec, price_of=listed_price(spec))
    install = ForgeInstall(python="~/env/python")
    values = build_ray_config(spec, cluster=OURS, plan=plan, context=CONTEXT, install=install)
    for command in (*values["head_start_ray_commands"][:2], *values["worker_start_ray_commands"]):
        done = subprocess.run(
            ["bash", "-c", f"true && ({command})"],
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.1"},
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
        assert done.stdout.startswith(("-P -m forge.cluster.ray_cli start ", "-P -m forge.cluster.ray_cli stop\n"))
    assert "ray start" in values["head_start_ray_commands"][1], "Ray's launcher looks for it"


@given(
    low=st.integers(0, 5),
    more=st.integers(0, 60),
    limit=st.floats(0.1, 500),
    fallback=st.booleans(),
    provider=st.sampled_from(sorted(PROJECT)),
)
def test_plan_instances__any_limit__is_never_exceeded(
    low: int, more: int, limit: float, fallback: bool, provider: str
) -> None:
    spec = spec_of(provider, workers=f"{low}..{low + more}", max_usd_per_hour=limit, on_demand_fallback=fallback)
    try:
        plan = plan_instances(spec, price_of=listed_price(spec))
    except JobFileError as error:
        assert error.key == "max_usd_per_hour" and "USD/h" in str(error)
        return
    assert low <= plan.max_workers <= low + more
    assert plan.usd_per_hour is not None
    assert plan.usd_per_hour <= limit + 1e-6
    if plan.max_workers < low + more:  # one more of the dearest would be too much
        dearest = max(option.usd_per_hour or 0.0 for option in plan.workers)
        assert plan.usd_per_hour + dearest > limit - 1e-6


def test_plan_instances__limit_without_prices__is_refused() -> None:
    spec = spec_of(instance_types=["g99.huge"], max_usd_per_hour=10)
    with pytest.raises(JobFileError, match=r"g99\.huge is unknown; add it to usd_per_hour"):
        plan_instances(spec, price_of=listed_price(spec))


@pytest.mark.parametrize("price", [5e-324, 1e-300])
def test_plan_instances__tiny_price__plans_all_workers(price: float) -> None:
    spec = spec_of(instance_types=["g5.xlarge"], usd_per_hour={"g5.xlarge": price}, max_usd_per_hour=50)
    assert plan_instances(spec, price_of=listed_price(spec)).max_workers == 4


def test_listed_price__no_spot_price__is_the_on_demand_price() -> None:
    assert machine_types("aws")["p5.4xlarge"].spot_usd_per_hour is None
    price_of = listed_price(spec_of(gpu="H100"))
    assert price_of("p5.4xlarge", True) == price_of("p5.4xlarge", False) == 6.88


def test_instance_plan__price__is_head_and_all_workers_at_the_highest() -> None:
    spec = spec_of(instance_types=["g5.xlarge", "g5.2xlarge"], workers="0..3", on_demand_fallback=True)
    plan = plan_instances(spec, price_of=listed_price(spec))
    assert plan.usd_per_hour == pytest.approx(0.192 + 3 * 1.212)


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({"gpu": "A100-80"}, "gpu", "A100-80GB"),
        ({"gpu": "T1000"}, "gpu", "for other machines list instance_types"),
        (
            {"gpu": "T4", "instance_types": ["g5.xlarge"]},
            "instance_types",
            "the file asks for T4",
        ),
        ({"gpu": "none", "instance_types": ["g5.xlarge"]}, "instance_types", "has A10G"),
    ],
)
def test_workers_of__unavailable_gpu__suggests_alternatives(keys: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(JobFileError, match=says) as caught:
        workers_of(spec_of(**keys))
    assert caught.value.key == key


def test_build_ray_config__unknown_size__is_refused_unless_ray_can_ask() -> None:
    with pytest.raises(
        ClusterError, match="does not have gcp's machine type 'g2-standard-7'; similar names are g2-standard"
    ):
        rendered(spec_of("gcp", instance_types=["g2-standard-7"]))
    assert rendered(spec_of(instance_types=["g5.4xlarge"]))["available_node_types"]["spot-g5-4xlarge"]


def test_build_ray_config__gcp_spot__has_the_documented_fields() -> None:
    values = rendered(spec_of("gcp"), context=RegionContext(**{**_plain(CONTEXT), "region": "us-central1-b"}))
    assert values["provider"] == {
        "type": "gcp",
        "region": "us-central1",
        "availability_zone": "us-central1-b",
        "project_id": "my-project",
        "cache_stopped_nodes": False,
    }
    spot = values["available_node_types"]["spot-g2-standard-8"]
    assert spot["resources"] == {"forge_worker": 1, "CPU": 8, "GPU": 1}
    assert spot["node_config"]["scheduling"] == {
        "onHostMaintenance": "TERMINATE",
        "provisioningModel": "SPOT",
        "instanceTerminationAction": "DELETE",
        "automaticRestart": False,
    }
    assert values["available_node_types"][HEAD]["node_config"]["scheduling"] == {"onHostMaintenance": "MIGRATE"}


def test_build_ray_config__azure__has_only_parameters_of_rays_template() -> None:
    import ray

    template = Path(ray.__file__).parent / "autoscaler/_private/_azure/azure-vm-template.json"
    known = set(json.loads(template.read_text())["parameters"])
    values = rendered(spec_of("azure", on_demand_fallback=True))
    assert values["provider"]["resource_group"] == "forge-big"
    assert values["provider"]["subscription_id"] == "12345678-1234-1234-1234-123456789abc"
    for name, kind in values["available_node_types"].items():
        parameters = kind["node_config"]["azure_arm_parameters"]
        assert set(parameters) <= known
        assert parameters.get("priority") == ("Spot" if name.startswith("spot-") else None)


def test_ingress__allows_the_cluster_and_one_network() -> None:
    own, ssh = ingress("sg-1", allow_from="203.0.113.4/32")
    assert own == {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": "sg-1"}]}
    assert ssh == {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.4/32"}]}
    assert ingress("sg-1", allow_from="2001:db8::/64")[1]["Ipv6Ranges"] == [{"CidrIpv6": "2001:db8::/64"}]


def test_rights__are_limited_to_the_bucket_and_the_own_cluster() -> None:
    objects, bucket = storage_rights("s3://bucket/runs/mine")
    assert objects["Resource"] == "arn:aws:s3:::bucket/runs/mine/*"
    assert bucket["Resource"] == "arn:aws:s3:::bucket"
    assert storage_rights("gs://bucket/runs") == storage_rights(None) == []


def test_head_rights__tag_or_end_only_what_has_the_id() -> None:
    rights = head_rights(OURS, roles=["r"])
    own = {"StringEquals": {"aws:ResourceTag/forge-cluster-id": OURS.id}}
    (end,) = (right for right in rights if "ec2:TerminateInstances" in right["Action"])
    assert end["Condition"] == own and end["Resource"] == "arn:*:ec2:*:*:instance/*"
    created, later = (right for right in rights if "ec2:CreateTags" in right["Action"])
    gets_id = {"aws:RequestTag/forge-cluster-id": OURS.id}
    assert created["Condition"] == {"StringEquals": gets_id | {"ec2:CreateAction": "RunInstances"}}
    assert later["Condition"] == own | {
        "ForAllValues:StringNotEquals": {"aws:TagKeys": ["forge-cluster-id", "forge-cluster"]}
    }, "the id itself is never given or taken"
    machines, used = (right for right in rights if "ec2:RunInstances" in right["Action"])
    assert machines["Condition"] == {"StringEquals": gets_id}
    assert not any(kind in resource for resource in used["Resource"] for kind in ("instance/", "volume/", "role"))
    changing = [right for right in rights if right["Action"] != ["ec2:Describe*"]]
    assert all(right["Resource"] != "*" for right in changing)
    assert {action for right in changing for action in right["Action"]} == {
        *("ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances"),
        *("iam:PassRole", "iam:CreateServiceLinkedRole"),
    }


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (
            "An error occurred (InsufficientInstanceCapacity) when calling the RunInstances operation: We",
            "InsufficientInstanceCapacity",
        ),
        ("An error occurred (MaxSpotInstanceCountExceeded) when calling", "MaxSpotInstanceCountExceeded"),
        ("(VcpuLimitExceeded) You have requested more vCPU capacity", "VcpuLimitExceeded"),
        ("'code': 'ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS'", "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS"),
        ("Quota 'NVIDIA_L4_GPUS' exceeded. reason: quotaExceeded", "quotaExceeded"),
        ("(SkuNotAvailable) The requested VM size", "SkuNotAvailable"),
        ("An error occurred (UnauthorizedOperation) when calling", None),
        ("wait_ready timeout exceeded.", None),
    ],
)
def test_find_capacity_error__codes_of_all_clouds__are_known(output: str, code: str | None) -> None:
    assert find_capacity_error(output) == code
    assert parse_result(1, output=output).capacity_error == code


def test_parse_result__failed_launch__has_output_and_hint() -> None:
    launch = parse_result(1, output="Checking\nModuleNotFoundError: No module named 'googleapiclient'\n\n")
    assert not launch.is_done
    assert "No module named 'googleapiclient'" in launch.output
    assert launch.hint.startswith("pip install google-api-python-client")
    assert (
        current_step("Launched a new head node\n[1/7] Waiting for SSH to become available\n") == "waiting for ssh"
    )


@pytest.mark.parametrize("provider", PROJECT)
def test_build_ray_config__has_no_secret(provider: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("planted-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-key")
    monkeypatch.setenv("WANDB_API_KEY", "planted-wandb")
    values = rendered(spec_of(provider), context=RegionContext(**{**_plain(CONTEXT), "token_file": str(token)}))
    assert "planted" not in yaml.safe_dump(values)


def test_errors__have_the_exit_codes_of_their_kind() -> None:
    assert (JobFileError("x").exit_code, ClusterError("x").exit_code) == (2, 3)
    assert issubclass(JobFileError, ForgeError)
    assert InstancePlan.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _plain(context: RegionContext) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(context)


def test_environment__other_regions__reach_the_processes_of_ray_unchanged() -> None:
    regions = ClusterRegions(
        here="us-east-1",
        storage_region=None,
        on_demand_usd_per_hour=1.006,
        spot_usd_per_hour={"us-east-1": 0.4, "us-west-2": 0.35},
    )
    spec = spec_of()
    plan, install = plan_instances(spec, price_of=listed_price(spec)), ForgeInstall(python="/opt/forge/bin/python")
    config = build_ray_config(spec, cluster=OURS, plan=plan, context=CONTEXT, install=install, regions=regions)
    exports = config["head_start_ray_commands"][2].partition("; case")[0]
    done = subprocess.run(["sh", "-c", f"{exports}; env"], capture_output=True, text=True, check=True)
    environment = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    assert read_regions(environment) == regions
    validated(config)
