"""Configuration of an agent, passed to it when it is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Identity and resources of an agent, and the run it works for."""

    node: str
    """Name of this agent, different from that of any earlier agent on the same node."""
    host: str
    """The node's address."""
    num_slots: int
    num_guaranteed: int
    num_cores: int
    """Shared by its ranks."""
    devices: Sequence[str]
    """One per initial slot: `cpu`, or `cuda:` and a number."""
    run_folder: str
    plan_json: str
    checkpoints: str
    keep: int
    keep_best: int = 0
    secret: str
