"""The state of a step, read from the memory of machines: what a new generation's rank goes on from.

The parts of the step are the snapshots of the ranks that trained it. Those that lie on this machine are
mapped and copied; of the others, the ranges that this rank needs are asked for over the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.checkpoint.intervals import Interval, IntervalIndex, Layout, Range, layout_from_record
from forge.checkpoint.manifest import Progress
from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.elastic.rpc import Endpoint, Reader

_TIMEOUT_S = 20.0
# Ranges in one question: an answer must not wait for all of a large model.
_MOST_RANGES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLocation:
    """Where one rank's snapshot of the step lies."""

    generation: int
    rank: int
    snapshot: SnapshotBuffer | None
    """On this machine."""
    endpoint: Endpoint | None
    """Of the agent of another."""


class PeerStateSource:
    """All parts of one step, open for reading until `close`.

    The snapshots of this machine become its own: memory that their store lets go of is free only then.
    """

    def __init__(self, assignment: Sequence[ShardLocation], *, step: int, secret: bytes) -> None:
        """Raises: OSError, EOFError, KeyError if a part is no longer where it was said to be."""
        self._snapshots = [place.snapshot for place in assignment if place.snapshot is not None]
        self._readers: dict[Endpoint, Reader] = {}
        try:
            self._parts = {str(place.rank): self._open(place, step=step, secret=secret) for place in assignment}
            first = self._parts["0"]
        except BaseException:
            self.close()
            raise
        self._holdings = IntervalIndex((name, part.layout, 0) for name, part in self._parts.items())
        self.progress = Progress(**first.state["progress"])
        self.metrics: list[dict[str, Any]] = first.state.get("metrics", [])
        """Steps that may not have been recorded yet when the snapshot was taken."""

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval.

        Raises: OSError, EOFError if a machine is gone; ValueError if an element is held nowhere.
        """
        for name, ranges in self._holdings.ranges(wanted).items():
            self._parts[name].read(ranges)

    def close(self) -> None:
        """Read no more: hang up, and let go of the memory."""
        self._parts = {}
        for reader in self._readers.values():
            reader.close()
        for snapshot in self._snapshots:
            snapshot.close()

    def _open(self, place: ShardLocation, *, step: int, secret: bytes) -> _Part:
        if place.snapshot is not None:
            return _LocalPart(place.snapshot, step=step)
        assert place.endpoint is not None
        if place.endpoint not in self._readers:
            self._readers[place.endpoint] = Reader(place.endpoint, secret=secret, timeout_s=_TIMEOUT_S)
        return _RemotePart(self._readers[place.endpoint], place, step=step)


class _LocalPart:
    """A snapshot in memory of this machine."""

    def __init__(self, snapshot: SnapshotBuffer, *, step: int) -> None:
        copy = next((copy for copy in snapshot.copies() if copy.step == step), None)
        if copy is None:
            raise OSError(f"the snapshot of step {step} is no longer there")
        self.layout: Layout = snapshot.layout
        self.state: Mapping[str, Any] = copy.state
        self._data = snapshot.data(copy.slot)

    def read(self, ranges: Sequence[Range]) -> None:
        for start, view in ranges:
            view[:] = self._data[start : start + len(view)]


class _RemotePart:
    """A snapshot in memory of another machine."""

    def __init__(self, reader: Reader, place: ShardLocation, *, step: int) -> None:
        self._reader = reader
        self._name = {"generation": place.generation, "rank": place.rank, "step": step}
        answer = reader.ask({"request": "describe"} | self._name)
        if "error" in answer:
            raise OSError(answer["error"])
        self.layout: Layout = layout_from_record(answer["layout"])
        self.state: Mapping[str, Any] = answer["state"]

    def read(self, ranges: Sequence[Range]) -> None:
        for first in range(0, len(ranges), _MOST_RANGES):
            some = ranges[first : first + _MOST_RANGES]
            asked = [[start, len(view)] for start, view in some]
            answer = self._reader.ask({"request": "read", "ranges": asked} | self._name)
            if "error" in answer:
                raise OSError(answer["error"])
            for _, view in some:
                self._reader.receive_into(view)


_Part = _LocalPart | _RemotePart
