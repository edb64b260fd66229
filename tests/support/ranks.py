"""Train with real processes, gloo and DeepSpeed, without Ray: ranks forked from a process that has imported all."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
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
    error: BaseException | None = None

    @property
    def losses(self) -> list[float]:
        return [metrics.loss for metrics in self.steps]


class RecordingReporter:
    """Keeps what it is told, and asks to stop after a given step."""

    def __init__(self, stop_after: int | None) -> None:
        self.recording = Recording()
        self._stop_after = stop_after

    def event(self, event: Event) -> None:
        self.recording.events.append(event)

    def step(self, metrics: StepMetrics) -> None:
        self.recording.steps.append(metrics)

    def should_stop(self) -> bool:
        # Asked before a step whether to stop after it.
        done = self.recording.steps[-1].step if self.recording.steps else 0
        return self._stop_after is not None and done + 1 >= self._stop_after


def run_ranks(plan: Plan, folder: Path, *, world_size: int, stop_after: int | None = None) -> Recording:
    """Run `forge.train.rank.run_rank` on `world_size` processes; checkpoints go under `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    port = _free_port()
    answers: Any = context.Queue()
    arguments = (plan_to_json(plan), str(folder), world_size, port, stop_after, answers)
    ranks = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        recordings = {}
        deadline = time.monotonic() + _TIMEOUT_S
        while len(recordings) < world_size:
            rank, recording = answers.get(timeout=max(0.1, deadline - time.monotonic()))
            recordings[rank] = recording
            if recording.error is not None:
                break
    finally:
        for process in ranks:
            process.join(timeout=5)
            process.kill()
    for recording in recordings.values():
        if recording.error is not None:
            raise recording.error
    return recordings[0]


def _rank(
    rank: int, plan_json: str, folder: str, world_size: int, port: int, stop_after: int | None, answers: Any
) -> None:
    from forge.train.rank import Place, run_rank

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    reporter = RecordingReporter(stop_after)
    place = Place(rank=rank, world_size=world_size, local_world_size=8, device="cpu", checkpoints=folder)
    try:
        run_rank(plan_from_json(plan_json), place, reporter)
    except BaseException as error:
        reporter.recording.error = error
    answers.put((rank, reporter.recording))
    with contextlib.suppress(Exception):
        import torch.distributed

        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
