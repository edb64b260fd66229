"""Starting agents and finding those of an earlier supervisor, against actors that only record the calls."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any, cast

import ray

from forge.elastic.agent_config import AgentConfig
from forge.runtime.agent_actor import AgentActor
from forge.runtime.placement import Allocation, PlacementManager
from forge.runtime.start_agent import AgentHandle, reattach_agents, start_agent

START = inspect.signature(cast(Any, AgentActor).__ray_metadata__.modified_class.start)


def remote(function: Any) -> SimpleNamespace:
    return SimpleNamespace(remote=function)


def test_start_agent__arguments__are_those_of_the_actors_start() -> None:
    actor = SimpleNamespace(start=remote(lambda *args, **kwargs: START.bind("self", *args, **kwargs).arguments))
    config, allocation = cast(AgentConfig, "config"), cast(Allocation, "allocation")
    assert start_agent(config, actor=actor, supervisor="s", recorder="r", allocation=allocation) == {
        "self": "self",
        "config": "config",
        "supervisor": "s",
        "recorder": "r",
        "allocation": "allocation",
    }


def test_reattach_agents__one_actor_does_not_answer__others_are_reattached() -> None:
    async def answer(supervisor: str) -> dict[str, str]:
        return {"node-1": "slots"} if supervisor == "s" else {}

    async def fail(supervisor: str) -> dict[str, str]:
        raise ray.exceptions.RayActorError

    attached: list[tuple[Any, ...]] = []
    placement = cast(PlacementManager, SimpleNamespace(reattach=lambda *found: attached.append(found)))
    living = SimpleNamespace(allocations=remote(answer))
    actors = [SimpleNamespace(allocations=remote(fail)), living]
    assert asyncio.run(reattach_agents(placement, actors, supervisor="s"))
    assert attached == [("node-1", AgentHandle(actor=living, name="node-1"), "slots")]
    assert not asyncio.run(reattach_agents(placement, actors, supervisor="another"))
