"""In-memory replicas: complete or absent, identical wherever they are read, freed when dropped."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import math
import os
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.checkpoint.intervals import ITEM_BYTES, Interval, Layout, pack
from forge.checkpoint.manifest import shape_record
from forge.checkpoint.snapshot_buffer import SnapshotBuffer, create_snapshot_buffer
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import find_checkpoint
from forge.elastic.replicas import restore
from forge.elastic.replicas.flush import flush_shard
from forge.elastic.replicas.replicate import Replicator
from forge.elastic.replicas.restore import PeerStateSource, ShardLocation
from forge.elastic.replicas.store import ReplicaStore, locations_from_record, locations_record
from forge.elastic.rpc import Channel, Endpoint, Listener, connect
from forge.elastic.states import ReplicaLocation
from tests.support.checkpoints import layout_of, model_shape, progress, values
from tests.support.checkpoints import write as write_checkpoint
from tests.support.handshakes import ignore_addresses

SECRET = bytes(32)
NAME = {"generation": 1, "rank": 0, "world_size": 1}
STATE_BYTES = 6 * 2**20


@pytest.fixture(autouse=True)
def allow_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    ignore_addresses(monkeypatch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A replica store and its endpoint."""

    store: ReplicaStore
    endpoint: Endpoint

    @property
    def steps(self) -> list[int]:
        """Steps that are complete here, of all ranks."""
        return sorted(replica.step for replica in self.store.locations())


@contextlib.asynccontextmanager
async def machine() -> AsyncIterator[Machine]:
    store = ReplicaStore(secret=SECRET)
    listener = Listener(host="127.0.0.1", secret=SECRET, serve=store.serve)
    try:
        yield Machine(store=store, endpoint=listener.endpoint)
    finally:
        listener.close()
        await asyncio.sleep(0)
        store.close()


class Proxy:
    """A TCP proxy in front of a node, which can stop forwarding or break."""

    def __init__(self, end: Endpoint) -> None:
        self._end, self._port = end, 0
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_passed = 0
        """Bytes forwarded to the node."""
        self.num_connections = 0
        self._limit = math.inf
        self._moves = asyncio.Event()

    @property
    def endpoint(self) -> Endpoint:
        return ("127.0.0.1", self._port)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def block(self, *, after_bytes: float) -> None:
        """Stop forwarding after `after_bytes` more bytes."""
        self._limit = self.num_passed + after_bytes
        self._moves.set()

    @property
    def is_blocked(self) -> bool:
        return self.num_passed >= self._limit

    async def tear(self) -> None:
        """Close all connections, as if the sender or the network had failed."""
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        far_reader, far_writer = await asyncio.open_connection(*self._end)
        self._writers |= {writer, far_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(
                self._forward_request(reader, far_writer), self._forward_answer(far_reader, writer)
            )
        for end in (writer, far_writer):
            end.close()

    async def _forward_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while text := await reader.read(int(min(2**16, max(1, self._limit - self.num_passed)))):
            while self.is_blocked:
                self._moves.clear()
                await self._moves.wait()
            writer.write(text)
            self.num_passed += len(text)
            await writer.drain()
        writer.close()

    async def _forward_answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while text := await reader.read(2**16):
            writer.write(text)
        writer.close()


async def until(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def filled(snapshot: SnapshotBuffer, *, step: int, slot: int, seed: int | None = None) -> bytes:
    """Write a step of random bytes into a slot. Returns: the bytes."""
    body = random.Random(step if seed is None else seed).randbytes(snapshot.layout.size_bytes)
    with snapshot.begin(slot) as data:
        data[:] = body
    snapshot.commit(slot, step=step, state={"progress": asdict(progress(step)), "metrics": [{"step": step}]})
    return body


def replicate(replicator: Replicator, snapshot: SnapshotBuffer, *, step: int) -> None:
    """Write a step and replicate it."""
    filled(snapshot, step=step, slot=(step - 1) % 2)
    replicator.send(step=step, slot=(step - 1) % 2)


def state_of(num_bytes: int = STATE_BYTES) -> SnapshotBuffer:
    return create_snapshot_buffer(
        pack([Interval(kind="master", name="w", start=0, stop=num_bytes // 4, dtype="F32")])
    )


def num_buffers() -> int:
    """Descriptors of snapshot buffers in this process."""
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(fd.readlink()))
    return sum("memfd:forge-snapshot" in name for name in names)


@contextlib.asynccontextmanager
async def sending(
    snapshot: SnapshotBuffer, endpoint: Endpoint | None, *, name: Mapping[str, int] = NAME
) -> AsyncIterator[tuple[Replicator, list[int]]]:
    """A replicator, and the steps that it has reported as replicated."""
    replicated: list[int] = []
    replicator = Replicator(endpoint, snapshot, name=dict(name), secret=SECRET, on_replicated=replicated.append)
    try:
        yield replicator, replicated
    finally:
        replicator.close()
        await asyncio.sleep(0)


# Replication


def test_replicator__replica_is_bit_identical() -> None:
    async def copy() -> None:
        snapshot = state_of()
        body = filled(snapshot, step=7, slot=1)
        async with machine() as far, sending(snapshot, far.endpoint) as (replicator, replicated):
            replicator.send(step=7, slot=1)
            await until(lambda: replicated == [7])
            assert far.store.locations() == {ReplicaLocation(generation=1, rank=0, world_size=1, step=7)}
            there = far.store.find(generation=1, rank=0)
            assert there is not None
            (found,) = there.snapshots()
            assert there.is_intact(found)
            assert bytes(there.data(found.slot)) == body
            assert found.state == snapshot.snapshots()[0].state
            assert there.description == snapshot.description

    asyncio.run(copy())


def test_replicator__incomplete_replica__not_reported() -> None:
    async def copy() -> None:
        snapshot = state_of()
        filled(snapshot, step=7, slot=1)
        async with machine() as far:
            proxy = Proxy(far.endpoint)
            await proxy.open()
            proxy.block(after_bytes=STATE_BYTES - 1)
            async with sending(snapshot, proxy.endpoint) as (replicator, replicated):
                replicator.send(step=7, slot=1)
                await until(lambda: proxy.is_blocked)
                assert (replicated, far.steps) == ([], [])
                proxy.block(after_bytes=math.inf)
                await until(lambda: replicated == [7])
                assert far.steps == [7]
            await proxy.tear()

    asyncio.run(copy())


def test_replicator__sender_dies__former_step_stays_complete() -> None:
    async def die() -> None:
        snapshot = state_of()
        filled(snapshot, step=1, slot=0)
        second = filled(snapshot, step=2, slot=1)
        async with machine() as far:
            proxy = Proxy(far.endpoint)
            await proxy.open()
            async with sending(snapshot, proxy.endpoint) as (replicator, replicated):
                for step, slot in ((1, 0), (2, 1)):
                    replicator.send(step=step, slot=slot)
                    await until(lambda step=step: replicated[-1:] == [step])  # type: ignore[misc]
                filled(snapshot, step=3, slot=0)
                proxy.block(after_bytes=STATE_BYTES // 2)
                replicator.send(step=3, slot=0)
                await until(lambda: proxy.is_blocked and far.steps == [2])
                await proxy.tear()
            there = far.store.find(generation=1, rank=0)
            assert there is not None
            (found,) = there.snapshots()
            assert (found.step, there.is_intact(found)) == (2, True)
            assert bytes(there.data(found.slot)) == second

    asyncio.run(die())


def test_store__keeps_the_two_newest_steps_of_a_peer() -> None:
    async def copy() -> None:
        snapshot = state_of(4096)
        async with machine() as far, sending(snapshot, far.endpoint) as (replicator, replicated):
            for step in range(1, 6):
                filled(snapshot, step=step, slot=step % 2)
                replicator.send(step=step, slot=step % 2)
                await until(lambda step=step: replicated == list(range(1, step + 1)))  # type: ignore[misc]
            assert far.steps == [4, 5]

    asyncio.run(copy())


def test_replicator__peer_returns__newest_step_is_sent() -> None:
    async def end_peer() -> None:
        snapshot = state_of(4096)
        async with machine() as far:
            proxy = Proxy(far.endpoint)
            await proxy.open()
            async with sending(snapshot, proxy.endpoint) as (replicator, replicated):
                replicate(replicator, snapshot, step=1)
                await until(lambda: replicated == [1])
                await proxy.tear()
                for step in (2, 3):
                    replicate(replicator, snapshot, step=step)
                await proxy.open()
                await until(lambda: replicated == [1, 3])
                assert far.steps == [1, 3]
            await proxy.tear()

    asyncio.run(end_peer())


def test_replicator__no_peer__reported_at_once() -> None:
    async def send() -> None:
        async with sending(state_of(4096), None) as (replicator, replicated):
            replicator.send(step=1, slot=0)
            assert replicated == [1]

    asyncio.run(send())


def test_set_peer__newest_step_is_sent_to_the_new_peer() -> None:
    async def move() -> None:
        snapshot = state_of(4096)
        async with machine() as gone, machine() as other:
            proxy = Proxy(gone.endpoint)
            await proxy.open()
            async with sending(snapshot, proxy.endpoint) as (replicator, replicated):
                replicate(replicator, snapshot, step=1)
                await until(lambda: replicated == [1])
                await proxy.tear()
                replicate(replicator, snapshot, step=2)
                await asyncio.sleep(0.1)
                assert replicated == [1]
                replicator.set_peer(other.endpoint)
                await until(lambda: replicated == [1, 2])
                assert other.steps == [2]

    asyncio.run(move())


def test_set_peer__none__pending_step_is_reported() -> None:
    async def move() -> None:
        snapshot = state_of(4096)
        async with machine() as gone:
            proxy = Proxy(gone.endpoint)  # closed at once
            await proxy.open()
            endpoint = proxy.endpoint
            await proxy.tear()
            async with sending(snapshot, endpoint) as (replicator, replicated):
                replicate(replicator, snapshot, step=1)
                await asyncio.sleep(0.1)
                assert replicated == []
                replicator.set_peer(None)
                assert replicated == [1]
                replicator.send(step=2, slot=1)
                assert replicated == [1, 2]

    asyncio.run(move())


# Dropping replicas


def test_drop_before__frees_memory() -> None:
    async def forget() -> None:
        gc.collect()  # free what other tests have left
        before = num_buffers()
        async with machine() as far:
            for generation in (1, 2):
                snapshot = state_of(4096)
                filled(snapshot, step=generation, slot=0)
                async with sending(snapshot, far.endpoint, name=NAME | {"generation": generation}) as (
                    replicator,
                    replicated,
                ):
                    replicator.send(step=generation, slot=0)
                    await until(lambda: bool(replicated))
                snapshot.close()
            own = state_of(4096)
            filled(own, step=1, slot=0)
            far.store.register_buffer(own.fd, generation=1, rank=1, world_size=2)
            of_both = num_buffers()
            far.store.drop_before(2)
            assert far.store.locations() == {ReplicaLocation(generation=2, rank=0, world_size=1, step=2)}
            assert far.store.find(generation=1, rank=1) is None
            del own
            assert before < num_buffers() < of_both
        assert num_buffers() == before

    asyncio.run(forget())


def test_drop_before__while_receiving__frees_memory() -> None:
    async def forget() -> None:
        snapshot = state_of()
        filled(snapshot, step=1, slot=0)
        gc.collect()
        before = num_buffers()
        async with machine() as far:
            proxy = Proxy(far.endpoint)
            await proxy.open()
            proxy.block(after_bytes=STATE_BYTES // 2)
            async with sending(snapshot, proxy.endpoint) as (replicator, replicated):
                replicator.send(step=1, slot=0)
                await until(lambda: proxy.is_blocked and num_buffers() > before)
                far.store.drop_before(2)
                await proxy.tear()
                await until(lambda: num_buffers() == before)
                await proxy.open()
                proxy.block(after_bytes=math.inf)
                await until(lambda: proxy.num_connections >= 3)  # it retries and is rejected
                assert (replicated, far.steps, num_buffers()) == ([], [], before)
            await proxy.tear()

    asyncio.run(forget())


def test_reject_up_to__replica_not_accepted() -> None:
    async def refuse() -> None:
        snapshot = state_of(4096)
        async with machine() as far, sending(snapshot, far.endpoint) as (replicator, replicated):
            replicate(replicator, snapshot, step=1)
            await until(lambda: replicated == [1])
            far.store.reject_up_to(NAME["generation"])
            replicate(replicator, snapshot, step=2)
            await asyncio.sleep(0.3)
            assert (replicated, far.steps) == ([1], [1])

    asyncio.run(refuse())


def test_locations_record__round_trip() -> None:
    replicas = frozenset(
        ReplicaLocation(generation=g, rank=r, world_size=3, step=g + r) for g in (1, 2) for r in range(3)
    )
    assert locations_from_record(json.loads(json.dumps(locations_record(replicas)))) == replicas


# Restoring at another world size


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A state, divided among ranks in two ways, and the node of each shard of the first division."""

    kinds: Mapping[tuple[str, str], tuple[str, int]]
    """(kind, name) → data type and number of elements."""
    held: Sequence[Layout]
    wanted: Sequence[Layout]
    machines: Sequence[int]
    """By rank: 0 is the node that reads."""

    def body(self, kind: str, name: str, *, step: int) -> bytes:
        """All bytes of one kind of a parameter."""
        dtype, numel = self.kinds[kind, name]
        return random.Random(f"{kind}/{name}/{step}").randbytes(numel * ITEM_BYTES[dtype])

    def bytes_of(self, layout: Layout, *, step: int) -> bytes:
        """The bytes of a rank with this layout."""
        pieces = []
        for interval in layout.intervals:
            item = ITEM_BYTES[interval.dtype]
            body = self.body(interval.kind, interval.name, step=step)
            pieces.append(body[interval.start * item : interval.stop * item])
        return b"".join(pieces)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    names = draw(st.lists(st.sampled_from(["a", "b", "layer/0 w"]), min_size=1, max_size=3, unique=True))
    types = st.sampled_from(["F32", "BF16", "I64", "BOOL"])
    kinds = {
        (kind, name): (draw(types), draw(st.integers(1, 50)))
        for name in names
        for kind in draw(st.sampled_from([("master",), ("master", "exp_avg", "exp_avg_sq"), ("buffer",)]))
    }

    def cut(world_size: int) -> list[Layout]:
        owned: list[list[Interval]] = [[] for _ in range(world_size)]
        for (kind, name), (dtype, numel) in kinds.items():
            inner = st.lists(st.integers(0, numel), min_size=world_size - 1, max_size=world_size - 1)
            cuts = [0, *sorted(draw(inner)), numel]
            for rank in range(world_size):
                piece = Interval(kind=kind, name=name, start=cuts[rank], stop=cuts[rank + 1], dtype=dtype)
                owned[rank].append(piece)
        return [pack(intervals) for intervals in owned]

    held = cut(draw(st.integers(1, 5)))
    machines = draw(st.lists(st.integers(0, 2), min_size=len(held), max_size=len(held)))
    return Split(kinds=kinds, held=held, wanted=cut(draw(st.integers(1, 5))), machines=machines)


def location_of(holder: Machine, here: Machine, *, rank: int) -> ShardLocation:
    """Where a rank on node `here` finds a snapshot of generation 3."""
    own = here.store.find(generation=3, rank=rank)
    snapshot = SnapshotBuffer(os.dup(own.fd)) if own is not None else None
    return ShardLocation(generation=3, rank=rank, snapshot=snapshot, endpoint=None if own else holder.endpoint)


def read_all(locations: Sequence[ShardLocation], layout: Layout, *, step: int) -> bytes:
    """The restored bytes of a rank with this layout."""
    memory = bytearray(layout.size_bytes)
    view = memoryview(memory)
    with contextlib.closing(PeerStateSource(locations, step=step, secret=SECRET)) as source:
        assert (source.progress, source.metrics) == (progress(step), [{"step": step}])
        source.read((interval, view[at : at + interval.size_bytes]) for interval, at in layout.with_offsets())
    return bytes(memory)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(split=splits(), step=st.sampled_from([4, 5]))
def test_peer_state_source__any_world_size_reads_any_other(split: Split, step: int) -> None:
    async def read() -> None:
        async with machine() as here, machine() as second, machine() as third:
            holders = []
            for rank, (layout, number) in enumerate(zip(split.held, split.machines, strict=True)):
                holder = (here, second, third)[number]
                snapshot = create_snapshot_buffer(layout)
                for slot, each in enumerate((4, 5)):
                    with snapshot.begin(slot) as data:
                        data[:] = split.bytes_of(layout, step=each)
                    note = {"progress": asdict(progress(each)), "metrics": [{"step": each}]}
                    snapshot.commit(slot, step=each, state=note)
                holder.store.register_buffer(
                    os.dup(snapshot.fd), generation=3, rank=rank, world_size=len(split.held)
                )
                snapshot.close()
                holders.append(holder)
            for layout in split.wanted:
                locations = [location_of(holder, here, rank=rank) for rank, holder in enumerate(holders)]
                found = await asyncio.to_thread(read_all, locations, layout, step=step)
                assert found == split.bytes_of(layout, step=step)

    asyncio.run(read())


def test_register_buffer__piece_of_another_rank_here__first_is_kept_and_second_closed() -> None:
    store, first, second = ReplicaStore(secret=SECRET), state_of(4096), state_of(4096)
    filled(first, step=5, slot=0)
    for buffer in (first, second):
        store.register_buffer(buffer.fd, **NAME)
    assert store.locations() == {ReplicaLocation(**NAME, step=5)}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second.fd)
    store.close()


def shard(snapshot: SnapshotBuffer | None, endpoint: Endpoint | None = None, *, rank: int = 0) -> ShardLocation:
    opened = None if snapshot is None else SnapshotBuffer(os.dup(snapshot.fd))
    return ShardLocation(generation=1, rank=rank, snapshot=opened, endpoint=endpoint)


@contextlib.asynccontextmanager
async def holder_of(step: int) -> AsyncIterator[tuple[Machine, SnapshotBuffer]]:
    """A node with one step of a small state."""
    async with machine() as far:
        snapshot = state_of(4096)
        filled(snapshot, step=step, slot=0)
        far.store.register_buffer(os.dup(snapshot.fd), generation=1, rank=0, world_size=1)
        yield far, snapshot


def test_peer_state_source__step_missing__error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, snapshot):
            for location in (shard(snapshot), shard(None, far.endpoint)):
                with pytest.raises(OSError, match="step 4"):
                    await asyncio.to_thread(PeerStateSource, [location], step=4, secret=SECRET)

    asyncio.run(ask())


def test_peer_state_source__step_dropped_while_reading__error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, snapshot):
            layout, location = snapshot.layout, shard(None, far.endpoint)
            source = await asyncio.to_thread(PeerStateSource, [location], step=5, secret=SECRET)
            wanted = [(layout.intervals[0], memoryview(bytearray(layout.size_bytes)))]
            far.store.drop_before(2)
            with contextlib.closing(source), pytest.raises(OSError, match="step 5"):
                await asyncio.to_thread(source.read, wanted)

    asyncio.run(ask())


@pytest.mark.parametrize("world_size", [20, 10, 13])
def test_peer_state_source__many_shards__opens_the_nearest_only(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty ranks trained; each rank of another world size needs shard 0 and those that its part overlaps."""
    described: list[int] = []
    describe = restore._RemoteShard.__init__

    def count(shard: restore._RemoteShard, channel: Any, location: ShardLocation, *, step: int) -> None:
        described.append(location.rank)
        describe(shard, channel, location, step=step)

    monkeypatch.setattr(restore._RemoteShard, "__init__", count)
    num_shards, numel = 20, 1300

    def piece(rank: int, of: int) -> Layout:
        start, stop = (numel * edge // of for edge in (rank, rank + 1))
        return pack([Interval(kind="master", name="w", start=start, stop=stop, dtype="F32")])

    def read(rank: int, locations: Sequence[ShardLocation]) -> bytes:
        layout = piece(rank, world_size)
        data = bytearray(layout.size_bytes)
        position = (rank + 0.5) / world_size
        with contextlib.closing(PeerStateSource(locations, step=5, secret=SECRET, position=position)) as source:
            source.read([(layout.intervals[0], memoryview(data))])
        return bytes(data)

    async def ask() -> None:
        whole = random.Random(3).randbytes(4 * numel)
        async with machine() as far:
            for rank in range(num_shards):
                layout = piece(rank, num_shards)
                snapshot = create_snapshot_buffer(layout)
                with snapshot.begin(0) as data:
                    data[:] = whole[4 * layout.intervals[0].start : 4 * layout.intervals[0].stop]
                snapshot.commit(0, step=5, state={"progress": asdict(progress(5))})
                far.store.register_buffer(os.dup(snapshot.fd), generation=1, rank=rank, world_size=num_shards)
                snapshot.close()
            locations = [shard(None, far.endpoint, rank=rank) for rank in range(num_shards)]
            for rank in range(world_size):
                described.clear()
                found = await asyncio.to_thread(read, rank, locations)
                own = piece(rank, world_size).intervals[0]
                assert found == whole[4 * own.start : 4 * own.stop]
                assert len(described) <= 1 + math.ceil(num_shards / world_size) + 1

    asyncio.run(ask())


def test_peer_state_source__shards_on_two_nodes__are_read_at_once() -> None:
    """The second node is asked while the first does not answer yet."""
    body, numel = random.Random(5).randbytes(8000), 1000

    def piece(rank: int) -> Interval:
        return Interval(kind="master", name="w", start=numel * rank, stop=numel * (rank + 1), dtype="F32")

    async def ask() -> None:
        async with machine() as first, machine() as second:
            proxies = [Proxy(far.endpoint) for far in (first, second)]
            for rank, far in enumerate((first, second)):
                await proxies[rank].open()
                snapshot = create_snapshot_buffer(pack([piece(rank)]))
                with snapshot.begin(0) as data:
                    data[:] = body[4 * numel * rank : 4 * numel * (rank + 1)]
                snapshot.commit(0, step=5, state={"progress": asdict(progress(5))})
                far.store.register_buffer(snapshot.fd, generation=1, rank=rank, world_size=2)
            locations = [shard(None, proxy.endpoint, rank=rank) for rank, proxy in enumerate(proxies)]
            source = await asyncio.to_thread(PeerStateSource, locations, step=5, secret=SECRET)
            found = [bytearray(4 * numel) for _ in range(2)]
            wanted = [(piece(rank), memoryview(found[rank])) for rank in range(2)]
            await asyncio.to_thread(source.read, wanted)  # both connections are open now
            found[0][:] = found[1][:] = bytes(4 * numel)
            proxies[0].block(after_bytes=0)
            num_asked = proxies[1].num_passed
            reading = asyncio.ensure_future(asyncio.to_thread(source.read, wanted))
            try:
                await until(lambda: proxies[1].num_passed > num_asked and any(found[1]))
                assert not any(found[0]) and not reading.done()
            finally:
                proxies[0].block(after_bytes=math.inf)
                await reading
            assert found[0] + found[1] == body
            source.close()
            for proxy in proxies:
                await proxy.tear()

    asyncio.run(ask())


def test_peer_state_source__shard_gone__error_when_it_is_needed() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, snapshot):
            more = Interval(kind="master", name="w", start=1000, stop=1030, dtype="F32")
            locations = [shard(snapshot), shard(None, far.endpoint, rank=1)]
            with (
                contextlib.closing(PeerStateSource(locations, step=5, secret=SECRET)) as source,
                pytest.raises(OSError, match="step 5"),
            ):
                await asyncio.to_thread(source.read, [(more, memoryview(bytearray(120)))])

    asyncio.run(ask())


def test_peer_state_source__node_gone__error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, _):
            location = shard(None, far.endpoint)
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(PeerStateSource, [location], step=5, secret=SECRET)

    asyncio.run(ask())


def test_peer_state_source__close__frees_memory() -> None:
    async def read() -> None:
        gc.collect()
        before = num_buffers()
        async with holder_of(5) as (far, snapshot):
            layout, of_holder = snapshot.layout, num_buffers()
            for locations in ([shard(snapshot)], [shard(None, far.endpoint)]):
                await asyncio.to_thread(read_all, locations, layout, step=5)
            del locations
            assert num_buffers() == of_holder
            snapshot.close()
        assert num_buffers() == before

    asyncio.run(read())


def test_peer_state_source__element_missing__error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (_, snapshot):
            more = Interval(kind="master", name="w", start=1000, stop=1030, dtype="F32")
            with (
                contextlib.closing(PeerStateSource([shard(snapshot)], step=5, secret=SECRET)) as source,
                pytest.raises(ValueError, match="holds 24 of the 30 elements"),
            ):
                source.read([(more, memoryview(bytearray(120)))])

    asyncio.run(ask())


@pytest.mark.parametrize("ranges", [[[0, 4097]], [[-1, 4]], [[8, -4]], [[0, 4], [10**12, 1]]])
def test_store__range_outside_of_snapshot__rejected(ranges: list[list[int]]) -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, _):
            channel: Channel = await connect(far.endpoint, secret=SECRET)
            await channel.send({"request": "read", "generation": 1, "rank": 0, "step": 5, "ranges": ranges})
            with pytest.raises((OSError, EOFError)):
                await channel.receive()
            channel.close()

    asyncio.run(ask())


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"request": "read"},
        {"request": "read", "generation": [], "rank": {}, "step": 5},
        {"request": "read", "generation": 1, "rank": 0, "step": 5, "ranges": 3},
        {"request": "read", "generation": 1, "rank": 0, "step": 5, "ranges": [[0, "x"]]},
        {"request": "replicate", "generation": 1, "rank": 7, "description": None},
        {"request": "replicate", "generation": 1, "rank": 7, "description": "{}"},
        {"request": "replicate", "generation": 1, "rank": 7, "description": "[" * 10**5},
        {"request": "replicate", "generation": "x", "rank": 7, "description": ""},
    ],
)
def test_store__invalid_request__connection_closed_without_traceback(
    request_: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, _):
            channel: Channel = await connect(far.endpoint, secret=SECRET)
            await channel.send(request_)
            with pytest.raises((OSError, EOFError)):
                await asyncio.wait_for(channel.receive(), 5)
            channel.close()

    asyncio.run(ask())
    gc.collect()
    assert caplog.records == []


# Flushing to storage


def test_flush_shard__ranks_gone__checkpoint_is_committed(tmp_path: Path) -> None:
    def snapshot_of(rank: int) -> SnapshotBuffer:
        snapshot = create_snapshot_buffer(layout_of(rank, 2), about={"shape": shape_record(model_shape())})
        with snapshot.begin(1) as data:
            for interval, at in snapshot.layout.with_offsets():
                data[at : at + interval.size_bytes] = values(interval, step=3).tobytes()
        snapshot.commit(1, step=3, state={"progress": asdict(progress(3))})
        return snapshot

    async def flush(step: int) -> list[dict[int, int]]:
        url, token = str(tmp_path), "aaaaaaaa0001"
        return await asyncio.gather(
            *(
                flush_shard(snapshot_of(rank), step=step, rank=rank, world_size=2, url=url, keep=2, token=token)
                for rank in range(2)
            )
        )

    assert asyncio.run(flush(2)) == [{}, {}]
    write_checkpoint(str(tmp_path), 1)  # which no event may have recorded
    first, second = asyncio.run(flush(3))
    found = find_checkpoint(open_storage(str(tmp_path)), on_skip=lambda *_: None)
    assert found is not None
    assert (found.progress, second) == (progress(3), {})
    assert first == {
        step: sum(path.stat().st_size for path in folder.iterdir() if "manifest" not in path.name)
        for step in (1, 3)
        for folder in tmp_path.glob(f"step-0000000{step}")
    }
    assert list(first) == [1, 3]
    wanted = Interval(kind="exp_avg", name="embedding.weight", start=5, stop=55, dtype="F32")
    read = bytearray(wanted.size_bytes)
    found.read([(wanted, memoryview(read))])
    assert bytes(read) == values(wanted, step=3).tobytes()
