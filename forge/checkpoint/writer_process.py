"""Making checkpoints of snapshots, in a process of its own while training goes on.

    python -m forge.checkpoint.writer_process SNAPSHOT_FD < orders > outcomes

Every rank has one. It writes the rank's part out of shared memory; the first one waits until all parts
lie there and seals the checkpoint. They speak through the storage alone, so a checkpoint is finished
even if every rank has died meanwhile. It imports no torch. A saver whose rank is gone finishes what it
has begun, waits a little for the other parts, and ends.

Orders and outcomes are lines of JSON. An order to save is WriteCommand; `{"abort": token}` gives up waiting
for parts that will not come. The outcomes of an order are `{"token", "part": bytes}`, then from the first
saver `{"token", "sealed": bytes, "at": time}`; or `{"token", "failed": reason}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forge.checkpoint.manifest import (
    MANIFEST,
    Part,
    manifest_bytes,
    part_from_record,
    part_header,
    part_name,
    part_record,
    state_name,
    step_name,
)
from forge.checkpoint.reader import list_checkpoints, open_checkpoint
from forge.checkpoint.snapshot_buffer import Snapshot, SnapshotBuffer, open_snapshot_buffer
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.errors import CheckpointError

MEMBERSHIP_DIGITS = 8
_CHUNK_BYTES = 8 * 2**20
# Training goes first where processors are few.
_NICENESS = 10
_POLL_S = 0.05
_REMOTE_POLL_S = 1.0
# How long a saver waits for the other parts once its rank is gone and nobody can tell it that they will not come.
_ORPHAN_PATIENCE_S = 10.0
# What a writer says of its part, for the one that seals; gone when the checkpoint is there.
_RECEIPT = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCommand:
    """Make a checkpoint of the snapshot of one step."""

    url: str
    step: int
    slot: int
    rank: int
    world_size: int
    token: str
    """The same for all ranks that write this checkpoint together, and nobody else's."""
    keep: int
    state: str
    """The file of the state; the first rank's alone is written."""

    @property
    def membership(self) -> str:
        """What the tokens of one membership have in common."""
        return self.token[:MEMBERSHIP_DIGITS]


class CommandStream:
    """The orders that come through a pipe, and whether more may come."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._text = b""
        self._waiting: list[dict[str, Any]] = []
        self.is_open = True

    def next_save(self) -> WriteCommand | None:
        """Wait for the next order to save; None when there will be no more."""
        while True:
            for order in self._waiting:
                if "abort" not in order:
                    self._waiting.remove(order)
                    return WriteCommand(**order)
            if not self.is_open:
                return None
            self._receive(timeout_s=None)

    def is_aborted(self, token: str, *, timeout_s: float) -> bool:
        """Whether a save was called off; listens for as long as `timeout_s`."""
        self._receive(timeout_s=timeout_s)
        return {"abort": token} in self._waiting

    def _receive(self, *, timeout_s: float | None) -> None:
        if not self.is_open:
            time.sleep(timeout_s or 0.0)
            return
        if select.select([self._fd], [], [], timeout_s)[0]:
            piece = os.read(self._fd, 2**20)
            self.is_open = bool(piece)
            *lines, self._text = (self._text + piece).split(b"\n")
            self._waiting += [json.loads(line) for line in lines]


def main() -> None:
    """Carry out orders until there are no more."""
    # Ctrl-C and SIGTERM reach whole groups of processes; this one ends with its rank, when its work is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    snapshot = open_snapshot_buffer(int(sys.argv[1]))
    snapshot.prepare(0)
    serve(snapshot, CommandStream(sys.stdin.fileno()), answer_fd=sys.stdout.fileno())


def serve(snapshot: SnapshotBuffer, orders: CommandStream, *, answer_fd: int) -> None:
    """Carry out orders until there are no more."""
    storages: dict[str, Storage] = {}
    order: WriteCommand | None = None
    while (following := orders.next_save()) is not None:
        order = following
        try:
            storage = storages.get(order.url) or storages.setdefault(order.url, open_storage(order.url))
            save(storage, snapshot, order, orders, answer_fd=answer_fd)
        except (OSError, CheckpointError, EOFError) as error:
            _answer(answer_fd, token=order.token, failed=_reason(error))
    if order is not None and order.rank == 0 and order.url in storages:
        storages[order.url].sweep(own=order.membership, up_to=order.token)


def save(
    storage: Storage, snapshot: SnapshotBuffer, order: WriteCommand, orders: CommandStream, *, answer_fd: int
) -> None:
    """Write one rank's part; the first rank's saver also seals the checkpoint and removes old ones.

    Raises: OSError, CheckpointError, EOFError; the first saver takes its draft away then.
    """
    draft = storage.open_draft(step_name(order.step), token=order.token)
    if order.rank != 0:
        part = write_part(storage, draft, snapshot, order)
        _answer(answer_fd, token=order.token, part=part.size_bytes)
        return
    try:
        storage.hold(draft)
        part = write_part(storage, draft, snapshot, order)
        _answer(answer_fd, token=order.token, part=part.size_bytes)
        size = seal(storage, draft, order, orders)
    except (OSError, CheckpointError, EOFError):
        storage.discard(draft, token=order.token)
        raise
    _answer(answer_fd, token=order.token, sealed=size, at=time.time())
    prune(storage, order)


def write_part(storage: Storage, draft: str, snapshot: SnapshotBuffer, order: WriteCommand) -> Part:
    """Write a rank's intervals as they lie in shared memory, and a receipt for whoever seals.

    Raises: OSError; CheckpointError if the snapshot was overwritten meanwhile, or is not whole.
    """
    name = part_name(order.rank, token=order.token)
    copy = _copy_of(snapshot, order)
    snapshot.prepare(copy.slot)
    with snapshot.data(copy.slot) as data:
        content = _Summed(part_header(snapshot.layout), data)
        storage.write(f"{draft}/{name}", content.pieces)
    if not snapshot.is_intact(copy):
        raise CheckpointError(f"the snapshot of step {order.step} was overwritten while it was written")
    part = Part(name=name, size_bytes=content.size_bytes, crc32=content.crc32, layout=snapshot.layout)
    receipt = json.dumps(part_record(part)).encode()
    storage.write(f"{draft}/{name}{_RECEIPT}", lambda: [receipt])
    return part


def seal(storage: Storage, draft: str, order: WriteCommand, orders: CommandStream) -> int:
    """Wait for every part, then make the checkpoint appear. Returns: its bytes.

    Raises: OSError; CheckpointError if a part will not come, or the place is taken by another job.
    """
    parts = _await_parts(storage, draft, order, orders)
    state = order.state.encode()
    storage.write(f"{draft}/{state_name(token=order.token)}", lambda: [state])
    storage.drop(draft, [f"{part.name}{_RECEIPT}" for part in parts])
    last = (MANIFEST, manifest_bytes(order.step, parts=parts, state=state, token=order.token))
    name = step_name(order.step)
    try:
        storage.publish(draft, name, last=last)
    except FileExistsError:
        if _is_ours(storage, name, state):  # saved before the run was resumed, or by another at the same time
            storage.discard(draft, token=order.token)
        else:
            storage.remove(name, sparing=order.token)
            storage.publish(draft, name, last=last)
    return len(state) + sum(part.size_bytes for part in parts)


def prune(storage: Storage, order: WriteCommand) -> None:
    """Keep the newest `keep` checkpoints that verify by their sizes; what is older goes, and what the dead left.

    The newest one was just written and is among them. A storage that will not delete costs space, not the run.
    """
    try:
        storage.sweep(own=order.membership, up_to=order.token)
        kept = 0
        for name in list_checkpoints(storage):
            if kept >= order.keep and name < step_name(order.step):
                storage.remove(name)
            elif verify_checkpoint(storage, name, with_checksums=False) is None:
                kept += 1
    except (OSError, CheckpointError) as error:
        sys.stderr.write(f"old checkpoints in {storage.url} could not be removed: {error}\n")


def _copy_of(snapshot: SnapshotBuffer, order: WriteCommand) -> Snapshot:
    for copy in snapshot.copies():
        if copy.slot == order.slot and copy.step == order.step:
            return copy
    raise CheckpointError(f"there is no whole snapshot of step {order.step}")


def _await_parts(storage: Storage, draft: str, order: WriteCommand, orders: CommandStream) -> list[Part]:
    wanted = [part_name(rank, token=order.token) for rank in range(order.world_size)]
    poll_s = _POLL_S if "://" not in storage.url else _REMOTE_POLL_S
    parts: dict[str, Part] = {}
    orphaned_at: float | None = None
    while True:
        there = storage.files(draft)
        for name in wanted:
            if name not in parts and f"{name}{_RECEIPT}" in there:
                with contextlib.suppress(ValueError):  # its writer is in the middle of it
                    parts[name] = part_from_record(json.loads(storage.read(f"{draft}/{name}{_RECEIPT}")))
        missing = [name for name in wanted if name not in parts]
        if not missing:
            return [parts[name] for name in wanted]
        if orders.is_aborted(order.token, timeout_s=poll_s):
            raise CheckpointError(f"{missing[0]} could not be written")
        if not orders.is_open:
            orphaned_at = orphaned_at or time.monotonic()
            if time.monotonic() - orphaned_at > _ORPHAN_PATIENCE_S:
                raise CheckpointError(f"{missing[0]} did not come, and every rank is gone")


def _is_ours(storage: Storage, name: str, state: bytes) -> bool:
    """Whether what stands there is whole, and of this job; what is broken may be replaced.

    Raises: CheckpointError if it is whole and of another job.
    """
    if verify_checkpoint(storage, name) is not None:
        return False
    there = open_checkpoint(storage, name)
    own = json.loads(state)
    if there.progress.config_digest != own["config_digest"] or there.progress.corpus != own["corpus"]:
        raise CheckpointError(f"{there.url} is a checkpoint of another job, which writes to the same place")
    return True


class _Summed:
    """A part's content in pieces, and their checksum once the last was taken."""

    def __init__(self, header: bytes, data: memoryview) -> None:
        self._header, self._data = header, data
        self.size_bytes = len(header) + len(data)
        self.crc32 = 0

    def pieces(self) -> Iterator[memoryview | bytes]:
        """From the beginning, as often as asked: a store that failed is given them again."""
        self.crc32 = zlib.crc32(self._header)
        yield self._header
        with ThreadPoolExecutor(max_workers=1) as beside:
            for start in range(0, len(self._data), _CHUNK_BYTES):
                piece = self._data[start : start + _CHUNK_BYTES]
                summed = beside.submit(zlib.crc32, piece, self.crc32)
                yield piece  # which is written meanwhile
                self.crc32 = summed.result()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error)


def _answer(fd: int, **outcome: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the rank is gone; the checkpoint is not
        os.write(fd, json.dumps(outcome).encode() + b"\n")


if __name__ == "__main__":
    main()
