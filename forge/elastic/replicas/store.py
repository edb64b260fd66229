"""A machine's memory of training states: the snapshots of its own ranks, and copies of another machine's.

The store belongs to the agent, so it outlives the ranks that wrote it. Each step that a rank copies is sent
on to a peer machine, straight from the rank's memory (`sendfile`), and counts as kept when it is whole
there. Ranks of a new generation read what they need from here, by ranges.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from forge.checkpoint.snapshot_buffer import Snapshot, SnapshotBuffer, create_as_described
from forge.elastic.rpc import Channel, Endpoint, Message, connect
from forge.elastic.states import ReplicaLocation

_RETRY_S = 0.1


@dataclass(slots=True, kw_only=True)
class Replica:
    """The snapshots of one rank of one generation."""

    snapshot: SnapshotBuffer
    world_size: int
    arrives: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of a copy of another machine's: one step arrives at a time."""


class ReplicaStore:
    """The snapshots that lie on this machine."""

    def __init__(self, *, secret: bytes) -> None:
        self._secret = secret
        self._kept: dict[tuple[int, int], Replica] = {}
        self._refused = 0
        """The newest generation of which no copies are taken."""

    def register_buffer(self, generation: int, rank: int, fd: int, *, world_size: int) -> None:
        """Take over the memory of a rank of this machine, behind a descriptor that is ours from now on."""
        self._kept[generation, rank] = Replica(snapshot=SnapshotBuffer(fd), world_size=world_size)

    def find(self, generation: int, rank: int) -> SnapshotBuffer | None:
        """A rank's snapshots, if they are here."""
        kept = self._kept.get((generation, rank))
        return kept.snapshot if kept else None

    def locations(self) -> frozenset[ReplicaLocation]:
        """Every whole snapshot."""
        return frozenset(
            ReplicaLocation(generation=generation, rank=rank, world_size=kept.world_size, step=copy.step)
            for (generation, rank), kept in self._kept.items()
            for copy in kept.snapshot.copies()
        )

    def reject_up_to(self, generation: int) -> None:
        """Take no more copies of this generation and of those before it: what is held now is what is told."""
        self._refused = max(generation, self._refused)

    def drop_before(self, before: int) -> None:
        """Let go of the snapshots of generations before this one."""
        self.reject_up_to(before - 1)
        for key in [key for key in self._kept if key[0] < before]:
            self._kept.pop(key).snapshot.close()

    def close(self) -> None:
        """Let go of everything."""
        for kept in self._kept.values():
            kept.snapshot.close()
        self._kept.clear()

    async def serve(self, channel: Channel) -> None:
        """Answer ranks that read, and take the copies of another machine.

        Raises: OSError, EOFError when the other end has gone.
        """
        while True:
            message = await channel.receive()
            if message["request"] == "replicate":
                await self._take(channel, message)
                continue
            kept = self._kept.get((message["generation"], message["rank"]))
            copy = _copy_of(kept, message["step"]) if kept else None
            if kept is None or copy is None:
                await channel.send({"error": f"there is no snapshot of step {message['step']} any more"})
            elif message["request"] == "describe":
                await channel.send({"layout": kept.snapshot.layout.to_record(), "state": copy.state})
            else:
                await _send_ranges(channel, kept.snapshot, copy, message["ranges"])

    async def _take(self, channel: Channel, message: Message) -> None:
        generation, rank = message["generation"], message["rank"]
        description = bytearray(message["description_bytes"])
        await channel.receive_into(memoryview(description))
        self._require_open(generation)
        kept = self._kept.get((generation, rank))
        if kept is None:
            kept = Replica(snapshot=create_as_described(bytes(description)), world_size=message["world_size"])
            self._kept[generation, rank] = kept
        async with kept.arrives:
            copies = kept.snapshot.copies()
            slot = next(slot for slot in range(2) if not copies or slot != copies[0].slot)
            data = kept.snapshot.begin(slot)
            await asyncio.to_thread(kept.snapshot.prepare, slot)
            await channel.receive_into(data)
            self._require_open(generation)
            kept.snapshot.commit(slot, step=message["step"], state=message["state"], checksum=message["checksum"])
        await channel.send({"replicated": message["step"]})

    def _require_open(self, generation: int) -> None:
        if generation <= self._refused:
            raise EOFError("a generation that is over")


class Replicator:
    """Sends the snapshots of one rank to another machine, the newest first if it cannot follow."""

    def __init__(
        self,
        endpoint: Endpoint | None,
        snapshot: SnapshotBuffer,
        *,
        name: dict[str, int],
        secret: bytes,
        on_replicated: Callable[[int], None],
    ) -> None:
        """Args:
        endpoint: of the other machine's agent; None where there is no other machine.
        name: generation, rank and world size.
        on_replicated: told of each step that is as safe as it is going to be.
        """
        self._snapshot = snapshot
        self._name, self._secret, self._on_kept = name, secret, on_replicated
        self._waiting: tuple[int, int] | None = None
        """The newest step, and its slot."""
        self._wakes = asyncio.Event()
        self._task = asyncio.ensure_future(self._send_all(endpoint)) if endpoint else None

    def send(self, *, step: int, slot: int) -> None:
        """A slot is whole."""
        self._waiting = (step, slot)
        self._wakes.set()
        if self._task is None:
            self._on_kept(step)

    def set_peer(self, endpoint: Endpoint | None) -> None:
        """The other machine is gone: send what is newest to this one, if there is one, and all that follows."""
        self.close()
        self._task = asyncio.ensure_future(self._send_all(endpoint)) if endpoint else None
        if self._waiting is not None:
            self.send(step=self._waiting[0], slot=self._waiting[1])

    def close(self) -> None:
        """Send no more."""
        if self._task is not None:
            self._task.cancel()

    async def _send_all(self, endpoint: Endpoint) -> None:
        channel: Channel | None = None
        try:
            while True:
                await self._wakes.wait()
                self._wakes.clear()
                waiting = self._waiting
                if waiting is None:
                    continue
                try:
                    is_new = channel is None
                    channel = channel or await connect(endpoint, secret=self._secret)
                    await self._send(channel, *waiting, is_new=is_new)
                    self._on_kept(waiting[0])
                except (OSError, EOFError, ValueError):  # the supervisor will say what becomes of it
                    if channel is not None:
                        channel.close()
                    channel = None
                    await asyncio.sleep(_RETRY_S)
                    self._wakes.set()
        finally:
            if channel is not None:
                channel.close()

    async def _send(self, channel: Channel, step: int, slot: int, *, is_new: bool) -> None:
        copy = next((copy for copy in self._snapshot.copies() if (copy.step, copy.slot) == (step, slot)), None)
        if copy is None:
            return
        description = self._snapshot.description if is_new else b""
        message = {
            "request": "replicate",
            "step": step,
            "state": copy.state,
            "checksum": copy.checksum,
            "description_bytes": len(description),
        }
        await channel.send(message | self._name, raw=description)
        size = self._snapshot.layout.size_bytes
        await channel.send_file(self._snapshot.fd, offset=self._snapshot.data_offset(slot), count=size)
        await channel.receive()


def _copy_of(kept: Replica, step: int) -> Snapshot | None:
    return next((copy for copy in kept.snapshot.copies() if copy.step == step), None)


async def _send_ranges(channel: Channel, snapshot: SnapshotBuffer, copy: Snapshot, ranges: list[list[int]]) -> None:
    start, end = snapshot.data_offset(copy.slot), snapshot.layout.size_bytes
    if any(first < 0 or size < 0 or first + size > end for first, size in ranges):
        raise ValueError("a range outside of the snapshot")
    await channel.send({"bytes": sum(size for _, size in ranges)})
    for first, size in ranges:
        await channel.send_file(snapshot.fd, offset=start + first, count=size)


def locations_record(replicas: frozenset[ReplicaLocation]) -> list[list[int]]:
    """As JSON; see `locations_from_record`."""
    return sorted([h.generation, h.rank, h.world_size, h.step] for h in replicas)


def locations_from_record(record: list[list[int]]) -> frozenset[ReplicaLocation]:
    """Read what `locations_record` gave."""
    return frozenset(ReplicaLocation(generation=g, rank=r, world_size=w, step=s) for g, r, w, s in record)
