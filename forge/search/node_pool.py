"""The agent actors of a search, one per node, started on first use and shared by all trials."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from forge.runtime.agent_actor import AgentActorConfig
from forge.runtime.start_agent import agent_actors_of, start_agent_actor

# How long an agent actor, with its idle fork servers, lives without agents after the search was killed.
_IDLE_S = 60.0
_NODE_DIGITS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePool:
    """The agent actors of a search."""

    search_id: str
    folder: str
    environment: Mapping[str, str] = field(repr=False)
    """Credentials, for all processes of the search."""
    num_ranks: int
    """Of all trials that run at once, each with its minimum of workers."""

    def on(self, node_id: str) -> Any:
        """The agent actor on a Ray node; a new one if there is none."""
        config = AgentActorConfig(
            run_id=self.search_id,
            node=node_id[:_NODE_DIGITS],
            folder=self.folder,
            environment=self.environment,
            shares_fork_servers=True,
            idle_s=_IDLE_S,
        )
        return start_agent_actor(config, node_id=node_id)

    def all(self) -> dict[str, Any]:
        """All of them, by actor name."""
        return agent_actors_of(self.search_id)

    def end(self) -> None:
        """Kill all of them: the search is over."""
        for actor in self.all().values():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
