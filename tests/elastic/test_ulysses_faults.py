"""Shared sequences on real Ray: runs of four ranks lose a rank, then a machine, and go on at another degree."""

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


@pytest.mark.parametrize(
    ("stage", "degree", "global_batch_size", "at_three"),
    [
        pytest.param(1, 2, 6, (1, 0), id="degree 2, then whole sequences"),
        pytest.param(3, 4, 1, (2, 1), id="degree 4, then degree 2 and a spare rank"),
    ],
)
def test_killed_rank_and_machine__shared_sequences__losses_of_an_undisturbed_run(
    tmp_path: Path, stage: int, degree: int, global_batch_size: int, at_three: tuple[int, int]
) -> None:
    write_job(tmp_path, steps=100_000, workers="1..4", stage=stage)
    changes = (
        f"training.sequence_parallel={degree}",
        f"training.global_batch_size={global_batch_size}",
        "model.num_attention_heads=4",
    )
    with machines(tmp_path, count=4) as cluster:
        run = start_run(cluster, *(word for change in changes for word in ("--set", change)))
        run.await_world(4, timeout_s=240)
        plan = plan_from_json((run.folder / "plan.json").read_text())
        shared = {size: plan.for_world_size(size).batch for size in (3, 4)}
        assert (shared[4].sequence_parallel_size, shared[4].num_spare_ranks) == (degree, 0)
        assert (shared[3].sequence_parallel_size, shared[3].num_spare_ranks) == at_three

        for number in (3, 0):  # rank 0 reports the metrics
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
        assert_equals_undisturbed_run(run, tmp_path / "undisturbed")
