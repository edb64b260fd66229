"""Layouts of ranks on real Ray: runs of four ranks lose ranks, then a machine, and go on in another layout.

Groups of hpZ, shard groups, whose groups are each other's replicas, and sequences that ranks share.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.plan.plan import Plan, plan_from_json
from forge.runs.reader import read_metrics
from tests.elastic.test_faults import assert_equals_undisturbed_run
from tests.support.command import wait_for
from tests.support.elastic import Run, leftovers, machines, start_run, stop_run, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# 32 x 400 and 32 x 1024 weights are above the number that DeepSpeed leaves undivided.
DIVIDED = ("training.global_batch_size=12", "model.intermediate_size=1024", "data.tokenizer.vocab_size=400")


def groups(plan: Plan) -> list[tuple[int, int]]:
    """The groups at three and four workers: shard groups, and the size of one of hpZ."""
    found = [plan.for_world_size(size).groups for size in (3, 4)]
    return [(one.num_shard_groups, one.hpz_partition_size) for one in found]


def sharing(plan: Plan) -> list[tuple[int, int]]:
    """At three and four workers: how many share a sequence, and how many have none."""
    found = [plan.for_world_size(size).batch for size in (3, 4)]
    return [(one.sequence_parallel_size, one.num_spare_ranks) for one in found]


@pytest.mark.parametrize(
    ("stage", "changes", "layout", "at_three_and_four"),
    [
        pytest.param(3, ("training.zero.hpz_partition_size=2", *DIVIDED), groups, [(1, 1), (1, 2)], id="hpZ"),
        pytest.param(
            3, ("training.zero.shard_group_size=2", *DIVIDED), groups, [(1, 1), (2, 1)], id="shard groups, ZeRO 3"
        ),
        pytest.param(
            2, ("training.zero.shard_group_size=2", *DIVIDED), groups, [(1, 1), (2, 1)], id="shard groups, ZeRO 2"
        ),
        pytest.param(
            1,
            ("training.sequence_parallel=2", "training.global_batch_size=6", "model.num_attention_heads=4"),
            sharing,
            [(1, 0), (2, 0)],
            id="degree 2, then whole sequences",
        ),
        pytest.param(
            3,
            ("training.sequence_parallel=4", "training.global_batch_size=1", "model.num_attention_heads=4"),
            sharing,
            [(2, 1), (4, 0)],
            id="degree 4, then degree 2 and a spare rank",
        ),
    ],
)
def test_killed_rank_and_machine__other_layout__losses_of_an_undisturbed_run(
    tmp_path: Path,
    stage: int,
    changes: tuple[str, ...],
    layout: Callable[[Plan], list[tuple[int, int]]],
    at_three_and_four: list[tuple[int, int]],
) -> None:
    write_job(tmp_path, steps=100_000, workers="1..4", stage=stage, paced=layout is groups)
    with machines(tmp_path, count=4) as cluster:
        run = start_run(cluster, *(word for change in changes for word in ("--set", change)))
        run.await_world(4, timeout_s=240)
        assert layout(plan_from_json((run.folder / "plan.json").read_text())) == at_three_and_four

        for number in (3, 0):  # of the second group, and of the first: the rank that reports the metrics
            repeated = len(run.repeated())
            pid = run.formed["ranks"][number]["pid"]
            run.recovers_from(lambda pid=pid: os.kill(pid, signal.SIGKILL), timeout_s=120)
            run.await_world(4, timeout_s=240)
            assert len(run.repeated()) - repeated <= 1

        repeated = len(run.repeated())
        node = run.machine_of(run.formed["ranks"][1])
        run.recovers_from(lambda: run.cluster.kill(node), timeout_s=120)
        assert run.formed["world_size"] == 3
        assert len(run.repeated()) - repeated <= 1
        stop_run(run)
        wait_for(lambda: run.of("RunStopped"))
        assert leftovers(run) == []
        assert {record["elastic/world_size"] for record in read_metrics(run.folder)} >= {3, 4}
        started = {event["generation"]: event for event in run.of("GenerationStarting") if event["world_size"] == 4}
        is_replicated = {event["parts_per_shard"] for event in started.values()}
        assert is_replicated == ({1} if at_three_and_four == [(1, 1), (2, 1)] else {0})
        assert {event["source"] for number, event in started.items() if number > 1} == {"memory"}
        assert_equals_undisturbed_run(run, tmp_path / "undisturbed")


def test_killed_machine__another_joins__its_rank_is_filled_from_the_twins_memory(tmp_path: Path) -> None:
    write_job(tmp_path, steps=100_000, workers="1..4", stage=3, paced=True)
    changes = ("training.zero.shard_group_size=2", *DIVIDED)
    with machines(tmp_path, count=4) as cluster:
        run = start_run(cluster, *(word for change in changes for word in ("--set", change)))
        run.await_world(4, timeout_s=240)

        lost, twin = run.formed["ranks"][1], run.formed["ranks"][3]
        # Only what rank 0 alone has is sent to another machine: the shard of rank 1 is in the memory of rank 3.
        before = run.of("GenerationStarting")[-1]
        assert (before["num_shard_groups"], before["parts_per_shard"]) == (2, 1)
        run.recovers_from(lambda: cluster.kill(run.machine_of(lost)), timeout_s=120)
        assert run.formed["world_size"] == 3
        assert run.of("GenerationStarting")[-1]["source"] == "memory"
        continues_on_the_newest_machine(run, cluster.add)
        assert {twin["node"]} < {rank["node"] for rank in run.formed["ranks"]}

        assert run.of("CheckpointSaved") == []
        assert len(run.repeated()) <= 1
        stop_run(run)
        wait_for(lambda: run.of("RunStopped"))
        assert leftovers(run) == []
        assert_equals_undisturbed_run(run, tmp_path / "undisturbed")


def continues_on_the_newest_machine(run: Run, cause: Callable[[], object]) -> None:
    """After a change four ranks continue from memory, one of them on the machine that was added last."""
    step = run.step
    run.recovers_from(cause, timeout_s=240)
    assert run.formed["world_size"] == 4
    assert run.cluster.nodes[-1] in [run.machine_of(rank) for rank in run.formed["ranks"]]
    started = run.of("GenerationStarting")[-1]
    assert (started["source"], started["num_shard_groups"], started["parts_per_shard"]) == ("memory", 2, 1)
    assert started["from_step"] >= step - 1
