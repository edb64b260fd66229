"""The recorder as a Ray actor, and the reporter through which rank 0 of the Ray Train engine reaches it.

This module imports Ray and nothing heavier, because the recorder's process starts while others import torch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from forge.errors import RunError
from forge.events import Event, RunFailed, StepMetrics
from forge.plan.plan import plan_from_json, written_job
from forge.process import redirect_output
from forge.runs.recorder import Recorder


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RecorderActor:
    """The single writer of a run's events, metrics and trackers.

    Ray restarts it if its process dies and repeats calls that were not answered; `Recorder` skips steps that are
    already written.
    """

    def __init__(self, run_folder: str, run_id: str, plan_json: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        redirect_output(Path(run_folder) / "logs" / "recorder.log")
        plan = plan_from_json(plan_json)
        self._recorder = Recorder(
            Path(run_folder), run_id=run_id, tracking=plan.job.tracking, config=written_job(plan)
        )
        self._recorder.start_alerts(plan)
        self._stop = False

    def event(self, event: Event) -> bool:
        """Write an event. Returns: whether the run was asked to stop."""
        self._recorder.event(event)
        return self._stop

    def step(self, metrics: StepMetrics) -> bool:
        """Write a step's metrics. Returns: whether the run was asked to stop."""
        self._recorder.step(metrics)
        return self._stop

    def write(self, records: list[tuple[str, Event | StepMetrics]], run_folder: str) -> None:
        """Write an agent's records in order; a trial runner has the same method, hence `run_folder`."""
        for kind, record in records:
            write_record(self._recorder, kind, record)

    def request_stop(self) -> None:
        """Ask the run to checkpoint and stop; rank 0 reads the request in the next answer."""
        self._stop = True

    def failure(self) -> RunFailed | None:
        """The first failure that a rank reported."""
        return self._recorder.failure

    def close(self, exit_code: int) -> None:
        """Flush all files and end the runs of all trackers."""
        self._recorder.close(exit_code=exit_code)


def write_record(recorder: Recorder, kind: str, record: Event | StepMetrics) -> None:
    """Write one record of an agent: an `event`, a `step`, or a `resend` of a step that may be written already."""
    if not isinstance(record, StepMetrics):
        recorder.event(record)
    elif kind == "step" or record.step > recorder.last_step:
        recorder.step(record)


class ActorReporter:
    """Rank 0's reporter: sends without waiting, and reads in the answers whether to stop."""

    # When more answers than this are outstanding, wait for the recorder.
    _MAX_BEHIND = 256

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._answers: deque[Any] = deque()
        self._stop = False

    def event(self, event: Event) -> None:
        self._answers.append(self._recorder.event.remote(event))

    def step(self, metrics: StepMetrics) -> None:
        self._answers.append(self._recorder.step.remote(metrics))

    def resend(self, metrics: StepMetrics) -> None:
        """Send the metrics of a step that may be written already."""
        self._answers.append(self._recorder.write.remote([("resend", metrics)], ""))

    def should_stop(self) -> bool:
        self._collect(timeout_s=0.0)
        if len(self._answers) > self._MAX_BEHIND:
            self._collect(timeout_s=None)
        return self._stop

    def should_drain(self) -> bool:
        """Always False: Ray Train ends its workers without draining them."""
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
                raise RunError(f"cannot write the run's events and metrics: {error.cause}") from error
