"""Two runs on one cluster, and a run that has too few machines: who waits, who gives back, and what is safe.

In the slow set, for the minute and a half it takes: `pytest -m slow tests/elastic/test_sharing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.checkpoint.reader import find_checkpoint
from forge.checkpoint.storage import open_storage
from forge.runs.reader import read_metrics, read_run
from tests.support.command import wait_for
from tests.support.elastic import Machines, Run, leftovers, machines, start_run, stop_run, write_job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=100_000)
    with machines(home, count=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def large(cluster: Machines) -> Run:
    """A run that takes all machines there are, and needs one."""
    run = start_run(cluster)
    run.await_world(3)
    return run


@pytest.fixture(scope="module")
def small(cluster: Machines, large: Run) -> Run:
    """A run that needs two, started while there is none free."""
    return start_run(cluster, "--set", "resources.workers=2")


def test_a_run_above_its_minimum_gives_back_what_another_needs(large: Run, small: Run) -> None:
    small.await_world(2)
    assert large.formed["world_size"] == 1
    assert large.of("MembershipChangeStarted")[-1]["cause"] == "yield"
    assert large.repeated() == []
    nodes = [{place["node"].partition("-")[0] for place in run.formed["ranks"]} for run in (large, small)]
    assert not nodes[0] & nodes[1]
    large.await_steps(3)


def test_below_its_minimum_a_run_waits_with_its_state_in_storage(cluster: Machines, large: Run, small: Run) -> None:
    cluster.kill(cluster.of(small.agent(small.formed["ranks"][1]["node"])))
    wait_for(lambda: small.of("WaitingForMachines"))
    assert (small.of("WaitingForMachines")[-1]["have"], small.of("WaitingForMachines")[-1]["need"]) == (1, 2)
    saved = wait_for(lambda: small.of("CheckpointSaved"))[-1]
    assert saved["step"] in (small.step - 1, small.step)
    found = find_checkpoint(open_storage(str(small.folder / "checkpoints")), on_skip=lambda name, why: None)
    assert found is not None
    assert found.progress.step == saved["step"]
    assert large.formed["world_size"] == 1  # it has nothing to spare
    large.await_steps(3)


def test_above_it_again_the_run_goes_on(cluster: Machines, small: Run) -> None:
    waiting, repeated = small.formed["generation"], len(small.repeated())
    cluster.add()
    wait_for(lambda: small.formed["generation"] > waiting)
    small.await_steps(3)
    assert small.of("GenerationStarting")[-1]["source"] == "memory"
    assert len(small.repeated()) - repeated <= 1


def test_what_was_given_back_is_taken_again_when_it_is_free(large: Run, small: Run) -> None:
    stop_run(small)
    assert [record["step"] for record in read_metrics(small.folder)] == list(range(1, small.step + 1))
    assert leftovers(small, but=large) == []
    large.await_world(3)
    assert large.of("MembershipChangeStarted")[-1]["cause"] == "growth"


def test_a_run_that_waits_can_be_stopped(cluster: Machines, large: Run) -> None:
    """Must come last: all machines are taken."""
    waiting = start_run(cluster, "--set", "resources.workers=3")
    stop_run(waiting)
    assert read_run(waiting.folder).status == "stopped"
    stop_run(large)
    assert leftovers(large) == []
    assert Path(large.folder / "checkpoints").is_dir()
