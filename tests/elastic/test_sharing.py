"""Two runs on one cluster: slots above a run's minimum are released while another run waits for its minimum.

In the slow set, because it takes a minute and a half: `pytest -m slow tests/elastic/test_sharing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint
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


@pytest.fixture
def large(cluster: Machines) -> Iterator[Run]:
    """A run that uses all machines and needs one."""
    run = start_run(cluster)
    run.await_world(3)
    yield run
    stop_run(run)
    assert leftovers(run) == []
    assert (run.folder / "checkpoints").is_dir()


def test_two_runs__share_machines_through_yield_loss_and_growth(cluster: Machines, large: Run) -> None:
    small = start_run(cluster, "--set", "resources.workers=2")
    assert_large_run_yields(large, small)
    cluster.kill(cluster.of(small.agent(small.formed["ranks"][1]["node"])))
    assert_waits_with_state_in_storage(small)
    assert large.formed["world_size"] == 1  # it is at its minimum
    large.await_steps(3)
    assert_continues_when_a_machine_joins(cluster, small)
    stop_run(small)
    assert [record["step"] for record in read_metrics(small.folder)] == list(range(1, small.step + 1))
    assert leftovers(small, but=large) == []
    large.await_world(3)
    assert large.of("MembershipChangeStarted")[-1]["cause"] == "growth"


def assert_large_run_yields(large: Run, small: Run) -> None:
    small.await_world(2)
    assert large.formed["world_size"] == 1
    assert large.of("MembershipChangeStarted")[-1]["cause"] == "yield"
    assert large.repeated() == []
    nodes = [{rank["node"].partition("-")[0] for rank in run.formed["ranks"]} for run in (large, small)]
    assert not nodes[0] & nodes[1]
    large.await_steps(3)


def assert_waits_with_state_in_storage(run: Run) -> None:
    wait_for(lambda: run.of("WaitingForMachines"))
    assert (run.of("WaitingForMachines")[-1]["have"], run.of("WaitingForMachines")[-1]["need"]) == (1, 2)
    saved = wait_for(lambda: run.of("CheckpointSaved"))[-1]
    assert saved["step"] in (run.step - 1, run.step)
    found = find_checkpoint(open_storage(str(run.folder / "checkpoints")), on_skip=lambda name, why: None)
    assert found is not None
    assert found.progress.step == saved["step"]


def assert_continues_when_a_machine_joins(cluster: Machines, run: Run) -> None:
    waiting, repeated = run.formed["generation"], len(run.repeated())
    cluster.add()
    wait_for(lambda: run.formed["generation"] > waiting)
    run.await_steps(3)
    assert run.of("GenerationStarting")[-1]["source"] == "memory"
    assert len(run.repeated()) - repeated <= 1


def test_run_that_waits_for_its_minimum__can_be_stopped(cluster: Machines, large: Run) -> None:
    waiting = start_run(cluster, "--set", "resources.workers=3")
    stop_run(waiting)
    assert read_run(waiting.folder).status == "stopped"
    large.await_steps(3)
