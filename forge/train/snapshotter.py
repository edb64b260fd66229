"""Take snapshots of a rank's state in shared memory, overlapped with the next forward and backward pass.

Only an update changes the state (except buffers, which are copied at once), so `begin` returns immediately, a
thread copies, and `settle`, called before every update, waits for the rest; on a GPU it is the GPU that waits
(`forge.train.snapshot_copy`). Training pays only for that wait. A `ReplicaClient` keeps snapshots beyond the life
of the rank, on this machine and on another; without one they serve checkpoints only. `forge.train.snapshot_pieces`
says which parts of the state a rank copies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from forge.checkpoint.manifest import Progress, base_record, shape_record
from forge.checkpoint.snapshot_buffer import NUM_SLOTS, SnapshotBuffer, create_snapshot_buffer
from forge.train.snapshot_copy import SnapshotCopier
from forge.train.snapshot_pieces import pieces_of
from forge.train.state import TrainState

# A state of at most this size is copied faster than a thread starts.
_SMALL_BYTES = 4 * 2**20


class ReplicaClient(Protocol):
    """Replicates a rank's snapshots to processes that outlive it."""

    def register(self, snapshot: SnapshotBuffer, *, piece: int, num_pieces: int, is_sent: bool) -> None:
        """Register the shared memory of a piece, before the first snapshot.

        Args:
            is_sent: whether its replica is to be sent to another node, since no other rank has the values.
        """

    def metadata(self) -> Mapping[str, Any]:
        """Return JSON to store with a snapshot taken now."""

    def publish(self, *, step: int, slot: int) -> None:
        """Announce that a slot is complete, to be copied to another machine."""

    def wait_replicated(self, step: int) -> None:
        """Wait until the snapshot of this step is replicated, or cannot be."""

    def cpu_s(self) -> float:
        """Return the CPU time of replication so far, attributed to this rank, in seconds."""


@dataclass(slots=True, kw_only=True)
class PendingSnapshot:
    """A snapshot that is being taken."""

    step: int
    slots: tuple[int, ...]
    """In the buffer of each piece."""
    stall_s: float = 0.0
    """How long training has waited for it."""
    failure: str | None = None
    is_copied: threading.Event = field(default_factory=threading.Event)
    """On a GPU: that the copy is queued."""
    thread: threading.Thread | None = None

    @property
    def slot(self) -> int:
        """In the buffer of the first piece."""
        return self.slots[0]


class Snapshotter:
    """Takes the snapshots of one rank."""

    def __init__(
        self, state: TrainState, *, replica_client: ReplicaClient | None = None, parts_per_shard: int = 0
    ) -> None:
        """Args:
        parts_per_shard: see `forge.train.snapshot_pieces`.
        """
        self._state, self._replica_client = state, replica_client
        self.pieces = pieces_of(state, parts_per_shard=parts_per_shard)
        about = {"shape": shape_record(state.shape)}
        self._buffers = [create_snapshot_buffer(piece.part.layout, about=about) for piece in self.pieces]
        self._copiers = [
            SnapshotCopier(state, buffer, part=piece.part)
            for buffer, piece in zip(self._buffers, self.pieces, strict=True)
        ]
        self._pending: PendingSnapshot | None = None
        self._pinned: set[int] = set()
        self._cpu_s = self._counted_cpu_s = self._stall_s = 0.0
        if replica_client is not None:
            for buffer, piece in zip(self._buffers, self.pieces, strict=True):
                replica_client.register(
                    buffer, piece=piece.number, num_pieces=piece.num_pieces, is_sent=piece.is_sent
                )

    @property
    def buffer(self) -> SnapshotBuffer:
        """The memory of the first piece, the only one that is written to checkpoints."""
        return self._buffers[0]

    def begin(
        self,
        progress: Progress,
        *,
        on_done: Callable[[PendingSnapshot], None] | None = None,
        is_pinned: bool = False,
    ) -> PendingSnapshot:
        """Start a snapshot of the current state, which must not change before `settle`.

        Waits until the previous snapshot is replicated, so that at most one interval can be lost.

        Args:
            on_done: called on another thread when the snapshot is complete, or has failed.
            is_pinned: do not reuse its slot before `unpin`, as a checkpoint is written from it.
        """
        began = time.monotonic()
        self.finish()
        pending = self._pending = PendingSnapshot(step=progress.step, slots=self._free_slots())
        if is_pinned:
            self._pinned.add(pending.slot)
        base = self._state.shape.base
        metadata = {"progress": asdict(progress)} | ({"base": base_record(base)} if base is not None else {})
        metadata |= dict(self._replica_client.metadata() if self._replica_client else {})
        events = [copier.begin(slot) for copier, slot in zip(self._copiers, pending.slots, strict=True)]
        arguments = (pending, metadata, events, on_done)
        size_bytes = sum(piece.part.layout.size_bytes for piece in self.pieces)
        is_small = size_bytes <= _SMALL_BYTES and self._state.device.type == "cpu"
        if is_small and on_done is None:  # a callback may block, so it needs a thread
            self._copy(*arguments)
        else:
            pending.thread = threading.Thread(target=self._copy, args=arguments, name="snapshot", daemon=True)
            pending.thread.start()
        self._count_stall(pending, began)
        return pending

    def settle(self) -> None:
        """Wait until the state may change, because the snapshot has been copied, or have the GPU wait for that."""
        if self._pending is None:
            return
        if not self._pending.is_copied.is_set():
            began = time.monotonic()
            self._pending.is_copied.wait()
            self._count_stall(self._pending, began)
        for copier in self._copiers:
            copier.hold_update()

    def complete(self) -> None:
        """Wait until the last snapshot is complete, as training may not go on without it.

        Where no replicas are sent, no other node has a rank's snapshot before the last. A faster rank begins the
        next one, and overwrites it, only after all ranks have passed here; else, if all ranks were killed then,
        some would have step s and half of s + 1, others s - 1 and half of s, and no step would be whole.
        """
        if self._pending is not None and self._pending.thread is not None and self._pending.thread.is_alive():
            began = time.monotonic()
            self.join()
            self._count_stall(self._pending, began)

    def join(self) -> None:
        """Wait until the last snapshot is complete and published."""
        if self._pending is not None and self._pending.thread is not None:
            self._pending.thread.join()

    def finish(self) -> None:
        """Wait until the last snapshot is replicated, unless it has failed."""
        self.join()
        if self._replica_client is not None and self._pending is not None and self._pending.failure is None:
            self._replica_client.wait_replicated(self._pending.step)

    def unpin(self, slot: int) -> None:
        """Allow the slot to be reused."""
        self._pinned.discard(slot)

    def take_cost_s(self) -> float:
        """Return the cost of snapshots since the last call, in seconds: waiting, and on CPU also the CPU time."""
        held_s = sum(copier.take_held_s() for copier in self._copiers)
        if self._pending is not None:
            self._pending.stall_s += held_s
        cost_s, self._stall_s = self._stall_s + held_s, 0.0
        if self._state.device.type == "cpu":
            cpu_s = self._cpu_s + (self._replica_client.cpu_s() if self._replica_client else 0.0)
            cost_s += max(0.0, cpu_s - self._counted_cpu_s)
            self._counted_cpu_s = cpu_s
        return cost_s

    def close(self) -> None:
        """Close the memory, which is freed unless another process has it open."""
        self.join()
        for copier in self._copiers:
            copier.close()
        for buffer in self._buffers:
            buffer.close()

    def _free_slots(self) -> tuple[int, ...]:
        """Return a free slot of each buffer; only the first one has pinned slots."""
        slots = [self._free_slot()]
        for buffer in self._buffers[1:]:
            newest = next((snapshot.slot for snapshot in buffer.snapshots()), None)
            slots.append(next(slot for slot in range(2) if slot != newest))
        return tuple(slots)

    def _free_slot(self) -> int:
        """Return a slot that is neither pinned nor the newest complete one; without replicas, any unpinned slot."""
        newest = next((snapshot.slot for snapshot in self.buffer.snapshots()), None)
        free = [slot for slot in range(NUM_SLOTS) if slot not in self._pinned]
        if self._replica_client is None:  # the last snapshot is not needed once its checkpoint is written
            return free[0]
        return next(slot for slot in free if slot != newest)

    def _copy(
        self,
        pending: PendingSnapshot,
        metadata: dict[str, Any],
        events: list[Any],
        on_done: Callable[[PendingSnapshot], None] | None,
    ) -> None:
        began_s = time.thread_time()
        try:
            for copier, slot, event in zip(self._copiers, pending.slots, events, strict=True):
                copier.copy(slot, after=event)
            pending.is_copied.set()  # training continues
            for copier in self._copiers:
                copier.wait()
            for buffer, slot in reversed(list(zip(self._buffers, pending.slots, strict=True))):
                buffer.commit(slot, step=pending.step, state=metadata)
            if self._replica_client is not None:
                self._replica_client.publish(step=pending.step, slot=pending.slot)
        except Exception as error:  # would otherwise be lost in the thread
            pending.failure = f"the state could not be copied: {error}"
        finally:
            if pending.thread is not None:  # otherwise counted as wait time
                self._cpu_s += time.thread_time() - began_s
            pending.is_copied.set()
            if on_done is not None:
                on_done(pending)

    def _count_stall(self, pending: PendingSnapshot, began: float) -> None:
        stall_s = time.monotonic() - began
        pending.stall_s += stall_s
        self._stall_s += stall_s
