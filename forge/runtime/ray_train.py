"""The `ray-train` engine: as many Ray Train workers as the job allows and the cluster has room for.

The world size is fixed while the run lasts. `forge.train` does not know which engine runs it: it gets a
`WorkerContext` and a reporter.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from forge.errors import ClusterError, ForgeError
from forge.events import NullReporter, RunFailed
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.process import redirect_output
from forge.runs.secrets import credentials
from forge.runtime.corpus_server import end_corpus_server, ensure_inputs
from forge.runtime.local_cluster import is_local_cluster
from forge.runtime.recorder_actor import ActorReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a worker needs to know; Ray Train passes it to each."""

    run_folder: str
    plan_json: str
    environment: Mapping[str, str] = field(repr=False)
    """Credentials, added to the worker's environment."""


def choose_world_size(plan: Plan) -> int:
    """As many workers as the job allows and the cluster has free slots for.

    Raises: ClusterError if the cluster has fewer than the job's minimum.
    """
    kind = "GPU" if plan.hardware.device == "cuda" else "CPU"
    num_free = int(ray.available_resources().get(kind, 0))
    wanted = plan.job.resources.workers
    if num_free < wanted.low:
        total = int(ray.cluster_resources().get(kind, 0))
        raise ClusterError(
            f"the job needs at least {wanted.low} workers, one {kind} each; the cluster has {total} {kind}s, "
            f"{num_free} of them free. Lower resources.workers, or start a larger cluster"
        )
    return min(num_free, wanted.high)


# Callbacks of Ray Train that forge does not need; each starts an actor. The placement group cleaner is for
# controllers that outlive their driver; it asks Ray's dashboard for the controller's state, and without a dashboard
# it delays the end of every run by ten seconds. The other one serves Ray Data.
_UNUSED_CALLBACKS = ("PlacementGroupCleanerCallback", "DatasetsCallback")


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray's trainer without unused callbacks: each actor costs 0.7 % of a core and a second of start-up."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if type(callback).__name__ not in _UNUSED_CALLBACKS]


def train_on_ray(plan: Plan, *, run_folder: Path, run_id: str, recorder: Any) -> None:
    """Run the plan and return when it is finished or stopped.

    Raises: ForgeError as a rank reported it; ClusterError if the cluster cannot hold the run.
    """
    on_gpu = plan.hardware.device == "cuda"
    trainer = _Trainer(
        _rank_main,
        train_loop_config={
            "assignment": WorkerConfig(
                run_folder=str(run_folder),
                plan_json=plan_to_json(plan),
                environment=credentials(os.environ, with_files=is_local_cluster()),
            ),
            "recorder": recorder,
        },
        scaling_config=ScalingConfig(num_workers=choose_world_size(plan), use_gpu=on_gpu),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(name=run_id, storage_path=str(run_folder / ".ray")),
    )
    try:
        trainer.fit()
    finally:
        end_corpus_server(run_id)
    # One more call after all that the ranks have sent, so that the driver reads complete files.
    ray.get(recorder.failure.remote())


def _rank_main(config: dict[str, Any]) -> None:
    """The main function of every worker."""
    from forge.train.worker import WorkerContext, run_worker

    assignment: WorkerConfig = config["assignment"]
    os.environ.update(assignment.environment)
    context = get_context()
    rank = context.get_world_rank()
    redirect_output(Path(assignment.run_folder) / "logs" / f"rank-{rank}.log")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    reporter = ActorReporter(config["recorder"]) if rank == 0 else NullReporter()
    try:
        plan = plan_from_json(ensure_inputs(assignment.plan_json, run_folder=Path(assignment.run_folder)))
        run_worker(
            plan,
            WorkerContext(
                rank=rank,
                world_size=context.get_world_size(),
                local_world_size=context.get_local_world_size(),
                device=str(get_device()),
                checkpoints=plan.job.checkpoint.url_of(assignment.run_folder),
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
