"""A real agent with its warm process and real ranks: they come, train and go as told, and nothing stays."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from forge.checkpoint.reader import verify_checkpoint
from forge.checkpoint.storage import open_storage
from forge.elastic.agent import Agent
from forge.elastic.agent_config import AgentConfig
from forge.elastic.replicas.store import locations_from_record
from forge.elastic.rpc import Channel, Endpoint, Listener, Message, pack
from forge.elastic.states import ReplicaLocation
from forge.elastic.workers.fork_client import ForkServerPool
from forge.elastic.workers.status_page import StatusField, StatusPage, create_status_page
from forge.events import CheckpointSaved, Event, StepMetrics
from forge.plan.plan import plan_to_json
from tests.support.command import survivors
from tests.support.jobs import synthetic_corpus, tiny_plan

T = TypeVar("T")
SECRET = bytes(32)
HOST = "127.0.0.1"
TOTAL_STEPS = 60
_PATIENCE_S = 60
_SPAWN = multiprocessing.get_context("spawn")

pytestmark = pytest.mark.slow  # half a minute and more, for the import of torch; test_faults goes the same ways


class Overseer:
    """Says to one agent what a test wants, and hears what it says."""

    def __init__(self, setup: AgentConfig) -> None:
        self._setup = setup
        self._listener = Listener(host=HOST, secret=SECRET, serve=self._serve)
        self._heard: list[Message] = []
        self._has_news = asyncio.Event()
        self._store_port = 0
        self.channel: Channel | None = None
        self.generation = 0

    async def locate(self) -> Endpoint:
        return self._listener.endpoint

    def close(self) -> None:
        self._listener.close()

    async def say(self, command: str, **details: Any) -> None:
        assert self.channel is not None
        await self.channel.send({"command": command} | details)

    async def expect(self, say: str, **details: Any) -> Message:
        """What it says of this kind, once for each time that it is asked for."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                for message in self._heard:
                    if message["report"] == say and all(message[name] == value for name, value in details.items()):
                        self._heard.remove(message)
                        return message
                self._has_news.clear()
                await self._has_news.wait()

    async def start(self, world_size: int, *, parts: Sequence[Message] = (), step: int = 0) -> dict[int, int]:
        """Order the next generation; without parts it begins anew. Returns: the pids of its ranks."""
        if not parts:
            shutil.rmtree(self._setup.checkpoints, ignore_errors=True)
        self.generation += 1
        self._heard.clear()
        await self.say(
            "start",
            generation=self.generation,
            world_size=world_size,
            ranks=list(range(world_size)),
            num_on_host=world_size,
            host=HOST,
            port=self._store_port,
            is_spread=False,
            peer=None,
            step=step,
            source=[parts[0]["generation"], pack([part["endpoint"] for part in parts])] if parts else None,
            laps={},
            is_stopping=False,
        )
        await self.expect("rendezvous")
        forked = [await self.expect("forked", generation=self.generation, rank=rank) for rank in range(world_size)]
        return {message["rank"]: message["pid"] for message in forked}

    async def formed(self) -> None:
        """The generation has made its first step."""
        formed = (await self.expect("started"))["started"]
        assert formed["generation"] == self.generation

    async def ended(self, rank: int) -> Message:
        """How a rank of the generation ended."""
        return await self.expect("ended", generation=self.generation, rank=rank)

    async def stop(self) -> frozenset[ReplicaLocation]:
        """End the generation. Returns: what the machine holds of it."""
        await self.say("stop", generation=self.generation, keep_replicas=True)
        stopped = await self.expect("stopped", generation=self.generation)
        replicas = locations_from_record(stopped["replicas"])
        return frozenset(replica for replica in replicas if replica.generation == self.generation)

    async def _serve(self, channel: Channel) -> None:
        self.channel = channel
        while True:
            message = await channel.receive()
            match message:
                case {"report": "register", "rendezvous_port": port} | {"report": "rendezvous", "port": port}:
                    self._store_port = port
            if message["report"] != "heartbeat":
                self._heard.append(message)
                self._has_news.set()


class Recorder:
    """Remembers what ranks report."""

    def __init__(self) -> None:
        self.news: list[tuple[str, Event | StepMetrics]] = []
        self._has_news = asyncio.Event()

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        self.news += records
        self._has_news.set()

    @property
    def steps(self) -> list[int]:
        """In the order in which they were reported; those that were told again apart."""
        return [of.step for what, of in self.news if what == "step" and isinstance(of, StepMetrics)]

    async def until_step(self, step: int) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while max(self.steps, default=0) < step:
                self._has_news.clear()
                await self._has_news.wait()


class Stage:
    """One agent, which lives on while tests come and go; its event loop runs while one of them waits."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self.setup = setup_in(folder)
        self.recorder = Recorder()
        self.num_memories_before = len(memories())
        """Of other tests."""
        self.run(self._open())

    def run(self, work: Awaitable[T]) -> T:
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self.life.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.run(self.life)
        self.overseer.close()
        self.run(asyncio.sleep(0))
        self._loop.close()

    @property
    def warm_process(self) -> psutil.Process:
        (process,) = [
            child for child in psutil.Process().children() if "forge.elastic.workers.fork_server" in child.cmdline()
        ]
        return process

    async def start(self, world_size: int, *, parts: Sequence[Message] = (), step: int = 0) -> dict[int, int]:
        """See `Overseer.start`."""
        self.recorder.news.clear()
        return await self.overseer.start(world_size, parts=parts, step=step)

    async def _open(self) -> None:
        self.overseer = Overseer(self.setup)
        agent = Agent(self.setup, find_supervisor=self.overseer.locate, recorder=self.recorder)
        self.life = asyncio.ensure_future(agent.run())
        await self.overseer.expect("register", is_ready=False)
        await self.overseer.expect("ready", is_ready=True)


def setup_in(folder: Path) -> AgentConfig:
    """A machine with four assignment, and a small job."""
    changes = {"training__total_steps": TOTAL_STEPS, "checkpoint__snapshot_every": 1}
    plan = tiny_plan(synthetic_corpus(folder / "corpus"), **changes)
    return AgentConfig(
        node="node-1",
        host=HOST,
        num_slots=4,
        num_cores=2,
        num_guaranteed=4,
        devices=("cpu",) * 4,
        run_folder=str(folder / "run"),
        plan_json=plan_to_json(plan),
        checkpoints=str(folder / "checkpoints"),
        keep=2,
        secret=SECRET.hex(),
    )


def memories() -> list[str]:
    """The anonymous memory that this process has descriptors of."""
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(fd.readlink()))
    return [name for name in names if "memfd:forge-" in name]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("stage"))
    yield stage
    stage.close()


def test_the_warm_process_has_one_thread_and_so_may_fork(stage: Stage) -> None:
    assert stage.warm_process.num_threads() == 1


def test_a_generation_trains_the_job_to_its_end(stage: Stage) -> None:
    async def train() -> None:
        pids = await stage.start(2)
        assert {psutil.Process(pid).ppid() for pid in pids.values()} == {stage.warm_process.pid}
        await stage.overseer.formed()
        for rank in pids:
            ended = await stage.overseer.ended(rank)
            assert (ended["end"], ended["step"]) == ("done", TOTAL_STEPS)
        await stage.overseer.expect("checkpoint_committed", step=TOTAL_STEPS)
        assert stage.recorder.steps == list(range(1, TOTAL_STEPS + 1))
        assert [of.step for _, of in stage.recorder.news if isinstance(of, CheckpointSaved)] == [TOTAL_STEPS]
        await stage.overseer.stop()

    stage.run(train())
    (name,) = [path.name for path in Path(stage.setup.checkpoints).iterdir()]
    assert verify_checkpoint(open_storage(stage.setup.checkpoints), name) is None


def test_stopping_kills_the_ranks_and_tells_what_they_have_left(stage: Stage) -> None:
    async def stop() -> None:
        ranks = [psutil.Process(pid) for pid in (await stage.start(2)).values()]
        await stage.recorder.until_step(5)
        held = await stage.overseer.stop()
        assert not any(rank.is_running() for rank in ranks)
        steps = [{replica.step for replica in held if replica.rank == rank} for rank in range(2)]
        assert {replica.world_size for replica in held} == {2}
        assert max(steps[0] & steps[1]) >= 4  # of the last one, one rank's copy may be unfinished

    stage.run(stop())


def test_the_next_generation_goes_on_from_memory_at_another_size(stage: Stage) -> None:
    async def change() -> None:
        await stage.start(2)
        await stage.recorder.until_step(5)
        held = await stage.overseer.stop()
        step = max(replica.step for replica in held if replace(replica, rank=1 - replica.rank) in held)
        endpoint = [HOST, 1]  # of the agent that holds it, which is this one and is not asked
        parts = [{"generation": stage.overseer.generation, "rank": rank, "endpoint": endpoint} for rank in range(2)]
        await stage.start(3, parts=parts, step=step)
        await stage.recorder.until_step(step + 3)
        assert stage.recorder.steps[:3] == [step + 1, step + 2, step + 3]
        await stage.overseer.stop()

    stage.run(change())


def test_ranks_that_are_wished_to_leave_lose_no_step(stage: Stage) -> None:
    async def leave() -> None:
        await stage.start(2)
        await stage.overseer.formed()
        await stage.overseer.say("set_flag", generation=stage.overseer.generation, flag="DRAIN")
        ends = [await stage.overseer.ended(rank) for rank in range(2)]
        assert {end["end"] for end in ends} == {"drained"}
        (step,) = {end["step"] for end in ends}
        held = await stage.overseer.stop()
        assert {(replica.rank, replica.step) for replica in held} >= {(0, step), (1, step)}
        assert stage.recorder.steps == list(range(1, step + 1))

    stage.run(leave())


def test_a_rank_that_is_killed_is_told_to_have_broken(stage: Stage) -> None:
    async def kill() -> None:
        pids = await stage.start(2)
        await stage.recorder.until_step(3)
        os.kill(pids[1], signal.SIGKILL)
        broken = await stage.overseer.ended(1)
        assert (broken["end"], broken["reason"]) == ("broken", "its process was killed")
        other = await stage.overseer.ended(0)
        assert other["end"] == "broken"
        assert other["reason"] != broken["reason"]
        held = await stage.overseer.stop()
        assert {replica.rank for replica in held} == {0, 1}  # the dead one's copies too

    stage.run(kill())


def test_the_orders_of_a_world_of_thousands_reach_the_ranks(stage: Stage) -> None:
    async def order() -> None:
        parts = [{"generation": 1000, "rank": rank, "endpoint": [HOST, 1]} for rank in range(10_000)]
        await stage.start(4, parts=parts, step=7)
        for rank in range(4):
            ended = await stage.overseer.ended(rank)
            assert (ended["end"], "refused" in ended["reason"]) == ("broken", True)
        await stage.overseer.stop()

    stage.run(order())


def test_an_agent_whose_supervisor_is_away_comes_back_and_says_what_it_has(stage: Stage) -> None:
    async def lose_connection() -> None:
        pids = await stage.start(2)
        await stage.overseer.formed()
        assert stage.overseer.channel is not None
        stage.overseer.channel.close()
        hello = await stage.overseer.expect("register")
        assert hello["is_ready"]
        assert hello["generation"] == stage.overseer.generation
        assert hello["running_ranks"] == {"0": 2, "1": 2}
        assert hello["pids"] == {str(rank): pid for rank, pid in pids.items()}
        held = locations_from_record(hello["replicas"])
        assert stage.overseer.generation in {replica.generation for replica in held}
        await stage.overseer.stop()

    stage.run(lose_connection())


def test_what_is_to_be_forgotten_frees_its_memory(stage: Stage) -> None:
    async def forget() -> None:
        for _ in range(2):
            await stage.start(2)
            await stage.overseer.formed()
            await stage.overseer.stop()
        gc.collect()
        before = len(memories())
        await stage.overseer.say("drop_replicas", generation=stage.overseer.generation + 1)
        assert not await stage.overseer.stop()
        assert len(memories()) < before

    stage.run(forget())


def test_where_the_warm_process_dies_its_ranks_die_and_it_is_started_anew(stage: Stage) -> None:
    async def kill() -> None:
        ranks = [psutil.Process(pid) for pid in (await stage.start(2)).values()]
        await stage.overseer.formed()
        stage.warm_process.kill()
        await stage.overseer.expect("ready", is_ready=False)
        await stage.overseer.expect("ready", is_ready=True)
        assert survivors(ranks) == []
        for rank in range(2):
            assert (await stage.overseer.ended(rank))["end"] == "broken"
        await stage.start(1)
        await stage.overseer.formed()
        await stage.overseer.stop()

    stage.run(kill())


def test_an_agent_that_is_sent_home_leaves_no_process_and_no_memory(stage: Stage) -> None:
    async def retire() -> None:
        ranks = [psutil.Process(pid) for pid in (await stage.start(2)).values()]
        warm_process = stage.warm_process
        await stage.overseer.formed()
        await stage.overseer.say("shut_down")
        async with asyncio.timeout(_PATIENCE_S):
            await stage.life
        assert survivors([warm_process, *ranks]) == []

    async def let_go() -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while len(memories()) > stage.num_memories_before:
                gc.collect()
                await asyncio.sleep(0.02)

    stage.run(retire())
    stage.run(let_go())


class Silent:
    """A recorder of no interest."""

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        pass


def be_an_agent(setup: AgentConfig, endpoint: Endpoint) -> None:
    """All of a process's life."""

    async def locate() -> Endpoint:
        return endpoint

    asyncio.run(Agent(setup, find_supervisor=locate, recorder=Silent()).run())


def test_an_agent_that_is_killed_takes_its_warm_process_and_its_ranks_along(tmp_path: Path) -> None:
    async def kill() -> None:
        setup = setup_in(tmp_path)
        overseer = Overseer(setup)
        process = _SPAWN.Process(target=be_an_agent, args=(setup, await overseer.locate()))
        process.start()
        try:
            await overseer.expect("ready", is_ready=True)
            ranks = (await overseer.start(2)).values()
            await overseer.formed()
            family = {*psutil.Process(process.pid).children(recursive=True), *map(psutil.Process, ranks)}
        finally:
            process.kill()
            process.join()
            overseer.close()
        assert len(family) == 3
        assert survivors(family) == []

    asyncio.run(kill())


def test_the_words_of_a_board_are_seen_by_whoever_has_its_descriptor() -> None:
    status = create_status_page()
    other = StatusPage(os.dup(status.fd))
    status[StatusField.STEP] = 2**40
    other[StatusField.DRAIN] = 1
    assert (other[StatusField.STEP], status[StatusField.DRAIN], status[StatusField.STOP]) == (2**40, 1, 0)
    for each in (status, other):
        each.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(each.fd)


def test_a_pool_hands_warm_processes_on_and_forks_others_from_the_first(tmp_path: Path) -> None:
    plans = [plan_to_json(tiny_plan(synthetic_corpus(tmp_path / "corpus"), name=name)) for name in ("one", "two")]

    async def use() -> None:
        pool = ForkServerPool(log=tmp_path / "warm.log")
        first, second = pool.take(plans[0]), pool.take(plans[1])
        assert (await first.receive() or {}).keys() >= {"ready", "pid"}
        async with asyncio.timeout(5):  # it imports nothing any more
            told = await second.receive()
        assert told is not None
        assert told["ready"] < 2
        first.kill()
        assert second.is_alive
        pool.release(second)
        assert pool.has_ready
        assert pool.take(plans[0]) is second
        async with asyncio.timeout(5):
            assert (await second.receive() or {})["epoch"] == 2
        second.kill()
        pool.close()

    before = set(psutil.Process().children(recursive=True))
    asyncio.run(use())
    assert survivors(set(psutil.Process().children(recursive=True)) - before) == []
