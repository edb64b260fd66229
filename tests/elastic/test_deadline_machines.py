"""A real supervisor and a deadline on a cluster that seems to rent spot and on-demand machines.

The cloud alone is not real: simulated machines have the environment that rented ones would have, and the file of
Ray's autoscaler is one that no autoscaler reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command import wait_for
from tests.support.elastic import Machines, machines, start_run, stop_run, write_job


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    """A cluster of two on-demand machines."""
    write_job(tmp_path, steps=200_000, workers="1..2")
    types = {name: {"max_workers": 4} for name in ("spot-a", "on-demand-a")}
    (tmp_path / "ray_bootstrap_config.yaml").write_text(json.dumps({"available_node_types": types}))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FORGE_USD_PER_HOUR", "10")
    with machines(tmp_path, count=2) as cluster:
        yield cluster


@pytest.mark.slow
def test_spot_machine_appears__takes_the_place_of_an_on_demand_one(
    cluster: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start_run(cluster, "--set", "resources.deadline=9d")
    run.await_world(2)
    file = cluster.home / ".forge" / "machine-limits" / f"{run.folder.name}.json"
    wait_for(file.exists, timeout_s=90, about=run.newest_events)
    wanted = json.loads(file.read_text())
    assert (wanted["spot"], wanted["on_demand"]) == (2, 2)  # those that are paid for are kept until spot ones work
    assert [event["ends_at"] < event["deadline"] for event in run.of("DeadlineForecast")] == [True]
    before = {rank["node"] for rank in run.formed["ranks"]}

    monkeypatch.setenv("FORGE_USD_PER_HOUR", "3")
    monkeypatch.setenv("FORGE_ON_DEMAND_USD_PER_HOUR", "10")
    cluster.add()
    wait_for(lambda: len(run.of("NodeJoined")) == 3, timeout_s=60, about=run.newest_events)
    spot = run.of("NodeJoined")[-1]["node"]
    wait_for(lambda: run.of("MembershipChangeStarted"), timeout_s=120, about=run.newest_events)
    wait_for(lambda: spot in {rank["node"] for rank in run.formed["ranks"]}, timeout_s=60, about=run.newest_events)
    run.await_steps(3)
    assert run.formed["world_size"] == 2
    assert len(before & {rank["node"] for rank in run.formed["ranks"]}) == 1
    assert run.of("MembershipChangeStarted")[-1]["cause"] == "notice"
    assert run.of("PreemptionNoticeReceived") == []  # forge itself gave the machine up
    assert run.repeated() == []
    chosen = [(event["num_spot"], event["num_on_demand"]) for event in run.of("MachinesChosen")]
    assert chosen[:2] == [(2, 2), (2, 1)]
    stop_run(run)
    wait_for(lambda: not file.exists(), timeout_s=30)
    assert os.environ["HOME"] == str(cluster.home)
