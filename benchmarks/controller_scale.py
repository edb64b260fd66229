"""The supervisor of a run on thousands of nodes: how fast it decides, and the CPU time that heartbeats cost it.

    python -m benchmarks.controller_scale --json FILE

The real supervisor, with simulated agents in this process that answer at once. Messages are JSON text, which is
encoded and decoded here as over a network.

    decision      one node is lost: from the end of its connection until the last surviving agent has its start
                  command, including the reports of all others that they have stopped, and their ranks ended
    heartbeats    as many per second as the supervisor asks for, every tenth with changed replicas, and its own
                  ticks: CPU time per second

Every agent holds two steps of its own ranks and two of its neighbour's. One node more than the job needs is
connected, so that the world size stays the same through all changes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.elastic.agent_connections import AgentConnection
from forge.elastic.states import MembershipState, Phase
from forge.elastic.supervisor import Supervisor
from forge.events import GenerationStarted
from forge.pricing.budget import CostLimits, CostMeter
from tests.support.placement import FixedPlacement

SIZES = ((10_000, 1), (4096, 1), (512, 8))
"""(number of agents, ranks of each)."""
TICKS_PER_S = 10
HEARTBEATS_PER_REPLICAS = 10
MAX_LISTENING_S = 60.0
"""Upper bound of one measurement, if the supervisor cannot keep up."""
STEPS_PER_GENERATION = 100
AIM_DECISION_S = 1.0
AIM_ATTACH_CPU_S = 5.0
AIM_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What was measured at one size."""

    num_agents: int
    ranks_per_agent: int
    attach_cpu_s: float
    """CPU time until all agents are attached and have their start commands."""
    decisions_s: tuple[float, ...]
    decisions_cpu_s: tuple[float, ...]
    """The same in CPU time."""
    heartbeats_per_s: float
    cpu_share: float
    """Share of one core, for heartbeats and ticks."""
    quiet_cpu_share: float
    """The same without changed replicas."""

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        ordered = sorted(self.decisions_s)
        return {
            "num_agents": self.num_agents,
            "num_ranks": self.num_agents * self.ranks_per_agent,
            "attach_cpu_s": self.attach_cpu_s,
            "decision_cpu_p50_s": statistics.median(self.decisions_cpu_s),
            "num_changes": len(ordered),
            "decision_p50_s": statistics.median(ordered),
            "decision_p99_s": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "decision_max_s": ordered[-1],
            "heartbeats_per_s": self.heartbeats_per_s,
            "heartbeat_cpu_share": self.cpu_share,
            "heartbeat_cpu_share_without_replicas": self.quiet_cpu_share,
        }


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=30)
    parser.add_argument("--agents", type=int, help="measure only this number of agents, with one rank each")
    options = parse_options(parser, smallest={"agents": 20})
    sizes = SIZES if options.agents is None else ((options.agents, 1),)
    found = []
    for num_agents, ranks_per_agent in sizes:
        found.append(asyncio.run(measure(num_agents, ranks_per_agent, options=options)).figures())
    print_table(
        f"The supervisor at scale; {options.repeats} changes each",
        header=[
            "agents",
            "ranks",
            "decision: CPU s",
            "p50 s",
            "p99 s",
            "max s",
            "heartbeats/s",
            "cores",
            "cores, no replicas",
            "attach CPU s",
        ],
        rows=[
            [
                f"{of['num_agents']:,}",
                f"{of['num_ranks']:,}",
                *(f"{of[f'decision_{which}_s']:.3f}" for which in ("cpu_p50", "p50", "p99", "max")),
                f"{of['heartbeats_per_s']:,.0f}",
                f"{of['heartbeat_cpu_share']:.2f}",
                f"{of['heartbeat_cpu_share_without_replicas']:.2f}",
                f"{of['attach_cpu_s']:.2f}",
            ]
            for of in found
        ],
    )
    print(f"aims: p99 ≤ {AIM_DECISION_S:g} s, < {AIM_SHARE:g} of a core, attach ≤ {AIM_ATTACH_CPU_S:g} s of CPU")
    write_json(options.json, figures={"controller_scale": found[0] | {"sizes": found}})


async def measure(num_agents: int, ranks_per_agent: int, *, options: argparse.Namespace) -> Scale:
    """Measure changes first, then heartbeats of the last generation."""
    cluster = Cluster(num_agents=num_agents, ranks_per_agent=ranks_per_agent)
    began = time.process_time()
    for _ in range(num_agents + 1):
        cluster.add()
    cluster.tick()
    attach_cpu_s = time.process_time() - began
    cluster.start_generation()
    decisions_s, decisions_cpu_s = [], []
    for _ in range(options.repeats):
        began = time.process_time()
        decisions_s.append(cluster.lose_one())
        decisions_cpu_s.append(time.process_time() - began)
        cluster.replace_lost()
    seconds = 1 if options.smallest else 5
    quiet = cluster.cpu_share(seconds=seconds, heartbeats_per_replicas=None)
    return Scale(
        num_agents=num_agents,
        ranks_per_agent=ranks_per_agent,
        attach_cpu_s=attach_cpu_s,
        decisions_s=tuple(decisions_s),
        decisions_cpu_s=tuple(decisions_cpu_s),
        heartbeats_per_s=cluster.heartbeats_per_s,
        cpu_share=cluster.cpu_share(seconds=seconds, heartbeats_per_replicas=HEARTBEATS_PER_REPLICAS),
        quiet_cpu_share=quiet,
    )


class Agent:
    """One node's agent, as the supervisor sees it."""

    def __init__(self, name: str, *, report: Callable[[Agent, str], None], now: float) -> None:
        self.connection = AgentConnection(
            node=name,
            host=f"10.{name}",
            endpoint=(f"10.{name}", 7000),
            rendezvous_port=7001,
            agent_pid=1000,
            send=self._receive,
            close=lambda: None,
            heard_at=now,
        )
        self._report = report
        self.generation = self.world_size = 0
        self.ranks: list[int] = []
        self.held: list[int] = []
        """The ranks whose replicas it holds: its own and its neighbour's."""
        self.heartbeat_s = 0.0
        self.started_at = 0.0

    def registration(self) -> dict[str, Any]:
        return {
            "node": self.connection.node,
            "pids": {},
            "generation": 0,
            "replicas": [],
            "num_slots": 0,
            "num_guaranteed": 0,
            "usd_per_hour": 1.0,
            "is_ready": True,
            "running_ranks": {},
        }

    def replicas(self, step: int) -> list[list[int]]:
        """Locations of two steps of everything it holds."""
        return [[self.generation, rank, self.world_size, of] for rank in self.held for of in (step - 1, step)]

    def heartbeat(self, step: int) -> dict[str, Any]:
        progress = [
            [rank, 120 + rank % 50, 0 if rank else step, 0 if rank else 400_000_000, 0] for rank in self.ranks
        ]
        return {"report": "heartbeat", "generation": self.generation, "ranks": progress}

    def _receive(self, message: Mapping[str, Any]) -> None:
        json.dumps(message)
        match message["command"]:
            case "set_heartbeat":
                self.heartbeat_s = message["heartbeat_s"]
            case "stop":
                replicas = self.replicas(self.generation * STEPS_PER_GENERATION)
                generation = message["generation"]
                self._report(
                    self, json.dumps({"report": "stopped", "generation": generation, "replicas": replicas})
                )
                ended = {"report": "ended", "generation": generation, "end": "broken", "error": None, "step": 0}
                for rank in self.ranks:
                    self._report(self, json.dumps(ended | {"rank": rank, "reason": "it was killed"}))
            case "start":
                self.generation, self.world_size = message["generation"], message["world_size"]
                self.ranks = message["ranks"]
                first = (self.ranks[0] - len(self.ranks)) % self.world_size
                self.held = [*self.ranks, *range(first, first + len(self.ranks))]
                self.started_at = time.perf_counter()


class Cluster:
    """A supervisor and its simulated agents."""

    def __init__(self, *, num_agents: int, ranks_per_agent: int) -> None:
        self._ranks_per_agent = ranks_per_agent
        num_ranks = num_agents * ranks_per_agent
        self._now = 0.0
        self._supervisor = Supervisor(
            MembershipState(min_workers=num_ranks, max_workers=num_ranks),
            placement=FixedPlacement(ranks_per_agent),
            record_event=lambda event: None,
            checkpoints="/nowhere",
            meter=CostMeter(
                CostLimits(usd=1e9, usd_per_hour=1e9), head="head", head_usd_per_hour=1.0, spent_usd=0.0
            ),
            clock=lambda: self._now,
        )
        self._agents: dict[str, Agent] = {}
        self._reports: deque[tuple[Agent, str]] = deque()
        self._num_added = 0

    @property
    def heartbeats_per_s(self) -> float:
        """Of all agents, at the interval that the supervisor has set."""
        return sum(1 / agent.heartbeat_s for agent in self._agents.values())

    def add(self) -> None:
        """Attach another agent."""
        name = f"{self._num_added // 65536}.{self._num_added // 256 % 256}.{self._num_added % 256}"
        self._num_added += 1
        agent = self._agents[name] = Agent(name, report=self._queue_report, now=self._now)
        self._supervisor.attach(agent.connection, registration=agent.registration())

    def _queue_report(self, agent: Agent, text: str) -> None:
        self._reports.append((agent, text))

    def start_generation(self) -> None:
        """Report the first step of the generation."""
        state = self._supervisor.state
        started = GenerationStarted(
            generation=state.generation,
            world_size=len(state.assignment),
            device="cpu",
            peak_flops=1e12,
            peak_source="none",
            seconds={},
        )
        record = {name: getattr(started, name) for name in started.__slots__}
        self._supervisor.receive(
            self._agents[state.assignment[0]].connection, {"report": "started", "started": record}
        )
        assert self._supervisor.state.phase is Phase.TRAINING

    def lose_one(self) -> float:
        """Lose a node. Returns: seconds until the last start command."""
        state = self._supervisor.state
        lost = self._agents.pop(state.assignment[state.generation * 97 % len(state.assignment)])
        began = time.perf_counter()
        self._supervisor.detach(lost.connection, reason="its connection closed")
        while self._reports:
            agent, text = self._reports.popleft()
            self._supervisor.receive(agent.connection, json.loads(text))
        after = self._supervisor.state
        assert (after.phase, after.generation) == (Phase.STARTING, state.generation + 1)
        return max(self._agents[name].started_at for name in after.assignment) - began

    def replace_lost(self) -> None:
        """Begin to train after a loss, and attach another node."""
        self.start_generation()
        self.add()
        self.tick()

    def tick(self) -> None:
        """Let the supervisor's timer expire."""
        self._supervisor.tick()

    def cpu_share(self, *, seconds: float, heartbeats_per_replicas: int | None) -> float:
        """CPU seconds per second of handling the heartbeats of all agents."""
        heartbeats_per_s = self.heartbeats_per_s
        heartbeats = self._heartbeats(
            round(seconds * heartbeats_per_s), heartbeats_per_replicas=heartbeats_per_replicas
        )
        per_tick = max(1, round(heartbeats_per_s / TICKS_PER_S))
        num_received, began_cpu, began = 0, time.process_time(), time.perf_counter()
        for agent, text in heartbeats:
            self._supervisor.receive(agent.connection, json.loads(text))
            num_received += 1
            self._now += 1 / heartbeats_per_s
            if num_received % per_tick == 0:
                self._supervisor.tick()
                if time.perf_counter() - began > MAX_LISTENING_S:
                    break
        assert self._supervisor.state.phase is Phase.TRAINING
        return (time.process_time() - began_cpu) / (num_received / heartbeats_per_s)

    def _heartbeats(self, count: int, *, heartbeats_per_replicas: int | None) -> list[tuple[Agent, str]]:
        """Heartbeats of the agents in turn, as text, with advancing steps."""
        agents = list(self._agents.values())
        reports = []
        for number in range(count):
            agent = agents[number % len(agents)]
            # All agents replicate the same steps and report each once.
            step = agent.generation * STEPS_PER_GENERATION + 1 + number // (HEARTBEATS_PER_REPLICAS * len(agents))
            heartbeat = agent.heartbeat(step)
            if heartbeats_per_replicas is not None and number % heartbeats_per_replicas == 0:
                heartbeat["replicas"] = agent.replicas(step)
            reports.append((agent, json.dumps(heartbeat)))
        return reports


if __name__ == "__main__":
    main()
