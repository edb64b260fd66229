"""A number of the plan by world size, of sizes that the plan does not list too.

Membership decisions need the group size of hpZ and the number of spare workers at the size of a generation. A run
has few of 10,000 possible sizes, so each is planned when it is first needed, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from forge.errors import PlanError
from forge.plan.plan import DraftPlan
from forge.plan.world_size import WorldSizePlan


class ByWorldSize(Mapping[int, int]):
    """World size → a number; sizes that the job does not allow are missing."""

    def __init__(self, plan: DraftPlan, *, number: Callable[[WorldSizePlan], int]) -> None:
        """Args:
        number: taken of the plan of a world size.
        """
        self._plan, self._number = plan, number
        self._known = {world.batch.world_size: number(world) for world in plan.worlds}

    def __getitem__(self, world_size: int) -> int:
        if world_size not in self._known:
            try:
                self._known[world_size] = self._number(self._plan.for_world_size(world_size))
            except PlanError:
                raise KeyError(world_size) from None
        return self._known[world_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self._plan.job.resources.workers)

    def __len__(self) -> int:
        workers = self._plan.job.resources.workers
        return workers.high - workers.low + 1
