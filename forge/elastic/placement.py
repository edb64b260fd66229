"""The interface through which the supervisor gets slots; `forge.runtime.placement` implements it on Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Placement(Protocol):
    """The slots that the cluster gives a run, and the agents on their nodes."""

    def slots_of(self, node: str) -> tuple[int, int] | None:
        """An agent's slots now, and how many of them are guaranteed; None if the node is not known."""

    def claim_slots(self) -> None:
        """Ask for as many slots as the job allows."""

    def request_extra(self, num_slots: int) -> None:
        """Ask for so many slots beyond what the job allows, so that other machines are found."""

    def set_used(self, used: Mapping[str, int]) -> None:
        """Tell how many slots of each node are used by running ranks."""

    def release_unused(self) -> None:
        """Keep no more slots than are used, and claim no more than the minimum."""

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        """Put nothing new on a node that will be preempted, and ask for another node."""

    def agent_lost(self, node: str) -> None:
        """An agent is gone; start another one if the node's slots are still this run's."""
