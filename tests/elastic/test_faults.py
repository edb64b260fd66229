"""Real Ray, simulated machines, real kills: training continues as if nothing had happened.

One run serves all tests, in any order: before each test it is restored to three healthy machines. After the last
test its record must be complete, and its losses equal those of an undisturbed run of the same job in one process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.runs.lock import driver_pid
from forge.runs.reader import read_metrics, read_run
from tests.support.command import forge, wait_for
from tests.support.elastic import Machines, Run, leftovers, machines, start_run, stop_run, write_job
from tests.support.ranks import Recording, on_ranks, train_one_rank

TOLERANCE = 2e-5
NUM_MACHINES = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=100_000, paced=True)
    with machines(home, count=NUM_MACHINES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_run(cluster: Machines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = start_run(cluster)
    run.await_world(NUM_MACHINES)
    yield run
    stop_run(run)
    assert leftovers(run) == []
    assert_equals_undisturbed_run(run, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def run(shared_run: Run) -> Run:
    """The shared run, training with two workers or more."""
    if shared_run.formed["world_size"] < 2:
        used = [shared_run.machine_of(rank) for rank in shared_run.formed["ranks"]]
        for node in [node for node in shared_run.cluster.nodes if node not in used]:
            shared_run.cluster.kill(node)  # it is draining, or the slot of a rank that hung is in quarantine
        shared_run.cluster.add()
        await_workers(shared_run, 2)
    return shared_run


def await_workers(run: Run, count: int) -> None:
    """Wait until a generation with at least `count` ranks has taken some steps."""
    wait_for(lambda: run.formed["world_size"] >= count, timeout_s=60)
    run.await_steps(3)


def assert_equals_undisturbed_run(run: Run, folder: Path) -> None:
    """Every step is recorded once, and the losses are those of a run in one process."""
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    arguments = ((run.folder / "plan.json").read_text(), str(folder), 1, len(records))
    (undisturbed,) = on_ranks(train_undisturbed, os.environ["FORGE_CACHE"], *arguments, world_size=1)
    losses = undisturbed.losses
    worst = max(abs(record["train/loss"] - loss) for record, loss in zip(records, losses, strict=True))
    assert worst < TOLERANCE
    for event in run.of("StepRepeated"):
        assert event["loss"] == pytest.approx(losses[event["step"] - 1], abs=TOLERANCE)


def train_undisturbed(rank: int, cache: str, *arguments: Any) -> Recording:
    """Train as `train_one_rank` does, with the code of the run from its cache."""
    os.environ["FORGE_CACHE"] = cache
    return train_one_rank(rank, *arguments)


def chaos(run: Run, what: str, *arguments: str) -> None:
    """Run `forge chaos WHAT RUN`."""
    done = forge("chaos", what, str(run.folder), *arguments, cwd=run.cluster.home, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_killed_rank__repeats_at_most_one_step(run: Run) -> None:
    rank = run.formed["ranks"][1]
    size, repeated = run.formed["world_size"], len(run.repeated())
    run.recovers_from(lambda: os.kill(rank["pid"], signal.SIGKILL))
    assert run.formed["world_size"] == size
    assert len(run.repeated()) - repeated <= 1


def test_killed_machine__repeats_at_most_one_step_and_a_new_machine_joins(run: Run) -> None:
    first = run.formed["ranks"][0]  # its node hosts the rendezvous, and it reports the metrics
    size, repeated = run.formed["world_size"], len(run.repeated())
    node = run.machine_of(first)
    run.recovers_from(lambda: run.cluster.kill(node))
    assert run.formed["world_size"] == size - 1
    assert len(run.repeated()) - repeated <= 1
    run.cluster.add()
    await_workers(run, size)
    assert run.of("MembershipChangeStarted")[-1]["cause"] == "growth"
    assert len(run.repeated()) - repeated <= 1
    assert {record["elastic/world_size"] for record in read_metrics(run.folder)} >= {size - 1, size}


@pytest.mark.slow
def test_killed_agent__its_ranks_die_and_it_is_restarted(run: Run) -> None:
    size, repeated = run.formed["world_size"], len(run.repeated())
    agent = run.agent(run.formed["ranks"][-1]["node"])
    children = psutil.Process(agent).children(recursive=True)
    run.recovers_from(lambda: os.kill(agent, signal.SIGKILL))
    assert len(run.repeated()) - repeated <= 1
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]
    await_workers(run, size)


def test_killed_supervisor__ranks_continue(run: Run) -> None:
    before, repeated = run.formed["generation"], len(run.repeated())
    count = len(run.of("SupervisorRestarted"))
    chaos(run, "kill", "--supervisor")
    run.await_steps(5)
    wait_for(lambda: len(run.of("SupervisorRestarted")) > count)
    run.await_steps(5)
    assert run.formed["generation"] == before
    assert len(run.repeated()) == repeated


def test_killed_driver__is_restarted_and_ranks_continue(run: Run) -> None:
    driver = driver_pid(run.folder)
    assert driver is not None
    before = run.formed["generation"]
    os.kill(driver, signal.SIGKILL)
    wait_for(lambda: driver_pid(run.folder) not in (None, driver))
    run.await_steps(5)
    assert run.formed["generation"] == before
    assert read_run(run.folder).status == "running"


def test_hung_rank__is_found_and_its_node_left_out(run: Run) -> None:
    rank = run.formed["ranks"][1]
    size, repeated = run.formed["world_size"], len(run.repeated())
    run.recovers_from(lambda: os.kill(rank["pid"], signal.SIGSTOP))
    assert (run.of("RankHung")[-1]["rank"], run.of("RankHung")[-1]["node"]) == (1, rank["node"])
    assert run.formed["world_size"] == size - 1
    assert rank["node"] not in [other["node"] for other in run.formed["ranks"]]
    assert len(run.repeated()) - repeated <= 1
    assert "Current thread" in (run.folder / "logs" / "rank-0.log").read_text()  # its stack


def test_preemption_notice__no_step_is_repeated_and_a_restarted_supervisor_keeps_used_slots(run: Run) -> None:
    size, repeated = run.formed["world_size"], len(run.repeated())
    rank = run.formed["ranks"][-1]
    run.recovers_from(lambda: chaos(run, "notice", "--node", rank["node"], "--seconds", "5"))
    assert run.of("PreemptionNoticeReceived")[-1]["source"] == "ray"
    assert run.of("MembershipChangeStarted")[-1]["cause"] == "notice"
    assert rank["node"] not in [other["node"] for other in run.formed["ranks"]]
    assert run.formed["world_size"] <= size
    assert len(run.repeated()) == repeated
    count = len(run.of("SupervisorRestarted"))
    chaos(run, "kill", "--supervisor")  # while a node is draining
    wait_for(lambda: len(run.of("SupervisorRestarted")) > count)
    restarted = run.of("SupervisorRestarted")[-1]["time"]
    assigned = {rank["node"] for rank in run.formed["ranks"]}

    def rejoined() -> dict[str, int]:
        joined = [event for event in run.of("NodeJoined") if event["time"] > restarted]
        return {event["node"]: event["num_slots"] for event in joined if event["node"] in assigned}

    wait_for(lambda: rejoined().keys() == assigned)
    assert min(rejoined().values()) >= 1
    run.await_steps(5)
