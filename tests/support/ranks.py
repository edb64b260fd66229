"""Training with real processes, gloo and DeepSpeed but without Ray: ranks forked from a fork server."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge.events import Event, StepMetrics
from forge.plan.plan import Plan, plan_from_json, plan_to_json

_TIMEOUT_S = 120


@dataclass
class Recording:
    """What rank 0 reported."""

    steps: list[StepMetrics] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    sample_ids: dict[int, list[int]] = field(default_factory=dict)
    """By step, in the order of the ranks that took them."""

    @property
    def losses(self) -> list[float]:
        return [metrics.loss for metrics in self.steps]


class RecordingReporter:
    """Records events and steps, and asks to stop after a given step."""

    def __init__(self, stop_after: int | None) -> None:
        self.recording = Recording()
        self._stop_after = stop_after

    def event(self, event: Event) -> None:
        self.recording.events.append(event)

    def step(self, metrics: StepMetrics) -> None:
        self.recording.steps.append(metrics)

    def resend(self, metrics: StepMetrics) -> None:
        """Nothing to do: no step was lost."""

    def should_stop(self) -> bool:
        # Called before a step, to decide whether to stop after it.
        done = self.recording.steps[-1].step if self.recording.steps else 0
        return self._stop_after is not None and done + 1 >= self._stop_after

    def should_drain(self) -> bool:
        return False


def run_ranks(
    plan: Plan, folder: Path, *, world_size: int, stop_after: int | None = None, timeout_s: float = _TIMEOUT_S
) -> Recording:
    """Run `forge.train.worker.run_worker` on `world_size` processes; checkpoints go under `folder`."""
    arguments = (plan_to_json(plan), str(folder), world_size, stop_after)
    recordings: list[Recording] = on_ranks(train_one_rank, *arguments, world_size=world_size, timeout_s=timeout_s)
    first = recordings[0]
    for step in first.sample_ids:
        first.sample_ids[step] = [sample for recording in recordings for sample in recording.sample_ids[step]]
    return first


def on_ranks(
    function: Callable[..., Any], *arguments: Any, world_size: int, timeout_s: float = _TIMEOUT_S
) -> list[Any]:
    """Call `function(rank, *arguments)` in one process per rank of a new process group.

    Returns: the results by rank.
    Raises: the exception of the first rank that fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fork_server"])
    port = free_port()
    answers: Any = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, arguments, answers), daemon=True)
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        deadline = time.monotonic() + timeout_s
        while len(found) < world_size:
            rank, answer, error = answers.get(timeout=max(0.1, deadline - time.monotonic()))
            if error is not None:
                raise error
            found[rank] = answer
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
    return [found[rank] for rank in range(world_size)]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, arguments: tuple[Any, ...], answers: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        answers.put((rank, function(rank, *arguments), None))
    except BaseException as error:
        answers.put((rank, None, error))
    with contextlib.suppress(Exception):
        import torch.distributed

        torch.distributed.destroy_process_group()


def train_one_rank(rank: int, plan_json: str, folder: str, world_size: int, stop_after: int | None) -> Recording:
    """Train in this process as one rank of the process group."""
    from forge.train.worker import WorkerContext, run_worker

    reporter = RecordingReporter(stop_after)
    _record_samples(reporter.recording)
    context = WorkerContext(rank=rank, world_size=world_size, local_world_size=8, device="cpu", checkpoints=folder)
    run_worker(plan_from_json(plan_json), context, reporter)
    return reporter.recording


def _record_samples(recording: Recording) -> None:
    """Record which samples this process trains on, without those that fill up a batch."""
    from forge.data.loader import MicroBatch, TrainBatches

    of_step = TrainBatches.of_step

    def noted(batches: TrainBatches, step: int) -> Iterator[MicroBatch]:
        taken = recording.sample_ids.setdefault(step, [])
        for batch in of_step(batches, step):
            taken += batches.order.samples(batch.positions[batch.positions >= 0]).tolist()
            yield batch

    TrainBatches.of_step = noted  # type: ignore[method-assign]


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
