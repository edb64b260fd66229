"""The supervisor of a training run as a Ray actor: named, detached, and restarted by Ray wherever it dies.

It has an agent started on each node where the run has slots (`forge.runtime.start_agent`), reattaches them after a
restart, and starts a new driver process if the old one was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from forge.elastic.rpc import Endpoint
from forge.elastic.supervisor import Outcome
from forge.events import Event, SupervisorRestarted, SupervisorStarted
from forge.plan.plan import plan_from_json
from forge.pricing.budget import CostLimits, CostMeter, read_price
from forge.process import calm_garbage_collector, open_log, raise_descriptor_limit, redirect_output
from forge.runtime.actor_names import SUPERVISOR
from forge.runtime.agent_actor import AgentActorConfig
from forge.runtime.placement import Allocation
from forge.runtime.start_agent import (
    AgentHandle,
    agent_actors_of,
    reattach_agents,
    start_agent,
    start_agent_actor,
)
from forge.runtime.supervised_run import (
    RunConfig,
    SupervisedRun,
    build_placement,
    is_restarted_actor,
    largest_recorded,
    resource_on,
)

CLOSE_TIMEOUT_S = 10.0
_LOCK_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """Constructor arguments of the supervisor actor; Ray passes them again when it restarts the actor."""

    run_id: str
    run: RunConfig
    environment: Mapping[str, str] = field(repr=False)
    """Credentials, added to the environment of all processes of the run."""
    driver_command: tuple[str, ...]
    """Starts a new driver; empty where the cluster ends with its driver."""


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=100)
class SupervisorActor:
    """The supervisor of one training run."""

    def __init__(self, config: SupervisorConfig, recorder: Any) -> None:
        os.environ.update(config.environment)
        raise_descriptor_limit()
        redirect_output(Path(config.run.run_folder) / "logs" / "supervisor.log")
        self._config, self._recorder = config, recorder
        self._plan = plan_from_json(config.run.plan_json)
        self._run: SupervisedRun | None = None
        self._starting: asyncio.Task[SupervisedRun] | None = None

    async def endpoint(self) -> Endpoint:
        """Where agents connect."""
        return (await self._started()).endpoint

    async def outcome(self, timeout_s: float) -> Outcome | None:
        """How the run has ended; None if it has not within `timeout_s`."""
        outcome = (await self._started()).supervisor.outcome
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(outcome), timeout=timeout_s)
        return None

    async def stop(self) -> None:
        """Checkpoint, then end the run."""
        (await self._started()).supervisor.stop()

    async def yield_slots(self) -> None:
        """Release slots beyond the minimum: another run is waiting for its own minimum."""
        (await self._started()).supervisor.yield_slots()

    async def close(self) -> None:
        """End the agents and release all slots."""
        run = await self._started()
        self._watching_driver.cancel()
        await self._placement.stop(timeout_s=CLOSE_TIMEOUT_S / 2)
        run.supervisor.close()
        await asyncio.to_thread(self._placement.close)

    async def _started(self) -> SupervisedRun:
        """The run; started by the first call, because a Ray actor's constructor has no event loop."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        return await self._starting

    async def _start(self) -> SupervisedRun:
        config, is_restarted = self._config, is_restarted_actor()
        self._placement = build_placement(
            self._plan,
            run_id=config.run_id,
            active_run=lambda: self._run,
            start_agent=self._start_agent,
            end_agent=_kill_agent,
        )
        self._run = SupervisedRun(
            config.run,
            placement=self._placement,
            record_event=self._record,
            meter=self._build_meter(),
            is_restarted=is_restarted,
        )
        self._record(SupervisorRestarted(pid=os.getpid()) if is_restarted else SupervisorStarted(pid=os.getpid()))
        if is_restarted:
            actors = await asyncio.to_thread(agent_actors_of, config.run_id)
            await reattach_agents(self._placement, actors.values(), supervisor=f"{SUPERVISOR}{config.run_id}")
        calm_garbage_collector()
        self._placement.start()
        self._watching_driver = asyncio.ensure_future(self._watch_driver())
        return self._run

    def _build_meter(self) -> CostMeter:
        resources = self._plan.job.resources
        limits = CostLimits(usd=resources.max_usd, usd_per_hour=resources.max_usd_per_hour).capped_by(os.environ)
        history = Path(self._config.run.run_folder) / "events.jsonl"
        return CostMeter(
            limits,
            head=ray.util.get_node_ip_address(),
            head_usd_per_hour=read_price(os.environ),
            spent_usd=largest_recorded(history, "CostUpdated", "usd"),
            saved_usd=largest_recorded(history, "CostUpdated", "saved_usd"),
        )

    def _record(self, event: Event) -> None:
        self._recorder.event.remote(event)

    def _start_agent(self, name: str, allocation: Allocation) -> AgentHandle:
        """Start an agent in an actor of its own; called on another thread."""
        config = self._config
        assert self._run is not None, "placement starts after the run"
        actor_config = AgentActorConfig(
            run_id=config.run_id, node=name, folder=config.run.run_folder, environment=config.environment
        )
        actor = start_agent_actor(actor_config, node_id=allocation.node_id)
        num_cores = resource_on(allocation.node_id, resource="CPU")
        start_agent(
            self._run.agent_config(name, allocation, num_cores=num_cores),
            actor=actor,
            supervisor=f"{SUPERVISOR}{config.run_id}",
            recorder=self._recorder,
            allocation=allocation,
        )
        return AgentHandle(actor=actor, name=name)

    async def _watch_driver(self) -> None:
        """Start a new driver when the run's lock, which a living driver holds, has been free for a while."""
        lock = Path(self._config.run.run_folder) / ".lock"
        free_since: float | None = None
        while self._config.driver_command:
            await asyncio.sleep(_LOCK_POLL_S)
            if not _is_free(lock):
                free_since = None
                continue
            free_since = free_since or time.monotonic()
            if time.monotonic() - free_since > 2 * _LOCK_POLL_S:
                free_since = None
                await asyncio.to_thread(
                    _start_detached, self._config.driver_command, lock.parent / "logs" / "driver.log"
                )
                await asyncio.sleep(10 * _LOCK_POLL_S)


def _kill_agent(agent: AgentHandle | None) -> None:
    if agent is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(agent.actor)


def _start_detached(command: tuple[str, ...], log: Path) -> None:
    """Start a process that outlives this actor: Ray kills an actor's children, but not their children."""
    with os.fdopen(open_log(log), "ab") as output:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _is_free(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
