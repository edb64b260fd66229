"""One run under a supervisor: what the supervisor actor of a training run and the trial runner of a search share.

`SupervisedRun` builds the supervisor from the run's plan and recorded events, and the configuration of each agent
from the plan and its slots. `build_placement` connects a placement manager to whichever run is active. A training
run has one `SupervisedRun` and one placement; a trial runner keeps the placement and replaces the `SupervisedRun`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ray

from forge.elastic.agent_config import AgentConfig
from forge.elastic.gpu_watch import GpuWatch
from forge.elastic.loss_history import LossHistory
from forge.elastic.states import MembershipState
from forge.elastic.straggler_watch import REPLACING, StragglerTerms, StragglerWatch
from forge.elastic.supervisor import Supervisor
from forge.events import Event
from forge.plan.by_world_size import ByWorldSize
from forge.plan.plan import Plan, plan_from_json
from forge.pricing.budget import CostMeter
from forge.runtime.deadlines import watch_deadlines
from forge.runtime.placement import Allocation, PlacementManager
from forge.runtime.start_agent import AgentHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run's folder and plan, and the secret that its supervisor and agents share, also after a restart."""

    run_folder: str
    plan_json: str
    secret: str = field(repr=False)


class SupervisedRun:
    """A run, its supervisor, and the configuration of its agents."""

    def __init__(
        self,
        config: RunConfig,
        *,
        placement: PlacementManager,
        record_event: Callable[[Event], None],
        meter: CostMeter,
        is_restarted: bool,
    ) -> None:
        """Args:
        is_restarted: agents of an earlier supervisor may be at work; see `Supervisor`.
        """
        self.config, self.plan = config, plan_from_json(config.plan_json)
        self._checkpoints = self.plan.job.checkpoint.url_of(config.run_folder)
        workers = self.plan.job.resources.workers
        history = Path(config.run_folder) / "events.jsonl"
        self.supervisor = Supervisor(
            MembershipState(
                min_workers=workers.low,
                max_workers=workers.high,
                num_spare=ByWorldSize(self.plan, number=lambda world: world.num_spare),
                group_sizes=ByWorldSize(self.plan, number=lambda world: world.node_group_size),
                num_shard_groups=ByWorldSize(self.plan, number=lambda world: world.groups.num_shard_groups),
            ),
            placement=placement,
            record_event=record_event,
            checkpoints=self._checkpoints,
            meter=meter,
            former_generation=int(largest_recorded(history, "GenerationStarting", "generation")),
            stored_step=int(largest_recorded(history, "CheckpointSaved", "step")),
            is_restarted=is_restarted,
            losses=LossHistory(history) if self.plan.job.checkpoint.every == "auto" else None,
            deadlines=tuple(
                watch_deadlines(self.plan, folder=history.parent, placement=placement, record_event=record_event)
            ),
            compile_failures=recorded_texts(history, "CompileFailed", "reason"),
            gpus=GpuWatch(
                self.plan.hardware,
                needed_bytes=ByWorldSize(self.plan, number=lambda world: world.memory.total_bytes),
                record_event=record_event,
            ),
            stragglers=StragglerWatch(
                StragglerTerms(
                    replaces=self.plan.job.resources.replace_stragglers,
                    global_batch_size=self.plan.job.training.global_batch_size,
                    replaced=replaced_stragglers(history),
                ),
                placement=placement,
                record_event=record_event,
            ),
        )
        self.endpoint = self.supervisor.listen(
            host=ray.util.get_node_ip_address(), secret=bytes.fromhex(config.secret)
        )

    def agent_config(self, name: str, allocation: Allocation, *, num_cores: int) -> AgentConfig:
        """The configuration of an agent; the agent's actor fills in `host`."""
        return AgentConfig(
            node=name,
            host="",
            num_slots=allocation.num_slots,
            num_guaranteed=allocation.num_guaranteed,
            num_cores=num_cores,
            devices=self._devices_of(allocation),
            run_folder=self.config.run_folder,
            plan_json=self.config.plan_json,
            checkpoints=self._checkpoints,
            keep=self.plan.job.checkpoint.keep,
            keep_best=self.plan.job.checkpoint.keep_best or 0,
            secret=self.config.secret,
        )

    def update_slots(self, node: str, allocation: Allocation) -> None:
        """Tell the supervisor that the slots of an agent's node have changed."""
        self.supervisor.update_slots(
            node,
            num_slots=allocation.num_slots,
            num_guaranteed=allocation.num_guaranteed,
            devices=self._devices_of(allocation),
        )

    def _devices_of(self, allocation: Allocation) -> tuple[str, ...]:
        """Return one device for each rank that the node can run."""
        on_gpus = tuple(f"cuda:{number}" for number in allocation.devices)
        return on_gpus or ("cpu",) * self.plan.job.resources.workers.high


def build_placement(
    plan: Plan,
    *,
    run_id: str,
    active_run: Callable[[], SupervisedRun | None],
    start_agent: Callable[[str, Allocation], AgentHandle | None],
    end_agent: Callable[[AgentHandle | None], None],
    is_paused: bool = False,
) -> PlacementManager:
    """A placement manager for the job's workers that reports changes to the supervisor of the active run.

    Args:
        run_id: names the placement groups.
        start_agent, end_agent, is_paused: see `PlacementManager`.
    """

    def update_slots(node: str, allocation: Allocation) -> None:
        if (run := active_run()) is not None:
            run.update_slots(node, allocation)

    def announce_preemption(node: str, seconds_left: float | None) -> None:
        if (run := active_run()) is not None:
            run.supervisor.announce_preemption(node, source="ray", seconds_left=seconds_left)

    workers = plan.job.resources.workers
    return PlacementManager(
        run_id=run_id,
        low=workers.low,
        high=workers.high,
        resource=resource_of(plan),
        start_agent=start_agent,
        end_agent=end_agent,
        on_slots_changed=update_slots,
        on_draining=announce_preemption,
        is_paused=is_paused,
    )


def resource_of(plan: Plan) -> str:
    """The Ray resource of which each rank takes one: `GPU` or `CPU`."""
    return "GPU" if plan.hardware.device == "cuda" else "CPU"


def resource_on(node_id: str, *, resource: str) -> int:
    """How much of a resource a Ray node has; simulated nodes share a machine, so its cores are not the answer."""
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    return int(node["Resources"].get(resource, 0)) if node is not None else 0


def is_restarted_actor() -> bool:
    """Whether Ray has restarted the actor that this process runs."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def replaced_stragglers(history: Path) -> tuple[str, ...]:
    """The nodes in `events.jsonl` that were replaced because they were slow."""
    found = []
    with contextlib.suppress(OSError), history.open() as lines:
        for line in lines:
            if '"StragglerDetected"' in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["action"] in REPLACING:
                        found.append(str(record["node"]))
    return tuple(found)


def largest_recorded(history: Path, kind: str, key: str) -> float:
    """The largest value of a field over all events of a kind in `events.jsonl`; 0 if there are none."""
    largest = 0.0
    with contextlib.suppress(OSError), history.open() as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["event"] == kind:
                    largest = max(largest, float(record[key]))
    return largest


def recorded_texts(history: Path, kind: str, key: str) -> list[str]:
    """The values of a text field of all events of a kind in `events.jsonl`."""
    found = []
    with contextlib.suppress(OSError), history.open() as lines:
        for line in lines:
            if f'"{kind}"' in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    found += [str(record[key])] if record["event"] == kind else []
    return found
