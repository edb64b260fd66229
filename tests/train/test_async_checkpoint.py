"""Real ranks with writer processes: a checkpoint has the state of its step, whichever process dies."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from forge.checkpoint.manifest import Progress
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint, verify_checkpoint
from forge.train.async_checkpoint import AsyncCheckpointer, SaveFailed
from forge.train.process_group import join_process_group
from tests.support.command import wait_for
from tests.support.odd import differing, odd_state, write_pattern
from tests.support.ranks import on_ranks

PROGRESS = Progress(step=1, num_tokens=10, config_digest="recipe", corpus="corpus")


def checkpointer_for(url: str, *, world_size: int) -> AsyncCheckpointer:
    join_process_group(device=torch.device("cpu"))
    state = odd_state("zero 1", world_size=world_size)
    write_pattern(state)
    return AsyncCheckpointer(state, url=url, keep=2)


def change_after_settling(rank: int, url: str) -> list[Any]:
    checkpointer = checkpointer_for(url, world_size=2)
    checkpointer.begin(PROGRESS)
    checkpointer.settle()
    write_pattern(checkpointer._state, zero=True)
    outcomes = checkpointer.finish()
    checkpointer.close()
    checkpointer._state.read(open_checkpoint(open_storage(url), "step-00000001"))
    return [*outcomes, *differing(checkpointer._state)]


def test_settle__state_changed_afterwards__checkpoint_is_unaffected(tmp_path: Path) -> None:
    first, second = on_ranks(change_after_settling, str(tmp_path), world_size=2)
    assert [outcome.step for outcome in first] == [1]
    assert second == first


def kill_a_writer(rank: int, url: str, victim: int) -> list[list[Any]]:
    checkpointer = checkpointer_for(url, world_size=2)
    pid = checkpointer._writer._process.pid
    if rank == victim:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    checkpointer.begin(PROGRESS)
    outcomes = [checkpointer.finish()]
    checkpointer.begin(replace(PROGRESS, step=2))
    outcomes.append(checkpointer.finish())
    checkpointer.close()
    return outcomes


@pytest.mark.parametrize("victim", [0, 1])
def test_finish__writer_killed__fails_once_on_every_rank(tmp_path: Path, victim: int) -> None:
    for failed, saved in on_ranks(kill_a_writer, str(tmp_path), victim, world_size=2):
        assert failed == [SaveFailed(step=1, reason=f"rank {victim}: the writer process died (SIGKILL)")]
        assert [outcome.step for outcome in saved] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def block_a_rank(rank: int, url: str, victim: int) -> list[list[Any]]:
    checkpointer = checkpointer_for(url, world_size=3)
    if rank == victim:
        checkpointer.url = f"{url}/file"
    checkpointer.begin(PROGRESS)
    outcomes = [checkpointer.finish()]
    checkpointer.url = url
    checkpointer.begin(PROGRESS)
    outcomes.append(checkpointer.finish())
    checkpointer.close()
    return outcomes


@pytest.mark.parametrize("victim", [0, 2])
def test_finish__one_rank_cannot_write__aborts_on_every_rank(tmp_path: Path, victim: int) -> None:
    (tmp_path / "file").write_text("no folder")
    for failed, saved in on_ranks(block_a_rank, str(tmp_path), victim, world_size=3):
        assert [outcome.step for outcome in failed] == [1]
        assert failed[0].reason.startswith(f"rank {victim}: Not a directory")
        assert [outcome.step for outcome in saved] == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "step-00000001"]


def two_at_once(rank: int, url: str) -> list[Any]:
    checkpointer = checkpointer_for(url, world_size=2)
    checkpointer.begin(PROGRESS)
    checkpointer.begin(replace(PROGRESS, step=2))
    outcomes = checkpointer.finish()
    checkpointer.close()
    return outcomes


def test_begin__two_pending__both_are_committed(tmp_path: Path) -> None:
    for outcomes in on_ranks(two_at_once, str(tmp_path), world_size=2):
        assert [outcome.step for outcome in outcomes] == [1, 2]
    storage = open_storage(str(tmp_path))
    assert [verify_checkpoint(storage, name) for name in list_checkpoints(storage)] == [None, None]


def vanish(rank: int, url: str, leave_out: int) -> int:
    """Take a snapshot and exit; one rank may exit before it."""
    checkpointer = checkpointer_for(url, world_size=2)
    if rank != leave_out:
        checkpointer.begin(PROGRESS)
        checkpointer.settle()
        time.sleep(0.2 if rank == 0 else 0.0)
    return checkpointer._writer._process.pid


def test_writers__ranks_died__complete_the_checkpoint(tmp_path: Path) -> None:
    pids = on_ranks(vanish, str(tmp_path), -1, world_size=2)
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), timeout_s=20)
    found = find_checkpoint(open_storage(str(tmp_path)), on_skip=lambda *_: None)
    assert found is not None
    assert found.progress.step == 1


def save_twice(rank: int, url: str) -> list[Any]:
    checkpointer = checkpointer_for(url, world_size=2)
    checkpointer._keep = 1
    outcomes: list[Any] = []
    for step in (2, 3):
        checkpointer.begin(replace(PROGRESS, step=step))
        outcomes += checkpointer.finish()
    checkpointer.close()
    return outcomes


def test_outcomes__earlier_writers_outlived_their_ranks__their_checkpoint_is_returned_once(tmp_path: Path) -> None:
    pids = on_ranks(vanish, str(tmp_path), -1, world_size=2)
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), timeout_s=20)
    size = sum(path.stat().st_size for path in tmp_path.glob("step-00000001/*") if "manifest" not in path.name)
    for outcomes in on_ranks(save_twice, str(tmp_path), world_size=2):
        assert [(outcome.step, math.isnan(outcome.seconds)) for outcome in outcomes] == [
            (1, True),
            (2, False),
            (3, False),
        ]
        assert outcomes[0].size_bytes == size
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]  # the first was removed since


@pytest.mark.slow
def test_writer__missing_peers__times_out_and_cleans_up(tmp_path: Path) -> None:
    pids = on_ranks(vanish, str(tmp_path), 1, world_size=2)
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), timeout_s=30)
    assert list(tmp_path.iterdir()) == []


def train_beside_a_stopped_writer(rank: int, url: str) -> tuple[float, list[Any]]:
    """Send a stopped writer process a command that is larger than a pipe's buffer."""
    checkpointer = checkpointer_for(url, world_size=2)
    shape = checkpointer._state.shape
    checkpointer._state.shape = replace(shape, config={"long": "x" * 2**20})
    pid = checkpointer._writer._process.pid
    os.kill(pid, signal.SIGSTOP)
    checkpointer.begin(PROGRESS)
    began = time.monotonic()
    checkpointer.settle()
    waited_s = time.monotonic() - began
    os.kill(pid, signal.SIGCONT)
    outcomes = checkpointer.finish()
    checkpointer.close()
    return waited_s, outcomes


def test_settle__busy_writer__does_not_wait(tmp_path: Path) -> None:
    for waited_s, outcomes in on_ranks(train_beside_a_stopped_writer, str(tmp_path), world_size=2):
        assert waited_s < 5.0  # not until the writer continues
        assert [outcome.step for outcome in outcomes] == [1]
