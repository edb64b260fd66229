"""The Ray actor that hosts agents on one node: one agent for a training run, one per trial for a search.

`forge.runtime.start_agent` starts the actor and the agents in it. The agents of a search share a pool of fork
servers, so that a trial is forked from a process that has imported everything already. The actor ends by itself
when it has had no agent for `idle_s`.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

from forge.elastic.agent import Agent, NoSupervisorError
from forge.elastic.agent_config import AgentConfig
from forge.elastic.rpc import Endpoint
from forge.elastic.workers.fork_client import ForkServerPool
from forge.errors import RunError
from forge.events import Event, NodeLeft, StepMetrics
from forge.pricing.budget import read_price
from forge.process import raise_descriptor_limit, redirect_output
from forge.runtime.actor_names import AGENT, NAMESPACE
from forge.runtime.corpus_server import ensure_inputs
from forge.runtime.local_gpus import smallest_gpu
from forge.runtime.placement import Allocation


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentActorConfig:
    """Constructor arguments of an `AgentActor`."""

    run_id: str
    """Of the run or the search; all its actors fetch the corpus from one server."""
    node: str
    """Completes the actor's name and names its logs."""
    folder: str
    """Of the run or the search."""
    environment: Mapping[str, str] = field(repr=False)
    """Credentials, added to the environment of the actor and of all workers."""
    shares_fork_servers: bool = False
    """Keep idle fork servers for the next agent."""
    idle_s: float = 0.0
    """How long the actor lives without agents."""

    @property
    def name(self) -> str:
        return f"{AGENT}{self.run_id}-{self.node}"


@dataclass(slots=True, kw_only=True)
class _HostedAgent:
    """An agent in this process, and the supervisor that it works for."""

    supervisor: str
    allocation: Allocation
    agent: Agent | None = None
    task: asyncio.Task[None] | None = None


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)
class AgentActor:
    """The agents of a run or a search on one node."""

    def __init__(self, config: AgentActorConfig) -> None:
        os.environ.update(config.environment)
        raise_descriptor_limit()
        logs = Path(config.folder) / "logs"
        redirect_output(logs / f"{'node' if config.shares_fork_servers else 'agent'}-{config.node}.log")
        self._config = config
        self._pool = (
            ForkServerPool(log=logs / f"fork-server-{config.node}.log") if config.shares_fork_servers else None
        )
        self._agents: dict[str, _HostedAgent] = {}
        self._exit_timer: asyncio.TimerHandle | None = None

    async def start_fork_servers(self, plan_json: str, count: int) -> None:
        """Start fork servers until `count` are idle, before the first trial needs one."""
        self._restart_exit_timer()
        assert self._pool is not None, "only the agents of a search share fork servers"
        self._pool.prepare(await self._with_local_inputs(plan_json), count=count)

    async def price(self) -> tuple[str, float | None]:
        """Return the node's address and its price in USD per hour; None if unknown."""
        return ray.util.get_node_ip_address(), read_price(os.environ)

    async def allocations(self, supervisor: str) -> dict[str, Allocation]:
        """The agents that work for a supervisor, by name, and their slots."""
        return {name: each.allocation for name, each in self._agents.items() if each.supervisor == supervisor}

    async def start(self, config: AgentConfig, *, supervisor: str, recorder: Any, allocation: Allocation) -> bool:
        """Start an agent.

        Args:
            supervisor: name of the actor whose `endpoint` method says where the supervisor listens.
            recorder: handle of the actor whose `write` method takes the agent's records.

        Returns: whether a fork server is ready for it.
        """
        is_warm = self._pool is not None and self._pool.has_ready
        hosted = self._agents[config.node] = _HostedAgent(supervisor=supervisor, allocation=allocation)
        hosted.task = asyncio.ensure_future(self._serve(config, hosted, recorder))
        return is_warm

    async def close(self, name: str) -> None:
        """End an agent and wait for it; its fork server returns to the pool unless it still has ranks."""
        hosted = self._agents.get(name)
        if hosted is None or hosted.task is None:
            return
        if hosted.agent is None:  # it is still waiting for the corpus
            hosted.task.cancel()
        else:
            hosted.agent.shut_down()
        await asyncio.wait([hosted.task])

    async def _serve(self, config: AgentConfig, hosted: _HostedAgent, recorder: Any) -> None:
        doing = "download the corpus or the code"
        client = _RecorderActorClient(recorder, config.run_folder)
        try:
            plan_json = await self._with_local_inputs(config.plan_json)
            doing = "run the agent"
            hosted.agent = Agent(
                replace(config, host=ray.util.get_node_ip_address(), plan_json=plan_json),
                find_supervisor=lambda: _endpoint_of(hosted.supervisor),
                recorder=client,
                pool=self._pool,
                find_gpu=partial(smallest_gpu, config.devices),
            )
            await hosted.agent.run()
        except Exception as error:  # Ray raises many unrelated classes; whichever it is, this node cannot be used
            traceback.print_exc()
            await client.write([("event", NodeLeft(node=config.node, reason=f"failed to {doing}: {error}"))])
        finally:
            del self._agents[config.node]
            self._restart_exit_timer()

    async def _with_local_inputs(self, plan_json: str) -> str:
        return await asyncio.to_thread(ensure_inputs, plan_json, run_folder=Path(self._config.folder))

    def _restart_exit_timer(self) -> None:
        if self._exit_timer is not None:
            self._exit_timer.cancel()
        self._exit_timer = asyncio.get_running_loop().call_later(self._config.idle_s, self._exit_if_idle)

    def _exit_if_idle(self) -> None:
        if self._agents:
            return
        if self._pool is not None:
            self._pool.close()
        os._exit(0)


class _RecorderActorClient:
    """An agent's recorder client: sends records to the actor that writes them."""

    def __init__(self, recorder: Any, run_folder: str) -> None:
        self._recorder, self._run_folder = recorder, run_folder

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        try:
            await self._recorder.write.remote(records, self._run_folder)
        except ray.exceptions.RayTaskError as error:
            raise RunError(f"the run's events and metrics cannot be written: {error.cause}") from error


async def _endpoint_of(supervisor: str) -> Endpoint:
    """Ask a supervisor actor, which Ray may have restarted elsewhere, where it listens now."""
    try:
        actor = await asyncio.to_thread(ray.get_actor, supervisor, namespace=NAMESPACE)
        endpoint: Endpoint = await actor.endpoint.remote()
    except ValueError as error:
        raise NoSupervisorError(str(error)) from error
    except ray.exceptions.RayError as error:
        raise ConnectionError(f"the supervisor does not answer: {error}") from error
    return endpoint
