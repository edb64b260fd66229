"""Decisions on single events: joins, losses, hangs, notices; waiting, yielding and stopping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.elastic.membership import (
    JOIN_WINDOW_S,
    MAX_FRUITLESS,
    MAX_STARTUP_FAILURES,
    QUARANTINE_S,
    RECOVERY_S,
    YIELD_S,
    decide,
    newest_complete_step,
)
from forge.elastic.sharded import ShardedSet
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


class Scenario:
    """A membership state, changed by one event after another."""

    def __init__(self, state: MembershipState) -> None:
        self.state, self.now = state, 100.0

    def on(self, event: Event) -> list[Action]:
        """Apply an event. Returns: the actions."""
        self.state, actions = decide(self.state, event, now=self.now)
        return list(actions)

    def after(self, seconds: float) -> list[Action]:
        """Let time pass. Returns: the actions of the tick."""
        self.now += seconds
        return self.on(Tick())

    def stopped(self, *names: str, **replicas: frozenset[ReplicaLocation]) -> list[Action]:
        """Confirm the stop of these nodes. Returns: the actions of the last confirmation."""
        generation = self.state.generation
        actions: list[Action] = []
        for name in names:
            held = replicas.get(name, self.state.nodes[name].replicas)
            actions = self.on(AgentStopped(node=name, generation=generation, replicas=held))
        return actions

    def drained(self) -> list[Action]:
        """Let every rank end as drained. Returns: the actions."""
        ranks = range(len(self.state.assignment))
        return [
            action for rank in ranks for action in self.on(ended(rank, EndReason.DRAINED, self.state.generation))
        ]


def waiting(*, low: int = 1, high: int = 4, **more: Any) -> Scenario:
    return Scenario(MembershipState(min_workers=low, max_workers=high, **more))


def training(*assignment: str, low: int = 1, high: int = 4, phase: Phase = Phase.TRAINING, **more: Any) -> Scenario:
    """Generation 1 is training, with a rank per named node."""
    nodes = {name: MemberNode(num_slots=assignment.count(name), is_ready=True) for name in assignment}
    return Scenario(
        MembershipState(
            min_workers=low, max_workers=high, phase=phase, generation=1, assignment=assignment, nodes=nodes, **more
        )
    )


def came(name: str, **more: Any) -> AgentAttached:
    return AgentAttached(node=name, **({"num_slots": 1, "is_ready": True} | more))


def lost(name: str) -> NodeLost:
    return NodeLost(node=name, reason="its connection closed")


def ended(rank: int, end: EndReason = EndReason.BROKEN, generation: int = 1, **more: Any) -> RankEnded:
    return RankEnded(generation=generation, rank=rank, end=end, **more)


def snapshots(step: int, *ranks: int, of: int, generation: int = 1) -> frozenset[ReplicaLocation]:
    return frozenset(ReplicaLocation(generation=generation, rank=rank, world_size=of, step=step) for rank in ranks)


def stops(*names: str, generation: int = 1, keep_replicas: bool = False) -> list[Action]:
    return [StopGeneration(node=name, generation=generation, keep_replicas=keep_replicas) for name in names]


def start(
    generation: int, *assignment: str, step: int = 0, source: tuple[int, int] | None = None
) -> StartGeneration:
    return StartGeneration(generation=generation, assignment=assignment, step=step, source=source)


def causes(actions: list[Action]) -> list[str]:
    return [action.cause for action in actions if isinstance(action, ChangeMembership)]


def starts(actions: list[Action]) -> list[StartGeneration]:
    return [action for action in actions if isinstance(action, StartGeneration)]


# --- starting and growing


def test_waiting__minimum_ready__generation_starts() -> None:
    scenario = waiting(low=2)
    assert scenario.on(came("a")) == []
    assert scenario.on(came("b", is_ready=False)) == []
    assert scenario.on(NodeReady(node="b")) == [start(1, "a", "b")]
    assert scenario.state.phase is Phase.STARTING


def test_start__node_with_many_slots__ranks_up_to_the_maximum() -> None:
    scenario = waiting(low=2, high=3)
    assert scenario.on(came("a", num_slots=4)) == [start(1, "a", "a", "a")]


def test_start__resumed_run__continues_from_storage_with_next_generation() -> None:
    scenario = waiting(former_generation=7, stored_step=40)
    assert scenario.on(came("a")) == [start(8, "a", step=40)]


def test_starting__first_step__training() -> None:
    scenario = training("a", phase=Phase.STARTING)
    assert scenario.on(GenerationReady(generation=1)) == []
    assert scenario.state.phase is Phase.TRAINING


def test_starting__replica_reported__training() -> None:
    scenario = training("a", phase=Phase.STARTING)
    scenario.on(ReplicasHeld(node="a", replicas=snapshots(1, 0, of=1)))
    assert scenario.state.phase is Phase.TRAINING


def test_growth__nodes_join_within_window__one_change() -> None:
    scenario = training("a")
    assert scenario.on(came("b")) == []
    scenario.now += JOIN_WINDOW_S / 2
    assert scenario.on(came("c")) == []
    actions = scenario.after(JOIN_WINDOW_S / 2)
    assert causes(actions) == ["growth"]
    assert actions[-1] == DrainGeneration(generation=1)
    assert scenario.drained() == stops("a", "b", "c")
    assert scenario.stopped("a", "b", "c") == [start(2, "a", "b", "c")]


def test_growth__joining_node_is_lost__no_change() -> None:
    scenario = training("a")
    scenario.on(came("b"))
    assert scenario.on(lost("b")) == []
    assert scenario.after(JOIN_WINDOW_S) == []
    assert scenario.on(came("c")) == []  # a new window begins


def test_growth__at_maximum__no_change() -> None:
    scenario = training("a", "b", high=2)
    assert scenario.on(came("c")) == []
    assert scenario.after(JOIN_WINDOW_S) == []


def test_growth__node_gets_more_slots__one_change() -> None:
    scenario = training("a")
    assert scenario.on(SlotsChanged(node="a", num_slots=2)) == []
    assert causes(scenario.after(JOIN_WINDOW_S)) == ["growth"]


# --- losses


def test_loss__member_lost__next_generation_waits_for_all_stops() -> None:
    scenario = training("a", "b", "c")
    actions = scenario.on(lost("b"))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "c")
    assert scenario.stopped("a") == []
    assert scenario.stopped("c") == [start(2, "a", "c")]


def test_loss__stopping_node_lost__not_waited_for() -> None:
    scenario = training("a", "b", "c")
    scenario.on(lost("b"))
    scenario.stopped("a")
    assert scenario.on(lost("c")) == [start(2, "a")]


def test_loss__continues_from_newest_complete_step() -> None:
    scenario = training("a", "b", "c")
    scenario.on(ReplicasHeld(node="a", replicas=snapshots(7, 0, 2, of=3) | snapshots(8, 0, 2, of=3)))
    scenario.on(lost("b"))
    scenario.stopped("a")
    held = snapshots(7, 1, of=3) | snapshots(9, 2, of=3)  # the replica of the lost rank; its own snapshot is newer
    assert scenario.stopped("c", c=held) == [start(2, "c", "a", step=7, source=(1, 3))]


def test_loss__spare_node_holds_replica__is_used() -> None:
    scenario = training("a", high=1)
    scenario.on(came("spare"))
    scenario.on(ReplicasHeld(node="spare", replicas=snapshots(3, 0, of=1)))
    assert scenario.on(lost("a"))[1:] == stops("spare")
    newer = snapshots(8, 0, of=1)
    assert scenario.stopped("spare", spare=newer) == [start(2, "spare", step=8, source=(1, 1))]


def test_start__storage_newer_than_memory__from_storage() -> None:
    scenario = training("a", "b")
    scenario.on(CheckpointCommitted(step=9))
    scenario.on(lost("b"))
    assert scenario.stopped("a", a=snapshots(8, 0, 1, of=2)) == [start(2, "a", step=9)]


def test_start__memory_as_new_as_storage__from_memory() -> None:
    scenario = training("a", "b")
    scenario.on(CheckpointCommitted(step=8))
    scenario.on(lost("b"))
    held = snapshots(8, 0, 1, of=2)
    assert scenario.stopped("a", a=held) == [start(2, "a", step=8, source=(1, 2))]


def test_starting__member_lost__generation_stops() -> None:
    scenario = training("a", "b", phase=Phase.STARTING)
    actions = scenario.on(lost("a"))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("b")


def test_draining__member_lost__no_second_change_reported() -> None:
    scenario = training("a", "b", phase=Phase.DRAINING)
    assert scenario.on(lost("a")) == stops("b")


def test_training__spare_node_lost__no_change() -> None:
    scenario = training("a", high=1)
    scenario.on(came("spare"))
    assert scenario.on(lost("spare")) == []
    assert scenario.state.phase is Phase.TRAINING


def test_training__rank_broke__restarts_on_same_nodes() -> None:
    scenario = training("a", "b")
    actions = scenario.on(ended(1, reason="its process was killed"))
    assert causes(actions) == ["failure"]
    assert scenario.on(ended(0)) == []  # its connection to the other rank broke
    assert scenario.stopped("a", "b") == [start(2, "a", "b")]


def test_rank_ended__earlier_generation__ignored() -> None:
    scenario = training("a", "b")
    assert scenario.on(ended(1, generation=0)) == []
    assert scenario.state.phase is Phase.TRAINING


def test_start__fork_server_dead__node_left_out_until_ready() -> None:
    scenario = training("a", "b")
    assert scenario.on(NodeReady(node="b", is_ready=False)) == []
    scenario.on(ended(1))
    assert scenario.stopped("a", "b") == [start(2, "a")]
    scenario.on(GenerationReady(generation=2))
    scenario.on(NodeReady(node="b"))
    assert causes(scenario.after(JOIN_WINDOW_S)) == ["growth"]


def test_start__fork_servers_of_all_nodes_end_again_and_again__run_fails_with_the_reason() -> None:
    scenario = waiting(low=2)
    for name in "ab":
        scenario.on(came(name, is_ready=False))
    failed = [NodeReady(node=name, is_ready=False, reason="ended: no torch") for name in "abaaab"]
    assert not any(scenario.on(event) for event in failed)
    assert scenario.on(NodeReady(node="b", is_ready=False)) == [
        FailRun(
            error="RunError",
            reason="no worker could be started: on a the process that starts them ended: no torch",
        )
    ]


def test_start__fork_server_that_was_ready_or_another_node__run_waits() -> None:
    scenario = waiting(low=2)
    for name in "ab":
        scenario.on(came(name, is_ready=False))
    for _ in range(9):
        assert scenario.on(NodeReady(node="a", is_ready=False)) == []
        assert scenario.on(NodeReady(node="b")) == []
        assert scenario.on(NodeReady(node="b", is_ready=False)) == []
    scenario.on(NodeReady(node="b"))
    assert scenario.on(NodeReady(node="a")) == [start(1, "a", "b")]


def test_start__fork_servers_end_but_a_step_is_in_memory_only__it_is_written_first() -> None:
    scenario = training("a", low=1)
    scenario.on(ReplicasHeld(node="a", replicas=snapshots(7, 0, of=1)))
    scenario.on(NodeReady(node="a", is_ready=False))
    scenario.on(ended(0))
    scenario.stopped("a")
    actions = [action for _ in range(5) for action in scenario.on(NodeReady(node="a", is_ready=False))]
    assert actions == []
    (end,) = scenario.on(CheckpointCommitted(step=7))
    assert isinstance(end, FailRun)


def test_start__nodes_with_replicas_first() -> None:
    scenario = training("a", "b", high=2)
    scenario.on(came("aa"))
    scenario.on(lost("a"))
    held = snapshots(5, 0, 1, of=2)
    assert scenario.stopped("aa", "b", b=held) == [start(2, "b", "aa", step=5, source=(1, 2))]


def test_tick__new_generation_complete_in_memory__older_replicas_dropped() -> None:
    scenario = training("a", "b")
    scenario.state = replace(scenario.state, generation=2)
    old = snapshots(4, 0, 1, of=2)
    assert scenario.on(ReplicasHeld(node="a", replicas=old | snapshots(5, 0, of=2, generation=2))) == []
    assert scenario.on(Tick()) == []
    scenario.on(ReplicasHeld(node="b", replicas=snapshots(5, 1, of=2, generation=2)))
    assert scenario.on(Tick()) == [DropReplicas(generation=2)]
    assert scenario.on(Tick()) == []  # only once


def test_newest_complete_step__ranks_of_two_generations__not_combined() -> None:
    held = snapshots(5, 0, of=2) | snapshots(5, 1, of=2, generation=2) | snapshots(3, 0, of=1, generation=3)
    node = MemberNode(num_slots=1, replicas=held)
    assert newest_complete_step(MembershipState(min_workers=1, max_workers=1, nodes={"a": node})) == ReplicatedStep(
        step=3, generation=3, world_size=1
    )
    assert newest_complete_step(MembershipState(min_workers=1, max_workers=1)) is None


# --- notices


def test_notice__time_left__trains_on_until_margin() -> None:
    scenario = training("a", "b")
    assert scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now + 30)) == [ReplaceNode(node="b")]
    assert (
        scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now + 29)) == []
    )  # the replacement is requested once
    assert scenario.after(20) == []
    actions = scenario.after(9 - scenario.state.margin_s)
    assert causes(actions) == ["notice"]
    assert actions[-1] == DrainGeneration(generation=1)
    scenario.drained()
    assert scenario.stopped("a", "b") == [start(2, "a")]


def test_notice__replacement_ready__drains_at_once() -> None:
    scenario = training("a", "b")
    scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now + 30))
    assert scenario.on(came("c", is_ready=False)) == []
    assert causes(scenario.on(NodeReady(node="c"))) == ["notice"]
    scenario.drained()
    assert scenario.stopped("a", "b", "c") == [start(2, "a", "c")]


def test_notice__no_time_left__drains_at_once() -> None:
    scenario = training("a", "b")
    actions = scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now))
    assert actions[0] == ReplaceNode(node="b")
    assert causes(actions) == ["notice"]


def test_notice__margin_from_tick__drains_when_reached() -> None:
    scenario = training("a", "b")
    scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now + 30))
    scenario.now += 5
    assert causes(scenario.on(Tick(margin_s=25.0))) == ["notice"]


def test_notice__spare_node__replaced_only() -> None:
    scenario = training("a", high=1)
    scenario.on(came("spare"))
    assert scenario.on(PreemptionNotice(node="spare", preempted_at=scenario.now)) == [ReplaceNode(node="spare")]
    assert scenario.state.phase is Phase.TRAINING


def test_notice__while_starting__drains_after_first_step() -> None:
    scenario = training("a", "b", phase=Phase.STARTING)
    assert scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now)) == [ReplaceNode(node="b")]
    assert causes(scenario.on(GenerationReady(generation=1))) == ["notice"]


def test_notice__joining_node__not_taken_in() -> None:
    scenario = training("a")
    scenario.on(came("b"))
    scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now + 60))
    assert scenario.after(JOIN_WINDOW_S) == []


def test_notice__node_needed_for_minimum__used_until_margin() -> None:
    scenario = training("a", "b", "c", low=2)
    scenario.on(PreemptionNotice(node="b", preempted_at=scenario.now + 30))
    scenario.on(lost("c"))
    assert starts(scenario.stopped("a", "b")) == [start(2, "a", "b")]
    scenario.on(GenerationReady(generation=2))
    held = snapshots(6, 0, 1, of=2, generation=2)
    scenario.on(ReplicasHeld(node="a", replicas=held))
    assert causes(scenario.after(30 - scenario.state.margin_s)) == ["notice"]
    scenario.drained()
    assert scenario.stopped("a", "b") == [
        WaitForNodes(have=1, need=2),
        FlushToStorage(step=6, generation=2, world_size=2),
    ]


# --- hangs


def hung(rank: int, generation: int = 1) -> HangDetected:
    return HangDetected(generation=generation, rank=rank, silent_s=5.0)


def test_hang__slot_quarantined_for_a_while() -> None:
    scenario = training("a", "b")
    actions = scenario.on(hung(1))
    assert causes(actions) == ["hang"]
    assert actions[1:] == stops("a", "b")
    assert scenario.stopped("a", "b") == [start(2, "a")]
    scenario.on(GenerationReady(generation=2))
    assert scenario.after(QUARANTINE_S - 0.1) == []
    scenario.after(0.1)
    assert causes(scenario.after(JOIN_WINDOW_S)) == ["growth"]


def test_hang__node_with_two_slots__one_is_quarantined() -> None:
    scenario = training("a", "a", "b")
    scenario.on(hung(0))
    assert starts(scenario.stopped("a", "b")) == [start(2, "a", "b")]


def test_hang__slot_needed_for_minimum__used() -> None:
    scenario = training("a", "b", low=2)
    scenario.on(hung(1))
    assert scenario.stopped("a", "b") == [start(2, "a", "b")]


def test_hang__earlier_generation__ignored() -> None:
    scenario = training("a", "b")
    assert scenario.on(hung(1, generation=0)) == []


# --- too few machines


def test_waiting__below_minimum__flushes_newest_step() -> None:
    scenario = training("a", "b", low=2)
    scenario.on(lost("b"))
    actions = scenario.stopped("a", a=snapshots(6, 0, 1, of=2))
    assert actions == [WaitForNodes(have=1, need=2), FlushToStorage(step=6, generation=1, world_size=2)]
    assert scenario.after(1.0) == []  # the replacement is requested once
    assert scenario.on(came("c")) == [start(2, "a", "c", step=6, source=(1, 2))]


def test_waiting__newest_step_stored__no_flush() -> None:
    scenario = training("a", "b", low=2, stored_step=6)
    scenario.on(lost("b"))
    assert scenario.stopped("a", a=snapshots(6, 0, 1, of=2)) == [WaitForNodes(have=1, need=2)]


@pytest.mark.parametrize("happens", [came("b"), lost("b")], ids=["it reconnects", "it is lost"])
def test_waiting__flush_may_be_lost__repeated(happens: Event) -> None:
    scenario = training("a", "b", "c", low=3)
    scenario.on(lost("c"))
    both = snapshots(6, 0, 1, 2, of=3)
    persist = FlushToStorage(step=6, generation=1, world_size=3)
    assert scenario.stopped("a", "b", a=both, b=both)[-1] == persist
    event = replace(happens, replicas=both) if isinstance(happens, AgentAttached) else happens
    assert scenario.on(event) == [persist]


# --- another run waits


def test_yield__above_minimum__shrinks_and_releases_for_a_while() -> None:
    scenario = training("a", "b", "c", low=1)
    scenario.state = replace(
        scenario.state,
        nodes={**scenario.state.nodes, "b": MemberNode(num_slots=1, num_guaranteed=1, is_ready=True)},
    )
    actions = scenario.on(YieldRequested())
    assert causes(actions) == ["yield"]
    scenario.drained()
    assert scenario.stopped("a", "b", "c") == [start(2, "b"), ReleaseSlots()]  # onto its firm place
    scenario.on(GenerationReady(generation=2))
    assert scenario.after(YIELD_S - 0.1) == []
    assert scenario.after(0.1) == [ClaimSlots()]
    assert scenario.after(0.1) == []
    assert causes(scenario.after(JOIN_WINDOW_S)) == ["growth"]


def test_yield__repeated__claims_later() -> None:
    scenario = training("a", low=1)
    for _ in range(20):
        assert scenario.on(YieldRequested()) == [ReleaseSlots()]
        assert scenario.after(2.0) == []
    assert scenario.after(YIELD_S) == [ClaimSlots()]


def test_yield__below_minimum__restarts_at_minimum() -> None:
    scenario = training("a", "b", low=2)
    scenario.on(YieldRequested())
    scenario.on(lost("b"))
    assert scenario.stopped("a") == [WaitForNodes(have=1, need=2)]
    assert scenario.after(YIELD_S) == [ClaimSlots()]


def test_yield__during_a_change__releases_only() -> None:
    for phase in (Phase.STARTING, Phase.DRAINING, Phase.STOPPING):
        scenario = training("a", "b", phase=phase, stopping_nodes=ShardedSet(["a"]))
        assert scenario.on(YieldRequested()) == [ReleaseSlots()]
        assert scenario.state.phase is phase


# --- the end


def test_done__all_ranks__finishes() -> None:
    scenario = training("a", "b")
    assert scenario.on(ended(0, EndReason.DONE, step=50)) == []
    assert scenario.on(ended(1, EndReason.DONE, step=50)) == [FinishRun(step=50)]
    assert scenario.on(came("c")) == []


@pytest.mark.parametrize("happens", [lost("b"), ended(1)], ids=["node lost", "rank broke"])
def test_done__remaining_rank_lost__finishes(happens: Event) -> None:
    scenario = training("a", "b")
    scenario.on(ended(0, EndReason.DONE, step=50))
    assert scenario.on(happens) == [FinishRun(step=50)]


def test_done__remaining_rank_hangs__stopped_and_finishes() -> None:
    scenario = training("a", "b")
    scenario.on(ended(0, EndReason.DONE, step=50))
    scenario.on(hung(1))
    assert scenario.stopped("a", "b") == [FinishRun(step=50)]


def test_failed_rank__fails_the_run() -> None:
    scenario = training("a", "b")
    failed = ended(1, EndReason.FAILED, reason="the loss is nan", error="RunError")
    assert scenario.on(failed) == [*stops("a", "b"), FailRun(error="RunError", reason="the loss is nan")]
    assert scenario.state.phase is Phase.DONE


def test_stop__before_first_generation__finishes() -> None:
    assert waiting(stored_step=3).on(StopRequested()) == [FinishRun(step=3)]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.TRAINING, Phase.DRAINING])
def test_stop__finishes_when_ranks_are_done(phase: Phase) -> None:
    scenario = training("a", phase=phase)
    assert scenario.on(StopRequested()) == []
    assert scenario.on(ended(0, EndReason.DONE, step=8)) == [FinishRun(step=8)]


def test_stop__no_further_changes() -> None:
    scenario = training("a", "b")
    scenario.on(StopRequested())
    scenario.on(came("c"))
    assert scenario.after(JOIN_WINDOW_S) == []
    assert scenario.on(PreemptionNotice(node="a", preempted_at=scenario.now)) == [ReplaceNode(node="a")]
    assert scenario.on(YieldRequested()) == [ReleaseSlots()]


def test_stop__while_draining__one_more_generation() -> None:
    scenario = training("a", phase=Phase.DRAINING)
    scenario.on(StopRequested())
    assert scenario.drained() == stops("a")
    assert scenario.stopped("a", a=snapshots(5, 0, of=1)) == [start(2, "a", step=5, source=(1, 1))]


def test_stop__returning_node_holds_newer_step__continues_from_it() -> None:
    scenario = training("a", is_stopping=True, phase=Phase.TRAINING)
    scenario.state = replace(scenario.state, generation=2)
    scenario.on(came("b", generation=1, replicas=snapshots(20, 0, of=1)))
    scenario.on(RankEnded(generation=2, rank=0, end=EndReason.DONE, step=11))
    (begun,) = starts(scenario.stopped("a", "b"))
    assert (begun.generation, begun.step, begun.source) == (3, 20, (1, 1))


def test_stop__only_storage_left__finishes() -> None:
    scenario = training("a", "b", stored_step=4)
    scenario.on(lost("b"))
    scenario.on(StopRequested())
    assert scenario.stopped("a", a=snapshots(6, 0, of=2)) == [FinishRun(step=4)]


def test_stop__while_waiting__finishes_after_flush() -> None:
    scenario = training("a", "b", low=2)
    scenario.on(lost("b"))
    scenario.stopped("a", a=snapshots(6, 0, 1, of=2))
    assert scenario.on(StopRequested()) == []
    assert scenario.on(CheckpointCommitted(step=6)) == [FinishRun(step=6)]


def test_stop__while_waiting_and_memory_lost__finishes_with_storage() -> None:
    scenario = training("a", "b", low=2, stored_step=2)
    scenario.on(lost("b"))
    scenario.stopped("a", a=snapshots(6, 0, 1, of=2))
    scenario.on(StopRequested())
    assert scenario.on(lost("a")) == [FinishRun(step=2)]


# --- failures


def break_while_starting(scenario: Scenario, *, is_lost: bool = False) -> list[Action]:
    """A rank breaks; with `is_lost`, the loss of its node is noticed afterwards."""
    generation = scenario.state.generation
    scenario.on(ended(0, generation=generation, reason="out of memory"))
    actions = scenario.on(lost("b")) if is_lost else []
    return actions + scenario.stopped(*scenario.state.stopping_nodes)


def test_startup_failures__budget_exceeded__fails_the_run() -> None:
    scenario = training("a", "b", phase=Phase.STARTING)
    for _ in range(MAX_STARTUP_FAILURES - 1):
        assert starts(break_while_starting(scenario))
    (fail,) = break_while_starting(scenario)
    assert isinstance(fail, FailRun)
    assert "3 generations in a row" in fail.reason
    assert "out of memory" in fail.reason


def test_startup_failures__node_lost__not_counted() -> None:
    scenario = training("a", "b", phase=Phase.STARTING)
    for _ in range(2 * MAX_STARTUP_FAILURES):
        assert starts(break_while_starting(scenario, is_lost=True))
        scenario.on(came("b"))
    assert scenario.state.num_failures == 0


def test_startup_failures__first_step__reset() -> None:
    scenario = training("a", "b", phase=Phase.STARTING)
    break_while_starting(scenario)
    scenario.on(GenerationReady(generation=scenario.state.generation))
    assert scenario.state.num_failures == 0


def test_startup_failures__after_first_step__not_counted() -> None:
    scenario = training("a", "b")
    scenario.on(ended(0))
    scenario.stopped("a", "b")
    assert scenario.state.num_failures == 0


def break_while_training(scenario: Scenario, *, is_lost: bool = False) -> list[Action]:
    """The first step is made, then a rank breaks before a snapshot; with `is_lost`, its node is lost too."""
    scenario.on(GenerationReady(generation=scenario.state.generation))
    return break_while_starting(scenario, is_lost=is_lost)


def test_failures__no_step_is_ever_kept__fail_the_run() -> None:
    scenario = training("a", "b")
    for _ in range(MAX_FRUITLESS - 1):
        assert starts(break_while_training(scenario))
    (fail,) = break_while_training(scenario)
    assert isinstance(fail, FailRun)
    assert "8 generations in a row broke before any step after step 0 was kept" in fail.reason
    assert "out of memory" in fail.reason


def test_failures__a_step_is_kept_or_a_node_is_lost__go_on() -> None:
    scenario = training("a", "b")
    for step in range(1, 3 * MAX_FRUITLESS):
        scenario.on(CheckpointCommitted(step=step))
        assert starts(break_while_training(scenario))
    for _ in range(3 * MAX_FRUITLESS):
        assert starts(break_while_training(scenario, is_lost=True))
        scenario.on(came("b"))


# --- connections


def test_reconnect__with_its_ranks__training_continues() -> None:
    scenario = training("a", "b")
    assert scenario.on(came("b", generation=1, running_ranks={1: 2})) == []
    assert scenario.state.phase is Phase.TRAINING


@pytest.mark.parametrize("running_ranks", [{}, {1: 3}], ids=["all", "one"])
def test_reconnect__without_its_ranks__generation_stops(running_ranks: dict[int, int]) -> None:
    scenario = training("a", "b", "b")
    actions = scenario.on(came("b", generation=1, running_ranks=running_ranks))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "b")


def test_reconnect__rank_has_drained__not_missed() -> None:
    scenario = training("a", "b", phase=Phase.DRAINING)
    scenario.on(ended(1, EndReason.DRAINED))
    assert scenario.on(came("b", generation=1)) == []
    assert scenario.on(ended(0, EndReason.DRAINED)) == stops("a", "b")


@pytest.mark.parametrize("running_ranks", [{}, {1: 2}], ids=["without ranks", "with ranks"])
def test_reconnect__while_stopping__stop_repeated(running_ranks: dict[int, int]) -> None:
    scenario = training("a", "b")
    scenario.on(ended(0))
    assert scenario.on(came("b", generation=1, running_ranks=running_ranks)) == stops("b")
    scenario.stopped("a")
    assert scenario.stopped("b") == [start(2, "a", "b")]


def test_reconnect__lost_node_while_stopping__stopped_and_waited_for() -> None:
    scenario = training("a", "b")
    scenario.on(lost("b"))
    assert scenario.on(came("b", generation=1, running_ranks={1: 2})) == stops("b")
    assert scenario.stopped("a") == []
    assert scenario.stopped("b") == [start(2, "a", "b")]


def test_reconnect__old_ranks__stopped_before_node_is_used() -> None:
    scenario = training("a", "b")
    scenario.on(lost("b"))
    scenario.stopped("a")
    scenario.on(GenerationReady(generation=2))
    assert scenario.on(came("b", generation=1, running_ranks={1: 2})) == stops(
        "b", generation=2, keep_replicas=True
    )
    actions = scenario.after(JOIN_WINDOW_S) + scenario.after(JOIN_WINDOW_S)
    assert causes(actions) == ["growth"]
    scenario.drained()
    assert scenario.stopped("a") == []
    assert scenario.stopped("b") == [start(3, "a", "b")]


def test_events_of_unknown_node__ignored() -> None:
    scenario = training("a")
    before = scenario.state
    for event in (
        lost("x"),
        NodeReady(node="x"),
        PreemptionNotice(node="x", preempted_at=0.0),
        SlotsChanged(node="x", num_slots=9),
    ):
        assert scenario.on(event) == []
    assert scenario.on(ReplicasHeld(node="x", replicas=snapshots(9, 0, of=1))) == []
    assert scenario.on(AgentStopped(node="x", generation=1, replicas=snapshots(9, 0, of=1))) == []
    assert scenario.state == before


# --- the supervisor was restarted


def restarted(**more: Any) -> Scenario:
    return waiting(low=2, former_generation=5, stored_step=3, recovery_deadline=100.0 + RECOVERY_S, **more)


def test_recovery__running_generation__continues() -> None:
    scenario = restarted()
    assert scenario.on(came("a", generation=5, running_ranks={0: 3, 1: 3})) == []
    assert scenario.after(RECOVERY_S / 2) == []
    assert scenario.on(came("b", generation=5, running_ranks={2: 3})) == []
    assert scenario.after(RECOVERY_S) == []
    assert (scenario.state.phase, scenario.state.assignment) == (Phase.TRAINING, ("a", "a", "b"))
    scenario.on(lost("b"))
    scenario.on(came("c"))
    assert starts(scenario.stopped("a"))[0].generation == 6


def test_recovery__spare_node_first__running_generation_found() -> None:
    scenario = restarted()
    assert scenario.on(came("spare", generation=4)) == []
    assert scenario.on(came("a", generation=5, running_ranks={0: 1})) == []
    assert (scenario.state.phase, scenario.state.generation, scenario.state.assignment) == (
        Phase.TRAINING,
        5,
        ("a",),
    )


def test_recovery__two_generations__older_is_stopped() -> None:
    scenario = restarted()
    scenario.on(came("cut off", generation=4, running_ranks={0: 2}))
    assert scenario.on(came("a", generation=5, running_ranks={0: 2})) == stops(
        "cut off", generation=5, keep_replicas=True
    )
    assert scenario.on(came("b", generation=5, running_ranks={1: 2})) == []
    assert (scenario.state.phase, scenario.state.assignment) == (Phase.TRAINING, ("a", "b"))


def test_recovery__agent_missing__generation_stops() -> None:
    scenario = restarted()
    scenario.on(came("a", generation=5, running_ranks={0: 3}))
    scenario.on(came("b", generation=5, running_ranks={1: 3}))
    actions = scenario.after(RECOVERY_S)
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "b", generation=5)
    assert scenario.stopped("a", "b") == [start(6, "a", "b", step=3)]


def test_recovery__no_running_generation__starts_after_deadline() -> None:
    scenario = restarted()
    held = snapshots(7, 0, 1, of=2, generation=5)
    assert scenario.on(came("a", generation=5, replicas=held)) == []
    assert scenario.on(came("b", generation=5)) == []
    scenario.after(RECOVERY_S)
    assert scenario.stopped("a", "b") == [start(6, "a", "b", step=7, source=(5, 2))]


def test_recovery__too_few_nodes__flushes_memory() -> None:
    scenario = restarted()
    scenario.on(came("a", generation=5, replicas=snapshots(7, 0, 1, of=2, generation=5)))
    scenario.after(RECOVERY_S)
    assert scenario.stopped("a") == [
        WaitForNodes(have=1, need=2),
        FlushToStorage(step=7, generation=5, world_size=2),
    ]


def test_recovery__stop_requested__running_generation_found_first() -> None:
    scenario = restarted()
    assert scenario.on(StopRequested()) == []
    scenario.on(came("a", generation=5, running_ranks={0: 1}))
    assert scenario.on(ended(0, EndReason.DONE, 5, step=9)) == [FinishRun(step=9)]


def test_recovery__yield_requested__ignored() -> None:
    assert restarted().on(YieldRequested()) == []


# --- the plan's spare workers and groups of ranks


def slots(name: str, count: int, **more: Any) -> AgentAttached:
    return came(name, num_slots=count, **more)


def test_start__spare_workers_by_the_plan__get_no_rank() -> None:
    run = waiting(low=4, high=8, num_spare={5: 1, 7: 3}, group_sizes={4: 4})
    actions = run.on(slots("a", 5))
    assert actions == [replace(start(1, *"aaaa"), num_spare=1)]
    run.on(GenerationReady(generation=1))
    run.on(slots("b", 2))
    assert run.after(10) == []  # seven slots have no more ranks than five
    run.on(slots("c", 1))
    actions = run.after(10)
    assert any(isinstance(action, DrainGeneration) for action in actions)


def test_start__groups__nodes_with_whole_groups_come_first() -> None:
    run = waiting(low=6, high=6, group_sizes={6: 2})
    run.on(slots("a", 3))
    (started,) = run.on(slots("b", 4))
    assert isinstance(started, StartGeneration)
    assert started.assignment == (*"bbbb", *"aa")
    assert started.num_split_groups == 0


def test_start__groups_that_no_node_holds__are_counted_as_split() -> None:
    run = waiting(low=6, high=6, group_sizes={6: 2})
    run.on(slots("a", 3))
    (started,) = run.on(slots("b", 3))
    assert isinstance(started, StartGeneration)
    assert (started.assignment, started.num_split_groups) == ((*"aaa", *"bbb"), 1)


def test_start__minimum_while_slots_are_released__has_no_spare_worker() -> None:
    run = waiting(low=4, high=8, num_spare={5: 1}, yield_until=1000.0)
    actions = run.on(slots("a", 5, num_guaranteed=4))
    assert actions[0] == start(1, *"aaaa")


@pytest.mark.parametrize(
    ("group", "assignment", "num_split"),
    [(4, "bbbbaaac", 1), (2, "bbbbaaac", 1), (3, "aaabbbbc", 0), (5, "aaabbbbc", 1)],
)
def test_start__unequal_nodes__whole_groups_first(group: int, assignment: str, num_split: int) -> None:
    run = waiting(low=8, high=8, group_sizes={8: group})
    run.on(slots("a", 3))
    run.on(slots("b", 4))
    (started,) = run.on(slots("c", 1))
    assert isinstance(started, StartGeneration)
    assert ("".join(started.assignment), started.num_split_groups) == (assignment, num_split)


def test_start__groups_and_left_over_slots__as_few_split_groups_as_possible() -> None:
    run = waiting(low=12, high=12, group_sizes={12: 4})
    for name, count in (("a", 5), ("b", 5)):
        run.on(slots(name, count))
    (started,) = run.on(slots("c", 2))
    assert isinstance(started, StartGeneration)
    assert ("".join(started.assignment), started.num_split_groups) == ("aaaabbbbabcc", 1)
