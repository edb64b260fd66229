"""Who is a member of a run, decided without a cluster: `decide(state, event) → (state, actions)`, a pure function.

Events are what agents and clocks tell the supervisor, actions what it tells the agents; both are plain
data, so any history can be replayed in a test. Times are seconds of one clock, given with every event.

                              enough machines
              ┌──────────┐ ───────────────────► ┌─────────┐  first step   ┌──────────┐
    begin ──► │ WAITING  │                      │ FORMING │ ────────────► │ TRAINING │ ──► done
              └──────────┘ ◄──┐                 └─────────┘               └──────────┘     ▲
                    too few   │                   ▲     │ a rank or             │  │       │
                              │     enough        │     │ machine lost     lost,│  │notice,│
                              │  ┌────────────────┘     │                  hung │  │growth,│all ranks
                              │  │                      ▼                       ▼  ▼yield  │done
                         ┌──────────┐ ◄──────── every rank left ──────── ┌─────────┐       │
                         │ STOPPING │ ◄───────────────────────────────── │ LEAVING │       │
                         └──────────┘ ───────────────────────────────────└─────────┘───────┘

    WAITING   no ranks; for machines, or at the beginning for the first of them
    FORMING   the ranks of a generation start, load, and take their first step
    TRAINING  steps are made
    LEAVING   the ranks were asked to end after their step, with a snapshot: no step is lost
    STOPPING  every agent kills what is left of the generation and says which snapshots it holds;
              the next generation begins only when all have answered or are lost: never two at once

A generation goes on from the newest step of which every rank's snapshot is still whole in some machine's
memory, or from storage if that is newer. A machine that was given notice is used until the time left is
what a planned change needs. A preemption is not a failure: only generations that break before their first
step while no machine is lost count against a budget.

The module is long because everything that may happen to a run is answered here.
"""

from __future__ import annotations

from dataclasses import replace

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
    ReplicasHeld,
    SlotsChanged,
    StartGeneration,
    StopGeneration,
    StopRequested,
    Tick,
    WaitForNodes,
    YieldRequested,
)

# Joins within this time of each other are taken together.
JOIN_WINDOW_S = 1.0
# How long a place is left out after its rank hung.
QUARANTINE_S = 60.0
# How long what was given back to another run is not claimed again.
YIELD_S = 15.0
# Generations in a row that break by themselves before their first step.
MAX_STARTUP_FAILURES = 3
# How long a supervisor that was restarted waits for the agents of the generation it finds.
RECOVERY_S = 4.0
_ALIVE = (Phase.STARTING, Phase.TRAINING, Phase.DRAINING)


def decide(state: MembershipState, event: Event, *, now: float) -> Decision:
    """What follows from one event."""
    if state.phase is Phase.DONE:
        return state, ()
    match event:
        case AgentAttached():
            return _came(state, event, now)
        case NodeReady(node=name, is_ready=is_ready) if name in state.nodes:
            return _look(_with_node(state, name, is_ready=is_ready), now)
        case NodeLost(node=name, reason=reason) if name in state.nodes:
            return _lost(state, name, reason, now)
        case SlotsChanged(node=name) if name in state.nodes:
            return _look(
                _with_node(state, name, num_slots=event.num_slots, num_guaranteed=event.num_guaranteed), now
            )
        case PreemptionNotice(node=name, preempted_at=preempted_at) if name in state.nodes:
            return _noticed(state, name, preempted_at, now)
        case ReplicasHeld(node=name, replicas=replicas) if name in state.nodes:
            state = _with_node(state, name, replicas=replicas)
            # That it has formed may have been said while the connection was away; no snapshot is older than that.
            if state.phase is Phase.STARTING and any(h.generation == state.generation for h in replicas):
                state = _formed(state)
            return state, ()
        case GenerationReady(generation=generation) if (
            generation == state.generation and state.phase is Phase.STARTING
        ):
            return _look(_formed(state), now)
        case RankEnded(generation=generation) if generation == state.generation and state.assignment:
            return _ended(state, event, now)
        case AgentStopped(node=name, generation=generation, replicas=replicas) if name in state.nodes:
            state = _with_node(state, name, replicas=replicas)
            is_all = generation >= state.generation
            return _look(replace(state, stopping_nodes=state.stopping_nodes - {name}) if is_all else state, now)
        case HangDetected() if event.generation == state.generation and state.phase in _ALIVE:
            return _hung(state, event, now)
        case CheckpointCommitted(step=step):
            return _look(replace(state, stored_step=max(step, state.stored_step)), now)
        case StopRequested():
            return _look(replace(state, is_stopping=True), now)
        case YieldRequested() if (
            state.recovery_deadline is None
        ):  # it does not know yet what it uses; it is asked again
            return _yield(state, now)
        case Tick(margin_s=margin_s):
            state, forgets = _forget(state if margin_s is None else replace(state, margin_s=margin_s))
            state, actions = _look(state, now)
            return state, (*forgets, *actions)
    return state, ()


def newest_complete_step(state: MembershipState) -> tuple[int, int, int] | None:
    """(step, generation, world size) of the newest step whose every rank's snapshot is in some machine's memory."""
    held: dict[tuple[int, int, int], set[int]] = {}
    for node in state.nodes.values():
        for h in node.replicas:
            held.setdefault((h.step, h.generation, h.world_size), set()).add(h.rank)
    return max((key for key, ranks in held.items() if len(ranks) == key[2]), default=None)


# --- what each event leads to -------------------------------------------------------------------------------


def _came(state: MembershipState, event: AgentAttached, now: float) -> Decision:
    name, running = event.node, set(event.running_ranks)
    node = replace(
        state.nodes.get(name) or MemberNode(num_slots=event.num_slots),
        num_slots=event.num_slots,
        num_guaranteed=event.num_guaranteed,
        is_ready=event.is_ready,
        replicas=event.replicas,
    )
    state = replace(
        state,
        nodes={**state.nodes, name: node},
        former_generation=max(state.former_generation, event.generation),
        # That it was done may have been said while the connection was away.
        flushing=None if name in state.nodes else state.flushing,
    )
    stops: tuple[Action, ...] = ()
    is_searching = state.phase is Phase.WAITING or state.recovery_deadline is not None
    if running and is_searching and event.generation > state.generation:
        state, stops = _adopt(state, event, now)
    if state.recovery_deadline is not None and event.generation == state.generation:
        assignment = tuple(name if rank in running else place for rank, place in enumerate(state.assignment))
        state = replace(state, assignment=assignment)
    ranks = {rank for rank, place in enumerate(state.assignment) if place == name and state.phase in _ALIVE}
    if ranks and not (event.generation == state.generation and ranks - state.ended_ranks <= running <= ranks):
        return _break(state, now, cause="loss", reason=f"node {name} has lost its ranks")
    # Its ranks are of a generation that is over. Or it was told so, and that may not have reached it.
    if (running and not ranks) or name in state.stopping_nodes:
        state = replace(state, stopping_nodes=state.stopping_nodes | {name})
        newest = max(state.generation, event.generation)
        return state, (*stops, StopGeneration(node=name, generation=newest, keep_replicas=state.phase in _ALIVE))
    state, actions = _look(state, now)
    return state, (*stops, *actions)


def _adopt(state: MembershipState, event: AgentAttached, now: float) -> Decision:
    """A supervisor that was restarted finds a generation at work, if need be a newer one than it found before."""
    strangers = state.stopping_nodes | set(_members(state))
    state = replace(
        state,
        phase=Phase.TRAINING,
        generation=event.generation,
        assignment=("",) * next(iter(event.running_ranks.values())),
        stopping_nodes=strangers,
        ended_ranks=frozenset(),
        recovery_deadline=state.recovery_deadline or now + RECOVERY_S,
    )
    return state, tuple(
        StopGeneration(node=name, generation=event.generation, keep_replicas=True) for name in sorted(strangers)
    )


def _lost(state: MembershipState, name: str, reason: str, now: float) -> Decision:
    nodes = {key: node for key, node in state.nodes.items() if key != name}
    state = replace(
        state, nodes=nodes, stopping_nodes=state.stopping_nodes - {name}, has_lost_node=True, flushing=None
    )
    if state.phase in _ALIVE and name in state.assignment:
        if state.done_step is not None:
            return _settle_done(state, now)
        return _break(state, now, cause="loss", reason=f"node {name} lost: {reason}")
    return _look(state, now)


def _noticed(state: MembershipState, name: str, preempted_at: float, now: float) -> Decision:
    known = state.nodes[name].preempted_at
    state = _with_node(state, name, preempted_at=preempted_at if known is None else min(known, preempted_at))
    state, actions = _look(state, now)
    return state, ((ReplaceNode(node=name),) if known is None else ()) + actions


def _ended(state: MembershipState, event: RankEnded, now: float) -> Decision:
    if event.end is EndReason.FAILED:
        stops = tuple(StopGeneration(node=name, generation=state.generation) for name in _members(state))
        return replace(state, phase=Phase.DONE), (*stops, FailRun(error=event.error, reason=event.reason))
    state = replace(state, ended_ranks=state.ended_ranks | {event.rank})
    if event.end is EndReason.DONE:
        state = replace(state, done_step=event.step)
    if state.done_step is not None:
        return _settle_done(state, now)
    if state.phase is Phase.STOPPING:
        return state, ()
    if event.end is EndReason.DRAINED:
        if len(state.ended_ranks) < len(state.assignment):
            return state, ()
        return _stop(state, now)  # all have left: nothing is lost
    place = state.assignment[event.rank]
    return _break(state, now, cause="failure", reason=f"rank {event.rank} on {place} broke: {event.reason}")


def _settle_done(state: MembershipState, now: float) -> Decision:
    """The last checkpoint is sealed: the run is over once every rank has ended or is lost."""
    left = [r for r, name in enumerate(state.assignment) if r not in state.ended_ranks and name in state.nodes]
    return (state, ()) if left else _conclude(state, now)


def _conclude(state: MembershipState, now: float) -> Decision:
    """The end; but for a run that was stopped before it reached what a machine has brought back since."""
    assert state.done_step is not None
    found = newest_complete_step(state)
    if state.is_stopping and found is not None and found[0] > state.done_step:
        return _stop(replace(state, done_step=None, stored_step=max(state.stored_step, state.done_step)), now)
    return replace(state, phase=Phase.DONE), (FinishRun(step=state.done_step),)


def _hung(state: MembershipState, event: HangDetected, now: float) -> Decision:
    name = state.assignment[event.rank] if event.rank < len(state.assignment) else ""
    if name in state.nodes:
        node = state.nodes[name]
        state = _with_node(
            state, name, quarantined_until=(*_still(node.quarantined_until, now), now + QUARANTINE_S)
        )
    return _break(
        state,
        now,
        cause="hang",
        reason=f"rank {event.rank} on {name} hung for {event.silent_s:.1f} s",
        silent_s=event.silent_s,
    )


def _yield(state: MembershipState, now: float) -> Decision:
    used = len(state.assignment)
    state = replace(state, yield_until=now + YIELD_S)
    if state.phase is Phase.TRAINING and used > state.min_workers and not state.is_stopping:
        return _leave(state, now, cause="yield", reason="another run waits for its smallest number of workers")
    return state, (ReleaseSlots(),)


# --- looking at the whole -----------------------------------------------------------------------------------


def _look(state: MembershipState, now: float) -> Decision:
    """What the state of things asks for, whatever has happened."""
    if state.recovery_deadline is not None:
        return _reunite(state, now)
    if 0 < state.yield_until <= now:  # whoever waited has had its time; what is free again may be taken
        state, actions = _look(replace(state, yield_until=0.0), now)
        return state, (ClaimSlots(), *actions)
    if state.phase is Phase.WAITING:
        return _wait(state, now)
    if state.phase is Phase.STOPPING and not state.stopping_nodes:
        return _follow(state, now)
    if state.phase is not Phase.TRAINING or state.is_stopping:
        return state, ()
    going = [name for name in _members(state) if _is_going(state, name, now)]
    if going:
        return _leave(state, now, cause="notice", reason=f"node {going[0]} will be taken away")
    return _grow(state, now)


def _reunite(state: MembershipState, now: float) -> Decision:
    assert state.recovery_deadline is not None
    is_whole = bool(state.assignment) and all(state.assignment)
    if not is_whole and now < state.recovery_deadline:
        return state, ()
    state = replace(state, recovery_deadline=None)
    if is_whole:
        return _look(state, now)
    if not state.assignment:
        return _stop(state, now)
    return _break(state, now, cause="loss", reason="an agent did not come back while the supervisor was away")


def _grow(state: MembershipState, now: float) -> Decision:
    """Take in machines that are ready: soon after they came, or at once where one has to be replaced."""
    doomed = [name for name in _members(state) if state.nodes[name].preempted_at is not None]
    staying = [node for node in state.nodes.values() if node.preempted_at is None]
    could = min(_limit(state, now), sum(node.room(now, margin_s=state.margin_s) for node in staying))
    if doomed and could >= len(state.assignment):
        return _leave(state, now, cause="notice", reason=f"node {doomed[0]} is replaced")
    if could <= len(state.assignment):
        return replace(state, grow_at=None), ()
    if state.grow_at is None:
        return replace(state, grow_at=now + JOIN_WINDOW_S), ()
    if now < state.grow_at:
        return state, ()
    more = could - len(state.assignment)
    return _leave(state, now, cause="growth", reason=f"{more} more worker{'s' * (more > 1)} ready")


def _leave(state: MembershipState, now: float, *, cause: str, reason: str) -> Decision:
    change = ChangeMembership(generation=state.generation, cause=cause, reason=reason)
    return replace(state, phase=Phase.DRAINING, grow_at=None), (
        change,
        DrainGeneration(generation=state.generation),
    )


def _break(state: MembershipState, now: float, *, cause: str, reason: str, silent_s: float = 0.0) -> Decision:
    """A generation cannot go on: stop what is left of it."""
    if state.phase is Phase.STARTING and cause != "loss":
        state = replace(state, failure=reason)
    change = ChangeMembership(generation=state.generation, cause=cause, reason=reason, silent_s=silent_s)
    # A change that was announced already is not announced again because its ranks break instead of leaving.
    announced = () if state.phase is Phase.DRAINING else (change,)
    state, actions = _stop(state, now)
    return state, (*announced, *actions)


def _stop(state: MembershipState, now: float) -> Decision:
    """Have no rank left. Machines without any are asked too: they may hold newer copies than they have told of."""
    state = replace(
        state, phase=Phase.STOPPING, stopping_nodes=frozenset(state.nodes), grow_at=None, recovery_deadline=None
    )
    stops = tuple(StopGeneration(node=name, generation=state.generation) for name in state.nodes)
    state, actions = _look(state, now)
    return state, (*stops, *actions)


def _follow(state: MembershipState, now: float) -> Decision:
    """No rank of the generation is left anywhere: form the next, or say what is waited for."""
    if state.done_step is not None:
        return _conclude(state, now)
    num_failures = state.num_failures + bool(state.failure and not state.has_lost_node)
    if num_failures >= MAX_STARTUP_FAILURES:
        reason = f"{num_failures} generations in a row broke before their first step; the last: {state.failure}"
        return replace(state, phase=Phase.DONE), (FailRun(error="RunError", reason=reason),)
    former = len(state.assignment)
    state = replace(
        state, phase=Phase.WAITING, num_failures=num_failures, failure="", assignment=(), ended_ranks=frozenset()
    )
    state, actions = _wait(replace(state, flushing=None), now, former=former)
    if state.phase is not Phase.WAITING:
        return state, actions
    return state, (WaitForNodes(have=_available(state, now), need=state.min_workers), *actions)


def _wait(state: MembershipState, now: float, *, former: int = 0) -> Decision:
    """No ranks are there: form a generation as soon as that can be; until then, leave nothing in memory alone."""
    found = newest_complete_step(state)
    unsaved = found if found is not None and found[0] > state.stored_step else None
    if state.is_stopping and unsaved is None:
        return replace(state, phase=Phase.DONE), (FinishRun(step=state.stored_step),)
    if not state.stopping_nodes and _available(state, now) >= state.min_workers:
        return _form(state, now, former=former)
    if unsaved is None or unsaved == state.flushing:
        return state, ()
    step, generation, world_size = unsaved
    persist = FlushToStorage(step=step, generation=generation, world_size=world_size)
    return replace(state, flushing=unsaved), (persist,)


def _form(state: MembershipState, now: float, *, former: int = 0) -> Decision:
    """Start a generation, from memory if that is as new as storage.

    Args:
        former: the size of the one before. A machine that was given notice is left out where that size is
            reached without it: it would only have to be left out later.
    """
    staying = {name: node for name, node in state.nodes.items() if node.preempted_at is None}
    without_going = _places(replace(state, nodes=staying), now)
    is_enough = former and len(without_going) >= max(state.min_workers, min(former, _limit(state, now)))
    assignment = without_going if is_enough else _places(state, now)
    found = newest_complete_step(state)
    from_memory = found is not None and found[0] >= state.stored_step
    start = StartGeneration(
        generation=max(state.generation, state.former_generation) + 1,
        assignment=assignment,
        step=found[0] if found and from_memory else state.stored_step,
        source=(found[1], found[2]) if found and from_memory else None,
    )
    state = replace(
        state,
        phase=Phase.STARTING,
        generation=start.generation,
        assignment=assignment,
        ended_ranks=frozenset(),
        has_lost_node=False,
        grow_at=None,
    )
    yields = now < state.yield_until
    return state, (start, *((ReleaseSlots(),) if yields else ()))


def _places(state: MembershipState, now: float) -> tuple[str, ...]:
    """A node for each rank: machines that hold snapshots first, so that little has to travel.

    While assignment are given back to another run, the firm ones come first.
    """
    size = min(_limit(state, now), _available(state, now))
    benches = _room(state, now, benches=True) >= state.min_workers
    order = sorted(state.nodes, key=lambda name: (-_newest_step(state.nodes[name]), name))
    room = {n: state.nodes[n].room(now, margin_s=state.margin_s, benches=benches) for n in order}
    taken = dict.fromkeys(order, 0)
    for is_firm in (True, False) if now < state.yield_until else (False,):
        for name in order:
            most = min(room[name], state.nodes[name].num_guaranteed) if is_firm else room[name]
            taken[name] += max(0, min(most - taken[name], size - sum(taken.values())))
    return tuple(name for name in order for _ in range(taken[name]))


def _newest_step(node: MemberNode) -> int:
    return max((replica.step for replica in node.replicas), default=-1)


def _available(state: MembershipState, now: float) -> int:
    """Places for ranks. One that hung is left out, unless the run could not go on without it."""
    room = _room(state, now, benches=True)
    return room if room >= state.min_workers else _room(state, now, benches=False)


def _room(state: MembershipState, now: float, *, benches: bool) -> int:
    return sum(node.room(now, margin_s=state.margin_s, benches=benches) for node in state.nodes.values())


def _limit(state: MembershipState, now: float) -> int:
    return state.min_workers if now < state.yield_until else state.max_workers


def _is_going(state: MembershipState, name: str, now: float) -> bool:
    preempted_at = state.nodes[name].preempted_at
    return preempted_at is not None and preempted_at - now <= state.margin_s


def _members(state: MembershipState) -> list[str]:
    """The nodes of the generation that are still there."""
    return [name for name in dict.fromkeys(state.assignment) if name in state.nodes]


def _forget(state: MembershipState) -> Decision:
    """Once a generation's own snapshots are whole, those of the ones before it are of no use."""
    if state.phase is not Phase.TRAINING or state.dropped_before >= state.generation:
        return state, ()
    found = newest_complete_step(state)
    if found is None or found[1] != state.generation:
        return state, ()
    return replace(state, dropped_before=state.generation), (DropReplicas(generation=state.generation),)


def _formed(state: MembershipState) -> MembershipState:
    return replace(state, phase=Phase.TRAINING, num_failures=0)


def _still(until: tuple[float, ...], now: float) -> tuple[float, ...]:
    return tuple(moment for moment in until if moment > now)


def _with_node(state: MembershipState, name: str, **changes: object) -> MembershipState:
    node = replace(state.nodes[name], **changes)  # type: ignore[arg-type]
    return replace(state, nodes={**state.nodes, name: node})
