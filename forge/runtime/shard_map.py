"""An elastic map over numbered shards: every shard is computed once, on whichever workers the cluster has.

    totals = ShardMap(spec, files=ShardFiles(folder=..., digest=...), ...).run(shards)

Workers are Ray actors of one GPU or CPU each that get one shard at a time. Only the shard of a lost worker or node
is repeated; new nodes take part; a worker that hangs is replaced; a shard that fails repeatedly ends the map with
its reason. This process alone writes results, one file for each shard (`forge.runtime.shard_files`); a second
start computes only what is missing. In memory are as many shards as there are workers, twice.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import ray

from forge.errors import ClusterError, ForgeError, RunError
from forge.process import first_line
from forge.runs.reader import error_named
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_worker import ShardAnswer, ShardWorkerActor, ShardWorkerSpec

_WAIT_S = 0.5
_WATCH_S = 2.0
_PATIENCE_S = 20.0
"""How long no worker has a place before it is said."""
_MAX_LOSSES = 5
"""How many workers one shard, or loading, may lose: a lost machine is no fault of the shard, but memory may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MapOptions:
    """How a map uses the cluster."""

    num_workers: int | None = None
    """The most; None: as many as the cluster has slots, also those of nodes that join later."""
    resource: Literal["CPU", "GPU"] = "CPU"
    """Each worker gets one."""
    max_failures: int = 3
    """How often a shard may fail, or hang, before the map ends."""
    silent_s: float = 120.0
    """A process that does not answer for so long is replaced."""
    stalled_s: float = 1800.0
    """A worker that reports no progress for so long is replaced; it reports after every example."""


@dataclass(slots=True, kw_only=True)
class MapTotals:
    """Counts of a map."""

    num_shards: int = 0
    num_reused: int = 0
    """Found finished."""
    num_lost: int = 0
    """Workers that ended by themselves."""
    num_replaced: int = 0
    """Workers that hung."""
    num_failures: int = 0
    """Shards whose computation raised an error."""
    most_workers: int = 0


class StoppedError(Exception):
    """The map was asked to stop; finished shards are stored."""


@dataclass(slots=True, kw_only=True)
class _Shard:
    number: int
    inputs: Any
    key: str
    failures: list[str] = field(default_factory=list)
    num_losses: int = 0


@dataclass(slots=True, kw_only=True)
class _MapWorker:
    number: int
    actor: Any
    answer: Any = None
    """Ray's reference to what it is doing now; None while it has nothing to do."""
    shard: _Shard | None = None
    """None while it loads."""
    is_loaded: bool = False
    num_reports: int = -1
    """-1 until it has answered once: Ray has not found a place for it yet."""
    moved_at: float = 0.0
    answered_at: float = 0.0
    watching: Any = None


class ShardMap:
    """One map, from its first shard to its last."""

    def __init__(
        self,
        spec: ShardWorkerSpec,
        *,
        files: ShardFiles,
        options: MapOptions,
        stop: threading.Event,
        on_done: Callable[[int], None] = lambda _: None,
        on_message: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Args:
        stop: set to end the map with `StoppedError`.
        on_done: called with the number of each shard that is stored, or was found so.
        on_message: called with what happens to workers and shards.
        """
        self._spec, self._files, self._options = spec, files, options
        self._stop, self._on_done, self._on_message = stop, on_done, on_message
        self._totals = MapTotals()
        self._warned: set[str] = set()
        self._workers: list[_MapWorker] = []
        self._num_started = 0
        self._num_load_losses = 0
        self._limit: int | None = options.num_workers
        self._waiting: deque[_Shard] = deque()
        self._watched_at = self._counted_at = 0.0
        self._num_slots = 1
        self._began: float | None = time.monotonic()
        """None once a worker has started, or it was said that none has."""

    def run(self, shards: Iterable[Any]) -> MapTotals:
        """Compute every shard that has no result.

        Args:
            shards: their inputs, as JSON values; read no faster than needed.

        Raises: StoppedError; the error of a shard or of loading, if repeating does not help; RunError if a result
            cannot be stored; ClusterError if workers keep dying while they load.
        """
        self._files.prepare()
        unread = self._unfinished(shards)
        try:
            while True:
                self._read_ahead(unread)
                if not self._waiting and not any(worker.shard for worker in self._workers):
                    return self._totals  # also if it was asked to stop meanwhile: nothing is left
                if self._stop.is_set():
                    raise StoppedError
                self._grow()
                self._hand_out()
                self._collect()
                self._watch()
        finally:
            for worker in self._workers:
                _end(worker)

    def _unfinished(self, shards: Iterable[Any]) -> Iterator[_Shard]:
        for number, inputs in enumerate(shards):
            self._totals.num_shards += 1
            key = self._files.key(inputs)
            if self._files.read(key) is None:
                yield _Shard(number=number, inputs=inputs, key=key)
            else:
                self._totals.num_reused += 1
                self._on_done(number)

    def _read_ahead(self, unread: Iterator[_Shard]) -> None:
        while len(self._waiting) < self._most_workers():
            shard = next(unread, None)
            if shard is None:
                return
            self._waiting.append(shard)

    def _most_workers(self) -> int:
        now = time.monotonic()
        if now - self._counted_at > _WATCH_S:
            self._counted_at = now
            self._num_slots = max(1, int(ray.cluster_resources().get(self._options.resource, 0)))
        return self._num_slots if self._limit is None else self._limit

    def _grow(self) -> None:
        """Start workers for shards that wait; Ray starts them when there is room."""
        num_busy = sum(worker.shard is not None for worker in self._workers)
        wanted = min(self._most_workers(), len(self._waiting) + num_busy)
        while len(self._workers) < wanted:
            is_gpu = self._options.resource == "GPU"
            actor = ShardWorkerActor.options(  # type: ignore[attr-defined]
                num_cpus=0 if is_gpu else 1, num_gpus=1 if is_gpu else 0
            ).remote()
            worker = _MapWorker(number=self._num_started, actor=actor, answer=actor.load.remote(self._spec))
            self._num_started += 1
            self._workers.append(worker)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.answer is None and self._waiting:
                worker.shard = self._waiting.popleft()
                worker.answer = worker.actor.run.remote(worker.shard.inputs)
                worker.moved_at = time.monotonic()

    def _collect(self) -> None:
        busy = {worker.answer: worker for worker in self._workers if worker.answer is not None}
        if not busy:
            return
        ready, _ = ray.wait(list(busy), num_returns=1, timeout=_WAIT_S)
        for reference in ready:
            worker = busy[reference]
            try:
                answer: ShardAnswer = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._take_loss(worker, reason=_reason(error))
                continue
            worker.answer = None
            for warning in answer.warnings:
                self._warn(warning)
            if worker.is_loaded:
                self._take_result(worker, answer)
            else:
                self._take_loaded(worker, answer)

    def _warn(self, warning: str) -> None:
        if warning not in self._warned:
            self._warned.add(warning)
            self._on_message(warning)

    def _take_loaded(self, worker: _MapWorker, answer: ShardAnswer) -> None:
        if answer.error is None:
            worker.is_loaded, self._num_load_losses = True, 0
            num_loaded = sum(each.is_loaded for each in self._workers)
            self._totals.most_workers = max(self._totals.most_workers, num_loaded)
            return
        sys.stderr.write(answer.traceback)
        if not any(each.is_loaded for each in self._workers):
            raise _error_of(answer)
        self._on_message(f"worker {worker.number} cannot load, continuing with the others: {answer.message}")
        self._remove(worker)
        self._limit = len(self._workers)

    def _take_result(self, worker: _MapWorker, answer: ShardAnswer) -> None:
        shard, worker.shard = worker.shard, None
        assert shard is not None, "a loaded worker with an answer had a shard"
        if answer.error is None:
            self._files.write(shard.key, answer.result)
            self._on_done(shard.number)
            return
        sys.stderr.write(answer.traceback)
        self._totals.num_failures += 1
        self._retry(shard, answer)

    def _retry(self, shard: _Shard, answer: ShardAnswer) -> None:
        """Have a shard that failed computed again, first of all. Raises: its error, if it has failed too often."""
        shard.failures.append(answer.message)
        if len(shard.failures) >= self._options.max_failures:
            message = f"shard {shard.number} failed {len(shard.failures)} times, at last: {answer.message}"
            raise _error_of(ShardAnswer(error=answer.error, message=message))
        self._on_message(f"shard {shard.number} failed and is repeated: {answer.message}")
        self._waiting.appendleft(shard)

    def _take_loss(self, worker: _MapWorker, *, reason: str) -> None:
        """Repeat the shard of a worker that has died. Raises: RunError, ClusterError if that happens too often."""
        self._remove(worker)
        self._totals.num_lost += 1
        shard = worker.shard
        if shard is None:
            self._num_load_losses += 1
            self._on_message(f"worker {worker.number} was lost while it loaded: {reason}")
            if self._num_load_losses >= _MAX_LOSSES:
                raise ClusterError(f"{_MAX_LOSSES} workers in a row died while they loaded the model: {reason}")
            return
        shard.num_losses += 1
        if shard.num_losses >= _MAX_LOSSES:
            raise RunError(f"shard {shard.number} has lost {_MAX_LOSSES} workers, the last one so: {reason}")
        self._on_message(f"worker {worker.number} was lost; shard {shard.number} is repeated: {reason}")
        self._waiting.appendleft(shard)

    def _watch(self) -> None:
        """Replace workers that hang."""
        now = time.monotonic()
        if now - self._watched_at < _WATCH_S:
            return
        self._watched_at = now
        self._say_if_none_starts(now)
        for worker in list(self._workers):
            self._note_reports(worker, now=now)
            if worker.answer is None or worker.num_reports < 0:
                continue
            if now - worker.answered_at > self._options.silent_s:
                self._take_hang(worker, f"its process did not answer for {self._options.silent_s:.0f} s")
            elif now - worker.moved_at > self._options.stalled_s:
                self._take_hang(worker, f"it made no progress for {self._options.stalled_s:.0f} s")

    def _say_if_none_starts(self, now: float) -> None:
        if self._began is None or any(worker.num_reports >= 0 for worker in self._workers):
            self._began = None
        elif now - self._began > _PATIENCE_S:
            self._began = None
            self._on_message(
                f"no worker has started yet: each waits for one {self._options.resource} of the cluster"
            )

    def _note_reports(self, worker: _MapWorker, *, now: float) -> None:
        if worker.watching is None:
            worker.watching = worker.actor.num_reports.remote()
            return
        with contextlib.suppress(ray.exceptions.RayError):  # its answer says the same
            ready, _ = ray.wait([worker.watching], timeout=0)
            if not ready:
                return
            reference, worker.watching = worker.watching, None
            num_reports = ray.get(reference)
            if num_reports != worker.num_reports:
                worker.num_reports, worker.moved_at = num_reports, now
            worker.answered_at = now

    def _take_hang(self, worker: _MapWorker, reason: str) -> None:
        if worker.shard is None:
            self._take_loss(worker, reason=f"it hung: {reason}")
            return
        self._remove(worker)
        self._totals.num_replaced += 1
        self._retry(worker.shard, ShardAnswer(error="RunError", message=f"worker {worker.number} hung: {reason}"))

    def _remove(self, worker: _MapWorker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            _end(worker)


def _end(worker: _MapWorker) -> None:
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(worker.actor)


def _reason(error: Exception) -> str:
    """The sentence of a Ray error that says why; its first line only names the class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line for line in lines[1:] if not line.startswith(("class_name:", "actor_id:", "pid:", "ip:", "namespace:"))
    ]
    return telling[0] if telling else first_line(error)


def _error_of(answer: ShardAnswer) -> ForgeError:
    return error_named(answer.error or "RunError", message=answer.message)
