"""hpZ on real Ray: a run of four ranks in groups of two loses ranks, then a machine, and goes on without groups."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from forge.plan.plan import plan_from_json
from forge.runs.reader import read_metrics
from tests.elastic.test_faults import assert_equals_undisturbed_run
from tests.support.command import wait_for
from tests.support.elastic import leftovers, machines, start_run, stop_run, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# 32 x 400 and 32 x 1024 weights are above the number that DeepSpeed leaves undivided.
CHANGES = (
    "training.zero.hpz_partition_size=2",
    "training.global_batch_size=12",
    "model.intermediate_size=1024",
    "data.tokenizer.vocab_size=400",
)


def test_killed_rank_and_machine__groups_of_two__losses_of_an_undisturbed_run(tmp_path: Path) -> None:
    write_job(tmp_path, steps=100_000, workers="1..4", stage=3, paced=True)
    with machines(tmp_path, count=4) as cluster:
        run = start_run(cluster, *(word for change in CHANGES for word in ("--set", change)))
        run.await_world(4, timeout_s=240)
        plan = plan_from_json((run.folder / "plan.json").read_text())
        assert {world.batch.world_size: world.hpz_partition_size for world in plan.worlds} == {
            1: 1,
            2: 1,
            3: 1,
            4: 2,
        }

        for number in (3, 0):  # of the second group, and of the first: the rank that reports the metrics
            repeated = len(run.repeated())
            pid = run.formed["ranks"][number]["pid"]
            run.recovers_from(lambda pid=pid: os.kill(pid, signal.SIGKILL), timeout_s=120)
            run.await_world(4, timeout_s=240)
            assert len(run.repeated()) - repeated <= 1

        repeated = len(run.repeated())
        node = run.machine_of(run.formed["ranks"][1])
        run.recovers_from(lambda: run.cluster.kill(node), timeout_s=120)
        assert run.formed["world_size"] == 3  # without groups
        assert len(run.repeated()) - repeated <= 1
        stop_run(run)
        wait_for(lambda: run.of("RunStopped"))
        assert leftovers(run) == []
        assert {record["elastic/world_size"] for record in read_metrics(run.folder)} >= {3, 4}
        assert_equals_undisturbed_run(run, tmp_path / "undisturbed")
