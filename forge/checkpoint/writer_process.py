"""Write checkpoints from snapshots in a separate process, while training continues.

    python -m forge.checkpoint.writer_process SNAPSHOT_FD < commands > outcomes

Each rank has one writer process. It writes the rank's part from shared memory; the writer of rank 0 then waits for
all parts and commits the checkpoint. Writers communicate only through the storage, so a checkpoint is completed
even if all ranks have died. A writer whose rank has died finishes its command, waits `_ORPHAN_TIMEOUT_S` for
missing parts, and exits. It does not import torch.

Commands and outcomes are lines of JSON. A save is a `WriteCommand`; `{"abort": token}` stops waiting for parts that
will not be written. The outcomes of a save are `{"token", "part": bytes}`, then from rank 0's writer
`{"token", "committed": bytes, "at": time, "stored": {step: bytes}, "removed": steps}`, with all checkpoints that
exist before the oldest are removed, and those removed before to make room; or `{"token", "failed": reason}`.
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

from forge.checkpoint.best import best_scores
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
from forge.checkpoint.space import is_full, make_room, no_space_reason
from forge.checkpoint.storage import Storage, open_storage
from forge.checkpoint.verify import stored_steps, verify_checkpoint
from forge.errors import CheckpointError

MEMBERSHIP_DIGITS = 8
_CHUNK_BYTES = 8 * 2**20
# Training has priority on the CPU.
_NICENESS = 10
_POLL_S = 0.05
_REMOTE_POLL_S = 1.0
# How long a writer waits for missing parts after its rank has died, when no abort can arrive any more.
_ORPHAN_TIMEOUT_S = 10.0
# How often, and how far apart, a writer tries to write its part to a full disk.
_SPACE_TRIES = 4
_SPACE_RETRY_S = 0.5
# Marker file of a complete part, with its manifest entry; removed before the checkpoint is published.
_MARKER_SUFFIX = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteCommand:
    """Write a checkpoint from the snapshot of one step."""

    url: str
    step: int
    slot: int
    rank: int
    world_size: int
    token: str
    """Identifies this save; equal on all ranks."""
    keep: int
    keep_best: int = 0
    """How many of the best checkpoints are kept besides."""
    state: str
    """Content of the state file; written by rank 0 only."""

    @property
    def membership(self) -> str:
        """Common prefix of all tokens of one membership."""
        return self.token[:MEMBERSHIP_DIGITS]


class CommandStream:
    """Reads commands from a pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._text = b""
        self._waiting: list[dict[str, Any]] = []
        self.is_open = True

    def next_save(self) -> WriteCommand | None:
        """Wait for the next save; None when the pipe is closed."""
        while True:
            for command in self._waiting:
                if "abort" not in command:
                    self._waiting.remove(command)
                    return WriteCommand(**command)
            if not self.is_open:
                return None
            self._receive(timeout_s=None)

    def is_aborted(self, token: str, *, timeout_s: float) -> bool:
        """Whether a save was aborted; waits for new commands for `timeout_s`."""
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
    """Entry point: execute commands from stdin until it is closed."""
    # Ctrl-C and SIGTERM reach the whole process group; a writer must finish its work before it exits.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    buffer = open_snapshot_buffer(int(sys.argv[1]))
    buffer.prepare(0)
    serve(buffer, CommandStream(sys.stdin.fileno()), outcome_fd=sys.stdout.fileno())


def serve(buffer: SnapshotBuffer, commands: CommandStream, *, outcome_fd: int) -> None:
    """Execute commands until the stream ends."""
    storages: dict[str, Storage] = {}
    command: WriteCommand | None = None
    while (next_command := commands.next_save()) is not None:
        command = next_command
        try:
            storage = storages.get(command.url) or storages.setdefault(command.url, open_storage(command.url))
            save(storage, buffer, command, commands, outcome_fd=outcome_fd)
        except (OSError, CheckpointError, EOFError) as error:
            _report(outcome_fd, token=command.token, failed=_reason(error))
    if command is not None and command.rank == 0 and command.url in storages:
        storages[command.url].sweep(own=command.membership, up_to=command.token)


def save(
    storage: Storage, buffer: SnapshotBuffer, command: WriteCommand, commands: CommandStream, *, outcome_fd: int
) -> None:
    """Write one rank's part; on rank 0 also commit the checkpoint and remove old ones.

    Raises: OSError, CheckpointError, EOFError; rank 0's writer removes the staging folder then.
    """
    needed = command.world_size * buffer.layout.size_bytes
    removed: list[int] = []
    try:
        if command.rank != 0:
            part = _write_patiently(storage, buffer, command)
            _report(outcome_fd, token=command.token, part=part.size_bytes)
            return
        removed += make_room(storage, needed_bytes=needed, keep_best=command.keep_best)
        size = _save_first(storage, buffer, command, commands, outcome_fd=outcome_fd, removed=removed)
    except OSError as error:
        if not is_full(error):
            raise
        raise CheckpointError(no_space_reason(storage, needed_bytes=needed, removed=removed)) from error
    at = time.time()
    stored = _stored(storage)
    _report(outcome_fd, token=command.token, committed=size, at=at, stored=stored, removed=removed)
    prune(storage, command)


def _save_first(
    storage: Storage,
    buffer: SnapshotBuffer,
    command: WriteCommand,
    commands: CommandStream,
    *,
    outcome_fd: int,
    removed: list[int],
) -> int:
    """Write rank 0's part and commit the checkpoint. Returns: its size in bytes.

    Args:
        removed: receives the steps of checkpoints that were removed to make room.

    Raises: as `save`.
    """
    staging = storage.open_staging(step_name(command.step), token=command.token)
    try:
        try:
            part = write_part(storage, staging, buffer, command)
        except OSError as error:
            if not is_full(error):
                raise
            removed += make_room(storage, needed_bytes=None, keep_best=command.keep_best)
            part = write_part(storage, staging, buffer, command)
        _report(outcome_fd, token=command.token, part=part.size_bytes)
        return commit(storage, staging, command, commands)
    except (OSError, CheckpointError, EOFError):
        storage.discard(staging, token=command.token)
        raise


def _write_patiently(storage: Storage, buffer: SnapshotBuffer, command: WriteCommand) -> Part:
    """Write the part of a rank other than 0, again if the disk is full: rank 0's writer makes room meanwhile.

    Raises: as `write_part`.
    """
    for _ in range(_SPACE_TRIES - 1):
        try:
            staging = storage.open_staging(step_name(command.step), token=command.token)
            return write_part(storage, staging, buffer, command)
        except OSError as error:
            if not is_full(error):
                raise
            time.sleep(_SPACE_RETRY_S)
    return write_part(storage, storage.open_staging(step_name(command.step), token=command.token), buffer, command)


def write_part(storage: Storage, staging: str, buffer: SnapshotBuffer, command: WriteCommand) -> Part:
    """Write a rank's part from shared memory, then its marker file, which rank 0's writer waits for.

    Raises: OSError; CheckpointError if the snapshot is incomplete, or was overwritten during the write.
    """
    name = part_name(command.rank, token=command.token)
    snapshot = _find_snapshot(buffer, command)
    buffer.prepare(snapshot.slot)
    with buffer.data(snapshot.slot) as data:
        content = _PartContent(part_header(buffer.layout), data)
        storage.write(f"{staging}/{name}", content.pieces)
    if not buffer.is_intact(snapshot):
        raise CheckpointError(f"the snapshot of step {command.step} was overwritten while it was written")
    part = Part(name=name, size_bytes=content.size_bytes, crc32=content.crc32, layout=buffer.layout)
    marker = json.dumps(part_record(part)).encode()
    storage.write(f"{staging}/{name}{_MARKER_SUFFIX}", lambda: [marker])
    return part


def commit(storage: Storage, staging: str, command: WriteCommand, commands: CommandStream) -> int:
    """Wait for all parts, then publish the checkpoint. Returns: its size in bytes.

    Raises: OSError; CheckpointError if a part is missing, or another job has a checkpoint of that name.
    """
    parts = _wait_for_parts(storage, staging, command, commands)
    state = command.state.encode()
    storage.write(f"{staging}/{state_name(token=command.token)}", lambda: [state])
    storage.remove_files(staging, [f"{part.name}{_MARKER_SUFFIX}" for part in parts])
    last = (MANIFEST, manifest_bytes(command.step, parts=parts, state=state, token=command.token))
    name = step_name(command.step)
    try:
        storage.publish(staging, name, last=last)
    except FileExistsError:
        if _is_same_job(storage, name, state):  # saved before the run was resumed, or concurrently
            storage.discard(staging, token=command.token)
        else:
            storage.remove(name, keep_token=command.token)
            storage.publish(staging, name, last=last)
    return len(state) + sum(part.size_bytes for part in parts)


def prune(storage: Storage, command: WriteCommand) -> None:
    """Keep the newest `keep` checkpoints with correct sizes and the `keep_best` best ones; remove older ones, and
    what dead writers have left.

    A failure to remove is logged, and does not fail the save.
    """
    try:
        storage.sweep(own=command.membership, up_to=command.token)
        best = {step_name(score.step) for score in best_scores(storage, count=command.keep_best)}
        kept = 0
        for name in list_checkpoints(storage):
            if kept >= command.keep and name < step_name(command.step):
                if name in best:
                    continue
                storage.remove(name)
            elif verify_checkpoint(storage, name, with_checksums=False) is None:
                kept += 1
    except (OSError, CheckpointError) as error:
        sys.stderr.write(f"old checkpoints in {storage.url} could not be removed: {error}\n")


def _stored(storage: Storage) -> dict[int, int]:
    """All checkpoints, step → bytes: a writer that outlived its ranks had no rank left to report its commit to."""
    try:
        return stored_steps(storage)
    except (OSError, CheckpointError) as error:
        sys.stderr.write(f"the checkpoints in {storage.url} could not be listed: {error}\n")
        return {}


def _find_snapshot(buffer: SnapshotBuffer, command: WriteCommand) -> Snapshot:
    for snapshot in buffer.snapshots():
        if snapshot.slot == command.slot and snapshot.step == command.step:
            return snapshot
    raise CheckpointError(f"there is no complete snapshot of step {command.step}")


def _wait_for_parts(storage: Storage, staging: str, command: WriteCommand, commands: CommandStream) -> list[Part]:
    names = [part_name(rank, token=command.token) for rank in range(command.world_size)]
    poll_s = _POLL_S if "://" not in storage.url else _REMOTE_POLL_S
    parts: dict[str, Part] = {}
    orphaned_since: float | None = None
    while True:
        files = storage.files(staging)
        for name in names:
            if name not in parts and f"{name}{_MARKER_SUFFIX}" in files:
                with contextlib.suppress(ValueError):  # being written
                    parts[name] = part_from_record(json.loads(storage.read(f"{staging}/{name}{_MARKER_SUFFIX}")))
        missing = [name for name in names if name not in parts]
        if not missing:
            return [parts[name] for name in names]
        if commands.is_aborted(command.token, timeout_s=poll_s):
            raise CheckpointError(f"{missing[0]} could not be written")
        if not commands.is_open:
            orphaned_since = orphaned_since or time.monotonic()
            if time.monotonic() - orphaned_since > _ORPHAN_TIMEOUT_S:
                raise CheckpointError(f"{missing[0]} was not written, and the rank has died")


def _is_same_job(storage: Storage, name: str, state: bytes) -> bool:
    """Whether the existing checkpoint verifies and is of this job; a broken one may be replaced.

    Raises: CheckpointError if it verifies and is of another job.
    """
    if verify_checkpoint(storage, name) is not None:
        return False
    existing = open_checkpoint(storage, name)
    own, progress = json.loads(state), existing.progress
    if progress.config_digest != own["config_digest"] or progress.corpus != own["corpus"]:
        raise CheckpointError(f"{existing.url} is a checkpoint of another job that writes to the same folder")
    return True


class _PartContent:
    """Yields a part's content in chunks, and computes its checksum meanwhile."""

    def __init__(self, header: bytes, data: memoryview) -> None:
        self._header, self._data = header, data
        self.size_bytes = len(header) + len(data)
        self.crc32 = 0

    def pieces(self) -> Iterator[memoryview | bytes]:
        """Yield all chunks; may be called again for a retry."""
        self.crc32 = zlib.crc32(self._header)
        yield self._header
        with ThreadPoolExecutor(max_workers=1) as executor:
            for start in range(0, len(self._data), _CHUNK_BYTES):
                piece = self._data[start : start + _CHUNK_BYTES]
                checksum = executor.submit(zlib.crc32, piece, self.crc32)
                yield piece  # written while the checksum is computed
                self.crc32 = checksum.result()


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    return str(error)


def _report(fd: int, **outcome: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the rank has died; the checkpoint is still completed
        os.write(fd, json.dumps(outcome).encode() + b"\n")


if __name__ == "__main__":
    main()
