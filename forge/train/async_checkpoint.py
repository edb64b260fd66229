"""Write checkpoints asynchronously: the client side of the writer process in each rank.

`AsyncCheckpointer.begin` returns at once: the snapshotter copies the state while training continues, and the writer
process writes a checkpoint from that snapshot; `outcomes` returns the results. The snapshot's slot is pinned until
the part is written.

The training loop has one pending checkpoint at a time: the next one that is due begins when the previous one is
committed. Only the last one of a run begins at once, in another slot.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from forge.checkpoint.manifest import Progress, state_bytes, step_name
from forge.checkpoint.writer_process import MEMBERSHIP_DIGITS, WriteCommand
from forge.process import ending
from forge.train.snapshotter import PendingSnapshot, Snapshotter
from forge.train.state import TrainState

T = TypeVar("T")
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    """A committed checkpoint."""

    step: int
    folder: str
    size_bytes: int
    seconds: float
    """From the end of the step to the commit; nan if a writer committed it that outlived its ranks."""
    stall_s: float
    """How long training waited for it, on this rank; nan likewise."""
    removed: tuple[int, ...] = ()
    """Steps of older checkpoints that were removed before it was written, to make room."""
    is_best: bool = False
    """Whether it was written because its evaluation is among the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """A checkpoint that could not be written."""

    step: int
    reason: str


Outcome = CheckpointWritten | SaveFailed


@dataclass(slots=True, kw_only=True)
class PendingCheckpoint:
    """A checkpoint that is being written, as known to this rank."""

    step: int
    began: float
    """Wall-clock time, comparable with that of the writer process."""
    is_best: bool = False
    snapshot: PendingSnapshot | None = None
    has_part: bool = False
    committed: dict[str, Any] | None = None
    """Outcome of the commit; on rank 0 only."""
    failure: str | None = None

    @property
    def is_over(self) -> bool:
        return self.committed is not None or self.failure is not None


class AsyncCheckpointer:
    """Writes checkpoints of one rank's state, together with its peers; one instance per membership."""

    def __init__(
        self,
        state: TrainState,
        *,
        url: str,
        keep: int,
        keep_best: int = 0,
        snapshotter: Snapshotter | None = None,
        unacked_metrics: Callable[[], Sequence[Mapping[str, Any]]] = list,
    ) -> None:
        """Collective.

        Args:
            url: folder or URL of the run's checkpoints.
            keep: number of newest checkpoints to keep.
            keep_best: number of best checkpoints to keep besides.
            snapshotter: takes the snapshots; by default one for checkpoints only.
            unacked_metrics: returns metrics not acknowledged by the recorder yet; called on rank 0.
        """
        self._state, self.url, self._unacked_metrics = state, url, unacked_metrics
        self._keep, self._keep_best = keep, keep_best
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        token: list[str] = [secrets.token_hex(MEMBERSHIP_DIGITS // 2)]
        dist.broadcast_object_list(token, src=0)
        self._token, self._num_begun = token[0], 0
        self._snapshotter = snapshotter or Snapshotter(state)
        self._is_shared = snapshotter is not None
        self._piece = self._snapshotter.pieces[0]
        self._process: _WriterProcess | None = None
        if not self._is_shared:  # its start allocates the pages of the buffer meanwhile
            self._process = self._writer
        self._pending: dict[str, PendingCheckpoint] = {}
        self._returned: set[int] = set()
        """Steps of the checkpoints that `outcomes` has returned."""
        self.on_wait: Callable[[], None] = lambda: None
        """Called repeatedly while waiting for the storage."""

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is pending; only rank 0 knows when it is committed."""
        return bool(self._pending)

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part could not be written; all ranks must then call `abort`."""
        self._listen()
        return any(pending.failure for pending in self._pending.values())

    def begin(self, progress: Progress, *, is_best: bool = False) -> None:
        """Start a checkpoint of the current state, which must not change before `settle`; collective.

        Args:
            is_best: whether it is written because its evaluation is among the best; only reported.
        """
        self._num_begun += 1
        token = f"{self._token}{self._num_begun:04x}"
        pending = self._pending[token] = PendingCheckpoint(step=progress.step, began=time.time(), is_best=is_best)
        if not self._piece.is_written:  # by other ranks, which have the same values
            pending.snapshot, pending.has_part = self._snapshotter.begin(progress), True
            return
        state = ""
        if self._rank == 0:
            state = state_bytes(progress, self._state.shape, unacked_metrics=self._unacked_metrics()).decode()

        def send_command(snapshot: PendingSnapshot) -> None:
            if snapshot.failure is not None:
                pending.failure = snapshot.failure
                return
            # A busy writer process reads the command later.
            self._writer.send(
                asdict(
                    WriteCommand(
                        url=self.url,
                        step=progress.step,
                        slot=snapshot.slot,
                        rank=self._piece.number,
                        world_size=self._piece.num_pieces,
                        token=token,
                        keep=self._keep,
                        keep_best=self._keep_best,
                        state=state,
                    )
                )
            )

        pending.snapshot = self._snapshotter.begin(progress, on_done=send_command, is_pinned=True)

    def settle(self) -> None:
        """Wait until the state may change, because the snapshot is complete."""
        self._snapshotter.settle()

    def outcomes(self) -> list[CheckpointWritten]:
        """Return the checkpoints committed since the last call; on rank 0 only.

        With the first ones of this membership come all that exist already: a writer process that outlived its ranks
        has committed some of them, perhaps, and reported it to none.
        """
        self._listen()
        found: list[CheckpointWritten] = []
        for token, pending in list(self._pending.items()):
            if self._rank != 0 and pending.has_part and pending.failure is None:
                del self._pending[token]  # only rank 0 waits for the commit
            elif pending.committed is not None:
                del self._pending[token]
                found += self._written(pending)
        return found

    def abort(self) -> list[SaveFailed]:
        """Abort checkpoints of which a part failed on any rank; collective. Returns: the same on every rank."""
        reasons = self._gather(
            {token: pending.failure for token, pending in self._pending.items() if pending.failure}
        )
        failed = []
        for token, reason in reasons.items():
            pending = self._pending.pop(token, None)
            if pending is not None:
                self._unpin(pending)
            if self._rank == 0 and pending is not None:
                if pending.failure is None:
                    self._writer.send({"abort": token})
                failed.append(SaveFailed(step=pending.step, reason=reason))
        return self._broadcast(failed)

    def finish(self) -> list[Outcome]:
        """Wait until no checkpoint is pending; collective. Returns: the same on every rank."""
        self.settle()
        self._wait_until(lambda: all(pending.has_part or pending.failure for pending in self._pending.values()))
        failed = self.abort()
        if self._rank == 0:
            self._wait_until(lambda: all(pending.is_over for pending in self._pending.values()))
        return [*failed, *self.abort(), *self._broadcast(self.outcomes())]

    def pause(self, seconds: float) -> None:
        """Wait, and keep showing that this rank waits for the storage."""
        end = time.monotonic() + seconds
        self._wait_until(lambda: time.monotonic() > end)

    def close(self) -> None:
        """Wait until the writer process has finished and exited, and free the memory."""
        self._snapshotter.join()
        if self._process is not None:
            self._process.close()
        if not self._is_shared:
            self._snapshotter.close()

    @property
    def _writer(self) -> _WriterProcess:
        """The writer process, started on first use."""
        if self._process is None:
            self._process = _WriterProcess(self._snapshotter.buffer.fd)
        return self._process

    def _unpin(self, pending: PendingCheckpoint) -> None:
        if pending.snapshot is not None:
            self._snapshotter.unpin(pending.snapshot.slot)

    def _listen(self) -> None:
        if self._process is None:
            return
        for outcome in self._process.outcomes():
            pending = self._pending.get(outcome["token"])
            if pending is None:
                continue  # aborted since
            self._unpin(pending)
            pending.has_part = pending.has_part or "part" in outcome
            pending.committed = outcome if "committed" in outcome else pending.committed
            pending.failure = pending.failure or outcome.get("failed")
        if self._process.death is not None:
            for pending in self._pending.values():
                if not pending.is_over and not (pending.has_part and self._rank != 0):
                    pending.failure = self._process.death
            self._process = _WriterProcess(self._snapshotter.buffer.fd)

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        self._listen()
        while not is_so():
            self.on_wait()
            time.sleep(_POLL_S)
            self._listen()

    def _gather(self, own: dict[str, str]) -> dict[str, str]:
        """Return the reason of the lowest rank for each token."""
        every: list[dict[str, str]] = [{} for _ in range(self._world_size)]
        dist.all_gather_object(every, {token: f"rank {self._rank}: {why}" for token, why in own.items()})
        return {token: reasons[token] for reasons in reversed(every) for token in reasons}

    def _broadcast(self, found: list[T]) -> list[T]:
        """Return rank 0's list on every rank."""
        shared = [found]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _written(self, pending: PendingCheckpoint) -> Iterator[CheckpointWritten]:
        assert pending.committed is not None
        sizes = {int(step): size for step, size in pending.committed["stored"].items()}
        for step, size in (sizes | {pending.step: pending.committed["committed"]}).items():
            is_own = step == pending.step
            if is_own or step not in self._returned:
                self._returned.add(step)
                yield CheckpointWritten(
                    step=step,
                    folder=f"{self.url}/{step_name(step)}",
                    size_bytes=size,
                    seconds=pending.committed["at"] - pending.began if is_own else math.nan,
                    stall_s=math.nan if not is_own else pending.snapshot.stall_s if pending.snapshot else 0.0,
                    removed=tuple(pending.committed["removed"]) if is_own else (),
                    is_best=is_own and pending.is_best,
                )


class _WriterProcess:
    """Client of this rank's writer process; see `forge.checkpoint.writer_process`."""

    def __init__(self, snapshot_fd: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "forge.checkpoint.writer_process", str(snapshot_fd)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[snapshot_fd],
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._text = b""
        self._sending = threading.Lock()
        self.death: str | None = None
        """How it died; None while it lives."""

    def send(self, command: dict[str, Any]) -> None:
        """Send a command; if the process has died, `outcomes` sets `death`."""
        with self._sending, contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(command).encode() + b"\n")
            self._stdin.flush()

    def outcomes(self) -> list[dict[str, Any]]:
        """Return the outcomes since the last call, without waiting."""
        while (piece := self._receive()) not in (None, b""):
            self._text += piece or b""
        if piece == b"" and self.death is None:
            self.death = f"the writer process died ({ending(self._process.wait())})"
        *lines, self._text = self._text.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """Close its stdin and wait until it exits."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait()
        self._stdout.close()

    def _receive(self) -> bytes | None:
        try:
            return os.read(self._stdout.fileno(), 2**16)
        except BlockingIOError:
            return None
