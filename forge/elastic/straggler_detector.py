"""Finds nodes whose ranks compute more slowly than the others of the same kind of device.

Every rank publishes the median of its own work's time over its last steps (`forge.train.local_time`), without the
waits for other ranks, so that one slow rank does not make all look slow. No collective is needed: the medians come
with heartbeats. A round compares each rank with the median of all others whose device has the same name, since a
slower kind of GPU is no fault. A node is a straggler after several rounds in a row, with different steps in each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WINDOW_STEPS = 20
"""Steps of which a rank publishes the median, and new steps that every rank makes between two rounds."""
MIN_ROUND_S = 10.0
"""Least time between two rounds: a step may take milliseconds."""
RETRY_S = 1.0
"""Time until the steps are looked at again that not every rank has made yet."""
NUM_ROUNDS = 3
"""Rounds in a row that name the same node."""
MIN_RATIO = 1.5
"""A rank is slow from this multiple of the others' median on. Ranks of one kind differ by a few percent; the slow
GPUs and networks that the operators of large clusters report cost 20 % and more, and below 1.5 a replacement, which
costs a membership change, gains little.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """A node with a rank that is slower than the others."""

    node: str
    rank: int
    """The slowest of its ranks."""
    ratio: float
    """Its time as a multiple of the others' median."""
    own_s: float
    """Median time of its own work in a step."""
    usual_s: float
    """Median of the other ranks' medians."""


@dataclass(slots=True, kw_only=True)
class _RankTime:
    own_s: float
    num_steps: int


class StragglerDetector:
    """The times of a generation's ranks, and how often in a row each node was slow."""

    def __init__(self) -> None:
        self._rounds: dict[str, int] = {}
        self._next_round_at = 0.0
        self.begin_generation()

    def begin_generation(self) -> None:
        """Drop the times of the ranks; rounds in which a node was slow still count."""
        self._times: dict[int, _RankTime] = {}
        self._next_num_steps = WINDOW_STEPS

    def update(self, rank: int, *, own_s: float, num_steps: int) -> None:
        """Note a rank's median time from a heartbeat.

        Args:
            own_s: median over its last `WINDOW_STEPS` steps, without waits for others.
            num_steps: steps that it has timed in this generation.
        """
        self._times[rank] = _RankTime(own_s=own_s, num_steps=num_steps)

    def find(self, assignment: Sequence[str], *, devices: Mapping[str, str], now: float) -> list[Straggler]:
        """Return the nodes that were slow in the last `NUM_ROUNDS` rounds; empty between two rounds.

        Args:
            assignment: the node of each rank.
            devices: name of the device of each node's ranks; nodes without one are compared with each other.
        """
        if now < self._next_round_at or len(self._times) < len(assignment):
            return []
        num_steps = min((self._times[rank].num_steps for rank in range(len(assignment))), default=0)
        if num_steps < self._next_num_steps:
            self._next_round_at = now + RETRY_S
            return []
        self._next_num_steps, self._next_round_at = num_steps + WINDOW_STEPS, now + MIN_ROUND_S
        slow = {straggler.node: straggler for straggler in self._slow(assignment, devices=devices)}
        self._rounds = {node: self._rounds.get(node, 0) + 1 for node in slow}
        return [straggler for node, straggler in slow.items() if self._rounds[node] >= NUM_ROUNDS]

    def _slow(self, assignment: Sequence[str], *, devices: Mapping[str, str]) -> list[Straggler]:
        """Return for each node its slowest rank, if that is slow; sorted by ratio, the least first."""
        kinds: dict[str, list[int]] = {}
        for rank, node in enumerate(assignment):
            kinds.setdefault(devices.get(node, ""), []).append(rank)
        found = []
        for ranks in kinds.values():
            ordered = sorted(self._times[rank].own_s for rank in ranks)
            for rank in ranks:
                own_s = self._times[rank].own_s
                usual_s = _median_without(ordered, own_s)
                if usual_s is not None and own_s >= MIN_RATIO * usual_s:
                    found.append(
                        Straggler(
                            node=assignment[rank], rank=rank, ratio=own_s / usual_s, own_s=own_s, usual_s=usual_s
                        )
                    )
        return sorted(found, key=lambda straggler: straggler.ratio)


def _median_without(ordered: Sequence[float], value: float) -> float | None:
    """Return the lower median of sorted times without one of them; None if none remain, or it is 0."""
    num_others = len(ordered) - 1
    if num_others < 1:
        return None
    at = (num_others - 1) // 2
    return ordered[at if at < bisect_left(ordered, value) else at + 1] or None
