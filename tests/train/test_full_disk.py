"""Training on a disk that fills up: the newest checkpoint is never lost, and the last one waits for space."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.checkpoint.reader import list_checkpoints
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.errors import CheckpointError
from forge.events import CheckpointFailed, CheckpointSaved
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import plan_to_json
from forge.train import loop
from forge.train.async_checkpoint import AsyncCheckpointer
from tests.support.jobs import tiny_plan
from tests.support.ranks import Recording, on_ranks, train_one_rank


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with space for one checkpoint of the tiny job, not for two."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def train_on_small_disk(rank: int, plan_json: str, folder: str, size_at_end: str | None) -> Recording:
    """Train with short waits; when the last checkpoint does not fit, wait until the disk has another size."""
    loop._SPACE_TRIES, loop._SPACE_RETRY_S = 3, 0.2
    pause = AsyncCheckpointer.pause

    def resize_and_pause(checkpointer: AsyncCheckpointer, seconds: float) -> None:
        if rank == 0 and size_at_end is not None:
            resize(Path(folder), size_at_end)
        pause(checkpointer, seconds)

    AsyncCheckpointer.pause = resize_and_pause  # type: ignore[method-assign]
    return train_one_rank(rank, plan_json, folder, 2, None)


def checkpoints_in(folder: Path) -> list[str]:
    """The checkpoints, newest first, that verify."""
    storage = open_storage(str(folder))
    kept = list_checkpoints(storage)
    assert [verify_checkpoint(storage, name) for name in kept] == [None] * len(kept)
    assert not list(folder.glob(".staging*"))
    return kept


@pytest.mark.slow
def test_train__disk_without_room_for_one_more__ends_with_the_newest(corpus: CorpusInfo, small_disk: Path) -> None:
    resize(small_disk, "1000k")  # for two, not for three
    plan = plan_to_json(tiny_plan(corpus, training__total_steps=150, checkpoint={"every": "2 steps", "keep": 3}))
    recording = on_ranks(train_on_small_disk, plan, str(small_disk), None, world_size=2)[0]
    saved = [event for event in recording.events if isinstance(event, CheckpointSaved)]
    assert saved[-1].step == 150
    removed = [step for event in saved for step in event.removed]
    assert removed == [event.step for event in saved[: len(removed)]]  # oldest first
    assert len(removed) >= 1
    assert not [event for event in recording.events if isinstance(event, CheckpointFailed)]
    assert checkpoints_in(small_disk)[0] == "step-00000150"


def test_train__disk_full_at_the_end__waits_for_space(corpus: CorpusInfo, small_disk: Path) -> None:
    plan = plan_to_json(tiny_plan(corpus, training__total_steps=4, checkpoint={"every": "3 steps", "keep": 3}))
    recording = on_ranks(train_on_small_disk, plan, str(small_disk), "2m", world_size=2)[0]
    (failed,) = [event for event in recording.events if isinstance(event, CheckpointFailed)]
    assert failed.step == 4
    expected = (
        r"no space left in .*/disk: the checkpoint needs about .* KiB, and .* are free; .* step 3 is kept; the"
    )
    assert re.search(expected, failed.reason)
    assert checkpoints_in(small_disk) == ["step-00000004", "step-00000003"]


def test_train__disk_full__fails_and_keeps_previous_checkpoint(corpus: CorpusInfo, small_disk: Path) -> None:
    plan = plan_to_json(tiny_plan(corpus, training__total_steps=4, checkpoint={"every": "2 steps", "keep": 3}))
    problem = r"of step 4 could not be written by rank \d: no space left in .*; the checkpoint of step 2 is kept"
    with pytest.raises(CheckpointError, match=problem):
        on_ranks(train_on_small_disk, plan, str(small_disk), None, world_size=2)
    assert checkpoints_in(small_disk) == ["step-00000002"]
