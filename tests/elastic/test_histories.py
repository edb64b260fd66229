"""Any history of a run: machines, connections, ranks and the supervisor itself fail whenever they like.

The world here is simulated truthfully but without processes: agents that obey in order, messages that are
under way or lost with their connection, ranks that step together, snapshots with a copy on another machine.
Hypothesis chooses what happens; `membership.decide` must never start a generation wrongly, and, once nothing
bad happens any more, must always find back to training.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from forge.elastic.membership import MAX_STARTUP_FAILURES, RECOVERY_S, YIELD_S, decide
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
"""Of a second each, in which everything is delivered and obeyed; a change needs a handful."""


@dataclass(frozen=True)
class Wish:
    """What the first rank's agent is told of a generation."""

    generation: int
    is_stop: bool


@dataclass
class Rank:
    """A process."""

    generation: int
    is_hung: bool = False


@dataclass
class Machine:
    """An agent, its ranks, its memory, and its connection with the supervisor."""

    name: str
    num_slots: int
    num_guaranteed: int
    is_ready: bool
    is_alive: bool = True
    is_connected: bool = False
    is_attached: bool = False
    """The supervisor has heard the hello of this connection."""
    to_agent: deque[Action | Wish] = field(default_factory=deque)
    to_supervisor: deque[Event] = field(default_factory=deque)
    generation: int = 0
    ranks: dict[int, Rank] = field(default_factory=dict)
    store: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """(generation, rank) → the steps of its whole snapshots, two at most."""
    dropped_before: int = 0
    refused: int = 0
    preempted_at: float | None = None

    def say(self, event: Event) -> None:
        if self.is_connected:
            self.to_supervisor.append(event)


@dataclass
class Generation:
    """What is true of a generation, whoever knows it."""

    start: StartGeneration
    step: int
    peers: dict[str, str | None]
    begun: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    copying: dict[int, int] = field(default_factory=dict)
    """rank → the step that is being copied."""
    is_formed: bool = False
    is_disturbed: bool = False
    """A machine was lost before the last of it was gone."""
    was_cut_off: bool = False
    """A machine of it went on without the supervisor."""
    is_leaving: bool = False
    is_stopping: bool = False


class World:
    """Everything there is, and the supervisor that knows only what it is told."""

    def __init__(self, *, low: int, high: int, snapshot_every: int) -> None:
        self.now = 0.0
        self.state = MembershipState(min_workers=low, max_workers=high)
        self.snapshot_every = snapshot_every
        self.machines: dict[str, Machine] = {}
        self.generations: dict[int, Generation] = {}
        self.stored_step = 0
        self.to_persist: dict[tuple[int, int, int], set[tuple[str, int]]] = {}
        self.is_stop_wished = False
        self.is_over = False
        self.has_given_back = False
        self.announced: set[int] = set()
        self.last_formed = 0

    # --- the supervisor

    def apply(self, event: Event) -> None:
        if self.is_over:
            return
        if isinstance(event, NodeLost) and self.state.assignment:
            self.generations[self.state.generation].is_disturbed = True
        before = self.state
        self.state, actions = decide(before, event, now=self.now)
        if (before.phase, self.state.phase) == (Phase.STARTING, Phase.TRAINING):
            self.last_formed = self.state.generation
        for action in actions:
            self.perform(action)

    def perform(self, action: Action) -> None:
        match action:
            case StartGeneration():
                self.start(action)
            case StopGeneration(node=name):
                self.send(name, action)
            case DrainGeneration():
                self.wish(is_stop=False)
            case DropReplicas(generation=generation):
                assert any(whole.generation == generation for whole in whole_steps(known(self.state)))
                for name in self.state.nodes:
                    self.send(name, action)
            case FlushToStorage():
                self.persist(action)
            case ChangeMembership(generation=generation):
                assert generation not in self.announced, "a change was announced twice"
                self.announced.add(generation)
            case ReleaseSlots():
                self.has_given_back = True
            case ClaimSlots():
                self.has_given_back = False
            case FinishRun(step=step):
                self.is_over = True
                assert step <= self.stored_step
                assert self.is_stop_wished or step == TOTAL_STEPS
                assert newest(whole_steps(known(self.state))) <= step
            case FailRun():
                self.is_over = True
                since = [g for number, g in self.generations.items() if number > self.last_formed]
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
        assert start.step == max(self.state.stored_step, newest(whole_steps(known(self.state))))
        assert start.step >= newest(self.there()), "a newer step lies in memory"
        names = list(dict.fromkeys(start.assignment))
        spare = next((name for name in self.state.nodes if name not in names), None)
        ring = dict(zip(names, [*names[1:], names[0]], strict=True)) if len(names) > 1 else {names[0]: spare}
        self.generations[start.generation] = Generation(
            start=start, step=start.step, peers=dict(ring), is_stopping=self.state.is_stopping
        )
        for name in names:
            self.send(name, start)

    def there(self) -> set[ReplicaLocation]:
        """The whole steps that machines within reach hold, whatever they have told."""
        held = {h for m in self.machines.values() if m.is_attached for h in self.replicas(m)}
        return {whole for whole in whole_steps(held) if not self.generations[whole.generation].was_cut_off}

    def persist(self, order: FlushToStorage) -> None:
        asked = set()
        for rank in range(order.world_size):
            wanted = ReplicaLocation(
                generation=order.generation, rank=rank, world_size=order.world_size, step=order.step
            )
            asked.add((next(name for name, node in self.state.nodes.items() if wanted in node.replicas), rank))
        self.to_persist[order.step, order.generation, order.world_size] = asked
        for name in {name for name, _ in asked}:
            self.send(name, order)

    def send(self, name: str, message: Action | Wish) -> None:
        machine = self.machines.get(name)
        if machine is not None and machine.is_attached:
            machine.to_agent.append(message)

    def stop(self) -> None:
        self.is_stop_wished = True
        self.apply(StopRequested())
        self.wish(is_stop=True)

    def wish(self, *, is_stop: bool) -> None:
        if self.state.assignment:
            self.send(self.state.assignment[0], Wish(generation=self.state.generation, is_stop=is_stop))

    def restart_supervisor(self) -> None:
        for machine in self.machines.values():
            self.cut(machine)
        self.state = MembershipState(
            min_workers=self.state.min_workers,
            max_workers=self.state.max_workers,
            former_generation=max(self.generations, default=0),
            stored_step=self.stored_step,
            recovery_deadline=self.now + RECOVERY_S,
        )
        self.announced.clear()
        self.has_given_back = False

    def lose_the_silent(self) -> None:
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
        machine.say(
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
            machine.say(PreemptionNotice(node=machine.name, preempted_at=machine.preempted_at))

    def deliver(self, machine: Machine) -> None:
        """The supervisor hears one message."""
        event = machine.to_supervisor.popleft()
        if isinstance(event, AgentAttached):
            machine.is_attached = True
        self.apply(event)
        if isinstance(event, AgentAttached) and self.state.phase is Phase.DRAINING:
            self.wish(is_stop=False)
        if isinstance(event, AgentAttached) and self.state.is_stopping:
            self.wish(is_stop=True)

    # --- agents

    def obey(self, machine: Machine) -> None:
        """An agent does one thing that it was told."""
        match machine.to_agent.popleft():
            case StartGeneration() as start:
                self.begin_ranks(machine, start)
            case StopGeneration(generation=generation, keep_replicas=keep_replicas):
                machine.refused = max(machine.refused, generation - keep_replicas)
                ended = [rank for rank, r in machine.ranks.items() if r.generation <= generation]
                gone = {rank: machine.ranks[rank].generation for rank in ended}
                for rank in ended:
                    self.end_rank(machine, rank)
                machine.say(AgentStopped(node=machine.name, generation=generation, replicas=self.replicas(machine)))
                for rank, of in gone.items():
                    machine.say(RankEnded(generation=of, rank=rank, end=EndReason.BROKEN, reason="it was killed"))
            case Wish(generation=generation, is_stop=is_stop):
                if 0 in machine.ranks and machine.ranks[0].generation == generation:
                    self.generations[generation].is_stopping |= is_stop
                    self.generations[generation].is_leaving |= not is_stop
            case DropReplicas(generation=generation):
                machine.dropped_before = max(machine.dropped_before, generation)
                machine.store = {key: steps for key, steps in machine.store.items() if key[0] >= generation}
            case FlushToStorage() as order:
                self.write_parts(machine, order)

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
        machine.say(RankEnded(generation=of, rank=rank, end=EndReason.BROKEN, reason="it was killed"))

    def write_parts(self, machine: Machine, order: FlushToStorage) -> None:
        key = (order.step, order.generation, order.world_size)
        missing = self.to_persist.get(key, set())
        for name, rank in list(missing):
            if name == machine.name and order.step in machine.store.get((order.generation, rank), []):
                missing.discard((name, rank))
        if key in self.to_persist and not missing:
            self.stored_step = max(self.stored_step, order.step)
            machine.say(CheckpointCommitted(step=order.step))

    def replicas(self, machine: Machine) -> frozenset[ReplicaLocation]:
        return frozenset(
            ReplicaLocation(
                generation=g, rank=rank, world_size=len(self.generations[g].start.assignment), step=step
            )
            for (g, rank), steps in machine.store.items()
            for step in steps
        )

    def die(self, machine: Machine) -> None:
        for rank in list(machine.ranks):
            self.end_rank(machine, rank)
        machine.is_alive, machine.store = False, {}
        self.cut(machine)

    def warm_up(self, machine: Machine) -> None:
        machine.is_ready = True
        machine.say(NodeReady(node=machine.name))

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
        """All ranks of a generation make a step together."""
        generation, members = self.generations[number], self.members(number)
        if not generation.is_formed and not self.load(number):
            for rank, machine in members.items():
                self.break_rank(machine, rank)
            return
        if generation.step < TOTAL_STEPS:
            generation.step += 1
        if not generation.is_formed:
            generation.is_formed = True
            members[0].say(GenerationReady(generation=number))
        if generation.step == TOTAL_STEPS or generation.is_stopping:
            self.save(number)
            self.end_all(number, EndReason.DONE)
        elif generation.is_leaving:
            self.begin_copies(number)
            self.finish_copies(number)
            self.end_all(number, EndReason.DRAINED)
        elif generation.step % self.snapshot_every == 0:
            self.begin_copies(number)
            if saves:
                self.finish_copies(number)
                self.save(number)

    def load(self, number: int) -> bool:
        """Whether the state to go on from is where it was said to be."""
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
        self.members(number)[0].say(CheckpointCommitted(step=self.stored_step))

    def end_all(self, number: int, end: EndReason) -> None:
        for rank, machine in self.members(number).items():
            self.end_rank(machine, rank)
            machine.say(RankEnded(generation=number, rank=rank, end=end, step=self.generations[number].step))

    def begin_copies(self, number: int) -> None:
        """From now until a copy is whole, its slot is not; the one before is kept by then."""
        self.finish_copies(number)
        for rank, machine in self.members(number).items():
            for keeper in self.keepers(number, machine):
                if (number, rank) in keeper.store:
                    keeper.store[number, rank] = keeper.store[number, rank][-1:]
            self.generations[number].copying[rank] = self.generations[number].step

    def finish_copies(self, number: int) -> None:
        for rank in list(self.generations[number].copying):
            self.copy(number, rank)

    def copy(self, number: int, rank: int) -> None:
        step = self.generations[number].copying.pop(rank)
        for keeper in self.keepers(number, self.members(number)[rank]):
            if number >= keeper.dropped_before and number > keeper.refused:
                keeper.store[number, rank] = [*keeper.store.get((number, rank), []), step]

    def keepers(self, number: int, machine: Machine) -> list[Machine]:
        peer = self.machines.get(self.generations[number].peers.get(machine.name) or "")
        return [machine, *([peer] if peer is not None and peer.is_alive else [])]

    def break_whoever_misses_a_peer(self, number: int) -> None:
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
        """A round in which everything that is under way arrives and whoever can, does something."""
        self.lose_the_silent()
        for machine in self.machines.values():
            if connects and machine.is_alive and not machine.is_connected:
                self.connect(machine)
        self.settle_messages()
        self.find_hang()
        for number in list(self.generations):
            self.break_whoever_misses_a_peer(number)
        self.settle_messages()
        for number in list(self.generations):
            if self.can_step(number):
                self.step(number)
        self.settle_messages()
        for machine in self.machines.values():
            machine.say(ReplicasHeld(node=machine.name, replicas=self.replicas(machine)))
        self.settle_messages()
        self.tick(seconds)

    def settle_messages(self) -> None:
        while any(machine.to_agent or machine.to_supervisor for machine in self.machines.values()):
            for machine in self.machines.values():
                if machine.to_supervisor:
                    self.deliver(machine)
                if machine.to_agent:
                    self.obey(machine)

    def bustle(self, count: int, *, chance: random.Random) -> None:
        """Good things happen, one at a time, in any order."""
        for _ in range(count):
            doable = self.doable()
            doable[chance.randrange(len(doable))]()

    def doable(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = [self.lose_the_silent, self.find_hang, partial(self.tick, 0.5)]
        for machine in self.machines.values():
            if machine.to_supervisor:
                found += 2 * [partial(self.deliver, machine)]
            if machine.to_agent:
                found += 2 * [partial(self.obey, machine)]
            if machine.is_connected:
                found += [partial(machine.say, ReplicasHeld(node=machine.name, replicas=self.replicas(machine)))]
            elif machine.is_alive:
                found += [partial(self.connect, machine)]
            if machine.is_alive and not machine.is_ready:
                found += [partial(self.warm_up, machine)]
        for number, generation in self.generations.items():
            found += [partial(self.copy, number, rank) for rank in generation.copying]
            if self.can_step(number):
                found += 3 * [partial(self.step, number)] + [partial(self.step, number, saves=True)]
            elif self.members(number):
                found += [partial(self.break_whoever_misses_a_peer, number)]
        return found

    def calm_down(self) -> None:
        """Nothing bad happens any more: training is reached; or the end, even without more machines, if wished."""
        self.lose_the_silent()
        if not self.is_stop_wished:
            for _ in range(self.state.min_workers):
                self.add(num_slots=1, num_guaranteed=1, is_ready=True)
            for machine in self.machines.values():
                if machine.is_alive and not machine.is_ready:
                    self.warm_up(machine)
        reached: list[tuple[int, int]] = []
        for round_number in range(CALM_ROUNDS):
            if self.is_stop_wished and not self.state.is_stopping:
                self.stop()
            self.work()
            if self.is_over:
                return
            number = self.state.generation
            if self.state.phase is Phase.TRAINING and self.can_step(number):
                reached.append((number, self.generations[number].step))
            if len(reached) > 3 and reached[-1][1] > reached[0][1] and not self.is_stop_wished:
                assert not self.has_given_back or round_number < YIELD_S + 1, "assignment were never claimed again"
                if not self.has_given_back:
                    return
        raise AssertionError(f"no training after {CALM_ROUNDS} calm rounds: {self.state}")

    def add(self, *, num_slots: int, num_guaranteed: int, is_ready: bool) -> None:
        name = f"m{len(self.machines) + 1}"
        self.machines[name] = Machine(
            name=name, num_slots=num_slots, num_guaranteed=num_guaranteed, is_ready=is_ready
        )

    # --- misfortunes

    def any(self, fits: Callable[[Machine], Any], chance: random.Random) -> Iterator[Machine]:
        """One that fits, if there is one."""
        found = [machine for machine in self.machines.values() if machine.is_alive and fits(machine)]
        yield from chance.sample(found, k=min(1, len(found)))

    def machine_comes(self, chance: random.Random) -> None:
        num_slots = chance.randint(1, 2)
        self.add(num_slots=num_slots, num_guaranteed=chance.randint(0, num_slots), is_ready=chance.random() < 0.5)

    def machine_dies(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: True, chance):
            self.die(machine)

    def connection_breaks(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.is_connected, chance):
            self.cut(machine)
            if chance.random() < 0.5:
                self.connect(machine)

    def warm_process_dies(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.is_ready, chance):
            machine.is_ready = False
            for rank in list(machine.ranks):
                self.break_rank(machine, rank)
            machine.say(NodeReady(node=machine.name, is_ready=False))

    def rank_is_killed(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.ranks, chance):
            self.break_rank(machine, chance.choice(sorted(machine.ranks)))

    def rank_hangs(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.ranks, chance):
            machine.ranks[chance.choice(sorted(machine.ranks))].is_hung = True

    def notice_is_given(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: machine.is_connected, chance):
            machine.preempted_at = self.now + chance.choice([0.0, 1.0, 5.0, 30.0])
            machine.say(PreemptionNotice(node=machine.name, preempted_at=machine.preempted_at))

    def places_change(self, chance: random.Random) -> None:
        for machine in self.any(lambda machine: True, chance):
            machine.num_slots = chance.randint(0, 2)
            machine.num_guaranteed = chance.randint(0, machine.num_slots)
            self.apply(
                SlotsChanged(node=machine.name, num_slots=machine.num_slots, num_guaranteed=machine.num_guaranteed)
            )

    def time_passes(self, chance: random.Random) -> None:
        self.tick(chance.choice([1.0, 3.0, 20.0, 70.0]))

    def stop_is_wished(self, chance: random.Random) -> None:
        if chance.random() < 0.05:
            self.stop()

    def yield_is_wished(self, chance: random.Random) -> None:
        self.apply(YieldRequested())

    def supervisor_dies(self, chance: random.Random) -> None:
        self.restart_supervisor()

    MISFORTUNES: ClassVar = [
        *2 * [machine_comes, machine_dies, connection_breaks, rank_is_killed, rank_hangs, notice_is_given],
        *(warm_process_dies, places_change, time_passes, stop_is_wished, yield_is_wished, supervisor_dies),
    ]


def known(state: MembershipState) -> set[ReplicaLocation]:
    """All snapshots that the supervisor has been told of."""
    return {replica for node in state.nodes.values() for replica in node.replicas}


def whole_steps(held: set[ReplicaLocation]) -> set[ReplicaLocation]:
    """Of those, the ones of steps of which every rank's snapshot is there."""
    return {h for h in held if all(replace(h, rank=rank) in held for rank in range(h.world_size))}


def newest(held: set[ReplicaLocation]) -> int:
    return max((replica.step for replica in held), default=0)


class Histories(RuleBasedStateMachine):
    """What may happen; hypothesis chooses how much of it, and by a seed what, to whom and in which order."""

    @initialize(low=st.integers(1, 3), more=st.integers(0, 3), every=st.integers(1, 3), is_stopped=st.booleans())
    def begin(self, low: int, more: int, every: int, is_stopped: bool) -> None:
        self.world = World(low=low, high=low + more, snapshot_every=every)
        self.is_stopped = is_stopped
        for number in range(low + more):
            self.world.add(num_slots=1, num_guaranteed=int(number < low), is_ready=True)
        self.work(3)

    @rule(rounds=st.integers(1, 6))
    def work(self, rounds: int) -> None:
        for _ in range(rounds):
            self.world.work()

    @rule(misfortunes=st.integers(1, 12), between=st.sampled_from([3, 10, 30, 60]), seed=st.integers(0, 2**32))
    def happen(self, misfortunes: int, between: int, seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(misfortunes):
            chance.choice(World.MISFORTUNES)(self.world, chance)
            self.world.bustle(chance.randint(0, between), chance=chance)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            if self.is_stopped:
                self.world.stop()
            self.world.calm_down()


def run_histories(*, max_examples: int, num_steps: int) -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_after_any_history_a_generation_starts_rightly_and_training_goes_on() -> None:
    run_histories(max_examples=60, num_steps=40)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_very_many_long_histories_too() -> None:
    run_histories(max_examples=1500, num_steps=40)
