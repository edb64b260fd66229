"""A node's in-memory store of training state: snapshots of its own ranks, and replicas of another node's.

The store belongs to the agent, so it outlives the ranks that wrote the snapshots. Each snapshot of a rank is sent
to a peer node (`forge.elastic.replicas.replicate`) and counts as replicated when it is complete there. Ranks of a
new generation read the ranges they need from these stores (`forge.elastic.replicas.restore`).
"""

from __future__ import annotations

import asyncio
import os
import struct
from dataclasses import dataclass, field

from forge.checkpoint.snapshot_buffer import Snapshot, SnapshotBuffer, create_from_description
from forge.elastic.rpc import Channel, Message
from forge.elastic.states import ReplicaLocation
from forge.process import first_line


@dataclass(slots=True, kw_only=True)
class Replica:
    """The snapshots of one rank of one generation."""

    snapshot: SnapshotBuffer
    world_size: int
    receiving: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of a peer's replica: one step is received at a time."""


class ReplicaStore:
    """The replicas in this node's memory."""

    def __init__(self, *, secret: bytes) -> None:
        self._secret = secret
        self._replicas: dict[tuple[int, int], Replica] = {}
        """By generation and rank."""
        self._rejected_up_to = 0

    def register_buffer(self, fd: int, *, generation: int, rank: int, world_size: int) -> None:
        """Take ownership of the snapshot buffer of a rank on this node, given its file descriptor.

        Of two ranks on this node that keep the same piece (`forge.train.snapshot_pieces`), the first one's is kept.
        """
        if (generation, rank) in self._replicas:
            os.close(fd)
            return
        self._replicas[generation, rank] = Replica(snapshot=SnapshotBuffer(fd), world_size=world_size)

    def find(self, *, generation: int, rank: int) -> SnapshotBuffer | None:
        """A rank's snapshot buffer, if it is in this store."""
        replica = self._replicas.get((generation, rank))
        return replica.snapshot if replica else None

    def locations(self) -> frozenset[ReplicaLocation]:
        """Every complete snapshot."""
        return frozenset(
            ReplicaLocation(generation=generation, rank=rank, world_size=replica.world_size, step=step)
            for (generation, rank), replica in self._replicas.items()
            for step in replica.snapshot.steps()
        )

    def reject_up_to(self, generation: int) -> None:
        """Stop accepting replicas of this and older generations, so that the reported locations are final."""
        self._rejected_up_to = max(generation, self._rejected_up_to)

    def drop_before(self, generation: int) -> None:
        """Free the replicas of generations before this one, and accept no more of them."""
        self.reject_up_to(generation - 1)
        for key in [key for key in self._replicas if key[0] < generation]:
            self._replicas.pop(key).snapshot.close()

    def close(self) -> None:
        """Free all replicas."""
        for replica in self._replicas.values():
            replica.snapshot.close()
        self._replicas.clear()

    async def serve(self, channel: Channel) -> None:
        """Serve ranks that read state, and receive a peer's replicas.

        Raises: OSError, EOFError when the other end has closed the connection; ValueError if a request is invalid.
        """
        while True:
            message = await channel.receive()
            try:
                await self._answer(channel, message)
            except (LookupError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
                raise ValueError(f"invalid request: {first_line(error)}") from error

    async def _answer(self, channel: Channel, message: Message) -> None:
        if message["request"] == "replicate":
            await self._receive(channel, message)
            return
        replica = self._replicas.get((message["generation"], message["rank"]))
        snapshot = _snapshot_of(replica, message["step"]) if replica else None
        if replica is None or snapshot is None:
            await channel.send({"error": f"there is no snapshot of step {message['step']} any more"})
        elif message["request"] == "describe":
            await channel.send({"layout": replica.snapshot.layout.to_record(), "state": snapshot.state})
        else:
            await _send_ranges(channel, replica.snapshot, snapshot, message["ranges"])

    async def _receive(self, channel: Channel, message: Message) -> None:
        generation, rank = message["generation"], message["rank"]
        self._require_accepted(generation)
        replica = self._replicas.get((generation, rank))
        if replica is None:
            if message["description"] is None:  # dropped since; the sender connects again, and describes it
                raise EOFError(f"the replica of rank {rank} of generation {generation} was dropped")
            buffer = create_from_description(message["description"].encode())
            replica = self._replicas[generation, rank] = Replica(snapshot=buffer, world_size=message["world_size"])
        async with replica.receiving:
            buffer = replica.snapshot
            copies = buffer.snapshots()
            slot = next(slot for slot in range(2) if not copies or slot != copies[0].slot)
            data = buffer.begin(slot)
            await asyncio.to_thread(buffer.prepare, slot)
            await channel.receive_into(data)
            self._require_accepted(generation)
            buffer.commit(slot, step=message["step"], state=message["state"], checksum=message["checksum"])
        await channel.send({"replicated": message["step"]})

    def _require_accepted(self, generation: int) -> None:
        if generation <= self._rejected_up_to:
            raise EOFError(f"replicas of generation {generation} are not accepted any more")


def _snapshot_of(replica: Replica, step: int) -> Snapshot | None:
    return next((copy for copy in replica.snapshot.snapshots() if copy.step == step), None)


async def _send_ranges(
    channel: Channel, buffer: SnapshotBuffer, snapshot: Snapshot, ranges: list[list[int]]
) -> None:
    start, end = buffer.data_offset(snapshot.slot), buffer.layout.size_bytes
    if any(first < 0 or count < 0 or first + count > end for first, count in ranges):
        raise ValueError("a requested range is outside of the snapshot")
    await channel.send({"bytes": sum(count for _, count in ranges)})
    for first, count in ranges:
        await channel.send_file(buffer.fd, offset=start + first, count=count)


def locations_record(locations: frozenset[ReplicaLocation]) -> list[list[int]]:
    """Convert to JSON; see `locations_from_record`."""
    return [list(location) for location in sorted(locations)]


def locations_from_record(record: list[list[int]]) -> frozenset[ReplicaLocation]:
    """Convert from the JSON of `locations_record`."""
    return frozenset(map(ReplicaLocation._make, record))
