"""Coordinate flushes: agents write a checkpoint from their replicas while no ranks run."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable

from forge.checkpoint.manifest import step_name
from forge.checkpoint.writer_process import MEMBERSHIP_DIGITS
from forge.elastic.agent_connections import AgentConnections
from forge.elastic.commands import flush_commands
from forge.elastic.membership import newest_complete_step
from forge.elastic.rpc import Message
from forge.elastic.states import FlushToStorage, MembershipState, Phase
from forge.events import CheckpointFailed, CheckpointSaved, Event

_RETRY_S = 5.0


class FlushCoordinator:
    """Has agents write their replicas of a step to storage, and records the result."""

    def __init__(
        self,
        connections: AgentConnections,
        *,
        checkpoints: str,
        record_event: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self._connections, self._checkpoints = connections, checkpoints
        self._record_event, self._clock = record_event, clock
        self._began: dict[int, float] = {}

    def start(self, flush: FlushToStorage, *, state: MembershipState) -> None:
        """Order the agents that hold the step to write it."""
        self._began[flush.step] = self._clock()
        token = secrets.token_hex(MEMBERSHIP_DIGITS // 2) + "0001"
        for node, command in flush_commands(flush, state=state, token=token).items():
            self._connections.send(node, command)

    def finish(self, report: Message) -> bool:
        """Record an agent's report on a flush. Returns: whether the checkpoint is complete."""
        step, stored = report["step"], dict(report["stored"])
        began = self._began.pop(step, self._clock())
        if step not in stored:
            reason = "the replicas in memory could not be written to storage"
            self._record_event(CheckpointFailed(step=step, reason=reason))
            return False
        for saved_step, size_bytes in stored.items():  # the recorder ignores those that it has
            is_own = saved_step == step
            self._record_event(
                CheckpointSaved(
                    step=saved_step,
                    folder=f"{self._checkpoints}/{step_name(saved_step)}",
                    size_bytes=size_bytes,
                    seconds=self._clock() - began if is_own else math.nan,
                    stall_s=0.0 if is_own else math.nan,
                )
            )
        return True

    async def retry(self, state: Callable[[], MembershipState]) -> None:
        """Flush again after a pause: storage may recover, and the state stays in memory."""
        await asyncio.sleep(_RETRY_S)
        found = newest_complete_step(state())
        if state().phase is Phase.WAITING and found is not None and found.step > state().stored_step:
            flush = FlushToStorage(step=found.step, generation=found.generation, world_size=found.world_size)
            self.start(flush, state=state())
