"""Spot traces: at which times which nodes joined and left a fleet.

A trace is read from a file (`forge.chaos.trace_file`) or made by a Poisson process; it can be scaled to fewer nodes
(`forge.chaos.trace_scale`) and sped up. Everything here is pure, so a trace can be shown before it is replayed.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, replace

from forge.errors import ArgumentError, printable

MAX_NODES = 10_000
MAX_JOINS = 1_000_000
MAX_DURATION_S = 10 * 365 * 86_400.0
"""Ten years; a longer trace has milliseconds where seconds are expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChange:
    """The nodes that leave and join at one time. Nodes leave before others join, so that one node may do both."""

    at_s: float
    """Since the start of the trace."""
    added: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The history of a fleet. Only absent nodes join and only present nodes leave."""

    changes: tuple[NodeChange, ...]
    """In order of time, at most one per time; the first, at 0 s, adds the initial nodes if there are any."""
    duration_s: float
    max_nodes: int
    """The largest number of nodes at once; at least 1."""

    def to_jsonl(self) -> str:
        """The trace as a file that `read_trace` reads; a final `no-op` line holds the duration."""
        lines: list[list[object]] = []
        for change in self.changes:
            for verb, nodes in (("remove", change.removed), ("add", change.added)):
                lines += [[round(1000 * change.at_s), verb, {"nodes": list(nodes)}]] if nodes else []
        lines.append([round(1000 * self.duration_s), "no-op", {"nodes": []}])
        return "".join(json.dumps(line) + "\n" for line in lines)


class TraceBuilder:
    """Builds a trace from changes in chronological order; simultaneous changes are merged."""

    def __init__(self) -> None:
        self._num_joins = 0
        self._start_s: float | None = None
        self._now_s = 0.0
        self._end_s = 0.0
        self._present: dict[str, None] = {}
        self._added: dict[str, None] = {}
        """Joined at the current time and still present."""
        self._removed: dict[str, None] = {}
        """Left at the current time and present before it."""
        self._max_nodes = 0
        self._changes: list[NodeChange] = []

    def add(
        self, *, at_s: float, added: tuple[str, ...] = (), removed: tuple[str, ...] = (), lasts_s: float = 0.0
    ) -> None:
        """Add a change.

        Args:
            at_s: its time; the first change's time is the start of the trace.
            lasts_s: the trace lasts at least until `at_s + lasts_s`.

        Raises: ArgumentError if the change is impossible, or the trace exceeds its limits.
        """
        self._move_to(at_s, lasts_s)
        count = len(self._present) + len(added)
        if count > MAX_NODES:
            raise ArgumentError(f"{count:,} nodes at once; expected at most {MAX_NODES:,}")
        for node in removed:
            self._remove(node)
        for node in added:
            self._join(node)

    def build(self) -> Trace:
        """The trace. Raises: ArgumentError if it has no node at any time."""
        self._end_change()
        if not self._max_nodes:
            raise ArgumentError("no node at any time")
        return Trace(changes=tuple(self._changes), duration_s=self._end_s, max_nodes=self._max_nodes)

    def _move_to(self, absolute_s: float, lasts_s: float) -> None:
        if self._start_s is None:
            self._start_s = absolute_s
        at_s = absolute_s - self._start_s
        if at_s < self._now_s:
            raise ArgumentError(f"the time goes backwards, from {self._now_s:g} s to {at_s:g} s after the first")
        end_s = at_s + lasts_s
        if not (absolute_s >= 0 and lasts_s >= 0 and end_s <= MAX_DURATION_S):  # so nan fails too
            lasting = f" for {lasts_s:g} s" if lasts_s else ""
            raise ArgumentError(f"{absolute_s:g} s{lasting}; expected 0 or more, at most ten years after the first")
        if at_s > self._now_s:
            self._end_change()
        self._now_s, self._end_s = at_s, max(self._end_s, end_s)

    def _end_change(self) -> None:
        if self._added or self._removed or not self._changes:
            added, removed = tuple(self._added), tuple(self._removed)
            self._changes.append(NodeChange(at_s=self._now_s, added=added, removed=removed))
        self._added, self._removed = {}, {}
        self._max_nodes = max(self._max_nodes, len(self._present))

    def _join(self, node: str) -> None:
        if node in self._present:
            raise ArgumentError(f"node '{printable(node, limit=60)}' is added but is present already")
        self._num_joins += 1
        if self._num_joins > MAX_JOINS:
            raise ArgumentError(f"a trace adds at most {MAX_JOINS:,} nodes")
        self._present[node] = self._added[node] = None

    def _remove(self, node: str) -> None:
        if node not in self._present:
            raise ArgumentError(f"node '{printable(node, limit=60)}' is removed but is not present")
        del self._present[node]
        if node in self._added:  # it joined and left at the same time: nothing has happened
            del self._added[node]
        else:
            self._removed[node] = None


def poisson(*, num_nodes: int, mtbf_s: float, down_s: float, duration_s: float, seed: int) -> Trace:
    """Nodes that fail independently at a constant rate and come back under their own name.

    A node's failures depend on the seed and its number alone, not on how many other nodes there are.

    Args:
        mtbf_s: mean time for which a node is present, exponentially distributed.
        down_s: constant time for which it is absent; 0 replaces it immediately.

    Raises: ArgumentError for values that are not positive, and for more than a million failures.
    """
    is_possible = 1 <= num_nodes <= MAX_NODES and mtbf_s > 0 and down_s >= 0 and 0 < duration_s <= MAX_DURATION_S
    if not is_possible or num_nodes * duration_s / (mtbf_s + down_s) > MAX_JOINS:
        raise ArgumentError(
            f"{num_nodes:,} nodes for {duration_s:g} s, each present for {mtbf_s:g} s and absent for {down_s:g} s; "
            f"expected 1 to {MAX_NODES:,} nodes, times above 0, at most ten years and {MAX_JOINS:,} failures"
        )
    names = tuple(f"node-{number}" for number in range(1, num_nodes + 1))
    changes = [NodeChange(at_s=0.0, added=names, removed=())]
    for name in names:
        dice = random.Random(f"{seed} {name}")
        fails_s = dice.expovariate(1.0) * mtbf_s
        while fails_s < duration_s:
            changes.append(NodeChange(at_s=fails_s, added=(), removed=(name,)))
            if fails_s + down_s < duration_s:
                changes.append(NodeChange(at_s=fails_s + down_s, added=(name,), removed=()))
            fails_s += down_s + dice.expovariate(1.0) * mtbf_s
    builder = TraceBuilder()
    for change in sorted(changes, key=lambda change: change.at_s):
        builder.add(at_s=change.at_s, added=change.added, removed=change.removed)
    builder.add(at_s=duration_s)
    return builder.build()


def faster(trace: Trace, *, speed: float) -> Trace:
    """The same history in `1 / speed` of the time. Raises: ArgumentError if the speed is not above 0."""
    if not 0 < speed < math.inf:
        raise ArgumentError(f"a trace is replayed at a speed above 0, not at {speed}")
    changes = tuple(replace(change, at_s=change.at_s / speed) for change in trace.changes)
    return replace(trace, changes=changes, duration_s=trace.duration_s / speed)
