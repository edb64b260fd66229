"""A rank's side of making checkpoints: a copy of its state, and what became of it.

`AsyncCheckpointer.begin` returns at once: the copier copies the state while training goes on, and the saver process
makes a durable checkpoint of the copy; `outcomes` tells what has become of it. The slot of the copy is
pinned until its part is written.

The loop has one checkpoint in the making at a time: the next that is due begins when the last is sealed.
Only the last of a run begins at once, in another slot.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from forge.checkpoint.manifest import Progress, state_bytes, step_name
from forge.checkpoint.writer_process import MEMBERSHIP_DIGITS, WriteCommand
from forge.train.snapshotter import PendingSnapshot, Snapshotter
from forge.train.state import TrainState

T = TypeVar("T")
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointWritten:
    """A checkpoint that is complete."""

    step: int
    folder: str
    size_bytes: int
    seconds: float
    """From the end of the step to the last flush."""
    stall_s: float
    """How long training stood still for it, on this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed:
    """A checkpoint that could not be written."""

    step: int
    reason: str


Outcome = CheckpointWritten | SaveFailed


@dataclass(slots=True, kw_only=True)
class PendingCheckpoint:
    """A checkpoint in the making, as far as this rank knows."""

    step: int
    began: float
    """By the clock that the saver shares."""
    copying: PendingSnapshot | None = None
    has_part: bool = False
    sealed: dict[str, Any] | None = None
    """The first rank alone hears of it."""
    failure: str | None = None

    @property
    def is_over(self) -> bool:
        """Sealed, or failed."""
        return self.sealed is not None or self.failure is not None


class AsyncCheckpointer:
    """Makes checkpoints of one rank's state together with its peers; one for each membership."""

    def __init__(
        self,
        state: TrainState,
        *,
        url: str,
        keep: int,
        copier: Snapshotter | None = None,
        unacked_metrics: Callable[[], Sequence[Mapping[str, Any]]] = list,
    ) -> None:
        """Collective.

        Args:
            url: where the run's checkpoints go.
            keep: how many of the newest are kept.
            copier: makes the copies; without one, one that serves checkpoints alone.
            unacked_metrics: the metrics that are perhaps not recorded yet; asked on the first rank.
        """
        self._state, self._url, self._keep, self._untold = state, url, keep, unacked_metrics
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        token: list[str] = [secrets.token_hex(MEMBERSHIP_DIGITS // 2)]
        dist.broadcast_object_list(token, src=0)
        self._token, self._num_begun = token[0], 0
        self._copier = copier or Snapshotter(state)
        self._is_lent = copier is not None
        self._process: _WriterProcess | None = None
        if not self._is_lent:  # one that serves checkpoints alone makes the memory's pages meanwhile
            self._process = self._saver
        self._making: dict[str, PendingCheckpoint] = {}
        self.on_wait: Callable[[], None] = lambda: None
        """Called again and again while storage is waited for."""

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is in the making; only the first rank knows when it is sealed."""
        return bool(self._making)

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of a checkpoint could not be written; tell the others, and `give_up`."""
        self._listen()
        return any(making.failure for making in self._making.values())

    def begin(self, progress: Progress) -> None:
        """Start to make a checkpoint of the state as it is; it must not change before `settle`. Collective."""
        self._num_begun += 1
        token = f"{self._token}{self._num_begun:04x}"
        making = self._making[token] = PendingCheckpoint(step=progress.step, began=time.time())
        state = ""
        if self._rank == 0:
            state = state_bytes(progress, self._state.shape, unacked_metrics=self._untold()).decode()

        def order(copying: PendingSnapshot) -> None:
            if copying.failure is not None:
                making.failure = copying.failure
                return
            # A saver that is busy takes the order when it is free.
            self._saver.send(
                asdict(
                    WriteCommand(
                        url=self._url,
                        step=progress.step,
                        slot=copying.slot,
                        rank=self._rank,
                        world_size=self._world_size,
                        token=token,
                        keep=self._keep,
                        state=state,
                    )
                )
            )

        making.copying = self._copier.begin(progress, then=order, is_pinned=True)

    def settle(self) -> None:
        """Return when the state may change: the copy is complete."""
        self._copier.settle()

    def outcomes(self) -> list[CheckpointWritten]:
        """On the first rank: the checkpoints that were sealed since it was asked last."""
        self._listen()
        found = []
        for token, making in list(self._making.items()):
            if self._rank != 0 and making.has_part and making.failure is None:
                del self._making[token]  # the rest is the first rank's
            elif making.sealed is not None:
                del self._making[token]
                found.append(self._saved(making))
        return found

    def give_up(self) -> list[SaveFailed]:
        """Call off what cannot be finished, as a rank's part failed; collective. Returns: the same everywhere."""
        reasons = self._gather({token: making.failure for token, making in self._making.items() if making.failure})
        failed = []
        for token, reason in reasons.items():
            making = self._making.pop(token, None)
            if making is not None:
                self._unpin(making)
            if self._rank == 0 and making is not None:
                if making.failure is None:
                    self._saver.send({"abort": token})
                failed.append(SaveFailed(step=making.step, reason=reason))
        return self._from_first(failed)

    def finish(self) -> list[Outcome]:
        """Wait until nothing is in the making any more; collective. Returns: the same on every rank."""
        self.settle()
        self._await(lambda: all(making.has_part or making.failure for making in self._making.values()))
        failed = self.give_up()
        if self._rank == 0:
            self._await(lambda: all(making.is_over for making in self._making.values()))
        return [*failed, *self.give_up(), *self._from_first(self.outcomes())]

    def close(self) -> None:
        """End the saver process once it has done what it was told, and free the memory."""
        self._copier.join()
        if self._process is not None:
            self._process.close()
        if not self._is_lent:
            self._copier.close()

    @property
    def _saver(self) -> _WriterProcess:
        """Started when it is first needed."""
        if self._process is None:
            self._process = _WriterProcess(self._copier.snapshot.fd)
        return self._process

    def _unpin(self, making: PendingCheckpoint) -> None:
        if making.copying is not None:
            self._copier.unpin(making.copying.slot)

    def _listen(self) -> None:
        if self._process is None:
            return
        for outcome in self._process.outcomes():
            making = self._making.get(outcome["token"])
            if making is None:
                continue  # called off meanwhile
            self._unpin(making)
            making.has_part = making.has_part or "part" in outcome
            making.sealed = outcome if "sealed" in outcome else making.sealed
            making.failure = making.failure or outcome.get("failed")
        if self._process.death is not None:
            for making in self._making.values():
                if not making.is_over and not (making.has_part and self._rank != 0):
                    making.failure = self._process.death
            self._process = _WriterProcess(self._copier.snapshot.fd)

    def _await(self, is_so: Callable[[], bool]) -> None:
        self._listen()
        while not is_so():
            self.on_wait()
            time.sleep(_POLL_S)
            self._listen()

    def _gather(self, own: dict[str, str]) -> dict[str, str]:
        """The first reason for each token, over all ranks."""
        every: list[dict[str, str]] = [{} for _ in range(self._world_size)]
        dist.all_gather_object(every, {token: f"rank {self._rank}: {why}" for token, why in own.items()})
        return {token: reasons[token] for reasons in reversed(every) for token in reasons}

    def _from_first(self, found: list[T]) -> list[T]:
        """The first rank's answer, on every rank."""
        shared = [found]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _saved(self, making: PendingCheckpoint) -> CheckpointWritten:
        assert making.sealed is not None
        return CheckpointWritten(
            step=making.step,
            folder=f"{self._url}/{step_name(making.step)}",
            size_bytes=making.sealed["sealed"],
            seconds=making.sealed["at"] - making.began,
            stall_s=making.copying.stall_s if making.copying else 0.0,
        )


class _WriterProcess:
    """The process beside this rank that writes its part; see `forge.checkpoint.writer_process`."""

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
        """How it died, if it did."""

    def send(self, order: dict[str, Any]) -> None:
        """Give an order; a saver that has died says so in `death`."""
        with self._sending, contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(order).encode() + b"\n")
            self._stdin.flush()

    def outcomes(self) -> list[dict[str, Any]]:
        """What it has answered since it was asked last; does not wait."""
        while (piece := self._receive()) not in (None, b""):
            self._text += piece or b""
        if piece == b"" and self.death is None:
            self.death = f"the saver process died ({_ending(self._process.wait())})"
        *lines, self._text = self._text.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """No more orders; wait until it has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._process.wait()
        self._stdout.close()

    def _receive(self) -> bytes | None:
        try:
            return os.read(self._stdout.fileno(), 2**16)
        except BlockingIOError:
            return None


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
