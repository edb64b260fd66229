"""A checkpoint that is committed after its ranks were killed: its event is recorded, once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.command import wait_for
from tests.support.elastic import Run, machines, start_run, stop_run, write_job


@pytest.mark.slow
def test_rank_killed__writer_commits_afterwards__checkpoint_is_recorded_once(tmp_path: Path) -> None:
    write_job(tmp_path, steps=100_000)
    with machines(tmp_path, count=2) as cluster:
        run = start_run(cluster, "--set", "checkpoint.every=5 steps", "--set", "checkpoint.keep=1")
        run.await_world(2)
        writers = wait_for(lambda: writers_of(run))
        for writer in writers:
            writer.suspend()
        run.await_steps(12)  # one more checkpoint has begun
        known = len(run.of("CheckpointSaved"))
        run.recovers_from(lambda: os.kill(run.formed["ranks"][0]["pid"], signal.SIGKILL))
        assert not any(event["seconds"] is None for event in run.of("CheckpointSaved"))
        for writer in writers:
            writer.resume()
        late = wait_for(lambda: [event for event in run.of("CheckpointSaved") if event["seconds"] is None])
        run.await_steps(12)
        wait_for(lambda: len(run.of("CheckpointSaved")) > known + 2)
        stop_run(run)
        wait_for(lambda: run.of("RunStopped"))
    saved = [event["step"] for event in run.of("CheckpointSaved")]
    assert len(saved) == len(set(saved))
    assert late[0]["step"] == min(event["step"] for event in late)
    # The state file of each has metrics of other steps.
    assert late[0]["size_bytes"] == pytest.approx(run.of("CheckpointSaved")[0]["size_bytes"], rel=0.01)
    assert late[0]["folder"] == str(run.folder / "checkpoints" / f"step-{late[0]['step']:08d}")


def writers_of(run: Run) -> list[psutil.Process]:
    """The writer process of each rank of the running generation; empty before its first checkpoint."""
    children = [child for rank in run.formed["ranks"] for child in psutil.Process(rank["pid"]).children()]
    found = [child for child in children if "forge.checkpoint.writer_process" in child.cmdline()]
    return found if len(found) == run.formed["world_size"] else []
