"""Snapshots: the state of one rank as of a step, in shared memory that outlives the rank.

The memory is anonymous (`memfd`): it has no name that could be left behind, it does not count against the
size of /dev/shm, and it is gone with the last process that holds it. It says itself what it holds, so
whoever has the descriptor can read it. Slots are written in turn; while one is written the others stay
whole. Two are enough for that; the third is for while a checkpoint is made of one of them, and costs memory
only then:

    header    magic, number of slots, bytes of the layout, bytes of the data
    slot 0    step, checksum of the data, length and text of a small JSON (step, tokens, ...)
    slot 1, slot 2
    layout    JSON: the intervals, in the order of their bytes, and what else is to be known of the state
    data 0, data 1, data 2

A writer takes the step away first and writes it last, after the checksum, so a slot that is torn, because
its writer was killed in the middle, is seen to be so. This module knows no torch: the process that makes
a checkpoint of a snapshot stays light.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from forge.checkpoint.intervals import Layout, layout_from_record

NUM_SLOTS = 3
_MAGIC = b"forgesn2"
_HEADER = struct.Struct("<8sIIQQ")  # magic, slots, page size, bytes of the layout, bytes of one slot's data
_SLOT = struct.Struct("<qQI")  # step (0: none), checksum, bytes of the JSON
_SLOT_BYTES = 256 * 2**10
_PAGE = 4096
_CHUNK_BYTES = 4 * 2**20
_MADV_POPULATE_WRITE = 23  # of Linux 5.14; Python's mmap does not name it yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One whole snapshot."""

    slot: int
    step: int
    checksum: int
    """xxh3_64 of the data."""
    state: dict[str, Any]


class SnapshotBuffer:
    """The shared memory of one rank; use `create_snapshot_buffer` or `open_snapshot_buffer`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, 0)
        magic, num_slots, _, layout_bytes, self._data_bytes = _HEADER.unpack_from(self._memory, 0)
        if magic != _MAGIC or num_slots != NUM_SLOTS:
            raise ValueError("this memory holds no snapshots of this version of forge")
        first = _PAGE + NUM_SLOTS * _SLOT_BYTES
        self.description: bytes = self._memory[first : first + layout_bytes]
        """Layout and `about` as they stand there; `create_snapshot_buffer` of the same description is laid out
        equally."""
        body = json.loads(self.description)
        self.layout: Layout = layout_from_record(body["layout"])
        self.about: dict[str, Any] = body["about"]
        self._data_start = _up(first + layout_bytes)

    def prepare(self, slot: int) -> None:
        """Have the pages of a slot at hand, a few at a time, so that copying does not stop at each of them.

        The first to do it makes them: 0.4 s a GB, ten times what the copy itself takes.
        """
        first = self.data_offset(slot)
        end = first + _up(self._data_bytes)
        with contextlib.suppress(OSError):  # before Linux 5.14 pages come one by one, when they are touched
            for start in range(first, end, _CHUNK_BYTES):
                self._memory.madvise(_MADV_POPULATE_WRITE, start, min(_CHUNK_BYTES, end - start))

    def begin(self, slot: int) -> memoryview:
        """Take the step away from a slot and give its bytes, to be written before `commit`."""
        _SLOT.pack_into(self._memory, self._slot_start(slot), 0, 0, 0)
        return self.data(slot)

    def commit(self, slot: int, *, step: int, state: dict[str, Any], checksum: int | None = None) -> None:
        """Declare a slot whole: checksum first, the step last.

        Args:
            checksum: of the data, where it is known.

        Raises: ValueError if `state` is more than 256 KiB of JSON.
        """
        text = json.dumps(state).encode()
        if step < 1 or len(text) > _SLOT_BYTES - _SLOT.size:
            raise ValueError(f"a snapshot of step {step} with {len(text)} bytes of JSON")
        start = self._slot_start(slot)
        self._memory[start + _SLOT.size : start + _SLOT.size + len(text)] = text
        _SLOT.pack_into(self._memory, start, 0, self._sum(slot) if checksum is None else checksum, len(text))
        # A word of 8 bytes at a page's beginning is written at once: a reader sees the step or no step.
        struct.pack_into("<q", self._memory, start, step)

    def copies(self) -> list[Snapshot]:
        """The slots that are whole by their headers, the newest first."""
        found = []
        for slot in range(NUM_SLOTS):
            start = self._slot_start(slot)
            step, checksum, num_bytes = _SLOT.unpack_from(self._memory, start)
            if step > 0:
                text = self._memory[start + _SLOT.size : start + _SLOT.size + num_bytes]
                found.append(Snapshot(slot=slot, step=step, checksum=checksum, state=json.loads(text)))
        return sorted(found, key=lambda copy: -copy.step)

    def is_intact(self, copy: Snapshot) -> bool:
        """Whether a slot still holds this copy, and its bytes are those that were committed."""
        return copy in self.copies() and self._sum(copy.slot) == copy.checksum

    def data(self, slot: int) -> memoryview:
        """The bytes of a slot, laid out as `layout` says; release it before `close`."""
        start = self.data_offset(slot)
        return memoryview(self._memory)[start : start + self._data_bytes]

    def data_offset(self, slot: int) -> int:
        """The byte of the memory at which a slot's data begin."""
        return self._data_start + slot * _up(self._data_bytes)

    def free(self, slot: int) -> None:
        """Give a slot's memory back to the system; it holds nothing afterwards."""
        self.begin(slot).release()
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_REMOVE, self.data_offset(slot), _up(self._data_bytes))

    def close(self) -> None:
        """Let go of the memory; it is freed when nobody holds it any more."""
        with contextlib.suppress(BufferError):  # a view that somebody still has keeps it mapped, and no longer
            self._memory.close()
        os.close(self.fd)

    def _sum(self, slot: int) -> int:
        with self.data(slot) as data:
            return checksum(data)

    def _slot_start(self, slot: int) -> int:
        return _PAGE + slot * _SLOT_BYTES


def create_snapshot_buffer(layout: Layout, *, about: Mapping[str, Any] | None = None) -> SnapshotBuffer:
    """Shared memory with room for copies of a layout; pages are taken when they are first written.

    Args:
        about: what else a reader must know; JSON.

    Raises: OSError if the system gives none.
    """
    return create_as_described(json.dumps({"layout": layout.to_record(), "about": dict(about or {})}).encode())


def create_as_described(description: bytes) -> SnapshotBuffer:
    """Shared memory laid out like that of the snapshot with this description.

    Raises: OSError if the system gives none; ValueError, KeyError for what is no description.
    """
    layout = layout_from_record(json.loads(description)["layout"])
    data_start = _up(_PAGE + NUM_SLOTS * _SLOT_BYTES + len(description))
    fd = os.memfd_create("forge-snapshot")  # closed in children that are not handed it
    try:
        os.ftruncate(fd, data_start + NUM_SLOTS * _up(layout.size_bytes))
        os.pwrite(fd, _HEADER.pack(_MAGIC, NUM_SLOTS, _PAGE, len(description), layout.size_bytes), 0)
        os.pwrite(fd, description, _PAGE + NUM_SLOTS * _SLOT_BYTES)
        return SnapshotBuffer(fd)
    except BaseException:
        os.close(fd)
        raise


def open_snapshot_buffer(fd: int) -> SnapshotBuffer:
    """The memory behind a descriptor that was inherited. Raises: ValueError if it holds something else."""
    return SnapshotBuffer(fd)


def checksum(data: memoryview) -> int:
    """xxh3_64, a few MiB at a time so that other threads get their turn."""
    digest = xxhash.xxh3_64()
    for start in range(0, len(data), _CHUNK_BYTES):
        digest.update(data[start : start + _CHUNK_BYTES])
    return digest.intdigest()


def _up(size: int) -> int:
    """Rounded up to whole pages."""
    return -(-size // _PAGE) * _PAGE
