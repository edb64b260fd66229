"""A real agent with its fork server and real ranks: they start, train and end on command, and leave nothing
behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.elastic.agent import Agent
from forge.elastic.agent_config import AgentConfig
from forge.elastic.messages import pack
from forge.elastic.replicas.store import locations_from_record
from forge.elastic.rpc import Channel, Endpoint, Listener, Message
from forge.elastic.states import ReplicaLocation
from forge.elastic.workers.fork_client import ForkServerPool
from forge.elastic.workers.status_page import StatusField, StatusPage, create_status_page
from forge.elastic.workers.worker_group import WorkerGroup
from forge.errors import RunError
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

pytestmark = pytest.mark.slow  # over half a minute, to import torch; test_faults covers the same paths


class TestSupervisor:
    """Sends commands to one agent and receives its reports."""

    __test__ = False

    def __init__(self, setup: AgentConfig) -> None:
        self._setup = setup
        self._listener = Listener(host=HOST, secret=SECRET, serve=self._serve)
        self._reports: list[Message] = []
        self._has_report = asyncio.Event()
        self._store_port = 0
        self.channel: Channel | None = None
        self.generation = 0

    async def locate(self) -> Endpoint:
        return self._listener.endpoint

    def close(self) -> None:
        self._listener.close()

    async def command(self, command: str, **details: Any) -> None:
        assert self.channel is not None
        await self.channel.send({"command": command} | details)

    async def expect(self, say: str, **details: Any) -> Message:
        """Wait for a report of this kind; each report is returned once."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                for message in self._reports:
                    if message["report"] == say and all(message[name] == value for name, value in details.items()):
                        self._reports.remove(message)
                        return message
                self._has_report.clear()
                await self._has_report.wait()

    async def start(self, world_size: int, *, parts: Sequence[Message] = (), step: int = 0) -> dict[int, int]:
        """Start the next generation, without `parts` at step 0. Returns: rank → pid."""
        if not parts:
            shutil.rmtree(self._setup.checkpoints, ignore_errors=True)
        self.generation += 1
        self._reports.clear()
        await self.command(
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
            source={
                "generation": parts[0]["generation"],
                "lists": [pack([0, *(1 for _ in parts[1:])])],
                "first": 0,
                "endpoints": pack([[number, *part["endpoint"]] for number, part in enumerate(parts)]),
            }
            if parts
            else None,
            laps={},
            checkpoint_risk=None,
            is_stopping=False,
            number=0,
            num_shard_groups=1,
            parts_per_shard=0,
        )
        await self.expect("rendezvous")
        forked = [await self.expect("forked", generation=self.generation, rank=rank) for rank in range(world_size)]
        return {message["rank"]: message["pid"] for message in forked}

    async def started(self) -> None:
        """Wait until the generation has taken its first step."""
        started = (await self.expect("started"))["started"]
        assert started["generation"] == self.generation

    async def ended(self, rank: int) -> Message:
        """Wait for the end of a rank of the generation."""
        return await self.expect("ended", generation=self.generation, rank=rank)

    async def stop(self) -> frozenset[ReplicaLocation]:
        """Stop the generation. Returns: the replicas of it that the node holds."""
        await self.command("stop", generation=self.generation, keep_replicas=True)
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
                self._reports.append(message)
                self._has_report.set()


class Recorder:
    """Records what ranks report."""

    def __init__(self) -> None:
        self.records: list[tuple[str, Event | StepMetrics]] = []
        self._has_report = asyncio.Event()
        self.failure: RunError | None = None
        """Raised by the next `write`."""

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        if (failure := self.failure) is not None:
            self.failure = None
            raise failure
        self.records += records
        self._has_report.set()

    @property
    def steps(self) -> list[int]:
        """In the order of their reports, without resent ones."""
        return [of.step for what, of in self.records if what == "step" and isinstance(of, StepMetrics)]

    async def until_step(self, step: int) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while max(self.steps, default=0) < step:
                self._has_report.clear()
                await self._has_report.wait()


class AgentUnderTest:
    """One agent that several tests use; its event loop runs while a test waits."""

    def __init__(self, folder: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self.setup = setup_in(folder)
        self.recorder = Recorder()
        self.num_buffers_before = len(buffers())
        """Of other tests."""
        self._children_before = set(psutil.Process().children())
        self.run(self._open())

    def run(self, work: Awaitable[T]) -> T:
        return self._loop.run_until_complete(work)

    def close(self) -> None:
        self.life.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.run(self.life)
        self.supervisor.close()
        self.run(asyncio.sleep(0))
        self._loop.close()

    @property
    def fork_server(self) -> psutil.Process:
        started = set(psutil.Process().children()) - self._children_before
        (process,) = [child for child in started if "forge.elastic.workers.fork_server" in child.cmdline()]
        return process

    async def start(self, world_size: int, *, parts: Sequence[Message] = (), step: int = 0) -> dict[int, int]:
        """See `TestSupervisor.start`."""
        self.recorder.records.clear()
        return await self.supervisor.start(world_size, parts=parts, step=step)

    async def _open(self) -> None:
        self.supervisor = TestSupervisor(self.setup)
        agent = Agent(self.setup, find_supervisor=self.supervisor.locate, recorder=self.recorder)
        self.life = asyncio.ensure_future(agent.run())
        await self.supervisor.expect("register", is_ready=False)
        await self.supervisor.expect("ready", is_ready=True)


def setup_in(folder: Path) -> AgentConfig:
    """A node with four slots, and a small job."""
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


def buffers() -> list[str]:
    """Anonymous memory of forge that this process holds descriptors of."""
    names = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(str(fd.readlink()))
    return [name for name in names if "memfd:forge-" in name]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentUnderTest]:
    agent = AgentUnderTest(tmp_path_factory.mktemp("agent"))
    yield agent
    agent.close()


@pytest.fixture
def own_agent(tmp_path: Path) -> Iterator[AgentUnderTest]:
    """For a test that shuts the agent down."""
    agent = AgentUnderTest(tmp_path)
    yield agent
    agent.close()


def test_fork_server__has_one_thread(agent: AgentUnderTest) -> None:
    assert agent.fork_server.num_threads() == 1


def test_agent__start__generation_trains_to_the_end(agent: AgentUnderTest) -> None:
    async def train() -> None:
        pids = await agent.start(2)
        assert {psutil.Process(pid).ppid() for pid in pids.values()} == {agent.fork_server.pid}
        await agent.supervisor.started()
        for rank in pids:
            ended = await agent.supervisor.ended(rank)
            assert (ended["end"], ended["step"]) == ("done", TOTAL_STEPS)
        await agent.supervisor.expect("checkpoint_committed", step=TOTAL_STEPS)
        assert agent.recorder.steps == list(range(1, TOTAL_STEPS + 1))
        assert [of.step for _, of in agent.recorder.records if isinstance(of, CheckpointSaved)] == [TOTAL_STEPS]
        await agent.supervisor.stop()

    agent.run(train())
    (name,) = [path.name for path in Path(agent.setup.checkpoints).iterdir()]
    assert verify_checkpoint(open_storage(agent.setup.checkpoints), name) is None


def test_agent__stop__ranks_killed_and_replicas_reported(agent: AgentUnderTest) -> None:
    async def stop() -> None:
        ranks = [psutil.Process(pid) for pid in (await agent.start(2)).values()]
        await agent.recorder.until_step(5)
        held = await agent.supervisor.stop()
        assert not any(rank.is_running() for rank in ranks)
        steps = [{replica.step for replica in held if replica.rank == rank} for rank in range(2)]
        assert {replica.world_size for replica in held} == {2}
        assert max(steps[0] & steps[1]) >= 4  # one rank's replica of the last step may be incomplete

    agent.run(stop())


def test_agent__start_from_memory__continues_at_another_world_size(agent: AgentUnderTest) -> None:
    async def change() -> None:
        await agent.start(2)
        await agent.recorder.until_step(5)
        held = await agent.supervisor.stop()
        step = max(replica.step for replica in held if replace(replica, rank=1 - replica.rank) in held)
        endpoint = [HOST, 1]  # never contacted: this agent holds the replicas itself
        parts = [
            {"generation": agent.supervisor.generation, "rank": rank, "endpoint": endpoint} for rank in range(2)
        ]
        await agent.start(3, parts=parts, step=step)
        await agent.recorder.until_step(step + 3)
        assert agent.recorder.steps[:3] == [step + 1, step + 2, step + 3]
        await agent.supervisor.stop()

    agent.run(change())


def test_agent__change_on_gpus__ranks_start_in_processes_that_waited(
    agent: AgentUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs that this machine need not have: their ranks compute on the CPU."""
    monkeypatch.setattr(WorkerGroup, "_device", lambda group, local_rank: "cpu")

    async def change() -> None:
        children = agent.fork_server.children
        await agent.supervisor.command("set_devices", devices=["cuda:2", "cuda:0"])
        waiting = await until(lambda: len(children()) == 2 and {child.pid for child in children()})
        assert set((await agent.start(2)).values()) == waiting
        await agent.recorder.until_step(3)
        next_ones = {child.pid for child in await until(lambda: len(children()) == 4 and children())} - waiting
        held = await agent.supervisor.stop()
        step = max(replica.step for replica in held if replace(replica, rank=1 - replica.rank) in held)
        parts = [
            {"generation": agent.supervisor.generation, "rank": rank, "endpoint": [HOST, 1]} for rank in range(2)
        ]
        assert set((await agent.start(1, parts=parts, step=step)).values()) < next_ones
        await agent.recorder.until_step(step + 2)
        await agent.supervisor.command("set_devices", devices=["cpu"] * 4)
        await agent.supervisor.stop()
        await until(lambda: not children())

    agent.run(change())


def test_agent__gpu_that_cannot_be_used__rank_forked_when_needed(agent: AgentUnderTest) -> None:
    async def start() -> None:
        await agent.supervisor.command("set_devices", devices=["cuda:0"])
        await agent.start(1)
        ended = await agent.supervisor.ended(0)
        await agent.supervisor.command("set_devices", devices=["cpu"] * 4)
        await agent.supervisor.stop()
        assert ended["end"] == "broken" and "cuda" in ended["reason"]

    agent.run(start())


async def until(found: Callable[[], T]) -> T:
    """Wait for something true."""
    async with asyncio.timeout(_PATIENCE_S):
        while not (answer := found()):
            await asyncio.sleep(0.05)
        return answer


def test_agent__drain__no_step_lost(agent: AgentUnderTest) -> None:
    async def leave() -> None:
        await agent.start(2)
        await agent.supervisor.started()
        await agent.supervisor.command("set_flag", generation=agent.supervisor.generation, flag="DRAIN")
        ends = [await agent.supervisor.ended(rank) for rank in range(2)]
        assert {end["end"] for end in ends} == {"drained"}
        (step,) = {end["step"] for end in ends}
        held = await agent.supervisor.stop()
        assert {(replica.rank, replica.step) for replica in held} >= {(0, step), (1, step)}
        assert agent.recorder.steps == list(range(1, step + 1))

    agent.run(leave())


def test_agent__recorder_cannot_write__reported_as_failed_and_records_are_kept(agent: AgentUnderTest) -> None:
    async def fail() -> None:
        await agent.start(1)
        await agent.recorder.until_step(2)
        agent.recorder.failure = RunError("the run's events and metrics cannot be written: disk gone")
        failed = await agent.supervisor.ended(0)
        assert (failed["end"], failed["error"]) == ("failed", "RunError")
        assert failed["reason"] == "the run's events and metrics cannot be written: disk gone"
        await agent.recorder.until_step(6)
        assert agent.recorder.steps == list(range(1, max(agent.recorder.steps) + 1))
        await agent.supervisor.stop()

    agent.run(fail())


def test_agent__rank_killed__reported_as_broken(agent: AgentUnderTest) -> None:
    async def kill() -> None:
        pids = await agent.start(2)
        await agent.recorder.until_step(3)
        os.kill(pids[1], signal.SIGKILL)
        broken = await agent.supervisor.ended(1)
        assert (broken["end"], broken["reason"]) == ("broken", "its process was killed")
        other = await agent.supervisor.ended(0)
        assert other["end"] == "broken"
        assert other["reason"] != broken["reason"]
        held = await agent.supervisor.stop()
        assert {replica.rank for replica in held} == {0, 1}  # also those of the killed rank

    agent.run(kill())


def test_agent__start_with_10000_shards__ranks_are_forked(agent: AgentUnderTest) -> None:
    async def order() -> None:
        parts = [{"generation": 1000, "rank": rank, "endpoint": [HOST, 1]} for rank in range(10_000)]
        await agent.start(4, parts=parts, step=7)
        for rank in range(4):
            ended = await agent.supervisor.ended(rank)
            assert (ended["end"], "refused" in ended["reason"]) == ("broken", True)
        await agent.supervisor.stop()

    agent.run(order())


def test_agent__connection_lost__registers_again_with_its_state(agent: AgentUnderTest) -> None:
    async def lose_connection() -> None:
        pids = await agent.start(2)
        await agent.supervisor.started()
        assert agent.supervisor.channel is not None
        agent.supervisor.channel.close()
        registration = await agent.supervisor.expect("register")
        assert registration["is_ready"]
        assert registration["generation"] == agent.supervisor.generation
        assert registration["running_ranks"] == {"0": 2, "1": 2}
        assert registration["pids"] == {str(rank): pid for rank, pid in pids.items()}
        held = locations_from_record(registration["replicas"])
        assert agent.supervisor.generation in {replica.generation for replica in held}
        await agent.supervisor.stop()

    agent.run(lose_connection())


def test_agent__drop_replicas__frees_memory(agent: AgentUnderTest) -> None:
    async def forget() -> None:
        for _ in range(2):
            await agent.start(2)
            await agent.supervisor.started()
            await agent.supervisor.stop()
        gc.collect()
        before = len(buffers())
        await agent.supervisor.command("drop_replicas", generation=agent.supervisor.generation + 1)
        assert not await agent.supervisor.stop()
        assert len(buffers()) < before

    agent.run(forget())


def test_agent__fork_server_killed__ranks_die_and_it_is_restarted(agent: AgentUnderTest) -> None:
    async def kill() -> None:
        ranks = [psutil.Process(pid) for pid in (await agent.start(2)).values()]
        await agent.supervisor.started()
        agent.fork_server.kill()
        await agent.supervisor.expect("ready", is_ready=False)
        await agent.supervisor.expect("ready", is_ready=True)
        assert survivors(ranks) == []
        for rank in range(2):
            assert (await agent.supervisor.ended(rank))["end"] == "broken"
        await agent.start(1)
        await agent.supervisor.started()
        await agent.supervisor.stop()

    agent.run(kill())


def test_agent__shut_down__no_process_and_no_memory_left(own_agent: AgentUnderTest) -> None:
    agent = own_agent

    async def retire() -> None:
        ranks = [psutil.Process(pid) for pid in (await agent.start(2)).values()]
        fork_server = agent.fork_server
        await agent.supervisor.started()
        await agent.supervisor.command("shut_down")
        async with asyncio.timeout(_PATIENCE_S):
            await agent.life
        assert survivors([fork_server, *ranks]) == []

    async def close() -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while len(buffers()) > agent.num_buffers_before:
                gc.collect()
                await asyncio.sleep(0.02)

    agent.run(retire())
    agent.run(close())


class NullRecorder:
    """A recorder that discards everything."""

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        pass


def run_agent(setup: AgentConfig, endpoint: Endpoint) -> None:
    """Run an agent; the target of a process."""

    async def locate() -> Endpoint:
        return endpoint

    asyncio.run(Agent(setup, find_supervisor=locate, recorder=NullRecorder()).run())


def test_agent__killed__fork_server_and_ranks_die(tmp_path: Path) -> None:
    async def kill() -> None:
        setup = setup_in(tmp_path)
        supervisor = TestSupervisor(setup)
        process = _SPAWN.Process(target=run_agent, args=(setup, await supervisor.locate()))
        process.start()
        try:
            await supervisor.expect("ready", is_ready=True)
            ranks = (await supervisor.start(2)).values()
            await supervisor.started()
            family = {*psutil.Process(process.pid).children(recursive=True), *map(psutil.Process, ranks)}
        finally:
            process.kill()
            process.join()
            supervisor.close()
        assert len(family) == 3
        assert survivors(family) == []

    asyncio.run(kill())


def test_status_page__fields_are_shared_through_the_descriptor() -> None:
    status = create_status_page()
    other = StatusPage(os.dup(status.fd))
    status[StatusField.STEP] = 2**40
    other[StatusField.DRAIN] = 1
    assert (other[StatusField.STEP], status[StatusField.DRAIN], status[StatusField.STOP]) == (2**40, 1, 0)
    for each in (status, other):
        each.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(each.fd)


def test_fork_server_pool__reuses_and_clones_fork_servers(tmp_path: Path) -> None:
    plans = [plan_to_json(tiny_plan(synthetic_corpus(tmp_path / "corpus"), name=name)) for name in ("one", "two")]

    async def use() -> None:
        pool = ForkServerPool(log=tmp_path / "fork-server.log")
        first, second = pool.take(plans[0]), pool.take(plans[1])
        assert (await first.receive() or {}).keys() >= {"ready", "pid"}
        async with asyncio.timeout(5):  # everything is imported already
            message = await second.receive()
        assert message is not None
        assert message["ready"] < 2
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
