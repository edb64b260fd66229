"""A placement for a supervisor without a cluster."""

from __future__ import annotations

from collections.abc import Mapping


class FixedPlacement:
    """Gives every node the same number of slots."""

    def __init__(self, ranks_per_agent: int) -> None:
        self._ranks_per_agent = ranks_per_agent

    def slots_of(self, node: str) -> tuple[int, int]:
        return self._ranks_per_agent, self._ranks_per_agent

    def claim_slots(self) -> None:
        pass

    def request_extra(self, num_slots: int) -> None:
        pass

    def set_used(self, used: Mapping[str, int]) -> None:
        pass

    def release_unused(self) -> None:
        pass

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        pass

    def agent_lost(self, node: str) -> None:
        pass
