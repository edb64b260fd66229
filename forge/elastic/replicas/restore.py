"""Reads the state of a step from the memory of nodes, for a rank of a new generation.

The shards of the step are the snapshots of the ranks that trained it. Shards in this node's memory are mapped
and copied; of the others, only the ranges that this rank needs are transferred. ZeRO divides every tensor, or
all of them one after the other, in the order of the ranks, so that a rank needs two or three shards of
thousands: those of other nodes are opened when a range is not in the ones opened before, the nearest by rank
first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from forge.checkpoint.intervals import Interval, IntervalIndex, Layout, Range, layout_from_record
from forge.checkpoint.manifest import BaseWeights, Progress, base_from_record
from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.elastic.rpc import Endpoint, Message, SyncChannel

_TIMEOUT_S = 20.0
# Ranges per request: one answer must not have to wait for all of a large model.
_MAX_RANGES = 4096
# As many as a shard has parts in memory with shard groups.
_MAX_NODES_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLocation:
    """Where one rank's snapshot of the step is."""

    generation: int
    rank: int
    snapshot: SnapshotBuffer | None
    """In this node's memory."""
    endpoint: Endpoint | None
    """The replica store of another node."""


class PeerStateSource:
    """The shards of one step, opened for reading as they are needed, until `close`.

    It owns the local snapshots: memory that their replica store drops is freed only at `close`.
    """

    def __init__(
        self, locations: Sequence[ShardLocation], *, step: int, secret: bytes, position: float = 0.0
    ) -> None:
        """Args:
        position: where this rank is among those of its generation, from 0 to 1: the shards there are read first.

        Raises: OSError, EOFError if the first shard is no longer at its location.
        """
        self._step, self._secret = step, secret
        self._snapshots = [location.snapshot for location in locations if location.snapshot is not None]
        self._channels: dict[Endpoint, SyncChannel] = {}
        self._shards: dict[str, _Shard] = {}
        self._index = IntervalIndex(())
        center = position * len(locations) - 0.5
        self._unopened = deque(sorted(locations, key=lambda of: (of.snapshot is None, abs(of.rank - center))))
        """Local ones first, as they cost no request, then by distance."""
        try:
            first = self._open(next(location for location in locations if location.rank == 0))
        except BaseException:
            self.close()
            raise
        self.progress = Progress(**first.state["progress"])
        self.base: BaseWeights | None = base_from_record(first.state.get("base"))
        """The pretrained weights that the frozen parameters have their values from."""
        self.metrics: list[dict[str, Any]] = first.state.get("metrics", [])
        """Metrics that the recorder had not acknowledged when the snapshot was taken."""

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval, from all nodes that have some of them at once.

        Raises: OSError, EOFError if a node or a shard is gone; ValueError if no shard holds an element.
        """
        wanted = list(wanted)
        for interval, _ in wanted:
            while self._unopened and not self._index.covers(interval):
                self._open(self._unopened.popleft())
        by_channel: dict[SyncChannel | None, list[tuple[_Shard, list[Range]]]] = {}
        for name, ranges in self._index.ranges(wanted).items():
            shard = self._shards[name]
            by_channel.setdefault(shard.channel, []).append((shard, ranges))
        here = by_channel.pop(None, [])
        # A thread for each node, as a connection answers one request at a time.
        with ThreadPoolExecutor(max_workers=_MAX_NODES_AT_ONCE) as pool:
            done = [pool.submit(_read_all, parts) for parts in by_channel.values()]
            _read_all(here)
        for one in done:
            one.result()

    def close(self) -> None:
        """Close the connections and free the memory."""
        self._shards = {}
        for channel in self._channels.values():
            channel.close()
        for snapshot in self._snapshots:
            snapshot.close()

    def _open(self, location: ShardLocation) -> _Shard:
        """Open a shard and add it to the index; one that is open already stays as it is."""
        name = str(location.rank)
        if name not in self._shards:
            shard = self._shards[name] = self._connect(location)
            self._index.add(name, shard.layout, data_start=0)
        return self._shards[name]

    def _connect(self, location: ShardLocation) -> _Shard:
        if location.snapshot is not None:
            return _LocalShard(location.snapshot, step=self._step)
        assert location.endpoint is not None
        if location.endpoint not in self._channels:
            channel = SyncChannel(location.endpoint, secret=self._secret, timeout_s=_TIMEOUT_S)
            self._channels[location.endpoint] = channel
        return _RemoteShard(self._channels[location.endpoint], location, step=self._step)


def _read_all(parts: Sequence[tuple[_Shard, list[Range]]]) -> None:
    for shard, ranges in parts:
        shard.read(ranges)


class _LocalShard:
    """A snapshot in this node's memory."""

    channel = None

    def __init__(self, buffer: SnapshotBuffer, *, step: int) -> None:
        snapshot = next((copy for copy in buffer.snapshots() if copy.step == step), None)
        if snapshot is None:
            raise OSError(f"the snapshot of step {step} has been overwritten")
        self.layout: Layout = buffer.layout
        self.state: Mapping[str, Any] = snapshot.state
        self._data = buffer.data(snapshot.slot)

    def read(self, ranges: Sequence[Range]) -> None:
        for start, view in ranges:
            view[:] = self._data[start : start + len(view)]


class _RemoteShard:
    """A snapshot in another node's memory."""

    def __init__(self, channel: SyncChannel, location: ShardLocation, *, step: int) -> None:
        self.channel = channel
        self._name = {"generation": location.generation, "rank": location.rank, "step": step}
        answer = self._request({"request": "describe"})
        self.layout: Layout = layout_from_record(answer["layout"])
        self.state: Mapping[str, Any] = answer["state"]

    def read(self, ranges: Sequence[Range]) -> None:
        for first in range(0, len(ranges), _MAX_RANGES):
            batch = ranges[first : first + _MAX_RANGES]
            self._request({"request": "read", "ranges": [[start, len(view)] for start, view in batch]})
            for _, view in batch:
                self.channel.receive_into(view)

    def _request(self, message: Message) -> Message:
        answer = self.channel.request(message | self._name)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer


_Shard = _LocalShard | _RemoteShard
