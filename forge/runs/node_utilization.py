"""Available and useful node-seconds of a run, updated by `forge.runs.goodput` as time passes.

If no record reports nodes that join and leave, the nodes of the generation count as available; if these are unknown
too, one node is assumed.
"""

from __future__ import annotations


class NodeSeconds:
    """Node-seconds available and useful so far, and the number of nodes now."""

    def __init__(self) -> None:
        self.num_now = 0
        self._joined: set[str] = set()
        self._is_known = False
        """Whether records report the nodes that join and leave."""
        self._num_members = 1
        self._available_s = self._useful_s = 0.0
        self._generation_s = self._generation_useful_s = 0.0
        """Seconds of this generation; its number of nodes may be recorded after its first steps."""

    def join(self, node: str) -> None:
        """A node is available from now on."""
        if not self._is_known:
            self._is_known, self._generation_s = True, 0.0
        self._joined.add(node)
        self.num_now = len(self._joined)

    def leave(self, node: str) -> None:
        """A node is no longer available."""
        self._joined.discard(node)
        if self._is_known:
            self.num_now = len(self._joined)

    def next_generation(self) -> None:
        """Start a generation, whose nodes are not known yet."""
        self._available_s, self._useful_s = self.available_s(), self.useful_s()
        self._generation_s = self._generation_useful_s = 0.0
        self._num_members = 1

    def form(self, nodes: set[str]) -> None:
        """Set the nodes of this generation; if empty, one is assumed."""
        self._num_members = max(1, len(nodes))
        if not self._is_known:
            self.num_now = self._num_members

    def pass_time(self, elapsed_s: float) -> None:
        """Count the available nodes for this time."""
        if self._is_known:
            self._available_s += len(self._joined) * elapsed_s
        else:
            self._generation_s += elapsed_s

    def work(self, seconds: float) -> None:
        """Count useful time of the generation's nodes."""
        self._generation_useful_s += seconds

    def end(self) -> None:
        """No node is available until the run is resumed."""
        self.next_generation()
        self._joined.clear()
        self._is_known = False

    def available_s(self, elapsed_s: float = 0.0) -> float:
        """Available node-seconds.

        Args:
            elapsed_s: since the last call of `pass_time`.
        """
        num_available = len(self._joined) if self._is_known else self._num_members
        return self._available_s + self._generation_s * self._num_members + elapsed_s * num_available

    def useful_s(self) -> float:
        """Node-seconds spent on new steps."""
        return self._useful_s + self._generation_useful_s * self._num_members
