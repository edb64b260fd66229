"""Real Ray and gloo: a rank that is slowed down is named, and its node is replaced without losing a step."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.command import wait_for
from tests.support.elastic import Run, leftovers, machines, start_run, stop_run, write_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# A forward pass must take longer than a slowed rank is stopped at a time.
LARGER = ("model.hidden_size=128", "model.intermediate_size=512", "data.seq_len=128")


@contextmanager
def slowed(run: Run, rank: int) -> Iterator[None]:
    """Run `forge chaos slow` on a rank."""
    command = [sys.executable, "-m", "forge.cli.app", "chaos", "slow", str(run.folder), "--rank", str(rank)]
    process = subprocess.Popen(
        [*command, "--factor", "10", "--seconds", "600"], cwd=run.cluster.home, env=os.environ
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("stage", [1, 3])
def test_slow_rank__named_and_its_node_replaced_without_repeating_a_step(tmp_path: Path, stage: int) -> None:
    write_job(tmp_path, steps=100_000, workers="2", stage=stage)
    changes = (*LARGER, "resources.replace_stragglers=true")
    with machines(tmp_path, count=2) as cluster:
        run = start_run(cluster, *(word for change in changes for word in ("--set", change)))
        run.await_world(2, timeout_s=240)
        slow = run.formed["ranks"][1]
        with slowed(run, 1):
            wait_for(lambda: run.of("StragglerDetected") != [], timeout_s=240, about=run.newest_events)
            (found,) = run.of("StragglerDetected")
            assert (found["node"], found["rank"], found["action"]) == (slow["node"], 1, "requested")
            assert found["ratio"] >= 1.5
            cluster.add()
            wait_for(lambda: run.formed["generation"] > 1, timeout_s=240, about=run.newest_events)
        run.await_steps(3, timeout_s=120)
        assert [event["action"] for event in run.of("StragglerDetected")] == ["requested", "replaced"]
        notices = run.of("PreemptionNoticeReceived")
        assert [(notice["node"], notice["source"]) for notice in notices] == [(slow["node"], "straggler")]
        assert run.formed["world_size"] == 2
        assert slow["node"] not in {rank["node"] for rank in run.formed["ranks"]}
        assert run.repeated() == []
        stop_run(run)
        assert leftovers(run) == []
