"""A node whose network is cut without notice: the others continue, and it does no harm when it is back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.config.load import load_job
from forge.runs.create import create_run
from forge.runs.lock import driver_pid
from forge.runs.reader import read_metrics, read_run
from forge.runtime.driver_process import LocalRun
from forge.runtime.resolve import resolve
from tests.support.command import wait_for
from tests.support.elastic import Machines, Run, write_job
from tests.support.hosts import Hosts

NUM_MACHINES = 3


@pytest.fixture(scope="module")
def hosts(_hosts_allowed: None) -> Iterator[Hosts]:
    with Hosts(1 + NUM_MACHINES) as hosts:
        hosts.start_ray()
        yield hosts


@pytest.fixture(scope="module")
def run(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run on three nodes with their own addresses; the head has none of its ranks."""
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=100_000)
    before = Path.cwd()
    os.chdir(home)
    try:
        os.environ["FORGE_CACHE"] = str(home / "cache")
        folder = home / create_run(resolve(load_job(home / "job.yaml")))
    finally:
        os.chdir(before)
        del os.environ["FORGE_CACHE"]
    command = (sys.executable, "-m", "forge.runtime.driver", folder, "--address", hosts.ray_address)
    with (folder / "logs" / "driver.log").open("w") as log:
        driver = hosts.run(0, *map(str, command), stdout=log, stderr=subprocess.STDOUT)
    run = Run(folder=folder, cluster=Machines(home))
    run.await_world(NUM_MACHINES, timeout_s=120.0)
    yield run
    pid = driver_pid(folder)
    if pid is not None:
        LocalRun(folder=folder, pid=pid).request_stop()
    driver.wait(timeout=60)


def host_of(run: Run, hosts: Hosts, node: str) -> int:
    address = next(event["host"] for event in run.of("NodeJoined") if event["node"] == node)
    return next(host for host in range(1 + NUM_MACHINES) if hosts.ip(host) == address)


@pytest.mark.slow
def test_run__node_loses_its_network__continues_within_seconds_as_one_curve(run: Run, hosts: Hosts) -> None:
    rank = run.formed["ranks"][1]
    cut_off = host_of(run, hosts, rank["node"])
    repeated, began = len(run.repeated()), time.time()
    seconds = run.recovers_from(lambda: hosts.cut(cut_off))
    assert run.formed["world_size"] == NUM_MACHINES - 1
    assert "no heartbeat for" in run.of("NodeLeft")[-1]["reason"]
    assert seconds < 20  # Ray itself took 65 s to call such a machine dead
    assert len(run.repeated(since=began)) - repeated <= 1
    hosts.reconnect(cut_off)
    run.await_world(NUM_MACHINES, timeout_s=120.0)
    assert rank["pid"] not in [other["pid"] for other in run.formed["ranks"]]

    pid = driver_pid(run.folder)
    assert pid is not None
    LocalRun(folder=run.folder, pid=pid).request_stop()
    wait_for(lambda: read_run(run.folder).status == "stopped")
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
