"""Names the nodes whose GPUs have less memory than the plan's estimate needs, before their ranks take a step.

A plan is made for the nodes that run then; others may join later, with GPUs of another kind. Each agent reports the
smallest GPU that it has for the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from forge.elastic.states import MembershipState
from forge.events import Event, SmallGpu
from forge.plan.inputs import HardwareInfo
from forge.plan.memory import USABLE_SHARE


class GpuWatch:
    """The GPUs of a run's nodes."""

    def __init__(
        self, hardware: HardwareInfo, *, needed_bytes: Mapping[int, int], record_event: Callable[[Event], None]
    ) -> None:
        """Args:
        hardware: that the plan was made for.
        needed_bytes: World size → memory that a rank needs on its GPU, by the plan.
        """
        self._hardware, self._needed_bytes, self._record_event = hardware, needed_bytes, record_event
        self._gpus: dict[str, tuple[str, int, str]] = {}
        """Node → name and memory of its GPU, and its address."""
        self._recorded: set[str] = set()

    def note(self, node: str, *, name: str, memory_bytes: int, host: str, state: MembershipState) -> None:
        """Note the GPU of a node; record it if the node has ranks for which it is too small."""
        self._gpus[node] = (name, memory_bytes, host)
        self.check(state)

    def check(self, state: MembershipState) -> None:
        """Record, once for each machine, GPUs with less memory than the ranks of this generation need.

        GPUs that are as large as the planned one are not named: the plan itself has said that it does not fit.
        """
        world_size = len(state.assignment)
        needed, planned = self._needed_bytes.get(world_size), self._hardware.memory_bytes
        if needed is None or not self._gpus:
            return
        for node in dict.fromkeys(state.assignment):
            name, memory_bytes, host = self._gpus.get(node, ("", 0, ""))
            if not name or host in self._recorded or needed <= USABLE_SHARE * memory_bytes:
                continue
            if planned is not None and memory_bytes >= planned:
                continue
            self._recorded.add(host)
            self._record_event(
                SmallGpu(
                    generation=state.generation,
                    node=node,
                    host=host,
                    gpu=name,
                    memory_bytes=memory_bytes,
                    needed_bytes=needed,
                    world_size=world_size,
                    planned_gpu=self._hardware.name,
                )
            )
