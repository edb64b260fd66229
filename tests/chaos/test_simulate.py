"""Simulation of a run on a spot trace: cases worked out by hand, properties, and recorded traces."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from typer.testing import CliRunner

from forge.chaos.simulate import simulate
from forge.chaos.simulation import POLICIES, Policy, SimulatedRun, SimulationSettings
from forge.chaos.trace import Trace, TraceBuilder, poisson
from forge.chaos.trace_file import read_trace
from forge.cli.app import app
from forge.errors import ArgumentError
from forge.runs.reader import read_run
from tests.chaos.test_replay import JOB
from tests.support.command import forge

RECORDED = Path(__file__).parents[3] / "shared" / "traces"
PLAIN = SimulationSettings(
    step_s=10,
    node_start_s=0,
    loss_pause_s=2,
    planned_pause_s=1,
    notice_s=None,
    restart_s=100,
    checkpoint_every_s=300,
)


def trace_of(*changes: tuple[float, str, str], until_s: float) -> Trace:
    """A trace from (time, nodes that leave, nodes that join); a letter is a node."""
    builder = TraceBuilder()
    for at_s, removed, added in changes:
        builder.add(at_s=at_s, removed=tuple(removed), added=tuple(added))
    builder.add(at_s=until_s)
    return builder.build()


def run(trace: Trace, policy: Policy = "elastic", **changes: object) -> SimulatedRun:
    return simulate(trace, policy, settings=dataclasses.replace(PLAIN, **changes))


def test_no_change__trains_all_the_time() -> None:
    for policy in POLICIES:
        found = run(trace_of((0, "", "ab"), until_s=1000), policy, num_nodes=2)
        assert found.steps == pytest.approx(100)
        assert found.node_goodput == pytest.approx(1)
        assert found.node_hours == pytest.approx(2000 / 3600)


def test_elastic__loss_in_a_step__repeats_it_and_pauses() -> None:
    """Two nodes take 10 s a step, one takes 20. At 55 s half a step is lost; 2 s of pause; then 443 s."""
    found = run(trace_of((0, "", "ab"), (55, "b", ""), until_s=500))
    assert found.steps == pytest.approx(5 + 443 / 20)
    assert found.seconds == pytest.approx({"training": 50 + 443, "repeated": 5, "pausing": 2, "waiting": 0})
    assert found.node_goodput == pytest.approx((2 * 50 + 443) / (2 * 55 + 445))


def test_elastic__notice__repeats_nothing() -> None:
    """At 25 s the machine is not used any more, 30 s before it leaves; 1 s of pause."""
    found = run(trace_of((0, "", "ab"), (55, "b", ""), until_s=500), notice_s=30)
    assert found.steps == pytest.approx(2.5 + 474 / 20)
    assert found.seconds == pytest.approx({"training": 499, "repeated": 0, "pausing": 1, "waiting": 0})


def test_elastic__growth__pauses_and_is_faster() -> None:
    found = run(trace_of((0, "", "a"), (100, "", "b"), until_s=301))
    assert found.steps == pytest.approx(100 / 20 + 200 / 10)
    assert found.num_changes == 2


def test_elastic__node_and_its_copy_at_once__back_to_the_checkpoint() -> None:
    """The checkpoint of 300 s has 30 steps; at 455 s, 155 s are lost."""
    found = run(trace_of((0, "", "abcd"), (455, "bc", ""), until_s=600))
    assert found.num_from_checkpoint == 1
    assert found.seconds["repeated"] == pytest.approx(155)
    assert found.steps == pytest.approx(30 + (600 - 455 - 100) / 20)
    apart = run(trace_of((0, "", "abcd"), (455, "bd", ""), until_s=600))
    assert apart.num_from_checkpoint == 0
    assert apart.seconds["repeated"] == pytest.approx(5)


def test_elastic__all_leave_with_notice__a_checkpoint_is_written() -> None:
    trace = trace_of((0, "", "ab"), (200, "ab", ""), (300, "", "cd"), until_s=500)
    found = run(trace, notice_s=30)
    assert found.seconds["repeated"] == pytest.approx(0)
    assert found.steps == pytest.approx(17 + 100 / 10)
    assert run(trace).steps == pytest.approx(200 / 10)  # none was written; the run begins again


def test_restart__each_change__goes_back_to_the_checkpoint() -> None:
    found = run(trace_of((0, "", "ab"), (455, "b", ""), (700, "", "c"), until_s=1000), "restart")
    assert found.num_from_checkpoint == 2
    assert found.steps == pytest.approx(30 + (1000 - 800) / 10)
    assert found.seconds["repeated"] == pytest.approx(155 + 145)


def test_rigid__spare_machine__takes_the_place_of_a_lost_one() -> None:
    trace = trace_of((0, "", "abc"), (455, "a", ""), (600, "b", ""), (800, "", "d"), until_s=1000)
    found = run(trace, "rigid", num_nodes=2)
    assert found.seconds == pytest.approx(
        {"training": 300 + 100, "repeated": 155 + 45, "pausing": 200, "waiting": 200}
    )
    assert found.steps == pytest.approx(30 + 10)


def test_last_step__ends_the_run_and_its_cost() -> None:
    found = run(trace_of((0, "", "ab"), until_s=10_000), total_steps=36, usd_per_node_hour=1.5, usd_per_hour=0.5)
    assert found.finished_at_s == pytest.approx(360)
    assert found.usd == pytest.approx(0.1 * (2 * 1.5 + 0.5))


def test_scaling_0__as_fast_on_one_machine() -> None:
    found = run(trace_of((0, "", "ab"), (50, "b", ""), until_s=502), scaling=0.0)
    assert found.steps == pytest.approx(50)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("notice_s", [None, 30.0])
def test_random_traces__every_second_is_in_one_part(policy: Policy, notice_s: float | None) -> None:
    for seed in range(20):
        trace = poisson(num_nodes=7, mtbf_s=900, down_s=seed * 13.0, duration_s=20_000, seed=seed)
        found = run(trace, policy, notice_s=notice_s, node_start_s=14)
        assert sum(found.seconds.values()) == pytest.approx(20_000)
        assert min(found.seconds.values()) >= -1e-6
        assert 0 <= found.node_goodput <= 1
        assert found == run(trace, policy, notice_s=notice_s, node_start_s=14)


def test_bamboo__as_an_independent_simulation() -> None:
    """It gave 95.8 % at 10 s for each change, and 17.6 % for restarts of 120 s and checkpoints of 600 s."""
    if not (RECORDED / "bamboo-p3.csv").exists():
        pytest.skip("no bamboo-p3.csv beside this checkout")
    trace = read_trace(RECORDED / "bamboo-p3.csv")
    slow = SimulationSettings(loss_pause_s=10, planned_pause_s=10, node_start_s=0)
    assert simulate(trace, "elastic", settings=slow).node_goodput == pytest.approx(0.958, abs=0.005)
    assert simulate(trace, "elastic").node_goodput >= 0.95
    assert simulate(trace, "restart").node_goodput == pytest.approx(0.176, abs=0.005)


@pytest.mark.slow
def test_4096_nodes_for_30_days__below_a_minute() -> None:
    trace = poisson(num_nodes=4096, mtbf_s=86_400, down_s=600, duration_s=30 * 86_400, seed=0)
    began = time.process_time()
    assert simulate(trace, "elastic").node_goodput > 0.9
    assert time.process_time() - began < 60


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_s": 0},
        {"step_s": math.nan},
        {"loss_pause_s": -1},
        {"checkpoint_every_s": 0},
        {"total_steps": 0},
        {"min_nodes": 0},
        {"num_nodes": 1, "min_nodes": 2},
        {"usd_per_node_hour": math.inf},
        {"scaling": 2},
    ],
)
def test_settings__impossible__refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ArgumentError, match=r"of a simulation is .*; expected"):
        SimulationSettings(**wrong)  # type: ignore[arg-type]


# The command


def test_command__json__one_record_for_a_policy(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(poisson(num_nodes=4, mtbf_s=600, down_s=60, duration_s=3600, seed=1).to_jsonl())
    done = CliRunner().invoke(app, ["chaos", "simulate", str(file), "--policy", "elastic", "-o", "json"])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["runs"]
    assert found["policy"] == "elastic"
    assert 0 < found["node_goodput"] < 1


def test_command__table__all_policies_and_what_was_assumed(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("0,add,a\n0,add,b\n400000,remove,b\n900000,add,b\n")
    done = CliRunner().invoke(app, ["chaos", "simulate", str(file), "--usd-per-node-hour", "2"])
    assert done.exit_code == 0, done.output
    assert all(policy in done.stdout for policy in POLICIES)
    assert "1 loss in 15m" in done.stderr
    assert "30 s notice" in done.stderr


def test_command__wrong_policy__names_those_there_are(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("0,add,a\n")
    done = forge("chaos", "simulate", str(file), "--policy", "lazy", cwd=tmp_path)
    assert done.returncode == 2
    assert "no policy 'lazy'; there are elastic, restart, rigid" in done.stderr


def trace_seen(events: Sequence[Mapping[str, Any]]) -> Trace:
    """The trace as a run has seen it: a node is there from when its workers can be started."""
    builder = TraceBuilder()
    for event in events:
        node = (str(event.get("node")),)
        if event["event"] == "NodeJoined":
            builder.add(at_s=event["time"], added=node)
        elif event["event"] == "NodeLeft":
            builder.add(at_s=event["time"], removed=node)
    builder.add(at_s=max(event["time"] for event in events))
    return builder.build()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replay__same_trace__node_goodput_within_a_tenth(tmp_path: Path) -> None:
    """Three simulated machines share this one's cores, so a step takes as long on one of them as on three.

    Nodes stay for 80 s or more: on a busy machine workers start for a minute. The pauses are this machine's;
    the time between its steps of milliseconds has no part in a simulation.
    """
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    trace = trace_of((0, "", "abc"), (100, "b", ""), (110, "", "b"), (190, "c", ""), until_s=240)
    (tmp_path / "trace.jsonl").write_text(trace.to_jsonl())
    done = forge(
        "chaos", "replay", "trace.jsonl", "--job", "job.yaml", "--nodes", "3", "-o", "json",
        cwd=tmp_path, timeout_s=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    goodput, events = result["goodput"], read_run(tmp_path / result["folder"]).events
    pauses: dict[bool, list[float]] = {True: [], False: []}
    for change in goodput["changes"]:
        if change["seconds"] is not None:
            pauses[change["cause"] == "growth"].append(change["seconds"])
    assert pauses[False], goodput["changes"]
    joined_at, started_at = (
        next(event["time"] for event in events if event["event"] == kind)
        for kind in ("NodeJoined", "GenerationStarted")
    )
    settings = SimulationSettings(
        step_s=goodput["ideal_step_s"], scaling=0.0, notice_s=None, node_start_s=started_at - joined_at,
        loss_pause_s=mean(pauses[False]), planned_pause_s=mean(pauses[True] or [0.0]),
    )  # fmt: skip
    expected = simulate(trace_seen(events), "elastic", settings=settings)
    assert expected.num_changes >= 2
    seconds = goodput["seconds"]
    in_steps = seconds["training"] / (seconds["training"] + seconds["other"] + seconds["saving"])
    assert in_steps > 0.5
    assert goodput["node_goodput"] == pytest.approx(expected.node_goodput * in_steps, rel=0.1)
