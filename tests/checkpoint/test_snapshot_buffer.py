"""Snapshot buffer: incomplete snapshots are detected, and no memory is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from forge.checkpoint.intervals import Interval, layout_from_record, pack
from forge.checkpoint.snapshot_buffer import create_snapshot_buffer, open_snapshot_buffer
from forge.checkpoint.storage import open_storage
from forge.checkpoint.writer_process import write_part
from forge.errors import CheckpointError
from tests.support.checkpoints import command_for, fill, layout_of, snapshot_of


def test_open_snapshot_buffer__inherited_descriptor__reads_snapshot() -> None:
    snapshot = snapshot_of(0, 2, step=3)
    other = open_snapshot_buffer(os.dup(snapshot.fd))
    assert other.layout == snapshot.layout
    (copy,) = other.snapshots()
    assert (copy.step, copy.state) == (3, {"step": 3})
    assert other.is_intact(copy)
    assert bytes(other.data(copy.slot)) == bytes(snapshot.data(copy.slot))


def test_snapshots__two_slots__newest_first() -> None:
    snapshot = create_snapshot_buffer(layout_of(0, 1))
    for step in range(1, 6):
        fill(snapshot, step=step, slot=step % 2)
        assert [copy.step for copy in snapshot.snapshots()] == [step, *([step - 1] if step > 1 else [])]
        assert all(snapshot.is_intact(copy) for copy in snapshot.snapshots())
        assert sorted(snapshot.steps()) == sorted(copy.step for copy in snapshot.snapshots())


def test_snapshots__incomplete_slot__is_ignored() -> None:
    snapshot = snapshot_of(0, 1, step=1)
    fill(snapshot, step=2, slot=1)
    snapshot.begin(0)[:4] = b"torn"
    assert [copy.step for copy in snapshot.snapshots()] == [2]


def test_is_intact__changed_byte__is_detected() -> None:
    snapshot = snapshot_of(0, 1, step=1)
    (copy,) = snapshot.snapshots()
    with snapshot.data(0) as data:
        data[7] ^= 1
    assert not snapshot.is_intact(copy)


def test_write_part__snapshot_overwritten_meanwhile__fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = snapshot_of(0, 1, step=1)
    storage = open_storage(str(tmp_path))
    staging = storage.open_staging("step-00000001", token="aaaaaaaa0001")
    write = storage.write

    def overwritten(path: str, chunks: object) -> None:
        write(path, chunks)  # type: ignore[arg-type]
        fill(snapshot, step=3)

    monkeypatch.setattr(storage, "write", overwritten)
    with pytest.raises(CheckpointError, match="snapshot of step 1 was overwritten"):
        write_part(storage, staging, snapshot, command_for(str(tmp_path), 1, 0, 1))


def test_write_part__no_snapshot_of_step__fails(tmp_path: Path) -> None:
    snapshot = snapshot_of(0, 1, step=1)
    with pytest.raises(CheckpointError, match="no complete snapshot of step 2"):
        write_part(open_storage(str(tmp_path)), "staging", snapshot, command_for(str(tmp_path), 2, 0, 1))


def test_open_snapshot_buffer__other_memory__is_refused() -> None:
    fd = os.memfd_create("other")
    os.write(fd, bytes(8192))
    with pytest.raises(ValueError, match="no snapshots"):
        open_snapshot_buffer(fd)


def test_close__last_descriptor__frees_unnamed_memory() -> None:
    before = set(Path("/dev/shm").iterdir())
    snapshot = snapshot_of(0, 1, step=1)
    assert set(Path("/dev/shm").iterdir()) == before
    fd = snapshot.fd
    snapshot.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_close__view_in_use__is_allowed() -> None:
    snapshot = snapshot_of(0, 1, step=1)
    view = snapshot.data(0)[:8]
    snapshot.close()
    assert len(bytes(view)) == 8


def test_commit__empty_layout__is_a_snapshot() -> None:
    snapshot = create_snapshot_buffer(pack([]))
    snapshot.begin(0).release()
    snapshot.commit(0, step=1, state={})
    assert [copy.step for copy in snapshot.snapshots()] == [1]


def test_pack__aligns_without_gaps_and_survives_json() -> None:
    layout = pack(
        [
            Interval(kind="buffer", name="flag", start=0, stop=3, dtype="BOOL"),
            Interval(kind="frozen", name="half", start=0, stop=3, dtype="BF16"),
            Interval(kind="exp_avg", name="b", start=5, stop=5, dtype="F32"),
            Interval(kind="exp_avg", name="a", start=5, stop=6, dtype="F32"),
            Interval(kind="buffer", name="count", start=0, stop=1, dtype="I64"),
            Interval(kind="master", name="b", start=1, stop=2, dtype="F32"),
        ]
    )
    assert [(i.name, offset) for i, offset in layout.with_offsets()] == [
        ("count", 0), ("b", 8), ("a", 12), ("half", 16), ("flag", 22)
    ]  # fmt: skip
    assert layout.size_bytes == 25
    assert layout_from_record(layout.to_record()) == layout
