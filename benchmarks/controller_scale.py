"""The supervisor of a run on thousands of machines: how fast it decides, and what listening costs it.

    python -m benchmarks.controller_scale --json FILE

The real supervisor, with agents that are objects of this process and answer at once; what they say and hear
is JSON text that the supervisor's process decodes and encodes, as it does with a network in between.

    decision      one machine is lost: from its connection's end until the last surviving agent has been
                  given the order to start its ranks, with what each of the others answers in between
    heartbeats    as many a second as the supervisor asks for, every tenth with new replicas, and its own
                  ticks: processor time per second

Every agent holds two steps of its own ranks and two of its neighbour's. One machine more than the job takes
is there, so that a world size is kept through all changes.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.report import benchmark_parser, print_table, write_json
from forge.elastic.agent_connections import AgentConnection
from forge.elastic.states import MembershipState, Phase
from forge.elastic.supervisor import Supervisor
from forge.events import GenerationStarted
from forge.pricing.budget import CostLimits, CostMeter
from tests.support.placement import EndlessClaims

SIZES = ((4096, 1), (512, 8))
"""Agents, and ranks of each."""
TICKS_PER_S = 10
BEATS_PER_HOLDINGS = 10
MOST_LISTENING_S = 60.0
"""A supervisor that is overwhelmed is not listened to for longer."""
STEPS_PER_GENERATION = 100
AIM_DECISION_S = 2.0
AIM_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What was measured at one size."""

    num_agents: int
    ranks_per_agent: int
    attach_s: float
    """Until all agents are there."""
    decisions_s: tuple[float, ...]
    beats_per_s: float
    cpu_share: float
    """Of one core, for heartbeats and ticks."""
    quiet_cpu_share: float
    """Without new replicas."""

    def figures(self) -> dict[str, Any]:
        """As JSON."""
        ordered = sorted(self.decisions_s)
        return {
            "num_agents": self.num_agents,
            "num_ranks": self.num_agents * self.ranks_per_agent,
            "attach_s": self.attach_s,
            "num_changes": len(ordered),
            "decision_p50_s": statistics.median(ordered),
            "decision_p99_s": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "decision_max_s": ordered[-1],
            "heartbeats_per_s": self.beats_per_s,
            "heartbeat_cpu_share": self.cpu_share,
            "heartbeat_cpu_share_without_holdings": self.quiet_cpu_share,
        }


def main() -> None:
    """Measure both at all sizes."""
    parser = benchmark_parser(__doc__, repeats=30)
    parser.add_argument("--agents", type=int, help="only so many, of one rank")
    options = parser.parse_args()
    sizes = SIZES if options.agents is None else ((options.agents, 1),)
    found = []
    for num_agents, ranks_per_agent in sizes:
        found.append(asyncio.run(measure(num_agents, ranks_per_agent, num_changes=options.repeats)).figures())
    print_table(
        f"The supervisor at scale; {options.repeats} changes each",
        header=[
            "agents",
            "ranks",
            "decision: p50 s",
            "p99 s",
            "max s",
            "beats/s",
            "of a core",
            "quiet",
            "attach s",
        ],
        rows=[
            [
                f"{of['num_agents']:,}",
                f"{of['num_ranks']:,}",
                *(f"{of[f'decision_{which}_s']:.3f}" for which in ("p50", "p99", "max")),
                f"{of['heartbeats_per_s']:,.0f}",
                f"{of['heartbeat_cpu_share']:.2f}",
                f"{of['heartbeat_cpu_share_without_holdings']:.2f}",
                f"{of['attach_s']:.2f}",
            ]
            for of in found
        ],
    )
    print(f"aims: p99 ≤ {AIM_DECISION_S:g} s, less than {AIM_SHARE:g} of a core")
    write_json(options.json, figures={"controller_scale": found[0] | {"sizes": found}})


async def measure(num_agents: int, ranks_per_agent: int, *, num_changes: int) -> Scale:
    """Changes first, then heartbeats of the last generation."""
    cluster = Cluster(num_agents=num_agents, ranks_per_agent=ranks_per_agent)
    began = time.perf_counter()
    for _ in range(num_agents + 1):
        cluster.add()
    attach_s = time.perf_counter() - began
    cluster.form()
    decisions_s = tuple(cluster.lose_one() for _ in range(num_changes))
    quiet = cluster.cpu_share(seconds=5, beats_per_holdings=None)
    return Scale(
        num_agents=num_agents,
        ranks_per_agent=ranks_per_agent,
        attach_s=attach_s,
        decisions_s=decisions_s,
        beats_per_s=cluster.beats_per_s,
        cpu_share=cluster.cpu_share(seconds=5, beats_per_holdings=BEATS_PER_HOLDINGS),
        quiet_cpu_share=quiet,
    )


class Agent:
    """One machine's agent, as far as the supervisor sees it."""

    def __init__(self, name: str, *, say: Callable[[Agent, str], None], now: float) -> None:
        self.connection = AgentConnection(
            node=name,
            host=f"10.{name}",
            endpoint=(f"10.{name}", 7000),
            rendezvous_port=7001,
            agent_pid=1000,
            send=self._hear,
            close=lambda: None,
            heard_at=now,
        )
        self._say = say
        self.generation = self.world_size = 0
        self.ranks: list[int] = []
        self.held: list[int] = []
        """Its own ranks and its neighbour's."""
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
        """Two steps of everything it holds."""
        return [[self.generation, rank, self.world_size, of] for rank in self.held for of in (step - 1, step)]

    def beat(self, step: int) -> dict[str, Any]:
        pulses = [
            [rank, 120 + rank % 50, 0 if rank else step, 0 if rank else 400_000_000, 0] for rank in self.ranks
        ]
        return {"report": "heartbeat", "generation": self.generation, "ranks": pulses}

    def _hear(self, message: Mapping[str, Any]) -> None:
        json.dumps(message)
        match message["command"]:
            case "set_heartbeat":
                self.heartbeat_s = message["heartbeat_s"]
            case "stop":
                replicas = self.replicas(self.generation * STEPS_PER_GENERATION)
                answer = {"report": "stopped", "generation": message["generation"], "replicas": replicas}
                self._say(self, json.dumps(answer))
            case "start":
                self.generation, self.world_size = message["generation"], message["world_size"]
                self.ranks = message["ranks"]
                first = (self.ranks[0] - len(self.ranks)) % self.world_size
                self.held = [*self.ranks, *range(first, first + len(self.ranks))]
                self.started_at = time.perf_counter()


class Cluster:
    """Agents and the supervisor that they belong to."""

    def __init__(self, *, num_agents: int, ranks_per_agent: int) -> None:
        self._ranks_per_agent = ranks_per_agent
        num_ranks = num_agents * ranks_per_agent
        self._now = 0.0
        self._supervisor = Supervisor(
            MembershipState(min_workers=num_ranks, max_workers=num_ranks),
            placement=EndlessClaims(ranks_per_agent),
            record_event=lambda event: None,
            checkpoints="/nowhere",
            meter=CostMeter(
                CostLimits(usd=1e9, usd_per_hour=1e9), head="head", head_usd_per_hour=1.0, spent_usd=0.0
            ),
            clock=lambda: self._now,
        )
        self._agents: dict[str, Agent] = {}
        self._said: deque[tuple[Agent, str]] = deque()
        self._num_added = 0

    @property
    def beats_per_s(self) -> float:
        """Of all agents, as they were told."""
        return sum(1 / agent.heartbeat_s for agent in self._agents.values())

    def add(self) -> None:
        """A machine joins."""
        name = f"{self._num_added // 65536}.{self._num_added // 256 % 256}.{self._num_added % 256}"
        self._num_added += 1
        agent = self._agents[name] = Agent(name, say=self._answer, now=self._now)
        self._supervisor.attach(agent.connection, registration=agent.registration())

    def _answer(self, agent: Agent, text: str) -> None:
        self._said.append((agent, text))

    def form(self) -> None:
        """The generation that was started makes its first step."""
        state = self._supervisor.state
        formed = GenerationStarted(
            generation=state.generation,
            world_size=len(state.assignment),
            device="cpu",
            peak_flops=1e12,
            peak_source="none",
            seconds={},
        )
        record = {name: getattr(formed, name) for name in formed.__slots__}
        self._supervisor.receive(
            self._agents[state.assignment[0]].connection, {"report": "started", "started": record}
        )
        assert self._supervisor.state.phase is Phase.TRAINING

    def lose_one(self) -> float:
        """A machine is lost; another comes once the run goes on. Returns: seconds until the last order to start."""
        state = self._supervisor.state
        lost = self._agents.pop(state.assignment[state.generation * 97 % len(state.assignment)])
        began = time.perf_counter()
        self._supervisor.detach(lost.connection, reason="its connection closed")
        while self._said:
            agent, text = self._said.popleft()
            self._supervisor.receive(agent.connection, json.loads(text))
        after = self._supervisor.state
        assert (after.phase, after.generation) == (Phase.STARTING, state.generation + 1)
        decision_s = max(self._agents[name].started_at for name in after.assignment) - began
        self.form()
        self.add()
        return decision_s

    def cpu_share(self, *, seconds: float, beats_per_holdings: int | None) -> float:
        """Processor time per second of listening to all agents at their pace."""
        beats_per_s = self.beats_per_s
        beats = self._beats(round(seconds * beats_per_s), beats_per_holdings=beats_per_holdings)
        per_tick = max(1, round(beats_per_s / TICKS_PER_S))
        num_heard, began_cpu, began = 0, time.process_time(), time.perf_counter()
        for agent, text in beats:
            self._supervisor.receive(agent.connection, json.loads(text))
            num_heard += 1
            self._now += 1 / beats_per_s
            if num_heard % per_tick == 0:
                self._supervisor.tick()
                if time.perf_counter() - began > MOST_LISTENING_S:
                    break
        assert self._supervisor.state.phase is Phase.TRAINING
        return (time.process_time() - began_cpu) / (num_heard / beats_per_s)

    def _beats(self, count: int, *, beats_per_holdings: int | None) -> list[tuple[Agent, str]]:
        """What agents say in turn, as text; their steps go on meanwhile."""
        agents = list(self._agents.values())
        said = []
        for number in range(count):
            agent = agents[number % len(agents)]
            # All copy the same steps, and tell of each once.
            step = agent.generation * STEPS_PER_GENERATION + 1 + number // (BEATS_PER_HOLDINGS * len(agents))
            beat = agent.beat(step)
            if beats_per_holdings is not None and number % beats_per_holdings == 0:
                beat["replicas"] = agent.replicas(step)
            said.append((agent, json.dumps(beat)))
        return said


if __name__ == "__main__":
    main()
