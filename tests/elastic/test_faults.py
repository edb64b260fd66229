"""Real Ray, real machines as far as one can simulate them, real kills: training goes on as if nothing had been.

One run is left in peace, in one process; the other, of the same job, loses a rank, an agent, a machine, its
supervisor, its carrier, hangs, shrinks after a notice and grows again. Its losses must be the first one's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from forge.plan.plan import plan_from_json
from forge.runs.reader import driver_pid, read_metrics, read_run
from tests.support.command import forge, wait_for
from tests.support.elastic import Machines, Run, leftovers, machines, start_run, stop_run, write_job
from tests.support.ranks import run_ranks

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=100_000)
    with machines(home, count=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def run(cluster: Machines) -> Iterator[Run]:
    run = start_run(cluster)
    run.await_world(3)
    yield run
    stop_run(run)


def chaos(run: Run, what: str, *arguments: str) -> None:
    """`forge chaos WHAT RUN`, as a user does it."""
    done = forge("chaos", what, str(run.folder), *arguments, cwd=run.cluster.home, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_a_killed_rank_costs_at_most_a_step(run: Run) -> None:
    place = run.formed["ranks"][1]
    repeated = len(run.repeated())
    run.recovers_from(lambda: os.kill(place["pid"], signal.SIGKILL))
    assert run.formed["world_size"] == 3
    assert len(run.repeated()) - repeated <= 1


def test_a_killed_machine_costs_at_most_a_step_and_is_taken_back(run: Run) -> None:
    first = run.formed["ranks"][0]  # the one that hosts the rendezvous, and reports
    repeated = len(run.repeated())
    node = run.cluster.of(run.agent(first["node"]))
    run.recovers_from(lambda: run.cluster.kill(node))
    assert run.formed["world_size"] == 2
    assert len(run.repeated()) - repeated <= 1
    run.cluster.add()
    run.await_world(3)
    assert run.of("MembershipChangeStarted")[-1]["cause"] == "growth"
    assert len(run.repeated()) - repeated <= 1


@pytest.mark.slow
def test_a_killed_agent_takes_its_ranks_along_and_is_started_anew(run: Run) -> None:
    repeated = len(run.repeated())
    agent = run.agent(run.formed["ranks"][2]["node"])
    children = psutil.Process(agent).children(recursive=True)
    run.recovers_from(lambda: os.kill(agent, signal.SIGKILL))
    assert len(run.repeated()) - repeated <= 1
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]
    run.await_world(3)


def test_a_killed_supervisor_does_not_stop_the_ranks(run: Run) -> None:
    before, repeated = run.formed["generation"], len(run.repeated())
    chaos(run, "kill", "--supervisor")
    run.await_steps(5)
    wait_for(lambda: run.of("SupervisorRestarted"))
    run.await_steps(5)
    assert run.formed["generation"] == before
    assert len(run.repeated()) == repeated


def test_a_killed_carrier_is_replaced(run: Run) -> None:
    carrier = driver_pid(run.folder)
    assert carrier is not None
    before = run.formed["generation"]
    os.kill(carrier, signal.SIGKILL)
    wait_for(lambda: driver_pid(run.folder) not in (None, carrier))
    run.await_steps(5)
    assert run.formed["generation"] == before
    assert read_run(run.folder).status == "running"


def test_a_rank_that_hangs_is_found_and_left_out(run: Run) -> None:
    place = run.formed["ranks"][1]
    repeated = len(run.repeated())
    run.recovers_from(lambda: os.kill(place["pid"], signal.SIGSTOP))
    assert (run.of("RankHung")[-1]["rank"], run.of("RankHung")[-1]["node"]) == (1, place["node"])
    assert run.formed["world_size"] == 2
    assert place["node"] not in [other["node"] for other in run.formed["ranks"]]
    assert len(run.repeated()) - repeated <= 1
    assert "Current thread" in (run.folder / "logs" / "rank-0.log").read_text()  # its stack


def test_a_notice_costs_no_step(run: Run) -> None:
    repeated = len(run.repeated())
    place = run.formed["ranks"][-1]
    size = run.formed["world_size"]
    run.recovers_from(lambda: chaos(run, "notice", "--node", place["node"], "--seconds", "5"))
    assert run.of("PreemptionNoticeReceived")[-1]["source"] == "ray"
    assert run.of("MembershipChangeStarted")[-1]["cause"] == "notice"
    assert place["node"] not in [other["node"] for other in run.formed["ranks"]]
    assert run.formed["world_size"] <= size
    assert len(run.repeated()) == repeated


def test_a_supervisor_that_finds_a_machine_going_takes_no_place_from_ranks_at_work(run: Run) -> None:
    count = len(run.of("SupervisorRestarted"))
    chaos(run, "kill", "--supervisor")
    wait_for(lambda: len(run.of("SupervisorRestarted")) > count)
    restarted = run.of("SupervisorRestarted")[-1]["time"]
    at_work = {place["node"] for place in run.formed["ranks"]}

    def back() -> dict[str, int]:
        joined = [event for event in run.of("NodeJoined") if event["time"] > restarted]
        return {event["node"]: event["num_slots"] for event in joined if event["node"] in at_work}

    wait_for(lambda: back().keys() == at_work)
    assert min(back().values()) >= 1
    run.await_steps(5)


def test_after_all_that_every_step_stands_once_and_the_losses_are_those_of_a_run_in_peace(
    run: Run, tmp_path: Path
) -> None:
    """Must come last: it ends the run."""
    stop_run(run)
    records = read_metrics(run.folder)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert {record["elastic/world_size"] for record in records} >= {2, 3}
    plan = plan_from_json((run.folder / "plan.json").read_text())
    peace = run_ranks(plan, tmp_path / "peace", world_size=1, stop_after=len(records)).losses
    worst = max(abs(record["train/loss"] - loss) for record, loss in zip(records, peace, strict=True))
    assert worst < TOLERANCE
    for event in run.of("StepRepeated"):
        assert event["loss"] == pytest.approx(peace[event["step"] - 1], abs=TOLERANCE)
    assert leftovers(run) == []
