"""The supervisor of a run on thousands of nodes: how fast it decides, and the CPU time that heartbeats cost it.

    python -m benchmarks.controller_scale --json FILE

The real supervisor, with simulated agents in this process that answer at once. Messages are JSON text, which is
encoded and decoded here as over a network; the connections themselves are measured by
`benchmarks.controller_connections`.

    decision      one node is lost: from the end of its connection until the last surviving agent has its start
                  command, including the reports of all others that they have stopped
    heartbeats    as many per second as the supervisor asks for, and its own ticks: CPU time per second. Without
                  changed replicas, with changed replicas and step times in every tenth, and in every one, as when a
                  step takes longer than the interval
    announcing    the CPU time to send all agents the endpoints of all others (`source_shards`), while ranks train;
                  the first decision is also measured before that

What the simulated agents themselves do, mostly to encode their reports, is measured and left out of all figures of
decisions but those that end in `_with_agents`: a real supervisor does not pay it. Its own encoding and decoding is
in all of them.

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.report import benchmark_parser, parse_options, print_table, write_json
from forge.elastic.agent_connections import AgentConnection
from forge.elastic.messages import to_json
from forge.elastic.states import MembershipState, Phase
from forge.elastic.straggler_watch import StragglerTerms, StragglerWatch
from forge.elastic.supervisor import Supervisor
from forge.events import GenerationStarted
from forge.pricing.budget import CostLimits, CostMeter
from forge.process import calm_garbage_collector
from tests.support.placement import FixedPlacement

SIZES = ((10_000, 1), (4096, 1), (512, 8))
"""(number of agents, ranks of each)."""
TICKS_PER_S = 10
HEARTBEATS_PER_REPLICAS = (None, 10, 1)
MAX_LISTENING_S = 60.0
"""Upper bound of one measurement, if the supervisor cannot keep up."""
STEPS_PER_GENERATION = 100
AIM_DECISION_S = 1.0
AIM_ATTACH_CPU_S = 5.0
AIM_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one lost node costs the supervisor, without the simulated agents."""

    seconds: float
    cpu_s: float
    agents_s: float
    """CPU time of the agents, meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What was measured at one size."""

    num_agents: int
    ranks_per_agent: int
    attach_cpu_s: float
    """CPU time until all agents are attached and have their start commands."""
    unannounced: Decision
    """The first one, before the agents know each other's endpoints."""
    announcing_cpu_s: float
    decisions: tuple[Decision, ...]
    heartbeats_per_s: float
    cpu_shares: tuple[float, ...]
    """Share of one core, for heartbeats and ticks, for each of `HEARTBEATS_PER_REPLICAS`."""

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        ordered = sorted(decision.seconds for decision in self.decisions)
        quiet, tenth, every = self.cpu_shares
        return {
            "num_agents": self.num_agents,
            "num_ranks": self.num_agents * self.ranks_per_agent,
            "attach_cpu_s": self.attach_cpu_s,
            "announcing_cpu_s": self.announcing_cpu_s,
            "decision_unannounced_cpu_s": self.unannounced.cpu_s,
            "decision_cpu_p50_s": statistics.median(decision.cpu_s for decision in self.decisions),
            "decision_cpu_max_s": max(decision.cpu_s for decision in self.decisions),
            "decision_cpu_p50_s_with_agents": statistics.median(
                decision.cpu_s + decision.agents_s for decision in self.decisions
            ),
            "num_changes": len(ordered),
            "decision_p50_s": statistics.median(ordered),
            "decision_p99_s": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "decision_max_s": ordered[-1],
            "heartbeats_per_s": self.heartbeats_per_s,
            "heartbeat_cpu_share": tenth,
            "heartbeat_cpu_share_without_replicas": quiet,
            "heartbeat_cpu_share_all_with_replicas": every,
        }


def main() -> None:
    parser = benchmark_parser(__doc__, repeats=30)
    parser.add_argument("--agents", type=int, help="measure only this number of agents, with one rank each")
    options = parse_options(parser, smallest={"agents": 20})
    sizes = SIZES if options.agents is None else ((options.agents, 1),)
    calm_garbage_collector()  # as the supervisor actor does
    found = []
    for num_agents, ranks_per_agent in sizes:
        found.append(asyncio.run(measure(num_agents, ranks_per_agent, options=options)).figures())
    print_table(
        f"The supervisor at scale; {options.repeats} changes each",
        header=[
            "agents",
            "ranks",
            "decision: CPU p50 s",
            "p50 s",
            "p99 s",
            "max s",
            "unannounced s",
            "heartbeats/s",
            "cores: no replicas",
            "1 of 10",
            "all",
            "attach CPU s",
            "announcing",
        ],
        rows=[
            [
                f"{of['num_agents']:,}",
                f"{of['num_ranks']:,}",
                *(
                    f"{of[f'decision_{which}_s']:.3f}"
                    for which in ("cpu_p50", "p50", "p99", "max", "unannounced_cpu")
                ),
                f"{of['heartbeats_per_s']:,.0f}",
                f"{of['heartbeat_cpu_share_without_replicas']:.2f}",
                f"{of['heartbeat_cpu_share']:.2f}",
                f"{of['heartbeat_cpu_share_all_with_replicas']:.2f}",
                f"{of['attach_cpu_s']:.2f}",
                f"{of['announcing_cpu_s']:.2f}",
            ]
            for of in found
        ],
    )
    print(f"aims: p99 ≤ {AIM_DECISION_S:g} s, < {AIM_SHARE:g} of a core, attach ≤ {AIM_ATTACH_CPU_S:g} s of CPU")
    write_json(options.json, figures={"controller_scale": found[0] | {"sizes": found}})


async def measure(num_agents: int, ranks_per_agent: int, *, options: argparse.Namespace) -> Scale:
    """Measure changes first, then heartbeats of the last generation."""
    unannounced = build_cluster(num_agents, ranks_per_agent).lose_one()
    began = time.process_time()
    cluster = build_cluster(num_agents, ranks_per_agent)
    attach_cpu_s = time.process_time() - began
    began = time.process_time()
    cluster.announce()
    announcing_cpu_s = time.process_time() - began
    decisions = []
    for _ in range(options.repeats):
        decisions.append(cluster.lose_one())
        cluster.replace_lost()
    seconds = 1 if options.smallest else 5
    return Scale(
        num_agents=num_agents,
        ranks_per_agent=ranks_per_agent,
        attach_cpu_s=attach_cpu_s,
        unannounced=unannounced,
        announcing_cpu_s=announcing_cpu_s,
        decisions=tuple(decisions),
        heartbeats_per_s=cluster.heartbeats_per_s,
        cpu_shares=tuple(
            cluster.cpu_share(seconds=seconds, heartbeats_per_replicas=every) for every in HEARTBEATS_PER_REPLICAS
        ),
    )


def build_cluster(num_agents: int, ranks_per_agent: int) -> Cluster:
    """Attach all agents, and start the first generation."""
    cluster = Cluster(num_agents=num_agents, ranks_per_agent=ranks_per_agent)
    for _ in range(num_agents + 1):
        cluster.add()
    cluster.tick()
    cluster.start_generation()
    return cluster


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
        self.num_announcements = 0
        """Of endpoints."""
        self.busy_s = 0.0
        """CPU time that it took to encode its reports."""

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

    def _receive(self, message: dict[str, Any]) -> None:
        to_json(message)
        match message["command"]:
            case "set_heartbeat":
                self.heartbeat_s = message["heartbeat_s"]
            case "endpoints":
                self.num_announcements += 1
            case "stop":
                began = time.process_time()
                replicas = self.replicas(self.generation * STEPS_PER_GENERATION)
                stopped = {"report": "stopped", "generation": message["generation"], "replicas": replicas}
                self._report(self, json.dumps(stopped))
                self.busy_s += time.process_time() - began
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
        placement = FixedPlacement(ranks_per_agent)
        self._supervisor = Supervisor(
            MembershipState(min_workers=num_ranks, max_workers=num_ranks),
            placement=placement,
            record_event=lambda event: None,
            checkpoints="/nowhere",
            meter=CostMeter(
                CostLimits(usd=1e9, usd_per_hour=1e9), head="head", head_usd_per_hour=1.0, spent_usd=0.0
            ),
            clock=lambda: self._now,
            stragglers=StragglerWatch(
                StragglerTerms(replaces=False, global_batch_size=num_ranks),
                placement=placement,
                record_event=lambda event: None,
            ),
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

    def lose_one(self) -> Decision:
        """Lose a node, and start the next generation."""
        state = self._supervisor.state
        lost = self._agents.pop(state.assignment[state.generation * 97 % len(state.assignment)])
        busy_s = sum(agent.busy_s for agent in self._agents.values())
        began, began_cpu = time.perf_counter(), time.process_time()
        self._supervisor.detach(lost.connection, reason="its connection closed")
        while self._reports:
            agent, text = self._reports.popleft()
            self._supervisor.receive(agent.connection, json.loads(text))
        after = self._supervisor.state
        assert (after.phase, after.generation) == (Phase.STARTING, state.generation + 1)
        cpu_s = time.process_time() - began_cpu
        agents_s = sum(agent.busy_s for agent in self._agents.values()) - busy_s
        seconds = max(self._agents[name].started_at for name in after.assignment) - began
        return Decision(seconds=seconds - agents_s, cpu_s=cpu_s - agents_s, agents_s=agents_s)

    def announce(self) -> None:
        """Let time pass until all agents have the endpoints of all others."""
        num_before = -1
        while (num_now := sum(agent.num_announcements for agent in self._agents.values())) > num_before:
            num_before = num_now
            self.tick()

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
            # All agents replicate the same steps.
            step = agent.generation * STEPS_PER_GENERATION + 1 + number // len(agents)
            heartbeat = agent.heartbeat(step)
            if heartbeats_per_replicas is not None and number % heartbeats_per_replicas == 0:
                heartbeat["replicas"] = agent.replicas(step)
                heartbeat["own_times"] = [[rank, 390_000_000 + rank, step] for rank in agent.ranks]
                heartbeat["device"] = "NVIDIA H200"
            reports.append((agent, json.dumps(heartbeat)))
        return reports


if __name__ == "__main__":
    main()
