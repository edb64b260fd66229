"""Room for a checkpoint on a disk that is nearly full; the disk is a small tmpfs."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.checkpoint.reader import list_checkpoints
from forge.checkpoint.space import make_room
from forge.checkpoint.storage_fs import FolderStorage
from forge.checkpoint.verify import verify_checkpoint
from forge.errors import CheckpointError
from tests.support.checkpoints import write


class SmallStorage(FolderStorage):
    """A folder with room for so many checkpoints."""

    room = 3

    def free_bytes(self) -> int:
        return 1000 * (self.room - len(self.names()))


@pytest.fixture
def storage(tmp_path: Path) -> SmallStorage:
    for step in (1, 2, 3):
        write(str(tmp_path), step)
    return SmallStorage(tmp_path)


@pytest.mark.parametrize(
    ("needed", "removed"), [(0, []), (1000, [1]), (1001, [1, 2]), (5000, [1, 2]), (None, [1, 2])]
)
def test_make_room__old_checkpoints__go_first_and_the_newest_stays(
    storage: SmallStorage, needed: int | None, removed: list[int]
) -> None:
    assert make_room(storage, needed_bytes=needed) == removed
    assert list_checkpoints(storage)[0] == "step-00000003"
    assert len(list_checkpoints(storage)) == 3 - len(removed)


def test_make_room__newest_is_damaged__keeps_the_newest_that_is_complete(
    storage: SmallStorage, tmp_path: Path
) -> None:
    next((tmp_path / "step-00000003").glob("part-*")).write_bytes(b"")
    assert make_room(storage, needed_bytes=None) == [1]
    assert verify_checkpoint(storage, "step-00000002") is None


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with three checkpoints and one free page."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    for step in (1, 2, 3):
        write(str(folder), step)
    try:
        (folder / ".filler").write_bytes(bytes(2**20))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_save__disk_full__removes_old_checkpoints_and_writes_the_new_one(full_disk: Path) -> None:
    write(str(full_disk), 4, world_size=1)
    storage = FolderStorage(full_disk)
    assert list_checkpoints(storage) == ["step-00000004", "step-00000003", "step-00000002"]
    assert [verify_checkpoint(storage, name) for name in list_checkpoints(storage)] == [None] * 3


def test_save__disk_full_and_one_checkpoint__keeps_it_and_says_what_is_missing(full_disk: Path) -> None:
    storage = FolderStorage(full_disk)
    for name in ("step-00000001", "step-00000002"):
        (full_disk / name).rename(full_disk / f".{name}")  # not removed by the writer
    with pytest.raises(CheckpointError, match=r"no space left in .*/disk: the checkpoint needs about .* are free"):
        write(str(full_disk), 4, world_size=1)
    assert list_checkpoints(storage) == ["step-00000003"]
    assert verify_checkpoint(storage, "step-00000003") is None
    assert not list(full_disk.glob(".staging*"))
