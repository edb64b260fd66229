"""States in the memory of machines: whole or not there, the same bytes wherever they are read, gone when let go."""

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

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge.checkpoint.intervals import ITEM_BYTES, Interval, Layout, pack
from forge.checkpoint.manifest import shape_record
from forge.checkpoint.reader import find_checkpoint
from forge.checkpoint.snapshot_buffer import SnapshotBuffer, create_snapshot_buffer
from forge.checkpoint.storage import open_storage
from forge.elastic.replicas.flush import flush_shard
from forge.elastic.replicas.replicate import Replicator
from forge.elastic.replicas.restore import PeerStateSource, ShardLocation
from forge.elastic.replicas.store import ReplicaStore, locations_from_record, locations_record
from forge.elastic.rpc import Channel, Endpoint, Listener, connect
from forge.elastic.states import ReplicaLocation
from tests.support.checkpoints import layout_of, model_shape, progress, values

SECRET = bytes(32)
NAME = {"generation": 1, "rank": 0, "world_size": 1}
STATE_BYTES = 6 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A store, and where it is asked."""

    store: ReplicaStore
    endpoint: Endpoint

    @property
    def steps(self) -> list[int]:
        """Whole here, of whatever rank."""
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


class Road:
    """Leads to a machine; may be closed to all that follows, or break."""

    def __init__(self, end: Endpoint) -> None:
        self._end, self._port = end, 0
        self._writers: set[asyncio.StreamWriter] = set()
        self.num_passed = 0
        """Bytes that have gone to the machine."""
        self.num_connections = 0
        self._limit = math.inf
        self._moves = asyncio.Event()

    @property
    def endpoint(self) -> Endpoint:
        return ("127.0.0.1", self._port)

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._lead, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def block(self, *, after_bytes: float) -> None:
        """Let no more than so many bytes through, from now on."""
        self._limit = self.num_passed + after_bytes
        self._moves.set()

    @property
    def is_blocked(self) -> bool:
        return self.num_passed >= self._limit

    async def tear(self) -> None:
        """As if the machine that sends had died, or the network."""
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0)

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        far_reader, far_writer = await asyncio.open_connection(*self._end)
        self._writers |= {writer, far_writer}
        with contextlib.suppress(OSError):
            await asyncio.gather(self._pass_on(reader, far_writer), self._pass_back(far_reader, writer))
        for end in (writer, far_writer):
            end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while text := await reader.read(int(min(2**16, max(1, self._limit - self.num_passed)))):
            while self.is_blocked:
                self._moves.clear()
                await self._moves.wait()
            writer.write(text)
            self.num_passed += len(text)
            await writer.drain()
        writer.close()

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while text := await reader.read(2**16):
            writer.write(text)
        writer.close()


async def until(is_so: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.002)


def filled(snapshot: SnapshotBuffer, *, step: int, slot: int, seed: int | None = None) -> bytes:
    """Write a step of random bytes into a slot. Returns: the bytes."""
    body = random.Random(step if seed is None else seed).randbytes(snapshot.layout.size_bytes)
    with snapshot.begin(slot) as data:
        data[:] = body
    snapshot.commit(slot, step=step, state={"progress": asdict(progress(step)), "metrics": [{"step": step}]})
    return body


def hand_on(peer: Replicator, snapshot: SnapshotBuffer, *, step: int) -> None:
    """Write a step, and have it sent."""
    filled(snapshot, step=step, slot=(step - 1) % 2)
    peer.send(step=step, slot=(step - 1) % 2)


def state_of(num_bytes: int = STATE_BYTES) -> SnapshotBuffer:
    return create_snapshot_buffer(
        pack([Interval(kind="master", name="w", start=0, stop=num_bytes // 4, dtype="F32")])
    )


def num_memories() -> int:
    """Descriptors of snapshots' memory in this process."""
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(fd.readlink()))
    return sum("memfd:forge-snapshot" in name for name in names)


@contextlib.asynccontextmanager
async def sending(
    snapshot: SnapshotBuffer, endpoint: Endpoint | None, *, name: Mapping[str, int] = NAME
) -> AsyncIterator[tuple[Replicator, list[int]]]:
    """Sends a snapshot, and the steps of which it was told that they are kept."""
    kept: list[int] = []
    peer = Replicator(endpoint, snapshot, name=dict(name), secret=SECRET, on_replicated=kept.append)
    try:
        yield peer, kept
    finally:
        peer.close()
        await asyncio.sleep(0)


# Copies on another machine


def test_a_copy_on_another_machine_is_bit_equal() -> None:
    async def copy() -> None:
        snapshot = state_of()
        body = filled(snapshot, step=7, slot=1)
        async with machine() as far, sending(snapshot, far.endpoint) as (peer, kept):
            peer.send(step=7, slot=1)
            await until(lambda: kept == [7])
            assert far.store.locations() == {ReplicaLocation(generation=1, rank=0, world_size=1, step=7)}
            there = far.store.find(generation=1, rank=0)
            assert there is not None
            (found,) = there.copies()
            assert there.is_intact(found)
            assert bytes(there.data(found.slot)) == body
            assert found.state == snapshot.copies()[0].state
            assert there.description == snapshot.description

    asyncio.run(copy())


def test_a_copy_counts_as_kept_only_when_it_is_whole() -> None:
    async def copy() -> None:
        snapshot = state_of()
        filled(snapshot, step=7, slot=1)
        async with machine() as far:
            road = Road(far.endpoint)
            await road.open()
            road.block(after_bytes=STATE_BYTES - 1)
            async with sending(snapshot, road.endpoint) as (peer, kept):
                peer.send(step=7, slot=1)
                await until(lambda: road.is_blocked)
                assert (kept, far.steps) == ([], [])
                road.block(after_bytes=math.inf)
                await until(lambda: kept == [7])
                assert far.steps == [7]
            await road.tear()

    asyncio.run(copy())


def test_a_sender_that_dies_in_the_middle_leaves_the_step_before_whole() -> None:
    async def die() -> None:
        snapshot = state_of()
        filled(snapshot, step=1, slot=0)
        second = filled(snapshot, step=2, slot=1)
        async with machine() as far:
            road = Road(far.endpoint)
            await road.open()
            async with sending(snapshot, road.endpoint) as (peer, kept):
                for step, slot in ((1, 0), (2, 1)):
                    peer.send(step=step, slot=slot)
                    await until(lambda step=step: kept[-1:] == [step])  # type: ignore[misc]
                filled(snapshot, step=3, slot=0)
                road.block(after_bytes=STATE_BYTES // 2)
                peer.send(step=3, slot=0)
                await until(lambda: road.is_blocked and far.steps == [2])
                await road.tear()
            there = far.store.find(generation=1, rank=0)
            assert there is not None
            (found,) = there.copies()
            assert (found.step, there.is_intact(found)) == (2, True)
            assert bytes(there.data(found.slot)) == second

    asyncio.run(die())


def test_the_two_newest_steps_of_another_machine_are_kept() -> None:
    async def copy() -> None:
        snapshot = state_of(4096)
        async with machine() as far, sending(snapshot, far.endpoint) as (peer, kept):
            for step in range(1, 6):
                filled(snapshot, step=step, slot=step % 2)
                peer.send(step=step, slot=step % 2)
                await until(lambda step=step: kept == list(range(1, step + 1)))  # type: ignore[misc]
            assert far.steps == [4, 5]

    asyncio.run(copy())


def test_a_machine_that_was_away_is_sent_the_newest_step_when_it_is_back() -> None:
    async def go_away() -> None:
        snapshot = state_of(4096)
        async with machine() as far:
            road = Road(far.endpoint)
            await road.open()
            async with sending(snapshot, road.endpoint) as (peer, kept):
                hand_on(peer, snapshot, step=1)
                await until(lambda: kept == [1])
                await road.tear()
                for step in (2, 3):
                    hand_on(peer, snapshot, step=step)
                await road.open()
                await until(lambda: kept == [1, 3])
                assert far.steps == [1, 3]
            await road.tear()

    asyncio.run(go_away())


def test_where_there_is_no_other_machine_a_step_is_as_safe_as_it_gets_at_once() -> None:
    async def send() -> None:
        async with sending(state_of(4096), None) as (peer, kept):
            peer.send(step=1, slot=0)
            assert kept == [1]

    asyncio.run(send())


def test_another_machine_in_the_place_of_one_that_is_gone_gets_the_newest_step() -> None:
    async def move() -> None:
        snapshot = state_of(4096)
        async with machine() as gone, machine() as other:
            road = Road(gone.endpoint)
            await road.open()
            async with sending(snapshot, road.endpoint) as (peer, kept):
                hand_on(peer, snapshot, step=1)
                await until(lambda: kept == [1])
                await road.tear()
                hand_on(peer, snapshot, step=2)
                await asyncio.sleep(0.1)
                assert kept == [1]
                peer.set_peer(other.endpoint)
                await until(lambda: kept == [1, 2])
                assert other.steps == [2]

    asyncio.run(move())


def test_without_another_machine_a_step_that_waits_is_as_safe_as_it_gets() -> None:
    async def move() -> None:
        snapshot = state_of(4096)
        async with machine() as gone:
            road = Road(gone.endpoint)  # never open
            await road.open()
            endpoint = road.endpoint
            await road.tear()
            async with sending(snapshot, endpoint) as (peer, kept):
                hand_on(peer, snapshot, step=1)
                await asyncio.sleep(0.1)
                assert kept == []
                peer.set_peer(None)
                assert kept == [1]
                peer.send(step=2, slot=1)
                assert kept == [1, 2]

    asyncio.run(move())


# Letting go


def test_forgetting_a_generation_frees_its_memory() -> None:
    async def forget() -> None:
        gc.collect()  # what other tests have left
        before = num_memories()
        async with machine() as far:
            for generation in (1, 2):
                snapshot = state_of(4096)
                filled(snapshot, step=generation, slot=0)
                async with sending(snapshot, far.endpoint, name=NAME | {"generation": generation}) as (peer, kept):
                    peer.send(step=generation, slot=0)
                    await until(lambda: bool(kept))
                snapshot.close()
            own = state_of(4096)
            filled(own, step=1, slot=0)
            far.store.register_buffer(own.fd, generation=1, rank=1, world_size=2)
            of_both = num_memories()
            far.store.drop_before(2)
            assert far.store.locations() == {ReplicaLocation(generation=2, rank=0, world_size=1, step=2)}
            assert far.store.find(generation=1, rank=1) is None
            del own
            assert before < num_memories() < of_both
        assert num_memories() == before

    asyncio.run(forget())


def test_a_generation_that_is_forgotten_while_a_copy_of_it_arrives_leaves_nothing() -> None:
    async def forget() -> None:
        snapshot = state_of()
        filled(snapshot, step=1, slot=0)
        gc.collect()
        before = num_memories()
        async with machine() as far:
            road = Road(far.endpoint)
            await road.open()
            road.block(after_bytes=STATE_BYTES // 2)
            async with sending(snapshot, road.endpoint) as (peer, kept):
                peer.send(step=1, slot=0)
                await until(lambda: road.is_blocked and num_memories() > before)
                far.store.drop_before(2)
                await road.tear()
                await until(lambda: num_memories() == before)
                await road.open()
                road.block(after_bytes=math.inf)
                await until(lambda: road.num_connections >= 3)  # it tries again and again, and is not listened to
                assert (kept, far.steps, num_memories()) == ([], [], before)
            await road.tear()

    asyncio.run(forget())


def test_a_copy_that_arrives_after_its_generation_was_stopped_is_not_taken() -> None:
    async def refuse() -> None:
        snapshot = state_of(4096)
        async with machine() as far, sending(snapshot, far.endpoint) as (peer, kept):
            hand_on(peer, snapshot, step=1)
            await until(lambda: kept == [1])
            far.store.reject_up_to(NAME["generation"])
            hand_on(peer, snapshot, step=2)
            await asyncio.sleep(0.3)
            assert (kept, far.steps) == ([1], [1])

    asyncio.run(refuse())


def test_holdings_survive_json() -> None:
    replicas = frozenset(
        ReplicaLocation(generation=g, rank=r, world_size=3, step=g + r) for g in (1, 2) for r in range(3)
    )
    assert locations_from_record(json.loads(json.dumps(locations_record(replicas)))) == replicas


# Reading a step at another world size


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A state, cut in two ways, and where each of the first pieces lies."""

    kinds: Mapping[tuple[str, str], tuple[str, int]]
    """Type and number of elements, by kind and name."""
    held: Sequence[Layout]
    wanted: Sequence[Layout]
    machines: Sequence[int]
    """By rank: 0 is the machine that reads."""

    def body(self, kind: str, name: str, *, step: int) -> bytes:
        """All bytes of one parameter in one kind."""
        dtype, numel = self.kinds[kind, name]
        return random.Random(f"{kind}/{name}/{step}").randbytes(numel * ITEM_BYTES[dtype])

    def bytes_of(self, layout: Layout, *, step: int) -> bytes:
        """What a rank with this layout holds."""
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


def place_of(holder: Machine, here: Machine, *, rank: int) -> ShardLocation:
    """Where a rank on the machine `here` finds a snapshot of generation 3."""
    own = here.store.find(generation=3, rank=rank)
    snapshot = SnapshotBuffer(os.dup(own.fd)) if own is not None else None
    return ShardLocation(generation=3, rank=rank, snapshot=snapshot, endpoint=None if own else holder.endpoint)


def read_all(assignment: Sequence[ShardLocation], layout: Layout, *, step: int) -> bytes:
    """What a rank with this layout goes on with."""
    memory = bytearray(layout.size_bytes)
    view = memoryview(memory)
    with contextlib.closing(PeerStateSource(assignment, step=step, secret=SECRET)) as origin:
        assert (origin.progress, origin.metrics) == (progress(step), [{"step": step}])
        origin.read((interval, view[at : at + interval.size_bytes]) for interval, at in layout.placed())
    return bytes(memory)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(split=splits(), step=st.sampled_from([4, 5]))
def test_any_number_of_ranks_reads_what_any_other_number_has_copied(split: Split, step: int) -> None:
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
                assignment = [place_of(holder, here, rank=rank) for rank, holder in enumerate(holders)]
                found = await asyncio.to_thread(read_all, assignment, layout, step=step)
                assert found == split.bytes_of(layout, step=step)

    asyncio.run(read())


def part(snapshot: SnapshotBuffer | None, endpoint: Endpoint | None = None, *, rank: int = 0) -> ShardLocation:
    opened = None if snapshot is None else SnapshotBuffer(os.dup(snapshot.fd))
    return ShardLocation(generation=1, rank=rank, snapshot=opened, endpoint=endpoint)


@contextlib.asynccontextmanager
async def holder_of(step: int) -> AsyncIterator[tuple[Machine, SnapshotBuffer]]:
    """A machine with one step of a small state."""
    async with machine() as far:
        snapshot = state_of(4096)
        filled(snapshot, step=step, slot=0)
        far.store.register_buffer(os.dup(snapshot.fd), generation=1, rank=0, world_size=1)
        yield far, snapshot


def test_a_step_that_is_gone_is_an_error_here_and_there() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, snapshot):
            for place in (part(snapshot), part(None, far.endpoint), part(None, far.endpoint, rank=1)):
                with pytest.raises(OSError, match="step 4"):
                    await asyncio.to_thread(PeerStateSource, [place], step=4, secret=SECRET)

    asyncio.run(ask())


def test_a_step_that_goes_while_it_is_read_is_an_error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, snapshot):
            layout, place = snapshot.layout, part(None, far.endpoint)
            origin = await asyncio.to_thread(PeerStateSource, [place], step=5, secret=SECRET)
            wanted = [(layout.intervals[0], memoryview(bytearray(layout.size_bytes)))]
            far.store.drop_before(2)
            with contextlib.closing(origin), pytest.raises(OSError, match="step 5"):
                await asyncio.to_thread(origin.read, wanted)

    asyncio.run(ask())


def test_a_machine_that_is_gone_is_an_error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, _):
            place = part(None, far.endpoint)
        with pytest.raises(OSError, match="refused"):
            await asyncio.to_thread(PeerStateSource, [place], step=5, secret=SECRET)

    asyncio.run(ask())


def test_what_was_read_from_is_let_go_of() -> None:
    async def read() -> None:
        gc.collect()
        before = num_memories()
        async with holder_of(5) as (far, snapshot):
            layout, of_holder = snapshot.layout, num_memories()
            for assignment in ([part(snapshot)], [part(None, far.endpoint)]):
                await asyncio.to_thread(read_all, assignment, layout, step=5)
            del assignment
            assert num_memories() == of_holder
            snapshot.close()
        assert num_memories() == before

    asyncio.run(read())


def test_an_element_that_nobody_holds_is_an_error() -> None:
    async def ask() -> None:
        async with holder_of(5) as (_, snapshot):
            more = Interval(kind="master", name="w", start=1000, stop=1030, dtype="F32")
            with (
                contextlib.closing(PeerStateSource([part(snapshot)], step=5, secret=SECRET)) as origin,
                pytest.raises(ValueError, match="holds 24 of the 30 elements"),
            ):
                origin.read([(more, memoryview(bytearray(120)))])

    asyncio.run(ask())


@pytest.mark.parametrize("ranges", [[[0, 4097]], [[-1, 4]], [[8, -4]], [[0, 4], [10**12, 1]]])
def test_nothing_outside_of_a_snapshot_is_shown(ranges: list[list[int]]) -> None:
    async def ask() -> None:
        async with holder_of(5) as (far, _):
            channel: Channel = await connect(far.endpoint, secret=SECRET)
            await channel.send({"request": "read", "generation": 1, "rank": 0, "step": 5, "ranges": ranges})
            with pytest.raises((OSError, EOFError)):
                await channel.receive()
            channel.close()

    asyncio.run(ask())


# A checkpoint without ranks


def test_a_durable_checkpoint_is_made_of_snapshots_whose_ranks_are_gone(tmp_path: Path) -> None:
    def snapshot_of(rank: int) -> SnapshotBuffer:
        snapshot = create_snapshot_buffer(layout_of(rank, 2), about={"shape": shape_record(model_shape())})
        with snapshot.begin(1) as data:
            for interval, at in snapshot.layout.placed():
                data[at : at + interval.size_bytes] = values(interval, step=3).tobytes()
        snapshot.commit(1, step=3, state={"progress": asdict(progress(3))})
        return snapshot

    async def persist(step: int) -> list[int | None]:
        url, token = str(tmp_path), "aaaaaaaa0001"
        return await asyncio.gather(
            *(
                flush_shard(snapshot_of(rank), step=step, rank=rank, world_size=2, url=url, keep=2, token=token)
                for rank in range(2)
            )
        )

    assert asyncio.run(persist(2)) == [None, None]
    first, second = asyncio.run(persist(3))
    found = find_checkpoint(open_storage(str(tmp_path)), on_skip=lambda *_: None)
    assert found is not None
    assert (found.progress, second) == (progress(3), None)
    assert first == sum(
        path.stat().st_size for path in tmp_path.glob("step-00000003/*") if "manifest" not in path.name
    )
    wanted = Interval(kind="exp_avg", name="embedding.weight", start=5, stop=55, dtype="F32")
    read = bytearray(wanted.size_bytes)
    found.read([(wanted, memoryview(read))])
    assert bytes(read) == values(wanted, step=3).tobytes()
