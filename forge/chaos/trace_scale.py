"""Scaling a spot trace to as few nodes as one machine can simulate, keeping its shape and its churn. Pure."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import chain, cycle, islice

from forge.chaos.trace import MAX_NODES, NodeChange, Trace
from forge.errors import ArgumentError


def scale(trace: Trace, *, num_nodes: int) -> Trace:
    """The same history with `num_nodes` where the original has its maximum.

    Number of nodes: c nodes become s(c) = ⌊c · num_nodes / max_nodes + ½⌋, but 1 rather than 0 where c is at least
    1, because a fleet that has nodes can train; 0 stays 0. This holds at every time.

    Churn: k = min(removed, added) nodes that are replaced at one time do not change the count, but each is a
    preemption to survive. Of c nodes (the smaller count of before and after), the share k / c is replaced, so k ·
    s(c) / c simulated nodes are. Fractions are carried over from one time to the next, so that the total is the
    rounded sum.

    Which nodes: each simulated node stands for an original one. If originals leave, the oldest simulated nodes that
    stand for them leave; if more must leave, the oldest others; if fewer, the rest stand for originals that no
    other simulated node stands for. A joining node stands for an original that has just joined, if possible. Names
    are `node-1`, `node-2`, ... in order of arrival and never reused.

    Raises: ArgumentError if `num_nodes` is out of bounds.
    """
    if not 1 <= num_nodes <= MAX_NODES:
        raise ArgumentError(f"a trace is scaled to between 1 and {MAX_NODES:,} nodes, not to {num_nodes:,}")

    def scaled(count: int) -> int:
        return max(min(count, 1), (2 * count * num_nodes + trace.max_nodes) // (2 * trace.max_nodes))

    assignment, owed, changes, after = _Assignment(), Fraction(0), list[NodeChange](), 0
    for change in trace.changes:
        before, after = after, after - len(change.removed) + len(change.added)
        least = min(before, after)
        if replaced := min(len(change.removed), len(change.added)):
            owed += Fraction(replaced * scaled(least), least)
        # At most scaled(least): the share is, and less than one half was carried over.
        swaps = math.floor(owed + Fraction(1, 2))
        owed -= swaps
        num_leaving = scaled(before) - scaled(least) + swaps
        followed = assignment.follow(change, num_leaving=num_leaving, num_nodes=scaled(after))
        if followed.added or followed.removed or not changes:
            changes.append(followed)
    return replace(trace, changes=tuple(changes), max_nodes=num_nodes)


class _Assignment:
    """Which original each simulated node stands for; several may stand for one if there are more of them."""

    def __init__(self) -> None:
        self._originals: dict[str, None] = {}  # in order of arrival
        self._stands_for: dict[str, str] = {}  # simulated → original, in order of arrival
        self._num_joins = 0

    def follow(self, change: NodeChange, *, num_leaving: int, num_nodes: int) -> NodeChange:
        """The simulated change: `num_leaving` nodes leave, and `num_nodes` are present after it."""
        for node in change.removed:
            del self._originals[node]
        self._originals.update(dict.fromkeys(change.added))

        gone = set(change.removed)
        orphaned = [name for name, original in self._stands_for.items() if original in gone]
        leaving = [*orphaned, *(name for name, original in self._stands_for.items() if original not in gone)]
        del leaving[num_leaving:]
        for name in leaving:
            del self._stands_for[name]
        joining = [f"node-{self._num_joins + 1 + i}" for i in range(num_nodes - len(self._stands_for))]
        self._num_joins += len(joining)
        self._assign([*joining, *orphaned[num_leaving:]], num_new=len(change.added))
        return NodeChange(at_s=change.at_s, added=tuple(joining), removed=tuple(leaving))

    def _assign(self, names: list[str], *, num_new: int) -> None:
        """Let nodes stand for free originals: first the `num_new` newest, then the oldest."""
        if not names:
            return
        num_old = len(self._originals) - num_new
        order = [*islice(self._originals, num_old, None), *islice(self._originals, num_old)]
        idle = set(names)
        taken = {original for name, original in self._stands_for.items() if name not in idle}
        free = (original for original in order if original not in taken)
        self._stands_for.update(zip(names, chain(free, cycle(order)), strict=False))
