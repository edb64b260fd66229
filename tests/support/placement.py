"""A cluster for a supervisor that has none."""

from __future__ import annotations

from collections.abc import Mapping


class EndlessClaims:
    """A cluster that gives every machine the same number of places."""

    def __init__(self, ranks_per_agent: int) -> None:
        self._ranks_per_agent = ranks_per_agent

    def places_of(self, node: str) -> tuple[int, int]:
        return self._ranks_per_agent, self._ranks_per_agent

    def claim(self) -> None:
        pass

    def use(self, used: Mapping[str, int]) -> None:
        pass

    def give_back(self) -> None:
        pass

    def replace(self, node: str, *, seconds_left: float | None) -> None:
        pass

    def lost(self, node: str) -> None:
        pass
