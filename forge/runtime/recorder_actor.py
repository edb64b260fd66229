"""How news travels from a rank to the run's one writer.

The recorder is an actor, where every rank can reach it; rank 0 holds an ActorReporter. This module
imports Ray and nothing heavier, because the recorder's process starts while others import torch.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from forge.config.job import JobSpec
from forge.errors import RunError
from forge.events import Event, RunFailed, StepMetrics
from forge.runs.recorder import Recorder

HEAD = {"node:__internal_head__": 0.001}
"""What an actor asks for to be placed on the head: the machine whose loss ends the cluster anyway."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RecorderActor:
    """The run's one writer, where every rank can reach it.

    Ray restarts it if its process dies, and sends again what was not answered; the recorder knows the
    steps that it has already written.
    """

    def __init__(self, run_folder: str, run_id: str, job_json: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        write_output_to(Path(run_folder) / "logs" / "recorder.log")
        job = JobSpec.model_validate_json(job_json)
        self._recorder = Recorder(
            Path(run_folder), run_id=run_id, wandb=job.tracking.wandb, config=job.model_dump(mode="json")
        )
        self._stop = False

    def event(self, event: Event) -> bool:
        """Write an event. Returns: whether the run was asked to stop."""
        self._recorder.event(event)
        return self._stop

    def step(self, metrics: StepMetrics) -> bool:
        """Write a step. Returns: whether the run was asked to stop."""
        self._recorder.step(metrics)
        return self._stop

    def take(self, news: list[tuple[str, Event | StepMetrics]]) -> None:
        """Write what an agent passes on, in order: `event`, `step`, or a step that was perhaps written before."""
        for what, item in news:
            if not isinstance(item, StepMetrics):
                self._recorder.event(item)
            elif what == "step" or item.step > self._recorder.last_step:
                self._recorder.step(item)

    def request_stop(self) -> None:
        """Ask the run to checkpoint and stop; rank 0 hears it in the next answer."""
        self._stop = True

    def failure(self) -> RunFailed | None:
        """The first failure that a rank reported."""
        return self._recorder.failure

    def close(self, exit_code: int) -> None:
        """Flush and end."""
        self._recorder.close(exit_code=exit_code)


class ActorReporter:
    """Rank 0's reporter: sends without waiting, and hears in the answers whether to stop."""

    # Answers that may be outstanding; a recorder that is further behind than this is waited for.
    _MAX_BEHIND = 256

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._answers: deque[Any] = deque()
        self._stop = False

    def event(self, event: Event) -> None:
        """Send an event."""
        self._answers.append(self._recorder.event.remote(event))

    def step(self, metrics: StepMetrics) -> None:
        """Send a step."""
        self._answers.append(self._recorder.step.remote(metrics))

    def resend(self, metrics: StepMetrics) -> None:
        """Send a step of before."""
        self._answers.append(self._recorder.take.remote([("resend", metrics)]))

    def should_stop(self) -> bool:
        """Read the answers that have come."""
        self._collect(timeout_s=0.0)
        if len(self._answers) > self._MAX_BEHIND:
            self._collect(timeout_s=None)
        return self._stop

    def should_drain(self) -> bool:
        """Ray Train ends its workers; it does not ask them to leave."""
        return False

    def drain(self) -> None:
        """Wait until everything is written."""
        self._collect(timeout_s=None)

    def _collect(self, *, timeout_s: float | None) -> None:
        if not self._answers:
            return
        pending = list(self._answers)
        ready, _ = ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
        for answer in ready:
            self._answers.remove(answer)
            try:
                self._stop = bool(ray.get(answer)) or self._stop
            except ray.exceptions.RayTaskError as error:
                raise RunError(f"the run's record cannot be written: {error.cause}") from error


class NullReporter:
    """For every rank but the first."""

    def event(self, event: Event) -> None:
        """Say nothing."""

    def step(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def resend(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def should_stop(self) -> bool:
        """Rank 0 decides."""
        return False

    def should_drain(self) -> bool:
        """Rank 0 decides."""
        return False


def write_output_to(path: Path) -> None:
    """Send this process's output, that of native libraries included, to a log of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
