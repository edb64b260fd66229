"""Random histories of a run: nodes, connections, ranks and the supervisor itself fail at any time.

The world is simulated without processes: agents execute commands in command, messages are in transit or lost with
their connection, ranks step together, snapshots are replicated to a peer. Hypothesis chooses the faults;
`membership.decide` must never start a generation wrongly, and must return to training once no more faults happen.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from forge.elastic import membership
from forge.elastic.membership import MAX_FRUITLESS, MAX_STARTUP_FAILURES, RECOVERY_S, YIELD_S, decide
from forge.elastic.states import (
    Action,
    AgentAttached,
    AgentStopped,
    ChangeMembership,
    CheckpointCommitted,
    ClaimSlots,
    DrainGeneration,
    DropReplicas,
    EndReason,
    Event,
    FailRun,
    FinishRun,
    FlushToStorage,
    GenerationReady,
    HangDetected,
    MembershipState,
    NodeLost,
    NodeReady,
    Phase,
    PreemptionNotice,
    RankEnded,
    ReleaseSlots,
    ReplicaLocation,
    ReplicasHeld,
    SlotsChanged,
    StartGeneration,
    StopGeneration,
    StopRequested,
    Tick,
    YieldRequested,
)

TOTAL_STEPS = 300
CALM_ROUNDS = 60
"""Of one second each, in which everything is delivered and executed; a change needs about five."""


@dataclass(frozen=True)
class Layout:
    """What the plan says of each number of ranks."""

    group_size: int = 1
    """Ranks of a group that should be on one node; 1: no groups."""
    is_sharded: bool = False
    """Whether each group holds the whole state."""
    leaves_spare: bool = False
    """Whether slots beyond whole groups get no rank."""

    def num_spare(self, num_slots: int, *, low: int) -> int:
        """Slots without a rank, of so many."""
        spare = num_slots % self.group_size if self.leaves_spare else 0
        return spare if num_slots - spare >= low else 0

    def num_shard_groups(self, world_size: int) -> int:
        is_whole = world_size % self.group_size == 0
        return world_size // self.group_size if self.is_sharded and is_whole and self.group_size > 1 else 1

    def state(self, *, low: int, high: int, **fields: Any) -> MembershipState:
        """The state of a new supervisor."""
        sizes = range(low, high + 1)
        return MembershipState(
            min_workers=low,
            max_workers=high,
            num_spare={size: self.num_spare(size, low=low) for size in sizes},
            group_sizes={size: self.group_size for size in sizes if size % self.group_size == 0},
            num_shard_groups={size: self.num_shard_groups(size) for size in sizes},
            **fields,
        )


@dataclass(frozen=True)
class SetFlag:
    """The command to set a control flag of rank 0."""

    generation: int
    is_stop: bool


@dataclass
class Rank:
    """A process."""

    generation: int
    is_hung: bool = False


@dataclass
class Machine:
    """An agent, its ranks, its memory, and its connection to the supervisor."""

    name: str
    num_slots: int
    num_guaranteed: int
    is_ready: bool
    is_alive: bool = True
    is_connected: bool = False
    is_attached: bool = False
    """The supervisor has received the registration of this connection."""
    to_agent: deque[Action | SetFlag] = field(default_factory=deque)
    to_supervisor: deque[Event] = field(default_factory=deque)
    generation: int = 0
    ranks: dict[int, Rank] = field(default_factory=dict)
    store: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """(generation, number of the snapshot) → the steps of its complete snapshots, at most two."""
    dropped_before: int = 0
    refused: int = 0
    preempted_at: float | None = None

    def report(self, event: Event) -> None:
        if self.is_connected:
            self.to_supervisor.append(event)


@dataclass
class Generation:
    """The true state of a generation."""

    start: StartGeneration
    step: int
    pieces: tuple[tuple[int, ...], ...]
    """rank → the numbers of the snapshots that it takes, see `is_sent`."""
    num_pieces: int
    peers: dict[str, str | None]
    begun: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    copying: dict[int, int] = field(default_factory=dict)
    """rank → the step that is being replicated."""
    has_started: bool = False
    is_disturbed: bool = False
    """A node was lost before its last rank had ended."""
    was_cut_off: bool = False
    """A node of it continued without the supervisor."""
    is_draining: bool = False
    is_stopping: bool = False

    def is_sent(self, piece: int) -> bool:
        """Whether a copy of a snapshot is sent to another node."""
        return piece == 0 or not self.start.parts_per_shard


def pieces_of(start: StartGeneration) -> tuple[tuple[tuple[int, ...], ...], int]:
    """The snapshots of each rank, and how many there are; see `forge.train.snapshot_pieces`."""
    world_size, parts = len(start.assignment), start.parts_per_shard
    if not parts:
        return tuple((rank,) for rank in range(world_size)), world_size
    size = world_size // start.num_shard_groups
    common = [1 + rank % size * parts + rank // size % parts for rank in range(world_size)]
    return tuple((0, piece) if rank == 0 else (piece,) for rank, piece in enumerate(common)), 1 + size * parts


class World:
    """The simulated cluster, and the supervisor, which knows only what is reported."""

    def __init__(self, *, low: int, high: int, snapshot_every: int, layout: Layout | None = None) -> None:
        self.now = 0.0
        self.layout = layout or Layout()
        self.state = self.layout.state(low=low, high=high)
        self.snapshot_every = snapshot_every
        self.machines: dict[str, Machine] = {}
        self.generations: dict[int, Generation] = {}
        self.stored_step = 0
        self.to_flush: dict[tuple[int, int, int], set[tuple[str, int]]] = {}
        self.is_stop_requested = False
        self.is_over = False
        self.has_released = False
        self.reported: set[int] = set()
        self.last_started = 0

    # --- the supervisor

    def apply(self, event: Event) -> None:
        if self.is_over:
            return
        if isinstance(event, NodeLost) and self.state.assignment:
            self.generations[self.state.generation].is_disturbed = True
        before = self.state
        self.state, actions = decide(before, event, now=self.now)
        if (before.phase, self.state.phase) == (Phase.STARTING, Phase.TRAINING):
            self.last_started = self.state.generation
        for action in actions:
            self.perform(action)

    def perform(self, action: Action) -> None:
        match action:
            case StartGeneration():
                self.start(action)
            case StopGeneration(node=name):
                self.send(name, action)
            case DrainGeneration():
                self.set_flag(is_stop=False)
            case DropReplicas(generation=generation):
                assert any(whole.generation == generation for whole in complete_steps(known(self.state)))
                for name in self.state.nodes:
                    self.send(name, action)
            case FlushToStorage():
                self.flush(action)
            case ChangeMembership(generation=generation):
                assert generation not in self.reported, "a change was reported twice"
                self.reported.add(generation)
            case ReleaseSlots():
                self.has_released = True
            case ClaimSlots():
                self.has_released = False
            case FinishRun(step=step):
                self.is_over = True
                assert step <= self.stored_step
                assert self.is_stop_requested or step == TOTAL_STEPS
                assert newest(complete_steps(known(self.state))) <= step
            case FailRun(reason=reason) if "was kept" in reason:
                self.is_over = True
                assert len(self.generations) >= MAX_FRUITLESS
                assert newest(complete_steps(known(self.state))) <= self.state.from_step
            case FailRun():
                self.is_over = True
                since = [g for number, g in self.generations.items() if number > self.last_started]
                assert sum(not g.is_disturbed for g in since) >= MAX_STARTUP_FAILURES, (
                    "a lost machine is no failure"
                )

    def start(self, start: StartGeneration) -> None:
        for name in self.state.nodes:
            machine = self.machines[name]
            if machine.is_attached:
                assert not machine.ranks, f"{name} still has ranks of generation {machine.generation}"
        assert start.generation > max(self.generations, default=0)
        assert self.state.min_workers <= len(start.assignment) <= self.state.max_workers
        for name in start.assignment:
            node = self.state.nodes[name]
            assert node.is_ready
            assert start.assignment.count(name) <= node.num_slots
            assert node.preempted_at is None or node.preempted_at > self.now
        assert start.step == max(self.state.stored_step, newest(complete_steps(known(self.state))))
        assert start.step >= newest(self.reachable()), "memory holds a newer step"
        self.check_layout(start)
        names = list(dict.fromkeys(start.assignment))
        spare = next((name for name in self.state.nodes if name not in names), None)
        ring = dict(zip(names, [*names[1:], names[0]], strict=True)) if len(names) > 1 else {names[0]: spare}
        pieces, num_pieces = pieces_of(start)
        self.generations[start.generation] = Generation(
            start=start,
            step=start.step,
            pieces=pieces,
            num_pieces=num_pieces,
            peers=dict(ring),
            is_stopping=self.state.is_stopping,
        )
        for name in names:
            self.send(name, start)

    def check_layout(self, start: StartGeneration) -> None:
        """Groups and spare slots are those of the plan; every snapshot that is not sent is on two nodes."""
        ranks = start.assignment
        assert start.num_spare == self.layout.num_spare(len(ranks) + start.num_spare, low=self.state.min_workers)
        assert start.num_shard_groups == self.layout.num_shard_groups(len(ranks))
        groups = [ranks[at : at + self.layout.group_size] for at in range(0, len(ranks), self.layout.group_size)]
        is_whole = len(ranks) % self.layout.group_size == 0
        assert start.num_split_groups == (sum(len(set(group)) > 1 for group in groups) if is_whole else 0)
        if start.parts_per_shard:
            pieces, num_pieces = pieces_of(start)
            for piece in range(1, num_pieces):
                assert len({name for name, own in zip(ranks, pieces, strict=True) if piece in own}) > 1

    def reachable(self) -> set[ReplicaLocation]:
        """The complete steps in the memory of connected nodes, reported or not."""
        held = {h for m in self.machines.values() if m.is_attached for h in self.replicas(m)}
        return {whole for whole in complete_steps(held) if not self.generations[whole.generation].was_cut_off}

    def flush(self, command: FlushToStorage) -> None:
        asked = set()
        for rank in range(command.world_size):
            wanted = ReplicaLocation(
                generation=command.generation, rank=rank, world_size=command.world_size, step=command.step
            )
            asked.add((next(name for name, node in self.state.nodes.items() if wanted in node.replicas), rank))
        self.to_flush[command.step, command.generation, command.world_size] = asked
        for name in {name for name, _ in asked}:
            self.send(name, command)

    def send(self, name: str, message: Action | SetFlag) -> None:
        machine = self.machines.get(name)
        if machine is not None and machine.is_attached:
            machine.to_agent.append(message)

    def stop(self) -> None:
        self.is_stop_requested = True
        self.apply(StopRequested())
        self.set_flag(is_stop=True)

    def set_flag(self, *, is_stop: bool) -> None:
        if self.state.assignment:
            self.send(self.state.assignment[0], SetFlag(generation=self.state.generation, is_stop=is_stop))

    def restart_supervisor(self) -> None:
        for machine in self.machines.values():
            self.cut(machine)
        self.state = self.layout.state(
            low=self.state.min_workers,
            high=self.state.max_workers,
            former_generation=max(self.generations, default=0),
            stored_step=self.stored_step,
            recovery_deadline=self.now + RECOVERY_S,
        )
        self.reported.clear()
        self.has_released = False

    def lose_silent_nodes(self) -> None:
        for name in list(self.state.nodes):
            if not self.machines[name].is_connected:
                self.apply(NodeLost(node=name, reason="silence"))

    # --- connections

    def cut(self, machine: Machine) -> None:
        for rank in machine.ranks.values():
            self.generations[rank.generation].was_cut_off = True
        machine.is_connected = machine.is_attached = False
        machine.to_agent.clear()
        machine.to_supervisor.clear()

    def connect(self, machine: Machine) -> None:
        machine.is_connected = True
        worlds = {rank: len(self.generations[r.generation].start.assignment) for rank, r in machine.ranks.items()}
        machine.report(
            AgentAttached(
                node=machine.name,
                num_slots=machine.num_slots,
                num_guaranteed=machine.num_guaranteed,
                is_ready=machine.is_ready,
                replicas=self.replicas(machine),
                generation=machine.generation,
                running_ranks=worlds,
            )
        )
        if machine.preempted_at is not None:
            machine.report(PreemptionNotice(node=machine.name, preempted_at=machine.preempted_at))

    def deliver(self, machine: Machine) -> None:
        """Deliver one message to the supervisor."""
        event = machine.to_supervisor.popleft()
        if isinstance(event, AgentAttached):
            machine.is_attached = True
        self.apply(event)
        if isinstance(event, AgentAttached) and self.state.phase is Phase.DRAINING:
            self.set_flag(is_stop=False)
        if isinstance(event, AgentAttached) and self.state.is_stopping:
            self.set_flag(is_stop=True)

    # --- agents

    def execute(self, machine: Machine) -> None:
        """Let an agent execute one command."""
        match machine.to_agent.popleft():
            case StartGeneration() as start:
                self.begin_ranks(machine, start)
            case StopGeneration(generation=generation, keep_replicas=keep_replicas):
                machine.refused = max(machine.refused, generation - keep_replicas)
                for rank in [rank for rank, r in machine.ranks.items() if r.generation <= generation]:
                    self.end_rank(machine, rank)
                machine.report(
                    AgentStopped(node=machine.name, generation=generation, replicas=self.replicas(machine))
                )
            case SetFlag(generation=generation, is_stop=is_stop):
                if 0 in machine.ranks and machine.ranks[0].generation == generation:
                    self.generations[generation].is_stopping |= is_stop
                    self.generations[generation].is_draining |= not is_stop
            case DropReplicas(generation=generation):
                machine.dropped_before = max(machine.dropped_before, generation)
                machine.store = {key: steps for key, steps in machine.store.items() if key[0] >= generation}
            case FlushToStorage() as command:
                self.write_parts(machine, command)

    def begin_ranks(self, machine: Machine, start: StartGeneration) -> None:
        machine.generation = start.generation
        for rank, name in enumerate(start.assignment):
            if name == machine.name:
                machine.ranks[rank] = Rank(generation=start.generation)
                self.generations[start.generation].begun.add(rank)
                if not machine.is_ready:
                    self.break_rank(machine, rank)

    def end_rank(self, machine: Machine, rank: int) -> None:
        generation = self.generations[machine.ranks.pop(rank).generation]
        generation.gone.add(rank)
        generation.copying.pop(rank, None)

    def break_rank(self, machine: Machine, rank: int) -> None:
        of = machine.ranks[rank].generation
        self.end_rank(machine, rank)
        machine.report(RankEnded(generation=of, rank=rank, end=EndReason.BROKEN, reason="it was killed"))

    def write_parts(self, machine: Machine, command: FlushToStorage) -> None:
        key = (command.step, command.generation, command.world_size)
        missing = self.to_flush.get(key, set())
        for name, rank in list(missing):
            if name == machine.name and command.step in machine.store.get((command.generation, rank), []):
                missing.discard((name, rank))
        if key in self.to_flush and not missing:
            self.stored_step = max(self.stored_step, command.step)
            machine.report(CheckpointCommitted(step=command.step))

    def replicas(self, machine: Machine) -> frozenset[ReplicaLocation]:
        return frozenset(
            ReplicaLocation(generation=g, rank=piece, world_size=self.generations[g].num_pieces, step=step)
            for (g, piece), steps in machine.store.items()
            for step in steps
        )

    def die(self, machine: Machine) -> None:
        for rank in list(machine.ranks):
            self.end_rank(machine, rank)
        machine.is_alive, machine.store = False, {}
        self.cut(machine)

    def make_ready(self, machine: Machine) -> None:
        machine.is_ready = True
        machine.report(NodeReady(node=machine.name))

    # --- ranks

    def members(self, number: int) -> dict[int, Machine]:
        return {
            rank: machine
            for machine in self.machines.values()
            for rank, r in machine.ranks.items()
            if r.generation == number
        }

    def can_step(self, number: int) -> bool:
        members, generation = self.members(number), self.generations[number]
        return len(members) == len(generation.start.assignment) and not any(
            machine.ranks[rank].is_hung for rank, machine in members.items()
        )

    def step(self, number: int, *, saves: bool = False) -> None:
        """Let all ranks of a generation take a step together."""
        generation, members = self.generations[number], self.members(number)
        if not generation.has_started and not self.load(number):
            for rank, machine in members.items():
                self.break_rank(machine, rank)
            return
        if generation.step < TOTAL_STEPS:
            generation.step += 1
        if not generation.has_started:
            generation.has_started = True
            members[0].report(GenerationReady(generation=number))
        if generation.step == TOTAL_STEPS or generation.is_stopping:
            self.save(number)
            self.end_all(number, EndReason.DONE)
        elif generation.is_draining:
            self.begin_replication(number)
            self.finish_replication(number)
            self.end_all(number, EndReason.DRAINED)
        elif generation.step % self.snapshot_every == 0:
            self.begin_replication(number)
            if saves:
                self.finish_replication(number)
                self.save(number)

    def load(self, number: int) -> bool:
        """Whether the state to continue from is where the start command says."""
        generation = self.generations[number]
        if generation.start.source is None:
            generation.step = self.stored_step
            return True
        of, world_size = generation.start.source
        held = {
            rank
            for machine in self.machines.values()
            for (g, rank), steps in machine.store.items()
            if g == of and generation.start.step in steps
        }
        return held == set(range(world_size))

    def save(self, number: int) -> None:
        self.stored_step = max(self.stored_step, self.generations[number].step)
        self.members(number)[0].report(CheckpointCommitted(step=self.stored_step))

    def end_all(self, number: int, end: EndReason) -> None:
        for rank, machine in self.members(number).items():
            self.end_rank(machine, rank)
            machine.report(RankEnded(generation=number, rank=rank, end=end, step=self.generations[number].step))

    def begin_replication(self, number: int) -> None:
        """Start replication: the slot is incomplete until it ends; the previous step stays complete."""
        self.finish_replication(number)
        for rank, machine in self.members(number).items():
            for piece, holder in self.copies(number, rank, machine):
                if (number, piece) in holder.store:
                    holder.store[number, piece] = holder.store[number, piece][-1:]
            self.generations[number].copying[rank] = self.generations[number].step

    def finish_replication(self, number: int) -> None:
        for rank in list(self.generations[number].copying):
            self.copy(number, rank)

    def copy(self, number: int, rank: int) -> None:
        step = self.generations[number].copying.pop(rank)
        for piece, holder in self.copies(number, rank, self.members(number)[rank]):
            steps = holder.store.get((number, piece), [])
            if number >= holder.dropped_before and number > holder.refused and step not in steps:
                holder.store[number, piece] = [*steps, step]

    def copies(self, number: int, rank: int, machine: Machine) -> Iterator[tuple[int, Machine]]:
        """The snapshots of a rank, each with a node that keeps it: its own, and for those that are sent a peer."""
        generation = self.generations[number]
        peer = self.machines.get(generation.peers.get(machine.name) or "")
        for piece in generation.pieces[rank]:
            yield piece, machine
            if peer is not None and peer.is_alive and generation.is_sent(piece):
                yield piece, peer

    def break_ranks_that_miss_a_peer(self, number: int) -> None:
        generation = self.generations[number]
        dead = {r for r, name in enumerate(generation.start.assignment) if not self.machines[name].is_alive}
        if generation.gone or dead - generation.begun:
            for rank, machine in self.members(number).items():
                if not machine.ranks[rank].is_hung:
                    self.break_rank(machine, rank)

    def find_hang(self) -> None:
        number = self.state.generation
        if self.state.phase in (Phase.STARTING, Phase.TRAINING, Phase.DRAINING) and number in self.generations:
            hung = [rank for rank, machine in self.members(number).items() if machine.ranks[rank].is_hung]
            if hung:
                self.apply(HangDetected(generation=number, rank=hung[0], silent_s=5.0))

    # --- time

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.apply(Tick())

    def work(self, *, seconds: float = 1.0, connects: bool = True) -> None:
        """One round: deliver all messages and let every rank and agent act."""
        self.lose_silent_nodes()
        for machine in self.machines.values():
            if connects and machine.is_alive and not machine.is_connected:
                self.connect(machine)
        self.deliver_all()
        self.find_hang()
        for number in list(self.generations):
            self.break_ranks_that_miss_a_peer(number)
        self.deliver_all()
        for number in list(self.generations):
            if self.can_step(number):
                self.step(number)
        self.deliver_all()
        for machine in self.machines.values():
            machine.report(ReplicasHeld(node=machine.name, replicas=self.replicas(machine)))
        self.deliver_all()
        self.tick(seconds)

    def deliver_all(self) -> None:
        while any(machine.to_agent or machine.to_supervisor for machine in self.machines.values()):
            for machine in self.machines.values():
                if machine.to_supervisor:
                    self.deliver(machine)
                if machine.to_agent:
                    self.execute(machine)

    def act_randomly(self, count: int, *, chance: random.Random) -> None:
        """Take `count` random actions of a healthy system, one at a time."""
        for _ in range(count):
            actions = self.possible_actions()
            actions[chance.randrange(len(actions))]()

    def possible_actions(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = [self.lose_silent_nodes, self.find_hang, partial(self.tick, 0.5)]
        for machine in self.machines.values():
            if machine.to_supervisor:
                found += 2 * [partial(self.deliver, machine)]
            if machine.to_agent:
                found += 2 * [partial(self.execute, machine)]
            if machine.is_connected:
                found += [partial(machine.report, ReplicasHeld(node=machine.name, replicas=self.replicas(machine)))]
            elif machine.is_alive:
                found += [partial(self.connect, machine)]
            if machine.is_alive and not machine.is_ready:
                found += [partial(self.make_ready, machine)]
        for number, generation in self.generations.items():
            found += [partial(self.copy, number, rank) for rank in generation.copying]
            if self.can_step(number):
                found += 3 * [partial(self.step, number)] + [partial(self.step, number, saves=True)]
            elif self.members(number):
                found += [partial(self.break_ranks_that_miss_a_peer, number)]
        return found

    def recover(self) -> None:
        """Without further faults the run reaches training, or its end if it was stopped."""
        self.lose_silent_nodes()
        if not self.is_stop_requested:
            for _ in range(self.state.min_workers):
                self.add(num_slots=1, num_guaranteed=1, is_ready=True)
            for machine in self.machines.values():
                if machine.is_alive and not machine.is_ready:
                    self.make_ready(machine)
        reached: list[tuple[int, int]] = []
        for round_number in range(CALM_ROUNDS):
            if self.is_stop_requested and not self.state.is_stopping:
                self.stop()
            self.work()
            if self.is_over:
                return
            number = self.state.generation
            if self.state.phase is Phase.TRAINING and self.can_step(number):
                reached.append((number, self.generations[number].step))
            if len(reached) > 3 and reached[-1][1] > reached[0][1] and not self.is_stop_requested:
                assert not self.has_released or round_number < YIELD_S + 1, "slots were never claimed again"
                if not self.has_released:
                    return
        raise AssertionError(f"no training after {CALM_ROUNDS} calm rounds: {self.state}")

    def add(self, *, num_slots: int, num_guaranteed: int, is_ready: bool) -> None:
        name = f"m{len(self.machines) + 1}"
        self.machines[name] = Machine(
            name=name, num_slots=num_slots, num_guaranteed=num_guaranteed, is_ready=is_ready
        )

    # --- faults

    def any(self, fits: Callable[[Machine], Any], chance: random.Random) -> Iterator[Machine]:
        """A random live node that matches, if there is one."""
        found = [machine for machine in self.machines.values() if machine.is_alive and fits(machine)]
        yield from chance.sample(found, k=min(1, len(found)))

    def machine_comes(self, chance: random.Random) -> None:
        num_slots = chance.choice([1, 1, 2, 2, 4])  # four: a group and its twins on one node
        self.add(num_slots=num_slots, num_guaranteed=chance.randint(0, num_slots), is_ready=chance.random() < 0.5)

    def machine_dies(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: True, chance):
            self.die(machine)

    def connection_breaks(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.is_connected, chance):
            self.cut(machine)
            if chance.random() < 0.5:
                self.connect(machine)

    def fork_server_dies(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.is_ready, chance):
            machine.is_ready = False
            for rank in list(machine.ranks):
                self.break_rank(machine, rank)
            machine.report(NodeReady(node=machine.name, is_ready=False))

    def rank_is_killed(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.ranks, chance):
            self.break_rank(machine, chance.choice(sorted(machine.ranks)))

    def rank_hangs(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.ranks, chance):
            machine.ranks[chance.choice(sorted(machine.ranks))].is_hung = True

    def notice_is_given(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.is_connected, chance):
            machine.preempted_at = self.now + chance.choice([0.0, 1.0, 5.0, 30.0])
            machine.report(PreemptionNotice(node=machine.name, preempted_at=machine.preempted_at))

    def slots_change(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: True, chance):
            machine.num_slots = chance.randint(0, 2)
            machine.num_guaranteed = chance.randint(0, machine.num_slots)
            self.apply(
                SlotsChanged(node=machine.name, num_slots=machine.num_slots, num_guaranteed=machine.num_guaranteed)
            )

    def half_of_the_machines_die(self, chance: random.Random) -> None:
        alive = [machine for machine in self.machines.values() if machine.is_alive]
        for machine in chance.sample(alive, k=(len(alive) + 1) // 2):
            self.die(machine)

    def zone_gets_notice(self, chance: random.Random) -> None:
        """Every second machine will be preempted at the same time."""
        preempted_at, zone = self.now + chance.choice([0.0, 5.0, 30.0]), chance.randint(0, 1)
        for machine in [*self.machines.values()][zone::2]:
            if machine.is_connected:
                machine.preempted_at = preempted_at
                machine.report(PreemptionNotice(node=machine.name, preempted_at=preempted_at))

    def machine_flaps(self, chance: random.Random) -> None:
        """A connection breaks and returns several times, and the supervisor sees some of it."""
        for machine in self.any(lambda machine: machine.is_connected, chance):
            for _ in range(chance.randint(2, 5)):
                self.cut(machine)
                if chance.random() < 0.5:
                    self.lose_silent_nodes()
                self.connect(machine)
                if chance.random() < 0.5:
                    self.deliver(machine)

    def time_passes(self, chance: random.Random) -> None:
        self.tick(chance.choice([1.0, 3.0, 20.0, 70.0]))

    def stop_is_requested(self, chance: random.Random) -> None:
        if chance.random() < 0.05:
            self.stop()

    def yield_is_requested(self, chance: random.Random) -> None:
        self.apply(YieldRequested())

    def supervisor_dies(self, chance: random.Random) -> None:
        self.restart_supervisor()

    FAULTS: ClassVar = [
        *2 * [machine_comes, machine_dies, connection_breaks, rank_is_killed, rank_hangs, notice_is_given],
        *(fork_server_dies, slots_change, time_passes, stop_is_requested, yield_is_requested, supervisor_dies),
        *(half_of_the_machines_die, zone_gets_notice, machine_flaps),
    ]


def known(state: MembershipState) -> set[ReplicaLocation]:
    """All replicas that the supervisor knows."""
    return {replica for node in state.nodes.values() for replica in node.replicas}


def complete_steps(held: set[ReplicaLocation]) -> set[ReplicaLocation]:
    """Those of complete steps."""
    return {h for h in held if all(h._replace(rank=rank) in held for rank in range(h.world_size))}


def newest(held: set[ReplicaLocation]) -> int:
    return max((replica.step for replica in held), default=0)


class Histories(RuleBasedStateMachine):
    """Hypothesis chooses how many faults happen; a seed chooses which, where and in which order."""

    num_recovered = 0

    @initialize(
        low=st.integers(1, 3),
        more=st.integers(0, 5),
        every=st.integers(1, 3),
        layout=st.builds(Layout, st.sampled_from([1, 2, 3]), st.booleans(), st.booleans()),
        is_stopped=st.booleans(),
    )
    def begin(self, low: int, more: int, every: int, layout: Layout, is_stopped: bool) -> None:
        self.world = World(low=low, high=low + more, snapshot_every=every, layout=layout)
        self.is_stopped = is_stopped
        for number in range(low + more):
            self.world.add(num_slots=1, num_guaranteed=int(number < low), is_ready=True)
        self.work(3)

    @rule(rounds=st.integers(1, 6))
    def work(self, rounds: int) -> None:
        for _ in range(rounds):
            self.world.work()

    @rule(num_faults=st.integers(1, 12), between=st.sampled_from([3, 10, 30, 60]), seed=st.integers(0, 2**32))
    def happen(self, num_faults: int, between: int, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(num_faults):
            chance.choice(World.FAULTS)(self.world, chance)
            self.world.act_randomly(chance.randint(0, between), chance=chance)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            if self.is_stopped:
                self.world.stop()
            self.world.recover()
            Histories.num_recovered += 1


def run_histories(*, max_examples: int, num_steps: int) -> int:
    """Run histories; the first that breaks an invariant raises. Returns: how many recovered at their end."""
    Histories.num_recovered = 0
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return Histories.num_recovered


def test_histories__invariants_hold_and_training_resumes() -> None:
    assert run_histories(max_examples=60, num_steps=40) >= 60


def test_histories__decided_at_ticks__invariants_hold_and_training_resumes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(membership, "BATCHED_NODES", 0)  # as with more than 256 nodes
    assert run_histories(max_examples=10, num_steps=40) >= 10


def training_world(*, low: int, layout: Layout | None = None) -> World:
    """Sixteen machines that train, with some steps kept in memory."""
    world = World(low=low, high=16, snapshot_every=1, layout=layout)
    for _ in range(16):
        world.add(num_slots=1, num_guaranteed=0, is_ready=True)
    for _ in range(6):
        world.work()
    number = world.state.generation
    assert world.state.phase is Phase.TRAINING and len(world.members(number)) == 16
    return world


@pytest.mark.parametrize("batched_nodes", [membership.BATCHED_NODES, 0])
@pytest.mark.parametrize("seed", range(4))
def test_half_of_the_nodes_lost_at_once__one_change_to_the_other_half(
    seed: int, batched_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "BATCHED_NODES", batched_nodes)
    world = training_world(low=4)
    before = world.state.generation
    world.half_of_the_machines_die(random.Random(seed))
    for _ in range(6):
        world.work()
    assert world.state.phase is Phase.TRAINING
    assert (world.state.generation, len(world.state.assignment)) == (before + 1, 8)


@pytest.mark.parametrize("lost", [slice(0, 1), slice(5, 6), slice(1, 8), slice(8, 16)])
def test_shard_groups__nodes_of_one_set_lost__whole_groups_continue_from_the_others_memory(lost: slice) -> None:
    """Eight groups of two: the first four have all of the state, and the last four."""
    world = training_world(low=4, layout=Layout(group_size=2, is_sharded=True, leaves_spare=True))
    before = world.state.generation
    start = world.generations[before].start
    assert (start.num_shard_groups, start.parts_per_shard) == (8, 4)
    for name in start.assignment[lost]:
        world.die(world.machines[name])
    for _ in range(6):
        world.work()
    after = world.generations[before + 1].start
    num_left = 16 - len(start.assignment[lost])
    assert (world.state.phase, world.state.generation) == (Phase.TRAINING, before + 1)
    assert (len(after.assignment), after.num_spare) == (num_left - num_left % 2, num_left % 2)
    assert after.source == (before, 9)
    assert world.generations[before].step - after.step <= 1


@pytest.mark.parametrize("batched_nodes", [membership.BATCHED_NODES, 0])
def test_notice_for_a_zone__one_change_without_a_lost_step(
    batched_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "BATCHED_NODES", batched_nodes)
    world = training_world(low=4)
    before, num_reported = world.state.generation, len(world.reported)
    zone = [*world.machines.values()][::2]
    for machine in zone:
        machine.preempted_at = world.now + 12.0
        machine.report(PreemptionNotice(node=machine.name, preempted_at=machine.preempted_at))
    while world.now < zone[0].preempted_at:  # type: ignore[operator]
        world.work()
    for machine in zone:
        world.die(machine)
    for _ in range(6):
        world.work()
    state = world.state
    assert (state.phase, state.generation, len(state.assignment)) == (Phase.TRAINING, before + 1, 8)
    assert not set(state.assignment) & {machine.name for machine in zone}
    assert world.generations[before + 1].start.step == world.generations[before].step
    assert len(world.reported) == num_reported + 1


@pytest.mark.parametrize("batched_nodes", [membership.BATCHED_NODES, 0])
@pytest.mark.parametrize("is_noticed", [True, False])
def test_node_flaps__others_train_and_it_takes_part_again(
    is_noticed: bool, batched_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection breaks and returns five times within a second; the supervisor may notice each loss, or none."""
    monkeypatch.setattr(membership, "BATCHED_NODES", batched_nodes)
    world = training_world(low=4)
    before, step = world.state.generation, world.generations[world.state.generation].step
    machine = world.machines["m5"]
    for _ in range(5):
        world.cut(machine)
        if is_noticed:
            world.lose_silent_nodes()
        world.connect(machine)
        world.deliver_all()
        world.tick(0.2)
    for _ in range(8):
        world.work()
    state = world.state
    assert (state.phase, len(state.assignment)) == (Phase.TRAINING, 16)
    most = 7 if is_noticed else 0  # a change for each loss, and one that takes the node in again
    assert state.generation - before <= most
    assert world.generations[state.generation].step > step


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("batched_nodes", [membership.BATCHED_NODES, 0])
def test_histories__many_long_ones__invariants_hold_and_training_resumes(
    batched_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership, "BATCHED_NODES", batched_nodes)
    assert run_histories(max_examples=1500, num_steps=40) >= 1500
