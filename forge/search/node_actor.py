"""A machine's part in a search: one actor that has an agent for each trial that works there.

What a trial leaves, a warm process, is the next one's: it has imported everything. A host lives as long as somebody
uses it, and a minute more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forge.elastic.agent import Agent, AgentConfig, NoSupervisorError
from forge.elastic.rpc import Endpoint
from forge.elastic.workers.fork_client import ForkServerPool
from forge.events import Event, NodeLeft, StepMetrics
from forge.pricing.budget import read_price
from forge.runtime.corpus_server import ensure_corpus
from forge.runtime.placement import Allocation
from forge.runtime.recorder_actor import write_output_to

HOST = "host-"
"""How the names of hosts' actors begin."""
_IDLE_S = 60.0
_POLL_S = 1.0
_NODE_DIGITS = 8


@dataclass(slots=True, kw_only=True)
class _HostedAgent:
    """An agent that works here, and for whom."""

    stage: str
    grant: Allocation
    agent: Agent | None = None
    life: asyncio.Task[None] | None = None


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=1000)
class NodeActor:
    """The agents of a search's trials on one machine, and their warm processes."""

    def __init__(self, *, search_id: str, namespace: str, folder: str, environment: Mapping[str, str]) -> None:
        """Args:
        folder: the search's.
        environment: secrets of whoever asked for the search.
        """
        os.environ.update(environment)
        node = ray.get_runtime_context().get_node_id()[:_NODE_DIGITS]
        write_output_to(Path(folder) / "logs" / f"host-{node}.log")
        self._search_id, self._namespace = search_id, namespace
        self._pool = ForkServerPool(log=Path(folder) / "logs" / f"warm-{node}.log")
        self._guests: dict[str, _HostedAgent] = {}
        self._used_at = time.monotonic()
        self._watching: asyncio.Task[None] | None = None

    async def warm_up(self, plan_json: str, count: int) -> None:
        """Begin to have so many processes warm, before anybody needs them."""
        self._watch()
        self._pool.prepare(await self._here(plan_json), count=count)

    async def price(self) -> tuple[str, float | None]:
        """This machine's address, and what it costs: USD per hour, if anybody has said."""
        return ray.util.get_node_ip_address(), read_price(os.environ)

    async def grants(self, stage: str) -> dict[str, Allocation]:
        """The agents of a stage that are here, and their places."""
        return {name: guest.grant for name, guest in self._guests.items() if guest.stage == stage}

    async def open(self, setup: AgentConfig, *, stage: str, grant: Allocation) -> bool:
        """Have an agent here. Returns: whether a process is warm for it already."""
        self._watch()
        is_warm = self._pool.has_ready
        guest = self._guests[setup.node] = _HostedAgent(stage=stage, grant=grant)
        guest.life = asyncio.ensure_future(self._serve(setup, stage))
        return is_warm

    async def close(self, name: str) -> None:
        """End an agent; its warm process stays, if it has no ranks."""
        guest = self._guests.get(name)
        if guest is None or guest.life is None:
            return
        if guest.agent is None:  # it waits for the corpus
            guest.life.cancel()
        else:
            guest.agent.shut_down()
        await asyncio.wait([guest.life])

    async def _serve(self, setup: AgentConfig, stage: str) -> None:
        recorder = ray.get_actor(stage, namespace=self._namespace)
        try:
            plan_json = await self._here(setup.plan_json)
            placed = replace(setup, host=ray.util.get_node_ip_address(), plan_json=plan_json)
            locate = _Locator(stage, self._namespace).locate
            record = _StageRecord(recorder, setup.run_folder)
            agent = Agent(placed, find_supervisor=locate, recorder=record, pool=self._pool)
            self._guests[setup.node].agent = agent
            await agent.run()
        except Exception as error:  # Ray raises many unrelated classes; all mean that this machine is of no use
            traceback.print_exc()
            left = NodeLeft(node=setup.node, reason=f"its agent ended: {error}")
            await recorder.take.remote([("event", left)], setup.run_folder)
        finally:
            del self._guests[setup.node]
            self._used_at = time.monotonic()

    async def _here(self, plan_json: str) -> str:
        return await asyncio.to_thread(ensure_corpus, plan_json, run_id=self._search_id, namespace=self._namespace)

    def _watch(self) -> None:
        self._used_at = time.monotonic()
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        """A search that is over, or whose carrier was killed, needs no host."""
        while self._guests or time.monotonic() - self._used_at < _IDLE_S:
            await asyncio.sleep(_POLL_S)
        self._pool.close()
        os._exit(0)


class _Locator:
    """Finds the supervisor of a stage, which may have been started anew."""

    def __init__(self, stage: str, namespace: str) -> None:
        self._stage, self._namespace = stage, namespace

    async def locate(self) -> Endpoint:
        """Where it listens now."""
        try:
            stage = await asyncio.to_thread(ray.get_actor, self._stage, namespace=self._namespace)
            endpoint: Endpoint = await stage.endpoint.remote()
        except ValueError as error:
            raise NoSupervisorError(str(error)) from error
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the supervisor does not answer: {error}") from error
        return endpoint


class _StageRecord:
    """A trial's recorder, from an agent."""

    def __init__(self, stage: Any, run_folder: str) -> None:
        self._stage, self._run_folder = stage, run_folder

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        """Have them written."""
        await self._stage.take.remote(records, self._run_folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePool:
    """The hosts of a search, each started where it is first needed."""

    search_id: str
    namespace: str
    folder: str
    environment: Mapping[str, str]
    num_ranks: int
    """Of all trials at once, if each has its smallest number of workers."""

    def on(self, node_id: str) -> Any:
        """The host's actor on one of Ray's nodes. It outlives whoever asks first."""
        return NodeActor.options(  # type: ignore[attr-defined]
            name=f"{HOST}{self.search_id}-{node_id[:_NODE_DIGITS]}",
            namespace=self.namespace,
            lifetime="detached",
            get_if_exists=True,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(
            search_id=self.search_id,
            namespace=self.namespace,
            folder=self.folder,
            environment=self.environment,
        )

    def all(self) -> dict[str, Any]:
        """Those that there are, by their names."""
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        found = {}
        for name in names:
            if name.startswith(f"{HOST}{self.search_id}-"):
                with contextlib.suppress(ValueError):  # it has just ended
                    found[name] = ray.get_actor(name, namespace=self.namespace)
        return found

    def end(self) -> None:
        """The search is over."""
        for host in self.all().values():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(host)
