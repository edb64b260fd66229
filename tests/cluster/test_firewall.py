"""On GCP and Azure port 22 is never open to the world, and nothing of another cluster is changed."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import ClusterRecord, NodeProgress, list_records, read_record, write_record
from forge.cluster.cloud import firewall
from forge.cluster.cloud.provider import CloudCluster
from forge.cluster.cloud.ray_config import azure_unique_id
from forge.cluster.cloud.ray_launcher import LaunchResult, RayLauncher
from forge.cluster.cloud.state import ClusterIdentity
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError
from tests.support.cloud_tools import CloudTools

UUID = "12345678-1234-1234-1234-123456789abc"
OURS = ClusterIdentity(name="big", id="0123456789abcdef")
ADDRESS = "203.0.113.4/32"
PREFIX = f"ray-{OURS.ray_name}-{azure_unique_id(OURS)}"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CloudTools:
    """Fake tools in front of PATH, and an empty state folder."""
    found = CloudTools.install(tmp_path / "cloud")
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(firewall, "_GONE_TIMEOUT_S", 0.0)
    monkeypatch.setattr("forge.cluster.cloud.provider.require_tools", lambda _: None)  # the launcher is a fake
    return found


def spec_of(provider: str, **keys: Any) -> CloudSpec:
    values = {
        "name": "big",
        "provider": provider,
        "project": {"gcp": "my-project", "azure": UUID}[provider],
        "gpu": "none",
        "regions": {"gcp": ["us-central1-a"], "azure": ["eastus"]}[provider],
        "allow_from": ADDRESS,
        "python": "/opt/forge/bin/python",
    }
    return CloudSpec.model_validate(values | keys, strict=False)


def restrict(provider: str, *, cluster: ClusterIdentity = OURS, allow_from: str = ADDRESS) -> None:
    spec = spec_of(provider)
    firewall.restrict_before_launch(spec, cluster=cluster, region=spec.regions[0], allow_from=allow_from)


def ignore(_: NodeProgress) -> None:
    pass


def test_gcp__first_time__denies_the_world_before_it_allows(tools: CloudTools) -> None:
    restrict("gcp")
    assert [call[3] for call in tools.calls()] == ["list", "create", "create", "create"]
    world, own, ssh = (tools.world["rules"][f"forge-{OURS.ray_name}-{name}"] for name in ("world", "own", "ssh"))
    assert [call[4].rpartition("-")[2] for call in tools.calls()[1:]] == ["world", "own", "ssh"]
    assert (world["action"], world["rules"], world["source-ranges"]) == ("DENY", "all", "0.0.0.0/0")
    assert (ssh["action"], ssh["rules"], ssh["source-ranges"]) == ("ALLOW", "tcp:22", ADDRESS)
    assert own["source-tags"] == world["target-tags"] == ssh["target-tags"] == f"forge-{OURS.ray_name}"
    assert int(own["priority"]) < int(ssh["priority"]) < int(world["priority"])


def test_gcp__again__changes_the_address_and_deletes_nothing(tools: CloudTools) -> None:
    restrict("gcp")
    restrict("gcp", allow_from="198.51.100.0/24")
    assert "delete" not in {call[3] for call in tools.calls()}
    assert [call[3] for call in tools.calls()][4:] == ["list", "update"]
    assert tools.world["rules"][f"forge-{OURS.ray_name}-ssh"]["source-ranges"] == "198.51.100.0/24"


def test_gcp__cannot_create__leaves_the_world_denied(tools: CloudTools) -> None:
    restrict("gcp")
    world = tools.world
    del world["rules"][f"forge-{OURS.ray_name}-ssh"]
    tools.write(world)
    tools.refuse("create")
    with pytest.raises(ClusterError, match="you do not have the right"):
        restrict("gcp")
    assert f"forge-{OURS.ray_name}-world" in tools.world["rules"]


def test_gcp__remove__deletes_exactly_the_own_rules(tools: CloudTools) -> None:
    names = (f"forge-{OURS.ray_name}-ssh-2", f"x-forge-{OURS.ray_name}-ssh", "forge-big-ssh", "forge", "big", "ssh")
    tools.write(tools.world | {"rules": {name: {"name": name} for name in names}})
    restrict("gcp")
    assert len(tools.world["rules"]) == 9
    assert firewall.remove_rules(spec_of("gcp"), cluster=OURS) == []
    assert set(tools.world["rules"]) == set(names), "a filter of gcloud's may list more than the exact name"


def test_gcp__rule_of_the_name_by_another__is_not_touched(tools: CloudTools) -> None:
    name = f"forge-{OURS.ray_name}-ssh"
    tools.write(tools.world | {"rules": {name: {"name": name, "description": "of a colleague"}}})
    for touch in (restrict, lambda _: firewall.remove_rules(spec_of("gcp"), cluster=OURS)):
        with pytest.raises(ClusterError, match="was not created by this cluster"):
            touch("gcp")
    assert {call[3] for call in tools.calls()} == {"list"}


def test_gcp__odd_answer__is_an_error(tools: CloudTools) -> None:
    for answer in ("{}", "[1]", "[" * 100_000, "not json", '[{"a": 1}]'):
        with pytest.raises(ClusterError, match="gcloud answers in another form"):
            firewall._parsed(answer, tool="gcloud")


def test_azure__before_the_launch__the_subnet_is_closed_already(tools: CloudTools) -> None:
    restrict("azure")
    tools.add_rays_network(PREFIX)  # open to all
    assert tools.sources_of_ssh(PREFIX) == {ADDRESS}
    assert tools.world["groups"]["forge-big"]["tags"] == {**OURS.tags, "owner": "forge"}
    restrict("azure", allow_from="198.51.100.0/24")
    assert tools.sources_of_ssh(PREFIX) == {"198.51.100.0/24"}
    assert sum(call[1:3] == ["group", "create"] for call in tools.calls()) == 1


def test_azure__network_made_by_ray_alone__is_closed(tools: CloudTools) -> None:
    tools.write(tools.world | {"groups": {"forge-big": {"name": "forge-big", "tags": OURS.tags}}})
    tools.add_rays_network(PREFIX)
    assert tools.sources_of_ssh(PREFIX) == {"*"}
    restrict("azure")
    assert tools.sources_of_ssh(PREFIX) == {ADDRESS}


def test_azure__group_of_another__is_neither_used_nor_deleted(tools: CloudTools) -> None:
    for tags in ({}, None, {**OURS.tags, "forge-cluster-id": "f" * 16}):
        tools.write(tools.world | {"groups": {"Forge-Big": {"name": "Forge-Big", "tags": tags}}})
        with pytest.raises(ClusterError, match=r"does not belong to this cluster.*az group update"):
            restrict("azure")
        with pytest.raises(ClusterError, match="does not belong to this cluster"):
            firewall.remove_rules(spec_of("azure"), cluster=OURS)
        with pytest.raises(ClusterError, match="does not belong to this cluster"):
            CloudCluster(spec_of("azure")).up(on_progress=ignore)
        assert list_records() == [], "nothing was begun"
    assert {" ".join(call[1:3]) for call in tools.calls()} == {"group list"}


def test_azure__remove__deletes_the_group_once_it_is_empty(tools: CloudTools) -> None:
    restrict("azure")
    tools.add_rays_network(PREFIX)
    tools.write(tools.world | {"others": [{"name": "my-disk", "type": "Microsoft.Compute/disks"}]})
    left = firewall.remove_rules(spec_of("azure"), cluster=OURS)
    assert left == ["Microsoft.Compute/disks my-disk in the resource group forge-big"]
    tools.write(tools.world | {"others": []})
    assert firewall.remove_rules(spec_of("azure"), cluster=OURS) == []
    assert tools.world["groups"] == {} == tools.world["nsgs"] == tools.world["vnets"]
    assert firewall.remove_rules(spec_of("azure"), cluster=OURS) == []


def test_tool__missing_or_failing__stops_the_start(tools: CloudTools, monkeypatch: pytest.MonkeyPatch) -> None:
    tools.refuse("az")
    with pytest.raises(ClusterError, match="az cannot restrict access to the machines: ERROR: you do not have"):
        restrict("azure")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match="az, which restricts access to the machines, cannot be run"):
        restrict("azure")


@pytest.mark.parametrize("provider", ["gcp", "azure"])
def test_project__shell_syntax__is_one_argument(tools: CloudTools, provider: str, tmp_path: Path) -> None:
    """Even for a record that no check has seen, as an older version could have written it."""
    spec = spec_of(provider).model_copy(update={"project": f"p$(touch {tmp_path}/PWNED)`touch {tmp_path}/PWNED`;x"})
    firewall.restrict_before_launch(spec, cluster=OURS, region="eastus", allow_from=ADDRESS)
    firewall.restrict_after_launch(spec, cluster=OURS, region="eastus", allow_from=ADDRESS)
    firewall.remove_rules(spec, cluster=OURS)
    assert not (tmp_path / "PWNED").exists()
    assert all(any(str(spec.project) in word for word in call) for call in tools.calls())


class _Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("provider", ["gcp", "azure"])
@pytest.mark.parametrize(
    ("how", "error"),
    [
        (LaunchResult(is_done=False, output="wait_ready timeout exceeded"), ClusterError),
        (LaunchResult(is_done=False, capacity_error="SkuNotAvailable"), ClusterError),
        (ClusterError("Ray's launcher did not finish within 900 s"), ClusterError),
        (_Interrupt(signal.SIGINT), _Interrupt),
    ],
    ids=["fails", "no capacity", "takes too long", "Ctrl-C"],
)
def test_up__fails_or_is_interrupted__port_22_is_never_open_to_the_world(
    tools: CloudTools, monkeypatch: pytest.MonkeyPatch, provider: str, how: Any, error: type[BaseException]
) -> None:
    seen: list[bool] = []

    def run(launcher: RayLauncher, command: str, *options: str, timeout_s: float) -> LaunchResult:
        config = json.loads(json.dumps(read_record("big").state))  # type: ignore[union-attr]
        cluster = ClusterIdentity.of("big", config)
        prefix = f"ray-{cluster.ray_name}-{azure_unique_id(cluster)}"
        if command == "down":
            return LaunchResult(is_done=True)
        if provider == "azure":
            tools.add_rays_network(prefix)
        seen.append(_is_closed(tools, provider, cluster))
        if isinstance(how, BaseException):
            raise how
        return how

    monkeypatch.setattr(RayLauncher, "run", run)
    with pytest.raises(error):
        CloudCluster(spec_of(provider)).up(on_progress=ignore)
    assert seen == [True], "while the launcher runs"
    record = read_record("big")
    if record is not None:  # nothing was left to close otherwise
        cluster = ClusterIdentity.of("big", record.state)
        assert _is_closed(tools, provider, cluster)
        if provider == "azure":
            rules = tools.world["nsgs"][f"ray-{cluster.ray_name}-{azure_unique_id(cluster)}-nsg"]["rules"]
            assert rules == {"SSH": [ADDRESS, "VirtualNetwork"]}, "Ray's own rule is narrowed too"
        assert CloudCluster(spec_of(provider)).down(on_progress=ignore) == []
    assert tools.world == {"rules": {}, "groups": {}, "nsgs": {}, "vnets": {}, "others": []}
    assert list_records() == []


def _is_closed(tools: CloudTools, provider: str, cluster: ClusterIdentity) -> bool:
    if provider == "azure":
        return tools.sources_of_ssh(f"ray-{cluster.ray_name}-{azure_unique_id(cluster)}") == {ADDRESS}
    return tools.world["rules"][f"forge-{cluster.ray_name}-world"]["action"] == "DENY"


def test_up__other_project_than_before__is_refused(tools: CloudTools) -> None:
    spec = spec_of("gcp")
    plain = spec.model_dump(mode="json", exclude_unset=True)
    write_record(ClusterRecord(name="big", provider="gcp", spec=plain, state={"id": OURS.id, "tried": ["a"]}))
    with pytest.raises(ClusterError, match=r"was started with project: my-project.*forge cluster down big first"):
        CloudCluster(spec_of("gcp", project="another-project")).up(on_progress=ignore)
    assert tools.calls() == []


def test_identity__names__are_unique_and_short_enough_for_every_cloud() -> None:
    long = ClusterIdentity(name="a" * 40, id="0123456789abcdef")
    assert len(long.ray_name) <= 40 and long.ray_name != ClusterIdentity(name="a" * 40, id="f" * 16).ray_name
    assert len(f"forge-{long.ray_name}-world") <= 63, "GCP's limit for a rule's name"
    assert len(f"ray-{long.ray_name}-worker") <= 64 - 8 - 1, "Ray's limit on GCP"
    with pytest.raises(ClusterError, match="has no id"):
        ClusterIdentity.of("big", {"id": "../x"})


def test_up__state_folder_with_a_space__is_refused_before_anything_is_rented(
    tools: CloudTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "my state"))
    with pytest.raises(ClusterError, match=r"key whose path has a space.*set FORGE_STATE to a folder without"):
        CloudCluster(spec_of("gcp")).up(on_progress=ignore)
    assert {call[3] for call in tools.calls()} <= {"list"}
