"""Decides the membership of a run: `decide(state, event) → (state, actions)`, a pure function.

Agents and timers report events to the supervisor, which turns actions into commands for agents. Both are plain
data, so a test can replay any history. Times are seconds of one clock, passed with every event.

                              enough slots
              ┌──────────┐ ───────────────────► ┌──────────┐ first step   ┌──────────┐
    begin ──► │ WAITING  │                      │ STARTING │ ───────────► │ TRAINING │ ──► done
              └──────────┘ ◄──┐                 └──────────┘              └──────────┘     ▲
                  too few     │                   ▲     │ a rank or            │  │        │
                  slots       │    enough slots   │     │ node lost      lost, │  │notice, │
                              │  ┌────────────────┘     │                hung  │  │growth, │all ranks
                              │  │                      ▼                      ▼  ▼yield   │done
                         ┌──────────┐ ◄─── every rank drained or lost ── ┌──────────┐      │
                         │ STOPPING │ ◄───────────────────────────────── │ DRAINING │      │
                         └──────────┘ ────────────────────────────────── └──────────┘ ─────┘

    WAITING   no ranks run: there are too few slots, or no agent has connected yet
    STARTING  the ranks of a generation start, load their state and take their first step
    TRAINING  ranks train
    DRAINING  the ranks end after their current step, with a snapshot: no step is lost
    STOPPING  every agent kills its remaining ranks and reports its replicas; the next generation starts only
              when all agents have answered or are lost, so that two generations never run at once

A generation continues from the newest step of which every rank's snapshot is complete in some node's memory, or
from storage if that is newer. A node with a preemption notice is used until the time left is what a planned change
needs. A preemption is not a failure: only generations that break while no node is lost, before their first step or
before a step of theirs is kept, count against the failure budget. A run whose nodes are never ready, because their
fork servers end while they import what the job needs, ends as well.

The module is long because it contains the response to every event of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from forge.elastic.shard_copies import parts_per_shard
from forge.elastic.sharded import ShardedMap, ShardedSet
from forge.elastic.states import (
    Action,
    AgentAttached,
    AgentStopped,
    ChangeMembership,
    CheckpointCommitted,
    ClaimSlots,
    Decision,
    DrainGeneration,
    DropReplicas,
    EndReason,
    Event,
    FailRun,
    FinishRun,
    FlushToStorage,
    GenerationReady,
    HangDetected,
    MemberNode,
    MembershipState,
    NodeLost,
    NodeReady,
    Phase,
    PreemptionNotice,
    RankEnded,
    ReleaseSlots,
    ReplaceNode,
    ReplicaLocation,
    ReplicasHeld,
    ReplicatedStep,
    SlotsChanged,
    StartGeneration,
    StopGeneration,
    StopRequested,
    Tick,
    WaitForNodes,
    YieldRequested,
)

# Nodes that join within this time of each other are taken in together.
JOIN_WINDOW_S = 1.0
# How long a slot is not used after its rank hung.
QUARANTINE_S = 60.0
# How long slots that were released for another run are not claimed again.
YIELD_S = 15.0
# Generations in a row that may break by themselves before their first step, and fork servers of each node that may
# end before they are ready.
MAX_STARTUP_FAILURES = 3
# Generations in a row that may break by themselves, after their first step, before any step of theirs is kept.
MAX_FRUITLESS = 8
# How long a restarted supervisor waits for the agents of the generation it finds.
RECOVERY_S = 4.0
# With more nodes, what an event makes possible is decided at the next tick, once for all events until then: 10,000
# agents that join, or are given notice, at once cost one decision instead of 10,000 that each visit every node.
BATCHED_NODES = 256
_HAS_RANKS = (Phase.STARTING, Phase.TRAINING, Phase.DRAINING)


def decide(state: MembershipState, event: Event, *, now: float) -> Decision:
    """Apply one event. Returns: the new state, and the actions to carry out in order."""
    if state.phase is Phase.DONE:
        return state, ()
    match event:
        case AgentAttached():
            return _attach(state, event, now)
        case NodeReady(node=name) if name in state.nodes:
            return _advance_batched(_note_ready(state, event), now)
        case NodeLost(node=name, reason=reason) if name in state.nodes:
            return _node_lost(state, name, reason, now)
        case SlotsChanged(node=name) if name in state.nodes:
            return _advance_batched(
                _with_node(state, name, num_slots=event.num_slots, num_guaranteed=event.num_guaranteed), now
            )
        case PreemptionNotice(node=name, preempted_at=preempted_at) if name in state.nodes:
            return _preempt(state, name, preempted_at, now)
        case ReplicasHeld(node=name, replicas=replicas) if name in state.nodes:
            state = _with_node(state, name, replicas=replicas)
            # GenerationReady may have been lost with the connection; a snapshot is never older than the first step.
            if state.phase is Phase.STARTING and any(
                replica.generation == state.generation for replica in replicas
            ):
                state = _mark_started(state)
            return state, ()
        case GenerationReady(generation=generation) if (
            generation == state.generation and state.phase is Phase.STARTING
        ):
            return _advance(_mark_started(state), now)
        case RankEnded(generation=generation) if generation == state.generation and state.assignment:
            return _rank_ended(state, event, now)
        case AgentStopped(node=name, generation=generation, replicas=replicas) if name in state.nodes:
            member = replace(state.nodes[name], replicas=replicas)
            is_all = generation >= state.generation
            stopping = state.stopping_nodes.without(name) if is_all else state.stopping_nodes
            nodes = _sharded(state.nodes).set(name, member)
            return _advance_batched(replace(state, nodes=nodes, stopping_nodes=stopping), now)
        case HangDetected() if event.generation == state.generation and state.phase in _HAS_RANKS:
            return _quarantine(state, event, now)
        case CheckpointCommitted(step=step):
            return _advance_batched(replace(state, stored_step=max(step, state.stored_step)), now)
        case StopRequested():
            return _advance(replace(state, is_stopping=True), now)
        # During recovery the used slots are not known yet; the other run repeats its request.
        case YieldRequested() if state.recovery_deadline is None:
            return _yield_slots(state, now)
        case Tick(margin_s=margin_s):
            state, drops = _drop_old_replicas(state if margin_s is None else replace(state, margin_s=margin_s))
            state, actions = _advance(state, now)
            return state, (*drops, *actions)
    return state, ()


def newest_complete_step(state: MembershipState) -> ReplicatedStep | None:
    """The newest step of which every rank's snapshot is complete in some node's memory."""
    held = set[ReplicaLocation]().union(*(node.replicas for node in state.nodes.values()))
    num_ranks = Counter(
        (step, generation, world_size) for generation, rank, world_size, step in held if 0 <= rank < world_size
    )
    newest = max((key for key, count in num_ranks.items() if count == key[2]), default=None)
    return newest and ReplicatedStep(step=newest[0], generation=newest[1], world_size=newest[2])


# --- one function per event -------------------------------------------------------------------------------


def _attach(state: MembershipState, event: AgentAttached, now: float) -> Decision:
    name, running = event.node, set(event.running_ranks)
    member = replace(
        state.nodes.get(name) or MemberNode(num_slots=event.num_slots),
        num_slots=event.num_slots,
        num_guaranteed=event.num_guaranteed,
        is_ready=event.is_ready,
        replicas=event.replicas,
    )
    state = replace(
        state,
        nodes=_sharded(state.nodes).set(name, member),
        former_generation=max(state.former_generation, event.generation),
        # The report that the flush is done may have been lost with the connection.
        flushing=None if name in state.nodes else state.flushing,
    )
    stops: tuple[Action, ...] = ()
    is_recovering = state.phase is Phase.WAITING or state.recovery_deadline is not None
    if running and is_recovering and event.generation > state.generation:
        state, stops = _recover_generation(state, event, now)
    if state.recovery_deadline is not None and event.generation == state.generation:
        assignment = list(state.assignment)
        for rank in running:
            if rank < len(assignment):
                assignment[rank] = name
        state = replace(state, assignment=tuple(assignment))
    has_ranks = state.phase in _HAS_RANKS and name in state.assignment
    ranks = {rank for rank, node in enumerate(state.assignment) if node == name} if has_ranks else set()
    if ranks and not (event.generation == state.generation and ranks - state.ended_ranks <= running <= ranks):
        return _break(state, now, cause="loss", reason=f"node {name} has lost its ranks")
    # Its ranks belong to a generation that is over, or an earlier StopGeneration may not have reached it.
    if (running and not ranks) or name in state.stopping_nodes:
        state = replace(state, stopping_nodes=state.stopping_nodes.with_one(name))
        newest = max(state.generation, event.generation)
        return state, (
            *stops,
            StopGeneration(node=name, generation=newest, keep_replicas=state.phase in _HAS_RANKS),
        )
    state, actions = _advance_batched(state, now)
    return state, (*stops, *actions)


def _recover_generation(state: MembershipState, event: AgentAttached, now: float) -> Decision:
    """Recover a running generation after a restart of the supervisor; it may replace an older one."""
    others = ShardedSet([*state.stopping_nodes, *_assigned_nodes(state)])
    state = replace(
        state,
        phase=Phase.TRAINING,
        generation=event.generation,
        assignment=("",) * next(iter(event.running_ranks.values())),
        stopping_nodes=others,
        ended_ranks=ShardedSet(),
        recovery_deadline=state.recovery_deadline or now + RECOVERY_S,
    )
    return state, tuple(
        StopGeneration(node=name, generation=event.generation, keep_replicas=True) for name in sorted(others)
    )


def _note_ready(state: MembershipState, event: NodeReady) -> MembershipState:
    node = state.nodes[event.node]
    failed = not event.is_ready and not node.is_ready
    return _with_node(
        state,
        event.node,
        is_ready=event.is_ready,
        num_failed_starts=node.num_failed_starts + 1 if failed else 0,
        start_failure=event.reason if failed else "",
    )


def _node_lost(state: MembershipState, name: str, reason: str, now: float) -> Decision:
    state = replace(
        state,
        nodes=_sharded(state.nodes).without(name),
        stopping_nodes=state.stopping_nodes.without(name),
        has_lost_node=True,
        flushing=None,
    )
    if state.phase in _HAS_RANKS and name in state.assignment:
        if state.done_step is not None:
            return _finish_when_all_ended(state, now)
        return _break(state, now, cause="loss", reason=f"node {name} lost: {reason}")
    return _advance_batched(state, now)


def _preempt(state: MembershipState, name: str, preempted_at: float, now: float) -> Decision:
    known = state.nodes[name].preempted_at
    state = _with_node(state, name, preempted_at=preempted_at if known is None else min(known, preempted_at))
    state, actions = _advance_batched(state, now)
    return state, ((ReplaceNode(node=name),) if known is None else ()) + actions


def _rank_ended(state: MembershipState, event: RankEnded, now: float) -> Decision:
    if event.end is EndReason.FAILED:
        stops = tuple(StopGeneration(node=name, generation=state.generation) for name in _assigned_nodes(state))
        return replace(state, phase=Phase.DONE), (*stops, FailRun(error=event.error, reason=event.reason))
    state = replace(state, ended_ranks=state.ended_ranks.with_one(event.rank))
    if event.end is EndReason.DONE:
        state = replace(state, done_step=event.step)
    if state.done_step is not None:
        return _finish_when_all_ended(state, now)
    if state.phase is Phase.STOPPING:
        return state, ()
    if event.end is EndReason.DRAINED:
        if len(state.ended_ranks) < len(state.assignment):
            return state, ()
        return _stop(state, now)  # all have drained: no step is lost
    node = state.assignment[event.rank]
    return _break(state, now, cause="failure", reason=f"rank {event.rank} on {node} broke: {event.reason}")


def _finish_when_all_ended(state: MembershipState, now: float) -> Decision:
    """Finish the run after its last checkpoint, once every rank has ended or is lost."""
    running = [r for r, name in enumerate(state.assignment) if r not in state.ended_ranks and name in state.nodes]
    return (state, ()) if running else _finish(state, now)


def _finish(state: MembershipState, now: float) -> Decision:
    """End the run, unless it was stopped and a returning node holds a newer step than the last checkpoint."""
    assert state.done_step is not None
    found = newest_complete_step(state)
    if state.is_stopping and found is not None and found.step > state.done_step:
        return _stop(replace(state, done_step=None, stored_step=max(state.stored_step, state.done_step)), now)
    return replace(state, phase=Phase.DONE), (FinishRun(step=state.done_step),)


def _quarantine(state: MembershipState, event: HangDetected, now: float) -> Decision:
    name = state.assignment[event.rank] if event.rank < len(state.assignment) else ""
    if name in state.nodes:
        node = state.nodes[name]
        state = _with_node(
            state, name, quarantined_until=(*_unexpired(node.quarantined_until, now), now + QUARANTINE_S)
        )
    return _break(
        state,
        now,
        cause="hang",
        reason=f"rank {event.rank} on {name} hung for {event.silent_s:.1f} s",
        silent_s=event.silent_s,
    )


def _yield_slots(state: MembershipState, now: float) -> Decision:
    num_used = len(state.assignment)
    state = replace(state, yield_until=now + YIELD_S)
    if state.phase is Phase.TRAINING and num_used > state.min_workers and not state.is_stopping:
        return _drain(state, now, cause="yield", reason="another run is waiting for its minimum number of workers")
    return state, (ReleaseSlots(),)


# --- what the state as a whole requires -------------------------------------------------------------------


def _advance(state: MembershipState, now: float) -> Decision:
    """Make the next transition that the state allows, whichever event caused it."""
    if state.recovery_deadline is not None:
        return _finish_recovery(state, now)
    if 0 < state.yield_until <= now:  # claim slots that are free again
        state, actions = _advance(replace(state, yield_until=0.0), now)
        return state, (ClaimSlots(), *actions)
    if state.phase is Phase.WAITING:
        return _wait(state, now, found=newest_complete_step(state))
    if state.phase is Phase.STOPPING and not state.stopping_nodes:
        return _after_stop(state, now)
    if state.phase is not Phase.TRAINING or state.is_stopping:
        return state, ()
    preempted = _preempted_nodes(state)
    leaving = [name for name in preempted if _is_leaving_soon(state, name, now)]
    if leaving:
        return _drain(state, now, cause="notice", reason=f"node {leaving[0]} will be preempted")
    return _grow(state, now, preempted=preempted)


def _advance_batched(state: MembershipState, now: float) -> Decision:
    """Advance now, or in a large cluster at the next tick; the last agent's stop report is never delayed."""
    if len(state.nodes) > BATCHED_NODES and state.phase is not Phase.STOPPING:
        return state, ()
    return _advance(state, now)


def _finish_recovery(state: MembershipState, now: float) -> Decision:
    assert state.recovery_deadline is not None
    is_complete = bool(state.assignment) and all(state.assignment)
    if not is_complete and now < state.recovery_deadline:
        return state, ()
    state = replace(state, recovery_deadline=None)
    if is_complete:
        return _advance(state, now)
    if not state.assignment:
        return _stop(state, now)
    return _break(state, now, cause="loss", reason="an agent did not come back while the supervisor was away")


def _grow(state: MembershipState, now: float, *, preempted: Sequence[str]) -> Decision:
    """Include ready nodes: shortly after they joined, or at once if one replaces a node with a notice.

    Args:
        preempted: nodes of the generation with a preemption notice.
    """
    staying = [node for node in state.nodes.values() if node.preempted_at is None]
    possible = _num_ranks(state, sum(node.usable_slots(now, margin_s=state.margin_s) for node in staying), now=now)
    if preempted and possible >= len(state.assignment):
        return _drain(state, now, cause="notice", reason=f"node {preempted[0]} is replaced")
    if possible <= len(state.assignment):
        return replace(state, grow_at=None), ()
    if state.grow_at is None:
        return replace(state, grow_at=now + JOIN_WINDOW_S), ()
    if now < state.grow_at:
        return state, ()
    more = possible - len(state.assignment)
    return _drain(state, now, cause="growth", reason=f"{more} more worker{'s' * (more > 1)} ready")


def _drain(state: MembershipState, now: float, *, cause: str, reason: str) -> Decision:
    change = ChangeMembership(generation=state.generation, cause=cause, reason=reason)
    return replace(state, phase=Phase.DRAINING, grow_at=None), (
        change,
        DrainGeneration(generation=state.generation),
    )


def _break(state: MembershipState, now: float, *, cause: str, reason: str, silent_s: float = 0.0) -> Decision:
    """Stop a generation that cannot continue, and report why."""
    if state.phase is Phase.STARTING and cause != "loss":
        state = replace(state, failure=reason)
    if state.phase is not Phase.DRAINING and cause == "failure":
        state = replace(state, break_reason=reason)
    change = ChangeMembership(generation=state.generation, cause=cause, reason=reason, silent_s=silent_s)
    # A planned change was reported when draining began; it is not reported again if a rank breaks instead.
    reported = () if state.phase is Phase.DRAINING else (change,)
    state, actions = _stop(state, now)
    return state, (*reported, *actions)


def _stop(state: MembershipState, now: float) -> Decision:
    """Stop all ranks, and ask nodes without ranks too: they may hold newer replicas than they have reported."""
    state = replace(
        state, phase=Phase.STOPPING, stopping_nodes=ShardedSet(state.nodes), grow_at=None, recovery_deadline=None
    )
    stops = tuple(StopGeneration(node=name, generation=state.generation) for name in state.nodes)
    state, actions = _advance(state, now)
    return state, (*stops, *actions)


def _after_stop(state: MembershipState, now: float) -> Decision:
    """Start the next generation, or report that the run waits, after all ranks of the last one have ended."""
    if state.done_step is not None:
        return _finish(state, now)
    num_failures = state.num_failures + bool(state.failure and not state.has_lost_node)
    if num_failures >= MAX_STARTUP_FAILURES:
        reason = f"{num_failures} generations in a row broke before their first step; the last: {state.failure}"
        return replace(state, phase=Phase.DONE), (FailRun(error="RunError", reason=reason),)
    found = newest_complete_step(state)
    num_fruitless = _count_fruitless(state, found=found)
    if num_fruitless >= MAX_FRUITLESS:
        reason = (
            f"{num_fruitless} generations in a row broke before any step after step {state.from_step} was kept; "
            f"the last: {state.break_reason}"
        )
        return replace(state, phase=Phase.DONE), (FailRun(error="RunError", reason=reason),)
    former_size = len(state.assignment)
    state = replace(
        state,
        phase=Phase.WAITING,
        num_failures=num_failures,
        num_fruitless=num_fruitless,
        failure="",
        break_reason="",
        assignment=(),
        ended_ranks=ShardedSet(),
    )
    state, actions = _wait(replace(state, flushing=None), now, found=found, former_size=former_size)
    if state.phase is not Phase.WAITING:
        return state, actions
    return state, (WaitForNodes(have=_usable_slots(state, now), need=state.min_workers), *actions)


def _count_fruitless(state: MembershipState, *, found: ReplicatedStep | None) -> int:
    """Count the generations in a row that broke by themselves and kept no step; a lost node does not count."""
    newest = max(state.stored_step, found.step if found is not None else 0)
    if newest > state.from_step:
        return 0
    return state.num_fruitless + bool(state.break_reason and not state.has_lost_node)


def _wait(state: MembershipState, now: float, *, found: ReplicatedStep | None, former_size: int = 0) -> Decision:
    """Start a generation as soon as there are enough slots; until then flush replicas to storage.

    Args:
        found: the newest complete step, which takes 10 ms to find on 10,000 nodes.
        former_size: see `_start`.
    """
    unsaved = found if found is not None and found.step > state.stored_step else None
    if state.is_stopping and unsaved is None:
        return replace(state, phase=Phase.DONE), (FinishRun(step=state.stored_step),)
    if not state.stopping_nodes and _usable_slots(state, now) >= state.min_workers:
        return _start(state, now, found=found, former_size=former_size)
    if unsaved is None and (reason := _start_failure(state)):
        return replace(state, phase=Phase.DONE), (FailRun(error="RunError", reason=reason),)
    if unsaved is None or unsaved == state.flushing:
        return state, ()
    flush = FlushToStorage(step=unsaved.step, generation=unsaved.generation, world_size=unsaved.world_size)
    return replace(state, flushing=unsaved), (flush,)


def _start_failure(state: MembershipState) -> str:
    """Return why no node will ever be ready, if the fork servers of all of them end again and again."""
    if not state.nodes or any(node.num_failed_starts < MAX_STARTUP_FAILURES for node in state.nodes.values()):
        return ""
    name, node = next(iter(state.nodes.items()))
    return f"no worker could be started: on {name} the process that starts them {node.start_failure}"


def _start(state: MembershipState, now: float, *, found: ReplicatedStep | None, former_size: int) -> Decision:
    """Start a generation, from memory if that is as new as storage.

    Args:
        found: the newest complete step.
        former_size: world size of the generation before. A node with a preemption notice is left out if that size
            is reached without it, because it would have to be left out soon anyway.
    """
    staying = {name: node for name, node in state.nodes.items() if node.preempted_at is None}
    chosen = replace(state, nodes=staying)
    assignment = _assign(chosen, now)
    is_enough = former_size and len(assignment) >= max(
        state.min_workers, min(former_size, _num_ranks(state, _target_size(state, now), now=now))
    )
    if not is_enough:
        chosen, assignment = state, _assign(state, now)
    from_memory = found is not None and found.step >= state.stored_step
    num_shard_groups = state.num_shard_groups.get(len(assignment), 1)
    start = StartGeneration(
        generation=max(state.generation, state.former_generation) + 1,
        assignment=assignment,
        step=found.step if found and from_memory else state.stored_step,
        source=(found.generation, found.world_size) if found and from_memory else None,
        num_spare=min(_target_size(state, now), _usable_slots(chosen, now)) - len(assignment),
        num_split_groups=_num_split(assignment, size=state.group_sizes.get(len(assignment), 1)),
        num_shard_groups=num_shard_groups,
        parts_per_shard=parts_per_shard(assignment, num_shard_groups=num_shard_groups),
    )
    state = replace(
        state,
        phase=Phase.STARTING,
        generation=start.generation,
        from_step=start.step,
        assignment=assignment,
        ended_ranks=ShardedSet(),
        has_lost_node=False,
        grow_at=None,
    )
    is_yielding = now < state.yield_until
    return state, (start, *((ReleaseSlots(),) if is_yielding else ()))


def _assign(state: MembershipState, now: float) -> tuple[str, ...]:
    """Choose a node for each rank: nodes that hold the newest replicas first, so that little state is transferred.

    Groups of ranks are consecutive, so nodes with whole groups come before all others. If that leaves more groups
    on several nodes than necessary, the whole groups of all nodes come first, and the slots that are left over form
    the last groups. While slots are released for another run, guaranteed slots come first.
    """
    size = _num_ranks(state, _usable_slots(state, now), now=now)
    group = state.group_sizes.get(size, 1)
    respect = _sum_usable(state, now, respect_quarantine=True) >= state.min_workers
    usable = {
        name: node.usable_slots(now, margin_s=state.margin_s, respect_quarantine=respect)
        for name, node in state.nodes.items()
    }
    order = sorted(usable, key=lambda name: (usable[name] % group > 0, -_newest_step(state.nodes[name]), name))
    taken, left = dict.fromkeys(order, 0), size
    for only_guaranteed in (True, False) if now < state.yield_until else (False,):
        for unit in (group, 1) if group > 1 else (1,):
            for name in order:
                most = min(usable[name], state.nodes[name].num_guaranteed) if only_guaranteed else usable[name]
                more = max(0, min(most - taken[name], left)) // unit * unit
                taken[name] += more
                left -= more
    whole = Counter({name: taken[name] // group * group for name in order})
    in_order = tuple(name for name in order for _ in range(taken[name]))
    whole_first = (*whole.elements(), *(Counter(taken) - whole).elements())
    return min(in_order, whole_first, key=lambda assignment: _num_split(assignment, size=group))


def _num_split(assignment: tuple[str, ...], *, size: int) -> int:
    """Count the groups of consecutive ranks that are on more than one node."""
    if size == 1:
        return 0
    firsts = range(0, len(assignment) - size + 1, size)  # the ranks after the last group belong to none
    return sum(len(set(assignment[at : at + size])) > 1 for at in firsts)


def _newest_step(node: MemberNode) -> int:
    return max([replica.step for replica in node.replicas], default=-1)


def _usable_slots(state: MembershipState, now: float) -> int:
    """Count the slots for ranks. Quarantined slots are left out unless the minimum needs them."""
    usable = _sum_usable(state, now, respect_quarantine=True)
    return usable if usable >= state.min_workers else _sum_usable(state, now, respect_quarantine=False)


def _sum_usable(state: MembershipState, now: float, *, respect_quarantine: bool) -> int:
    return sum(
        node.usable_slots(now, margin_s=state.margin_s, respect_quarantine=respect_quarantine)
        for node in state.nodes.values()
    )


def _num_ranks(state: MembershipState, num_slots: int, *, now: float) -> int:
    """Return how many ranks a generation has on so many slots: those that the plan leaves spare get none."""
    most = min(_target_size(state, now), num_slots)
    return most - state.num_spare.get(most, 0)


def _target_size(state: MembershipState, now: float) -> int:
    return state.min_workers if now < state.yield_until else state.max_workers


def _is_leaving_soon(state: MembershipState, name: str, now: float) -> bool:
    preempted_at = state.nodes[name].preempted_at
    return preempted_at is not None and preempted_at - now <= state.margin_s


def _assigned_nodes(state: MembershipState) -> list[str]:
    """The nodes of the generation that are still connected."""
    return [name for name in dict.fromkeys(state.assignment) if name in state.nodes]


def _preempted_nodes(state: MembershipState) -> list[str]:
    """The nodes of the generation with a preemption notice, in the order of their ranks."""
    preempted = {name for name, node in state.nodes.items() if node.preempted_at is not None}
    return [name for name in dict.fromkeys(state.assignment) if name in preempted] if preempted else []


def _drop_old_replicas(state: MembershipState) -> Decision:
    """Drop older replicas once a step of the current generation is complete in memory."""
    if state.phase is not Phase.TRAINING or state.dropped_before >= state.generation:
        return state, ()
    found = newest_complete_step(state)
    if found is None or found.generation != state.generation:
        return state, ()
    return replace(state, dropped_before=state.generation), (DropReplicas(generation=state.generation),)


def _mark_started(state: MembershipState) -> MembershipState:
    return replace(state, phase=Phase.TRAINING, num_failures=0)


def _unexpired(until: tuple[float, ...], now: float) -> tuple[float, ...]:
    return tuple(moment for moment in until if moment > now)


def _with_node(state: MembershipState, name: str, **changes: object) -> MembershipState:
    node = replace(state.nodes[name], **changes)  # type: ignore[arg-type]
    return replace(state, nodes=_sharded(state.nodes).set(name, node))


def _sharded(nodes: Mapping[str, MemberNode]) -> ShardedMap[MemberNode]:
    return nodes if isinstance(nodes, ShardedMap) else ShardedMap(nodes)
