"""The supervisor at scale with real connections: the CPU time of a membership change, and of heartbeats.

    python -m benchmarks.controller_connections --json FILE

The real supervisor, with its timer, in this process; simulated agents in another one, each with its own
authenticated TCP connection over loopback. They answer at once, and report progress, changed replicas and step
times in every heartbeat. The CPU time is that of the supervisor's process, without the agents'. They share the
machine with it, so the time of a change by the clock is an upper bound: from the end of the lost node's connection
until the last agent has read its start command. It needs two idle cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import time
from typing import Any

from benchmarks.controller_scale import STEPS_PER_GENERATION
from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.elastic.agent_channel import AgentChannel
from forge.elastic.rpc import Message, connect
from forge.elastic.states import MembershipState
from forge.elastic.straggler_watch import StragglerTerms, StragglerWatch
from forge.elastic.supervisor import Supervisor
from forge.pricing.budget import CostLimits, CostMeter
from forge.process import calm_garbage_collector
from tests.support.placement import FixedPlacement

SECRET = bytes(32)
CONNECTING_AT_ONCE = 32
"""An unproved connection is closed after a second."""
LISTENING_S = 10.0
SPARE_FILES = 200
MIN_ANNOUNCED_AGENTS = 64
CLOSED = (OSError, EOFError, ValueError)


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=20)
    parser.add_argument("--agents", type=int, default=9_500)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # HOST:PORT, in the agents' process
    options = parse_options(parser, smallest={"agents": 20})
    _raise_file_limit(options.agents + SPARE_FILES)
    if options.serve is not None:
        asyncio.run(AgentProcess(options.serve, count=options.agents + 1).run())
        return
    calm_garbage_collector()  # as the supervisor actor does
    figures = asyncio.run(measure(options))
    print_table(
        f"The supervisor with real connections; {options.repeats} changes",
        header=["figure", "value"],
        rows=[[name, f"{value:,.3f}"] for name, value in figures.items()],
    )
    write_json(options.json, figures={"controller_connections": figures})


def _raise_file_limit(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        sys.exit(f"{count} open files are needed, but the limit is {hard}: pass a smaller number with --agents")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


async def measure(options: argparse.Namespace) -> dict[str, float]:
    """Connect all agents, then measure announcing, changes and heartbeats."""
    count, placement = options.agents, FixedPlacement(1)
    supervisor = Supervisor(
        MembershipState(min_workers=count, max_workers=count),
        placement=placement,
        record_event=lambda event: None,
        checkpoints="/nowhere",
        meter=CostMeter(CostLimits(usd=1e9), head="head", head_usd_per_hour=1.0, spent_usd=0.0),
        stragglers=StragglerWatch(
            StragglerTerms(replaces=False, global_batch_size=count),
            placement=placement,
            record_event=lambda event: None,
        ),
    )
    host, port = supervisor.listen(host="127.0.0.1", secret=SECRET)
    command = [sys.executable, "-m", "benchmarks.controller_connections", "--serve", f"{host}:{port}"]
    began = time.process_time()
    process = await asyncio.create_subprocess_exec(
        *command, "--agents", str(count), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        agents = _AgentLines(process)
        await agents.wait("started")
        attach_cpu_s = time.process_time() - began
        began = time.process_time()
        if count >= MIN_ANNOUNCED_AGENTS:
            await agents.wait("announced")
        announcing_cpu_s = time.process_time() - began
        decisions_cpu_s, decisions_s = [], []
        for _ in range(options.repeats):
            await asyncio.sleep(0.5 if options.smallest else 2.0)  # the collection of replicas of the last change
            began = time.process_time()
            agents.order("lose")
            decisions_s.append((await agents.wait("started"))["seconds"])
            decisions_cpu_s.append(time.process_time() - began)
        listening_s = 1.0 if options.smallest else LISTENING_S
        before = await agents.ask("count")
        began = time.process_time()
        await asyncio.sleep(listening_s)
        after = await agents.ask("count")
        cpu_s = (time.process_time() - began) / (after["count"] - before["count"])
    finally:
        supervisor.close()
        process.kill()
        await process.wait()
    ordered = sorted(decisions_s)
    return {
        "num_agents": count,
        "attach_cpu_s": attach_cpu_s,
        "announcing_cpu_s": announcing_cpu_s,
        "change_cpu_p50_s": statistics.median(decisions_cpu_s),
        "change_cpu_max_s": max(decisions_cpu_s),
        "change_p50_s": statistics.median(ordered),
        "change_p99_s": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "heartbeats_per_s": after["per_s"],
        "heartbeat_cpu_us": cpu_s * 1e6,
        "heartbeat_cpu_share": cpu_s * after["per_s"],
    }


class _AgentLines:
    """The agents' process: one line for each order and answer."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._orders, self._answers = process.stdin, process.stdout

    def order(self, what: str) -> None:
        self._orders.write(f"{what}\n".encode())

    async def ask(self, what: str) -> dict[str, Any]:
        """Order something, and wait for the answer with its name."""
        self.order(what)
        return await self.wait(what)

    async def wait(self, what: str) -> dict[str, Any]:
        """Wait for an answer; others are passed over."""
        while line := await self._answers.readline():
            answer: dict[str, Any] = json.loads(line)
            if what in answer:
                return answer
        raise RuntimeError("the agents' process has ended")


class AgentProcess:
    """Connects the agents, and carries out orders from standard input."""

    def __init__(self, endpoint: str, *, count: int) -> None:
        host, _, port = endpoint.partition(":")
        self._endpoint, self._count = (host, int(port)), count
        self.agents: dict[int, LoopbackAgent] = {}
        self._connecting = asyncio.Semaphore(CONNECTING_AT_ONCE)
        self._num_connected = 0
        self._lost_at = 0.0
        self._num_started: dict[int, int] = {}
        self._num_announced = 0
        self._num_heartbeats = 0
        self._heartbeats_per_s = 0.0

    async def run(self) -> None:
        """Work until the process is killed."""
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        tasks = [asyncio.ensure_future(self._add()) for _ in range(self._count)]
        tasks.append(asyncio.ensure_future(self._send_heartbeats()))
        while line := (await reader.readline()).decode().strip():
            if line == "count":
                _answer(count=self._num_heartbeats, per_s=self._heartbeats_per_s)
            else:
                self._lost_at = time.monotonic()
                next(agent for agent in self.agents.values() if agent.ranks and 0 not in agent.ranks).close()
                tasks.append(asyncio.ensure_future(self._add()))

    async def _add(self) -> None:
        number = self._num_connected = self._num_connected + 1
        async with self._connecting:
            channel = AgentChannel(await connect(self._endpoint, secret=SECRET))
        agent = self.agents[number] = LoopbackAgent(number, channel, process=self)
        with contextlib.suppress(*CLOSED):
            await agent.serve()
        del self.agents[number]

    def started(self, agent: LoopbackAgent, command: Message) -> None:
        """Note a start command; the last one of a generation has its rank 0 report the first step."""
        generation, world_size = command["generation"], command["world_size"]
        self._num_started[generation] = self._num_started.get(generation, 0) + 1
        if self._num_started[generation] < world_size:
            return
        _answer(started=generation, seconds=time.monotonic() - self._lost_at)
        started = {"generation": generation, "world_size": world_size, "device": "cpu", "peak_flops": 1e12}
        started |= {"peak_source": "none", "seconds": {}}
        first = next(agent for agent in self.agents.values() if 0 in agent.ranks)
        first.channel.send({"report": "started", "started": started})

    def announced(self) -> None:
        """Note the announcement of endpoints."""
        self._num_announced += 1
        if self._num_announced == self._count - 1:
            _answer(announced=self._num_announced)

    async def _send_heartbeats(self) -> None:
        """Send each agent's heartbeat in its turn, at the interval that the supervisor has set."""
        step, position, due, counted_at = 0, 0, 0.0, time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            agents = list(self.agents.values())
            now = time.monotonic()
            rate = len(agents) / agents[0].heartbeat_s if agents else 0.0  # all have the same interval
            due, counted_at = due + rate * (now - counted_at), now
            self._heartbeats_per_s = rate
            for _ in range(min(int(due), len(agents))):
                position = (position + 1) % len(agents)
                step += position == 0
                agents[position].send_heartbeat(step)
                self._num_heartbeats += 1
            due -= int(due)


class LoopbackAgent:
    """One agent, which holds two steps of its own ranks and two of its neighbour's."""

    def __init__(self, number: int, channel: AgentChannel, *, process: AgentProcess) -> None:
        self.channel, self._number, self._process = channel, number, process
        self.ranks: list[int] = []
        self.generation = self.world_size = self._step = 0
        self.heartbeat_s = 0.25

    async def serve(self) -> None:
        """Register, and carry out commands until the connection ends."""
        self.channel.send(
            {
                "report": "register",
                "node": f"node-{self._number}",
                "host": f"10.{self._number // 65536}.{self._number // 256 % 256}.{self._number % 256}",
                "endpoint": [
                    f"10.0.{self._number // 256}.{self._number % 256}",
                    32768 + self._number * 7919 % 28000,
                ],
                "rendezvous_port": 7001,
                "pid": os.getpid(),
                "pids": {},
                "generation": 0,
                "replicas": [],
                "num_slots": 1,
                "num_guaranteed": 1,
                "usd_per_hour": 1.0,
                "is_ready": True,
                "running_ranks": {},
            }
        )
        await self.channel.receive_all(self._execute)

    def close(self) -> None:
        """Be lost."""
        self.channel.close()

    def send_heartbeat(self, step: int) -> None:
        """Report progress; what has changed, too, if it has ranks."""
        self._step = self.generation * STEPS_PER_GENERATION + step
        progress = [[rank, 120, self._step, 400_000_000, 0] for rank in self.ranks]
        heartbeat: Message = {"report": "heartbeat", "generation": self.generation, "ranks": progress}
        if self.ranks:
            heartbeat["replicas"] = self._replicas()
            heartbeat["own_times"] = [[rank, 390_000_000, step] for rank in self.ranks]
            heartbeat["device"] = "NVIDIA H200"
        self.channel.send(heartbeat)

    def _replicas(self) -> list[list[int]]:
        held = [rank for own in self.ranks for rank in (own, (own - 1) % self.world_size)]
        step = max(1, self._step)
        return [[self.generation, rank, self.world_size, of] for rank in held for of in (step - 1, step)]

    def _execute(self, command: Message) -> None:
        match command["command"]:
            case "set_heartbeat":
                self.heartbeat_s = command["heartbeat_s"]
            case "endpoints":
                self._process.announced()
            case "stop":
                stopped = {"report": "stopped", "generation": command["generation"], "replicas": self._replicas()}
                self.channel.send(stopped)
            case "start":
                self.generation, self.world_size = command["generation"], command["world_size"]
                self.ranks = command["ranks"]
                self._process.started(self, command)


def _answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
