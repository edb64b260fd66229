"""Copies of a rank's state in shared memory, taken beside the next forward and backward.

Only an update changes what is copied (but for buffers, which are copied at once), so `begin` returns
right away, a thread copies, and `settle`, called before every update, waits for whatever is left. That
wait is all that training pays. Who keeps the copies beyond the rank's life, on this machine and on
another, is a `ReplicaClient`; without one the copies serve checkpoints alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from forge.checkpoint.manifest import Progress, base_record, shape_record
from forge.checkpoint.snapshot_buffer import NUM_SLOTS, SnapshotBuffer, create_snapshot_buffer
from forge.train.state import TrainState

# A state of this size is copied in less time than a thread takes to start.
_SMALL_BYTES = 4 * 2**20


class ReplicaClient(Protocol):
    """Keeps a rank's snapshots where they outlive it."""

    def register(self, snapshot: SnapshotBuffer) -> None:
        """Take the memory over, before the first copy."""

    def metadata(self) -> Mapping[str, Any]:
        """What is to be kept with a copy that is made now; JSON."""

    def publish(self, *, step: int, slot: int) -> None:
        """A slot is whole: copy it to another machine."""

    def wait_replicated(self, step: int) -> None:
        """Return when the copy of this step is as safe as it is going to be."""

    def cpu_s(self) -> float:
        """Processor time that keeping has taken so far, on this rank's account."""


@dataclass(slots=True, kw_only=True)
class PendingSnapshot:
    """One copy in the making."""

    step: int
    slot: int
    stall_s: float = 0.0
    """How long training has stood still for it."""
    failure: str | None = None
    is_copied: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None


class Snapshotter:
    """The snapshots of one rank."""

    def __init__(self, state: TrainState, *, keeper: ReplicaClient | None = None) -> None:
        self._state, self._keeper = state, keeper
        self.snapshot = create_snapshot_buffer(state.layout, about={"shape": shape_record(state.shape)})
        self._last: PendingSnapshot | None = None
        self._pinned: set[int] = set()
        self._cpu_s = self._counted_cpu_s = self._stall_s = 0.0
        if keeper is not None:
            keeper.register(self.snapshot)

    def begin(
        self, progress: Progress, *, then: Callable[[PendingSnapshot], None] | None = None, is_pinned: bool = False
    ) -> PendingSnapshot:
        """Start to copy the state as it is; it must not change before `settle`.

        Waits until the copy before is kept: so no more than one step is ever at risk.

        Args:
            then: called when the copy is whole, or has failed, on another thread.
            is_pinned: do not write to its slot again before `unpin`: somebody makes a checkpoint of it.
        """
        began = time.monotonic()
        self.finish()
        copying = self._last = PendingSnapshot(step=progress.step, slot=self._free_slot())
        if is_pinned:
            self._pinned.add(copying.slot)
        base = self._state.shape.base
        note = {"progress": asdict(progress)} | ({"base": base_record(base)} if base is not None else {})
        note |= dict(self._keeper.metadata() if self._keeper else {})
        self._state.copy_to(self.snapshot.begin(copying.slot), buffers=True)
        arguments = (copying, note, _mark(self._state.device), then)
        is_small = self._state.layout.size_bytes <= _SMALL_BYTES and self._state.device.type == "cpu"
        if is_small and then is None:  # which may have to wait for somebody
            self._copy(*arguments)
        else:
            copying.thread = threading.Thread(target=self._copy, args=arguments, name="snapshot", daemon=True)
            copying.thread.start()
        self._count_stall(copying, began)
        return copying

    def settle(self) -> None:
        """Return when the state may change: the copy is complete."""
        if self._last is not None and not self._last.is_copied.is_set():
            began = time.monotonic()
            self._last.is_copied.wait()
            self._count_stall(self._last, began)

    def join(self) -> None:
        """Wait until the last copy is whole and has been passed on."""
        if self._last is not None and self._last.thread is not None:
            self._last.thread.join()

    def finish(self) -> None:
        """Wait until the last copy is kept; one that failed never is."""
        self.join()
        if self._keeper is not None and self._last is not None and self._last.failure is None:
            self._keeper.wait_replicated(self._last.step)

    def unpin(self, slot: int) -> None:
        """The slot may be written again."""
        self._pinned.discard(slot)

    def take_cost_s(self) -> float:
        """What snapshots have cost training since this was asked last: standing still, and on CPU their work."""
        cost_s, self._stall_s = self._stall_s, 0.0
        if self._state.device.type == "cpu":
            cpu_s = self._cpu_s + (self._keeper.cpu_s() if self._keeper else 0.0)
            cost_s += max(0.0, cpu_s - self._counted_cpu_s)
            self._counted_cpu_s = cpu_s
        return cost_s

    def close(self) -> None:
        """Free the memory, unless somebody else holds it."""
        self.join()
        self.snapshot.close()

    def _free_slot(self) -> int:
        """One that is neither pinned nor the newest whole one; the last only where it must be."""
        newest = next((copy.slot for copy in self.snapshot.copies()), None)
        free = [slot for slot in range(NUM_SLOTS) if slot not in self._pinned]
        if self._keeper is None:  # nobody needs the last copy once its checkpoint is made
            return free[0]
        return next(slot for slot in free if slot != newest)

    def _copy(
        self,
        copying: PendingSnapshot,
        note: dict[str, Any],
        ready: Any,
        then: Callable[[PendingSnapshot], None] | None,
    ) -> None:
        began_s = time.thread_time()
        try:
            with _beside(ready):
                self.snapshot.prepare(copying.slot)
                self._state.copy_to(self.snapshot.data(copying.slot), buffers=False)
            copying.is_copied.set()  # training goes on
            self.snapshot.commit(copying.slot, step=copying.step, state=note)
            if self._keeper is not None:
                self._keeper.publish(step=copying.step, slot=copying.slot)
        except Exception as error:  # a thread's exceptions are seen by nobody
            copying.failure = f"the state could not be copied: {error}"
        finally:
            if copying.thread is not None:  # otherwise it was training itself that waited, and is counted there
                self._cpu_s += time.thread_time() - began_s
            copying.is_copied.set()
            if then is not None:
                then(copying)

    def _count_stall(self, copying: PendingSnapshot, began: float) -> None:
        stall_s = time.monotonic() - began
        copying.stall_s += stall_s
        self._stall_s += stall_s


def _mark(device: torch.device) -> Any:
    """This moment in the work that was handed to a GPU; None on the host."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextlib.contextmanager
def _beside(ready: Any) -> Iterator[None]:
    """On a GPU, copies begun meanwhile run beside training, after `ready`, and are complete at the end."""
    if ready is None:
        yield
        return
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
