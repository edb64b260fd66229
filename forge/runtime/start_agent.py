"""Start agents, and find those that are already running.

The supervisor actor of a training run and the trial runner of a search start their agents here: first the actor on
a node (`start_agent_actor`), then an agent in it (`start_agent`). After a restart they find the agents of their
predecessor with `reattach_agents`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forge.elastic.agent_config import AgentConfig
from forge.runtime.actor_names import AGENT, NAMESPACE
from forge.runtime.agent_actor import AgentActor, AgentActorConfig
from forge.runtime.placement import Allocation, PlacementManager

_REATTACH_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentHandle:
    """One agent of an `AgentActor`, from the supervisor's side."""

    actor: Any
    name: str


def start_agent_actor(config: AgentActorConfig, *, node_id: str) -> Any:
    """Return the agent actor of that name on a Ray node: the running one, otherwise a new, detached one."""
    return AgentActor.options(  # type: ignore[attr-defined]
        name=config.name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(config)


def start_agent(config: AgentConfig, *, actor: Any, supervisor: str, recorder: Any, allocation: Allocation) -> Any:
    """Start an agent in an agent actor, without waiting for it.

    Args:
        supervisor, recorder: see `AgentActor.start`.

    Returns: Ray's reference to the result of `AgentActor.start`: whether a fork server is ready.
    """
    return actor.start.remote(config, supervisor=supervisor, recorder=recorder, allocation=allocation)


def agent_actors_of(run_id: str) -> dict[str, Any]:
    """All agent actors of a run or a search, by name."""
    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["name"].startswith(f"{AGENT}{run_id}-"):
            try:
                found[actor["name"]] = ray.get_actor(actor["name"], namespace=NAMESPACE)
            except ValueError:  # it ended in between
                continue
    return found


async def reattach_agents(placement: PlacementManager, actors: Iterable[Any], *, supervisor: str) -> bool:
    """Reattach the agents that worked for a supervisor before Ray restarted it. Returns: whether there were any."""
    found = False
    for actor in actors:
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            allocations = await asyncio.wait_for(actor.allocations.remote(supervisor), timeout=_REATTACH_TIMEOUT_S)
            for name, allocation in allocations.items():
                placement.reattach(name, AgentHandle(actor=actor, name=name), allocation)
                found = True
    return found
