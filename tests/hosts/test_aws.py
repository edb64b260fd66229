"""AWS in a box: Ray's unchanged launcher and autoscaler rent and lose machines.

Everything is real except AWS itself, which is moto: the API calls, ssh, rsync, Ray on every machine, its token.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forge.api import start
from forge.aws_client import client
from forge.cli.app import app
from forge.cluster.base import NodeProgress, list_records, read_record, token_path
from forge.cluster.cloud.provider import CloudCluster
from forge.cluster.registry import cluster_of, find_cluster
from forge.cluster.tools import require_tools
from forge.config.load import load_cluster, load_job
from forge.remote.cluster_runs import stop_runs
from forge.runs.create import create_run
from forge.runs.reader import read_metrics
from forge.runtime.resolve import resolve
from tests.support.cloud_box import IMAGE, PYTHON, CloudBox, Refusal
from tests.support.command import mentioning, wait_for
from tests.support.elastic import Machines, Run, write_job

REGION = "us-east-1"
NODES = (
    "import ray, json; ray.init(address='auto', logging_level='error', log_to_driver=False); "
    "print(json.dumps([node['NodeManagerAddress'] for node in ray.nodes() if node['Alive']]))"
)


@pytest.fixture
def box(_hosts_allowed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CloudBox]:
    """A cloud without machines, and an empty state folder."""
    require_tools("aws")  # names what to install
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    with CloudBox(regions=(REGION, "us-west-2")) as box:
        yield box


def write_file(box: CloudBox, folder: Path, **keys: Any) -> Path:
    """A cluster file, as a user writes it."""
    values = {
        "name": "boxed",
        "provider": "aws",
        "regions": [REGION],
        "instance_types": ["m5.2xlarge"],
        "workers": "0..2",
        "allow_from": box.network,
        "image": IMAGE,
        "user": "root",
        "python": PYTHON,
        "startup_timeout": "2m",
    }
    file = folder / "cluster.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (values | keys).items()))
    return file


def cluster_from(file: Path) -> CloudCluster:
    cluster = cluster_of(load_cluster(file))
    assert isinstance(cluster, CloudCluster)
    return cluster


def members(cluster: CloudCluster) -> set[str]:
    """The addresses of the machines that Ray believes to be alive."""
    done = cluster.on_head(["python", "-c", NODES])
    assert done.returncode == 0, done.stderr.decode()
    return set(json.loads(done.stdout.decode().splitlines()[-1]))


def ignore(_: NodeProgress) -> None:
    pass


@pytest.mark.slow
def test_up_and_down__rent_a_private_cluster_and_leave_nothing(
    box: CloudBox, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster = cluster_from(write_file(box, tmp_path, workers="1..2", max_usd_per_hour=5))
    progress: list[str] = []
    status = cluster.up(on_progress=lambda one: progress.append(one.message))
    assert progress[0] == "comparing prices" and progress[-1] == "ready"
    wait_for(lambda: len(members(cluster)) == 2, timeout_s=60)

    head, worker = sorted(box.api.alive(REGION), key=lambda machine: "InstanceLifecycle" in machine)
    assert "InstanceLifecycle" not in head and worker["InstanceLifecycle"] == "spot"
    assert status.address == f"{head['PrivateIpAddress']}:6379"
    assert members(cluster) == {machine["PrivateIpAddress"] for machine in (head, worker)}
    for machine in (head, worker):
        tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
        record = read_record("boxed")
        assert record is not None
        cluster_id = record.state["id"]
        assert (tags["forge-cluster"], tags["forge-cluster-id"], tags["owner"]) == ("boxed", cluster_id, "forge")
        assert tags["ray-cluster-name"] == f"boxed-{cluster_id[:8]}"
        (group,) = machine["SecurityGroups"]
        rules = box.api.ec2(REGION).describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"][0]
        sources = [entry["CidrIp"] for rule in rules["IpPermissions"] for entry in rule["IpRanges"]]
        assert sources == [box.network], "only the cluster and this machine are allowed"

    requests: list[str] = []
    events = client("ec2", REGION).meta.events
    events.register("before-call.ec2", lambda model, **_: requests.append(model.name), unique_id="test")
    nodes = cluster.status().nodes
    events.unregister("before-call.ec2", unique_id="test")
    assert requests == ["DescribeInstances"], "status is one request, so that it stays quick"
    assert [(node.kind, node.state, node.usd_per_hour, node.num_cpus) for node in nodes] == [
        ("head", "alive", 0.192, 0.0),
        ("worker", "alive", 0.384, 8.0),
    ]
    assert all(node.node_id for node in nodes)

    entered = subprocess.run(
        [*cluster.shell(nodes[1].name), "echo", "$SSH_CONNECTION"], capture_output=True, timeout=20
    )
    assert entered.stdout.split()[::2] == [nodes[0].name.encode(), nodes[1].name.encode()], "through the head"

    token = cluster.token()
    with cluster.job_server() as url:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=10)
        assert refused.value.code == 401
        asked = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        assert urllib.request.urlopen(asked, timeout=10).status == 200
    environment = cluster.on_head(["env"]).stdout.decode()
    assert "FORGE_CLOUD=aws" in environment and token not in environment
    asked_again: list[str] = []
    cluster.up(on_progress=lambda one: asked_again.append(one.message))
    assert asked_again == ["ready"], "a running cluster is left alone"
    _require_no_secret(tmp_path / "state", token=token, output="".join(capfd.readouterr()))

    assert find_cluster("boxed").down(on_progress=ignore) == []
    assert not box.api.alive(REGION)
    assert list_records() == [] and not token_path("boxed").exists()
    groups = box.api.ec2(REGION).describe_security_groups()["SecurityGroups"]
    assert [group["GroupName"] for group in groups] == ["default"]
    assert not box.api.client("iam").list_roles()["Roles"]


def _require_no_secret(folder: Path, *, token: str, output: str) -> None:
    """The token is in one private file; it and the cloud's key are on no command line and in no output."""
    secrets = (token, os.environ["AWS_SECRET_ACCESS_KEY"])
    assert token_path("boxed").stat().st_mode & 0o077 == 0
    for file in folder.rglob("*"):
        if file.is_file() and file != token_path("boxed"):
            assert not any(secret.encode() in file.read_bytes() for secret in secrets), file
    for file in [folder / "clusters/boxed.d" / name for name in ("launch.yaml", "launch.log", "key")]:
        assert file.stat().st_mode & 0o077 == 0, file
    assert not any(secret in output for secret in secrets)
    assert not mentioning(*secrets)


@pytest.mark.slow
def test_autoscaler__machine_reclaimed__rents_another(box: CloudBox, tmp_path: Path) -> None:
    cluster = cluster_from(write_file(box, tmp_path, workers="1..2"))
    cluster.up(on_progress=ignore)
    try:
        wait_for(lambda: len(members(cluster)) == 2, timeout_s=60)
        (lost,) = (machine for machine in box.api.alive(REGION) if "InstanceLifecycle" in machine)
        box.reclaim(lost["InstanceId"])
        assert lost["PrivateIpAddress"] not in box.machines
        wait_for(lambda: len(box.api.alive(REGION)) == 2, timeout_s=60)
        (new,) = (machine for machine in box.api.alive(REGION) if "InstanceLifecycle" in machine)
        assert new["InstanceId"] != lost["InstanceId"]
        wait_for(lambda: new["PrivateIpAddress"] in members(cluster), timeout_s=90)
    finally:
        assert cluster.down(on_progress=ignore) == []
    assert not box.api.alive(REGION)


@pytest.mark.slow
def test_autoscaler__rents_for_waiting_work_and_terminates_idle_machines(box: CloudBox, tmp_path: Path) -> None:
    cluster = cluster_from(write_file(box, tmp_path, workers="0..1", idle_minutes=0.1))
    cluster.up(on_progress=ignore)
    work = (
        "import os, ray; ray.init(address='auto', log_to_driver=False); "
        "f = ray.remote(num_cpus=8)(lambda: os.environ['FORGE_USD_PER_HOUR'] + os.environ['FORGE_CLOUD']); "
        "print(ray.get(f.remote()))"
    )
    try:
        assert len(box.api.alive(REGION)) == 1
        done = cluster.on_head(["python", "-c", work], timeout_s=120)
        assert done.stdout.decode().split()[-1] == "0.384aws", done.stderr.decode()
        wait_for(lambda: len(box.api.alive(REGION)) == 1, timeout_s=90)
    finally:
        assert cluster.down(on_progress=ignore) == []


@pytest.mark.slow
def test_autoscaler__no_spot_capacity__rents_on_demand(box: CloudBox, tmp_path: Path) -> None:
    cluster = cluster_from(write_file(box, tmp_path, workers="0..1", on_demand_fallback=True))
    box.api.refusals = [Refusal("RunInstances", REGION, "InsufficientInstanceCapacity", needs="MarketType=spot")]
    cluster.up(on_progress=ignore)
    work = "import ray; ray.init(address='auto'); ray.get(ray.remote(num_cpus=8)(lambda: 1).remote())"
    try:
        done = cluster.on_head(["python", "-c", work], timeout_s=120)
        assert done.returncode == 0, done.stderr.decode()
        machines = box.api.alive(REGION)
        assert len(machines) == 2 and all("InstanceLifecycle" not in machine for machine in machines)
        assert box.api.calls["RunInstances", REGION] > 2
    finally:
        assert cluster.down(on_progress=ignore) == []


@pytest.mark.slow
def test_up__no_capacity_for_the_head__tries_another_region(box: CloudBox, tmp_path: Path) -> None:
    box.api.spot_prices = {REGION: {"m5.2xlarge": 0.1}, "us-west-2": {"m5.2xlarge": 0.2}}
    box.api.refusals = [Refusal("RunInstances", REGION, "InsufficientInstanceCapacity")]
    cluster = cluster_from(write_file(box, tmp_path, regions=[REGION, "us-west-2"]))
    progress: list[NodeProgress] = []
    status = cluster.up(on_progress=progress.append)
    try:
        assert [one.name for one in progress if one.is_failure] == [REGION]
        assert [node.kind for node in status.nodes] == ["head"]
        assert len(box.api.alive("us-west-2")) == 1
    finally:
        assert cluster.down(on_progress=ignore) == []
    assert not box.api.alive("us-west-2")


@pytest.mark.slow
def test_train__machines_reclaimed_with_and_without_notice__is_one_curve(
    box: CloudBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Machines of one CPU: each takes one rank, and is rented because the run waits for it.
    file = write_file(box, tmp_path, instance_types=["t2.small"], usd_per_hour={"t2.small": 0.01})
    cluster = cluster_from(file)
    write_job(tmp_path, steps=100_000, workers="1..2")
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / create_run(resolve(load_job("job.yaml")))
    run = Run(folder=folder, cluster=Machines(tmp_path))
    status = cluster.up(on_progress=ignore)
    start = f"setsid nohup {PYTHON} -m forge.runtime.driver {folder} --address {status.address}"
    try:
        assert len(box.api.alive(REGION)) == 1
        cluster.on_head(["sh", "-c", f"{start} > {folder}/logs/driver.log 2>&1 < /dev/null &"])
        run.await_world(2, timeout_s=180.0)

        lost = _machine_of_a_rank(box, run)
        run.recovers_from(lambda: box.announce(lost), timeout_s=110.0)
        assert len(box.api.alive(REGION)) == 4, "another machine is rented at the notice"
        assert _machine_of_a_rank(box, run) != lost
        box.reclaim(lost)
        run.await_world(2, timeout_s=180.0)
        assert run.repeated() == [], "an announced loss repeats no step"

        began = time.time()
        lost = _machine_of_a_rank(box, run)
        run.recovers_from(lambda: box.reclaim(lost), timeout_s=60.0)
        assert len(run.repeated(since=began)) <= 1
        run.await_world(2, timeout_s=180.0)
        steps = [line["step"] for line in read_metrics(folder)]
        assert steps == list(range(1, len(steps) + 1))
    finally:
        assert cluster.down(on_progress=ignore) == []
    assert not box.api.alive(REGION)


@pytest.mark.slow
def test_move__run_in_a_region_without_spot_machines__goes_on_in_another(
    box: CloudBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    west, prices = "us-west-2", {"t2.small": 0.01}
    box.api.spot_prices = {REGION: prices, west: prices}
    store = str(tmp_path / "store")  # another folder than the one to which records are copied
    keys = {"instance_types": ["t2.small"], "usd_per_hour": prices, "storage": store}
    cluster = cluster_from(write_file(box, tmp_path, regions=[REGION, west], startup_timeout="5m", **keys))
    write_job(tmp_path, steps=100_000, workers="1")
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.chdir(tmp_path)
    cluster.up(on_progress=ignore)
    try:
        handle = start(tmp_path / "job.yaml", cluster="boxed")
        run = Run(folder=handle.folder.absolute(), cluster=Machines(tmp_path))
        run.await_world(1, timeout_s=400.0)
        done = CliRunner().invoke(app, ["cluster", "move", "boxed", "--to", west, "--yes"])
        assert done.exit_code == 0, done.output
        assert not box.api.alive(REGION) and cluster.place == west
        stopped_at = run.step
        wait_for(lambda: run.step >= stopped_at + 3, timeout_s=400.0, about=run.newest_events)
        assert run.repeated() == []
        steps = [line["step"] for line in read_metrics(run.folder)]
        assert steps == list(range(1, len(steps) + 1)), "one curve"
        assert [event["reason"] for event in run.of("RunStopped")] == [""]
        stop_runs([run.folder], on_message=print)
    finally:
        assert cluster.down(on_progress=ignore) == []
    assert not box.api.alive(west) and not box.api.alive(REGION)


def _machine_of_a_rank(box: CloudBox, run: Run) -> str:
    """The instance on which the last rank is."""
    node = run.formed["ranks"][-1]["node"]
    address = next(event["host"] for event in reversed(run.of("NodeJoined")) if event["node"] == node)
    (found,) = (machine for machine in box.api.alive(REGION) if machine["PrivateIpAddress"] == address)
    return str(found["InstanceId"])


@pytest.mark.slow
def test_up__no_capacity_for_min_workers__tries_another_region(box: CloudBox, tmp_path: Path) -> None:
    box.api.spot_prices = {REGION: {"m5.2xlarge": 0.1}, "us-west-2": {"m5.2xlarge": 0.2}}
    box.api.refusals = [Refusal("RunInstances", REGION, "MaxSpotInstanceCountExceeded", needs="MarketType=spot")]
    cluster = cluster_from(write_file(box, tmp_path, regions=[REGION, "us-west-2"], workers="1..1"))
    progress: list[NodeProgress] = []
    cluster.up(on_progress=progress.append)
    try:
        assert [one.name for one in progress if one.is_failure] == [REGION]
        assert not box.api.alive(REGION)
        wait_for(lambda: len(members(cluster)) == 2, timeout_s=90)
        assert {node.usd_per_hour for node in cluster.status().nodes} == {0.192, 0.2}
    finally:
        assert cluster.down(on_progress=ignore) == []
    assert not box.api.alive("us-west-2")


UP = (
    "import sys; from forge.cluster.registry import cluster_of; from forge.config.load import load_cluster; "
    "from forge.errors import ForgeError\n"
    "try: cluster_of(load_cluster(sys.argv[1])).up(on_progress=lambda one: print(one.message, flush=True))\n"
    "except ForgeError as error: print(error); sys.exit(error.exit_code)\n"
    "except KeyboardInterrupt: sys.exit(130)"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_up__killed_midway__down_finds_every_machine(box: CloudBox, tmp_path: Path, number: signal.Signals) -> None:
    file = write_file(box, tmp_path)
    with subprocess.Popen([sys.executable, "-c", UP, str(file)], stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: box.api.alive(REGION), timeout_s=60)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]
    wait_for(lambda: not mentioning("ray up", "boxed.d/launch.yaml"), timeout_s=20)
    assert read_record("boxed") is not None
    assert find_cluster("boxed").down(on_progress=ignore) == []
    assert not box.api.alive(REGION)
    assert list_records() == []


@pytest.mark.slow
def test_up__ray_died_on_the_head__restarts_it(box: CloudBox, tmp_path: Path) -> None:
    cluster = cluster_from(write_file(box, tmp_path))
    cluster.up(on_progress=ignore)
    try:
        (head,) = box.api.alive(REGION)
        ray = str(Path(PYTHON).with_name("ray"))
        assert cluster.on_head([ray, "stop", "--force"]).returncode == 0
        cluster.up(on_progress=ignore)
        assert members(cluster) == {head["PrivateIpAddress"]}
        assert [machine["InstanceId"] for machine in box.api.alive(REGION)] == [head["InstanceId"]]
    finally:
        assert cluster.down(on_progress=ignore) == []
