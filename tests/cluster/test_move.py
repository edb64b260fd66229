"""A cluster on GCP moves between zones: real calls of a fake gcloud, and a launcher that rents nothing.

On AWS, with machines and a run: tests/hosts/test_aws.py.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from forge.cluster.base import NodeProgress, list_records, read_record
from forge.cluster.cloud import firewall
from forge.cluster.cloud.provider import CloudCluster
from forge.cluster.cloud.ray_launcher import LaunchResult, RayLauncher
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError
from tests.support.cloud_tools import CloudTools

ZONES = ["us-central1-a", "us-east1-b", "europe-west4-a"]
SPEC: dict[str, object] = {
    "name": "big",
    "provider": "gcp",
    "project": "my-project",
    "gpu": "L4",
    "instance_types": ["g2-standard-4"],
    "regions": ZONES,
    "workers": "0..2",
    "allow_from": "203.0.113.4/32",
    "python": "/opt/forge/bin/python",
}


class Launcher:
    """Stands for Ray's launcher: records its commands with the zone of its file, and refuses some zones."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.full: set[str] = set()

    def run(self, launcher: RayLauncher, command: str, *options: str, timeout_s: float) -> LaunchResult:
        zone = yaml.safe_load(launcher.file.read_text())["provider"]["availability_zone"]
        self.calls.append((command, zone))
        if command == "get-head-ip":
            return LaunchResult(is_done=True, output=f"10.0.0.{1 + ZONES.index(zone)}")
        if command == "up" and zone in self.full:
            return LaunchResult(is_done=False, capacity_error="ZONE_RESOURCE_POOL_EXHAUSTED")
        return LaunchResult(is_done=True)


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """Fake tools, and an empty state folder."""
    for name, value in CloudTools.install(tmp_path / "cloud").environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(firewall, "_GONE_TIMEOUT_S", 0.0)
    monkeypatch.setattr("forge.cluster.cloud.provider.require_tools", lambda _: None)
    found = Launcher()
    run: Callable[..., LaunchResult] = found.run
    monkeypatch.setattr(RayLauncher, "run", lambda *words, **options: run(*words, **options))
    key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")]  # faster than forge's RSA
    subprocess.run(key, check=True, timeout=60)
    monkeypatch.setitem(SPEC, "identity_file", str(tmp_path / "key"))
    monkeypatch.setattr(CloudCluster, "_ask_ray", lambda _: ([], ()))
    return found


def started(**keys: object) -> CloudCluster:
    cluster = CloudCluster(CloudSpec.model_validate(SPEC | keys, strict=False))
    cluster.up(on_progress=ignore)
    return cluster


def ignore(_: NodeProgress) -> None:
    pass


def test_move__other_zone_has_capacity__ends_the_cluster_before_it_starts_there(launcher: Launcher) -> None:
    cluster = started()
    assert cluster.place == "us-central1-a"
    before = read_record("big")
    launcher.calls.clear()
    cluster.move(cluster.elsewhere(to="europe-west4-a"), on_progress=ignore)
    assert launcher.calls == [
        ("down", "us-central1-a"),
        ("up", "europe-west4-a"),
        ("get-head-ip", "europe-west4-a"),
    ]
    after = read_record("big")
    assert before is not None and after is not None
    assert cluster.place == "europe-west4-a" and after.state["address"] == "10.0.0.3"
    assert after.state["id"] == before.state["id"], "it is the same cluster, with the same token"
    assert after.state["tried"] == ["europe-west4-a"]
    assert cluster.down(on_progress=ignore) == [] and list_records() == []


@pytest.mark.slow
def test_move__no_other_zone_has_capacity__returns_to_where_it_was(launcher: Launcher) -> None:
    cluster = started()
    launcher.full = {"us-east1-b", "europe-west4-a"}
    cluster.move(cluster.elsewhere(to="us-east1-b"), on_progress=ignore)
    assert [zone for command, zone in launcher.calls if command == "up"][1:] == [
        "us-east1-b",
        "europe-west4-a",
        "us-central1-a",
    ]
    assert cluster.place == "us-central1-a"


@pytest.mark.slow
def test_move__no_zone_has_capacity__says_so_and_leaves_nothing(launcher: Launcher) -> None:
    cluster = started()
    launcher.full = set(ZONES)
    with pytest.raises(ClusterError, match=r"no region has capacity now \(us-east1-b: ZONE_"):
        cluster.move(cluster.elsewhere(to="us-east1-b"), on_progress=ignore)
    assert list_records() == [] and cluster.place is None


def test_head__several_zones__knows_the_others_and_one_zone_none(launcher: Launcher, tmp_path: Path) -> None:
    started()
    file = tmp_path / "state/clusters/big.d/launch.yaml"
    assert "FORGE_REGIONS" in file.read_text()
    started(name="small", regions=["us-central1-a"])
    assert "FORGE_REGIONS" not in (tmp_path / "state/clusters/small.d/launch.yaml").read_text()
