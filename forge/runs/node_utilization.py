"""How long the machines of a run were there, and how long they did something useful, in node-seconds.

Fed by `forge.runs.goodput` as time passes. Where no record tells who joins and leaves, the machines of the
generation are there, and one where even these are not told.
"""

from __future__ import annotations


class NodeSeconds:
    """Two sums over the machines of a run, and who is there now."""

    def __init__(self) -> None:
        self.num_now = 0
        self._joined: set[str] = set()
        self._is_told = False
        """Who joins and leaves is known."""
        self._num_members = 1
        self._available_s = self._useful_s = 0.0
        self._generation_s = self._generation_useful_s = 0.0
        """Of this generation, whose number of machines may be told later than its first steps."""

    def join(self, node: str) -> None:
        """A machine is there from now on."""
        if not self._is_told:
            self._is_told, self._generation_s = True, 0.0
        self._joined.add(node)
        self.num_now = len(self._joined)

    def leave(self, node: str) -> None:
        """A machine is there no more."""
        self._joined.discard(node)
        if self._is_told:
            self.num_now = len(self._joined)

    def next_generation(self) -> None:
        """Other machines, not yet known, do the work from now on."""
        self._available_s, self._useful_s = self.available_s(), self.useful_s()
        self._generation_s = self._generation_useful_s = 0.0
        self._num_members = 1

    def form(self, nodes: set[str]) -> None:
        """These machines do the work of this generation; none: not told, one is assumed."""
        self._num_members = max(1, len(nodes))
        if not self._is_told:
            self.num_now = self._num_members

    def pass_time(self, elapsed_s: float) -> None:
        """Whoever is there was there for so long."""
        if self._is_told:
            self._available_s += len(self._joined) * elapsed_s
        else:
            self._generation_s += elapsed_s

    def work(self, seconds: float) -> None:
        """The machines of the generation did something useful for so long."""
        self._generation_useful_s += seconds

    def end(self) -> None:
        """Nobody is there until the run is taken up again."""
        self.next_generation()
        self._joined.clear()
        self._is_told = False

    def available_s(self, elapsed_s: float = 0.0) -> float:
        """Node-seconds of those that were there.

        Args:
            elapsed_s: since time passed last.
        """
        num_there = len(self._joined) if self._is_told else self._num_members
        return self._available_s + self._generation_s * self._num_members + elapsed_s * num_there

    def useful_s(self) -> float:
        """Node-seconds of what was useful."""
        return self._useful_s + self._generation_useful_s * self._num_members
