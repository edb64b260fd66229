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
from tests.support.elastic import leftovers, machines, start_run, stop_run, write_job

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
