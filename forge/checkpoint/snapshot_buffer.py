"""Snapshots of one rank's state in shared memory, which outlives the rank.

The memory is anonymous (`memfd`): no file can be left behind, it does not count against the size of /dev/shm, and
it is freed when the last process closes it. It describes its own content, so any process with the descriptor can
read it. A snapshot is written to a free slot, while the others stay complete. Two slots suffice for that; the third
is used while a checkpoint is written from one of them, and takes memory only then:

    header    magic, number of slots, bytes of the layout, bytes of the data
    slot 0    step, checksum of the data, length and text of a small JSON (step, tokens, ...)
    slot 1, slot 2
    layout    JSON: the intervals, in the order of their bytes, and further information on the state
    data 0, data 1, data 2

Writing clears the step of a slot first and sets it last, after the checksum, so a slot whose writer was killed is
recognised as incomplete. This module does not import torch, which keeps the checkpoint writer process small.
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
    """One complete snapshot in a slot."""

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
            raise ValueError("the memory contains no snapshots of this version of forge")
        first = _PAGE + NUM_SLOTS * _SLOT_BYTES
        self.description: bytes = self._memory[first : first + layout_bytes]
        """Layout and `about` as JSON; see `create_from_description`."""
        body = json.loads(self.description)
        self.layout: Layout = layout_from_record(body["layout"])
        self.about: dict[str, Any] = body["about"]
        self._data_start = _round_up(first + layout_bytes)

    def prepare(self, slot: int) -> None:
        """Map the pages of a slot, in chunks, so that copying causes no page faults.

        The first call allocates them: 0.4 s per GB, ten times the duration of the copy.
        """
        first = self.data_offset(slot)
        end = first + _round_up(self._data_bytes)
        with contextlib.suppress(OSError):  # before Linux 5.14: pages are mapped on first access
            for start in range(first, end, _CHUNK_BYTES):
                self._memory.madvise(_MADV_POPULATE_WRITE, start, min(_CHUNK_BYTES, end - start))

    def begin(self, slot: int) -> memoryview:
        """Mark a slot as incomplete and return its bytes, to be written before `commit`."""
        _SLOT.pack_into(self._memory, self._slot_start(slot), 0, 0, 0)
        return self.data(slot)

    def commit(self, slot: int, *, step: int, state: dict[str, Any], checksum: int | None = None) -> None:
        """Mark a slot as complete: write the checksum first, the step last.

        Args:
            step: at least 1.
            state: JSON stored with the snapshot.
            checksum: of the data, if known; otherwise it is computed.

        Raises: ValueError if `state` is more than 256 KiB of JSON.
        """
        text = json.dumps(state).encode()
        if step < 1 or len(text) > _SLOT_BYTES - _SLOT.size:
            raise ValueError(f"invalid snapshot: step {step}, {len(text)} bytes of JSON, at most 256 KiB")
        start = self._slot_start(slot)
        self._memory[start + _SLOT.size : start + _SLOT.size + len(text)] = text
        _SLOT.pack_into(self._memory, start, 0, self._checksum(slot) if checksum is None else checksum, len(text))
        # An aligned word of 8 bytes is written atomically: a reader sees the step or 0.
        struct.pack_into("<q", self._memory, start, step)

    def steps(self) -> list[int]:
        """Return the steps of the complete snapshots, by slot; cheap enough to be asked all the time."""
        found = (_SLOT.unpack_from(self._memory, self._slot_start(slot))[0] for slot in range(NUM_SLOTS))
        return [step for step in found if step > 0]

    def snapshots(self) -> list[Snapshot]:
        """Return the complete snapshots according to the slot headers, newest first."""
        found = []
        for slot in range(NUM_SLOTS):
            start = self._slot_start(slot)
            step, checksum, num_bytes = _SLOT.unpack_from(self._memory, start)
            if step > 0:
                text = self._memory[start + _SLOT.size : start + _SLOT.size + num_bytes]
                found.append(Snapshot(slot=slot, step=step, checksum=checksum, state=json.loads(text)))
        return sorted(found, key=lambda snapshot: -snapshot.step)

    def is_intact(self, snapshot: Snapshot) -> bool:
        """Whether the slot still holds this snapshot, and its bytes match the checksum."""
        return snapshot in self.snapshots() and self._checksum(snapshot.slot) == snapshot.checksum

    def data(self, slot: int) -> memoryview:
        """Return the bytes of a slot, in the order of `layout`; release the view before `close`."""
        start = self.data_offset(slot)
        return memoryview(self._memory)[start : start + self._data_bytes]

    def data_offset(self, slot: int) -> int:
        """Return the offset of a slot's data in the memory, in bytes."""
        return self._data_start + slot * _round_up(self._data_bytes)

    def free(self, slot: int) -> None:
        """Return a slot's memory to the system; the slot is empty afterwards."""
        self.begin(slot).release()
        with contextlib.suppress(OSError):
            self._memory.madvise(mmap.MADV_REMOVE, self.data_offset(slot), _round_up(self._data_bytes))

    def close(self) -> None:
        """Close the memory; it is freed when no process has it open."""
        with contextlib.suppress(BufferError):  # an unreleased view keeps the memory mapped until it is released
            self._memory.close()
        os.close(self.fd)

    def _checksum(self, slot: int) -> int:
        with self.data(slot) as data:
            return checksum(data)

    def _slot_start(self, slot: int) -> int:
        return _PAGE + slot * _SLOT_BYTES


def create_snapshot_buffer(layout: Layout, *, about: Mapping[str, Any] | None = None) -> SnapshotBuffer:
    """Create shared memory for snapshots of a layout; pages are allocated on first write.

    Args:
        about: further information for readers; JSON.

    Raises: OSError if no memory can be created.
    """
    return create_from_description(json.dumps({"layout": layout.to_record(), "about": dict(about or {})}).encode())


def create_from_description(description: bytes) -> SnapshotBuffer:
    """Create shared memory with the same layout as the buffer whose `description` this is.

    Raises: OSError if no memory can be created; ValueError, KeyError if the description is not valid.
    """
    layout = layout_from_record(json.loads(description)["layout"])
    data_start = _round_up(_PAGE + NUM_SLOTS * _SLOT_BYTES + len(description))
    fd = os.memfd_create("forge-snapshot")  # close-on-exec: not inherited unless passed on
    try:
        os.ftruncate(fd, data_start + NUM_SLOTS * _round_up(layout.size_bytes))
        os.pwrite(fd, _HEADER.pack(_MAGIC, NUM_SLOTS, _PAGE, len(description), layout.size_bytes), 0)
        os.pwrite(fd, description, _PAGE + NUM_SLOTS * _SLOT_BYTES)
        return SnapshotBuffer(fd)
    except BaseException:
        os.close(fd)
        raise


def open_snapshot_buffer(fd: int) -> SnapshotBuffer:
    """Open the buffer of an inherited descriptor. Raises: ValueError if it is not a snapshot buffer."""
    return SnapshotBuffer(fd)


def checksum(data: memoryview) -> int:
    """Return the xxh3_64 of the data, in chunks, so that other threads can run in between."""
    digest = xxhash.xxh3_64()
    for start in range(0, len(data), _CHUNK_BYTES):
        digest.update(data[start : start + _CHUNK_BYTES])
    return digest.intdigest()


def _round_up(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // _PAGE) * _PAGE
