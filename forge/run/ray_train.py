"""A run carried out by Ray Train: as many ranks as the plan allows and the cluster has room for.

The ranks are Ray Train workers; the recorder is an actor beside them, because the machine that asked
for the run may go away. `forge.train` knows nothing of either: it is handed its place and a reporter.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from forge.errors import ClusterError, ForgeError
from forge.events import Event, RunFailed, StepMetrics
from forge.plan.plan import Plan, plan_from_json
from forge.run.record import Recorder
from forge.spec.job import JobSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a rank needs to know, as it travels to it."""

    run_folder: str
    plan_json: str


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class RecorderActor:
    """The run's one writer, where every rank can reach it.

    Ray restarts it if its process dies, and sends again what was not answered; the recorder knows the
    steps that it has already written.
    """

    def __init__(self, run_folder: str, run_id: str, job_json: str) -> None:
        _write_output_to(Path(run_folder) / "logs" / "recorder.log")
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

    def should_stop(self) -> bool:
        """Read the answers that have come."""
        self._collect(timeout_s=0.0)
        if len(self._answers) > self._MAX_BEHIND:
            self._collect(timeout_s=None)
        return self._stop

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
            self._stop = bool(ray.get(answer)) or self._stop


class SilentReporter:
    """For every rank but the first."""

    def event(self, event: Event) -> None:
        """Say nothing."""

    def step(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def should_stop(self) -> bool:
        """Rank 0 decides."""
        return False


def choose_world_size(plan: Plan) -> int:
    """As many workers as the job allows and the cluster has free places for.

    Raises: ClusterError if the cluster has fewer than the job's minimum.
    """
    kind = "GPU" if plan.hardware.device == "cuda" else "CPU"
    places = int(ray.available_resources().get(kind, 0))
    wanted = plan.job.resources.workers
    if places < wanted.low:
        total = int(ray.cluster_resources().get(kind, 0))
        raise ClusterError(
            f"the job needs at least {wanted.low} workers, one {kind} each; the cluster has {total} {kind}s, "
            f"{places} of them free. Lower resources.workers, or start a larger cluster"
        )
    return min(places, wanted.high)


def train_on_ray(plan: Plan, *, run_folder: Path, run_id: str, recorder: Any) -> None:
    """Carry the plan out and return when it is done, stopped or failed.

    Raises: ForgeError as a rank reported it; ClusterError if the cluster cannot hold the run.
    """
    on_gpu = plan.hardware.device == "cuda"
    trainer = TorchTrainer(
        _rank_main,
        train_loop_config={
            "assignment": Assignment(run_folder=str(run_folder), plan_json=(run_folder / "plan.json").read_text()),
            "recorder": recorder,
        },
        scaling_config=ScalingConfig(num_workers=choose_world_size(plan), use_gpu=on_gpu),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(name=run_id, storage_path=str(run_folder / ".ray")),
    )
    trainer.fit()
    # Everything the ranks sent has been answered; ask once more, so that what the driver reads is whole.
    ray.get(recorder.failure.remote())


def _rank_main(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    from forge.train.rank import Place, run_rank

    assignment: Assignment = config["assignment"]
    context = get_context()
    rank = context.get_world_rank()
    _write_output_to(Path(assignment.run_folder) / "logs" / f"rank-{rank}.log")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    plan = plan_from_json(assignment.plan_json)
    reporter = ActorReporter(config["recorder"]) if rank == 0 else SilentReporter()
    try:
        run_rank(
            plan,
            Place(
                rank=rank,
                world_size=context.get_world_size(),
                local_world_size=context.get_local_world_size(),
                device=str(get_device()),
                checkpoints=str(Path(assignment.run_folder) / "checkpoints"),
            ),
            reporter,
        )
    except ForgeError as error:
        failed = RunFailed(error=type(error).__name__, message=str(error))
        ray.get(config["recorder"].event.remote(failed))
        raise
    except BaseException:
        traceback.print_exc()  # into the rank's log
        raise
    finally:
        if isinstance(reporter, ActorReporter):
            reporter.drain()


def _write_output_to(path: Path) -> None:
    """Send this process's output, that of native libraries included, to a log of the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
