"""Decisions on single events: joins, losses, hangs, notices; waiting, yielding and stopping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.elastic.membership import (
    JOIN_WINDOW_S,
    MAX_STARTUP_FAILURES,
    QUARANTINE_S,
    RECOVERY_S,
    YIELD_S,
    decide,
    newest_complete_step,
)
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


class Story:
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


def waiting(*, low: int = 1, high: int = 4, **more: Any) -> Story:
    return Story(MembershipState(min_workers=low, max_workers=high, **more))


def training(*assignment: str, low: int = 1, high: int = 4, phase: Phase = Phase.TRAINING, **more: Any) -> Story:
    """Generation 1 is training, with a rank per named node."""
    nodes = {name: MemberNode(num_slots=assignment.count(name), is_ready=True) for name in assignment}
    return Story(
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
    story = waiting(low=2)
    assert story.on(came("a")) == []
    assert story.on(came("b", is_ready=False)) == []
    assert story.on(NodeReady(node="b")) == [start(1, "a", "b")]
    assert story.state.phase is Phase.STARTING


def test_start__node_with_many_slots__ranks_up_to_the_maximum() -> None:
    story = waiting(low=2, high=3)
    assert story.on(came("a", num_slots=4)) == [start(1, "a", "a", "a")]


def test_start__resumed_run__continues_from_storage_with_next_generation() -> None:
    story = waiting(former_generation=7, stored_step=40)
    assert story.on(came("a")) == [start(8, "a", step=40)]


def test_starting__first_step__training() -> None:
    story = training("a", phase=Phase.STARTING)
    assert story.on(GenerationReady(generation=1)) == []
    assert story.state.phase is Phase.TRAINING


def test_starting__replica_reported__training() -> None:
    story = training("a", phase=Phase.STARTING)
    story.on(ReplicasHeld(node="a", replicas=snapshots(1, 0, of=1)))
    assert story.state.phase is Phase.TRAINING


def test_growth__nodes_join_within_window__one_change() -> None:
    story = training("a")
    assert story.on(came("b")) == []
    story.now += JOIN_WINDOW_S / 2
    assert story.on(came("c")) == []
    actions = story.after(JOIN_WINDOW_S / 2)
    assert causes(actions) == ["growth"]
    assert actions[-1] == DrainGeneration(generation=1)
    assert story.drained() == stops("a", "b", "c")
    assert story.stopped("a", "b", "c") == [start(2, "a", "b", "c")]


def test_growth__joining_node_is_lost__no_change() -> None:
    story = training("a")
    story.on(came("b"))
    assert story.on(lost("b")) == []
    assert story.after(JOIN_WINDOW_S) == []
    assert story.on(came("c")) == []  # a new window begins


def test_growth__at_maximum__no_change() -> None:
    story = training("a", "b", high=2)
    assert story.on(came("c")) == []
    assert story.after(JOIN_WINDOW_S) == []


def test_growth__node_gets_more_slots__one_change() -> None:
    story = training("a")
    assert story.on(SlotsChanged(node="a", num_slots=2)) == []
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


# --- losses


def test_loss__member_lost__next_generation_waits_for_all_stops() -> None:
    story = training("a", "b", "c")
    actions = story.on(lost("b"))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "c")
    assert story.stopped("a") == []
    assert story.stopped("c") == [start(2, "a", "c")]


def test_loss__stopping_node_lost__not_waited_for() -> None:
    story = training("a", "b", "c")
    story.on(lost("b"))
    story.stopped("a")
    assert story.on(lost("c")) == [start(2, "a")]


def test_loss__continues_from_newest_complete_step() -> None:
    story = training("a", "b", "c")
    story.on(ReplicasHeld(node="a", replicas=snapshots(7, 0, 2, of=3) | snapshots(8, 0, 2, of=3)))
    story.on(lost("b"))
    story.stopped("a")
    held = snapshots(7, 1, of=3) | snapshots(9, 2, of=3)  # the replica of the lost rank; its own snapshot is newer
    assert story.stopped("c", c=held) == [start(2, "c", "a", step=7, source=(1, 3))]


def test_loss__spare_node_holds_replica__is_used() -> None:
    story = training("a", high=1)
    story.on(came("spare"))
    story.on(ReplicasHeld(node="spare", replicas=snapshots(3, 0, of=1)))
    assert story.on(lost("a"))[1:] == stops("spare")
    newer = snapshots(8, 0, of=1)
    assert story.stopped("spare", spare=newer) == [start(2, "spare", step=8, source=(1, 1))]


def test_start__storage_newer_than_memory__from_storage() -> None:
    story = training("a", "b")
    story.on(CheckpointCommitted(step=9))
    story.on(lost("b"))
    assert story.stopped("a", a=snapshots(8, 0, 1, of=2)) == [start(2, "a", step=9)]


def test_start__memory_as_new_as_storage__from_memory() -> None:
    story = training("a", "b")
    story.on(CheckpointCommitted(step=8))
    story.on(lost("b"))
    held = snapshots(8, 0, 1, of=2)
    assert story.stopped("a", a=held) == [start(2, "a", step=8, source=(1, 2))]


def test_starting__member_lost__generation_stops() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    actions = story.on(lost("a"))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("b")


def test_draining__member_lost__no_second_change_reported() -> None:
    story = training("a", "b", phase=Phase.DRAINING)
    assert story.on(lost("a")) == stops("b")


def test_training__spare_node_lost__no_change() -> None:
    story = training("a", high=1)
    story.on(came("spare"))
    assert story.on(lost("spare")) == []
    assert story.state.phase is Phase.TRAINING


def test_training__rank_broke__restarts_on_same_nodes() -> None:
    story = training("a", "b")
    actions = story.on(ended(1, reason="its process was killed"))
    assert causes(actions) == ["failure"]
    assert story.on(ended(0)) == []  # its connection to the other rank broke
    assert story.stopped("a", "b") == [start(2, "a", "b")]


def test_rank_ended__earlier_generation__ignored() -> None:
    story = training("a", "b")
    assert story.on(ended(1, generation=0)) == []
    assert story.state.phase is Phase.TRAINING


def test_start__fork_server_dead__node_left_out_until_ready() -> None:
    story = training("a", "b")
    assert story.on(NodeReady(node="b", is_ready=False)) == []
    story.on(ended(1))
    assert story.stopped("a", "b") == [start(2, "a")]
    story.on(GenerationReady(generation=2))
    story.on(NodeReady(node="b"))
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


def test_start__nodes_with_replicas_first() -> None:
    story = training("a", "b", high=2)
    story.on(came("aa"))
    story.on(lost("a"))
    held = snapshots(5, 0, 1, of=2)
    assert story.stopped("aa", "b", b=held) == [start(2, "b", "aa", step=5, source=(1, 2))]


def test_tick__new_generation_complete_in_memory__older_replicas_dropped() -> None:
    story = training("a", "b")
    story.state = replace(story.state, generation=2)
    old = snapshots(4, 0, 1, of=2)
    assert story.on(ReplicasHeld(node="a", replicas=old | snapshots(5, 0, of=2, generation=2))) == []
    assert story.on(Tick()) == []
    story.on(ReplicasHeld(node="b", replicas=snapshots(5, 1, of=2, generation=2)))
    assert story.on(Tick()) == [DropReplicas(generation=2)]
    assert story.on(Tick()) == []  # only once


def test_newest_complete_step__ranks_of_two_generations__not_combined() -> None:
    held = snapshots(5, 0, of=2) | snapshots(5, 1, of=2, generation=2) | snapshots(3, 0, of=1, generation=3)
    node = MemberNode(num_slots=1, replicas=held)
    assert newest_complete_step(MembershipState(min_workers=1, max_workers=1, nodes={"a": node})) == ReplicatedStep(
        step=3, generation=3, world_size=1
    )
    assert newest_complete_step(MembershipState(min_workers=1, max_workers=1)) is None


# --- notices


def test_notice__time_left__trains_on_until_margin() -> None:
    story = training("a", "b")
    assert story.on(PreemptionNotice(node="b", preempted_at=story.now + 30)) == [ReplaceNode(node="b")]
    assert (
        story.on(PreemptionNotice(node="b", preempted_at=story.now + 29)) == []
    )  # the replacement is requested once
    assert story.after(20) == []
    actions = story.after(9 - story.state.margin_s)
    assert causes(actions) == ["notice"]
    assert actions[-1] == DrainGeneration(generation=1)
    story.drained()
    assert story.stopped("a", "b") == [start(2, "a")]


def test_notice__replacement_ready__drains_at_once() -> None:
    story = training("a", "b")
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 30))
    assert story.on(came("c", is_ready=False)) == []
    assert causes(story.on(NodeReady(node="c"))) == ["notice"]
    story.drained()
    assert story.stopped("a", "b", "c") == [start(2, "a", "c")]


def test_notice__no_time_left__drains_at_once() -> None:
    story = training("a", "b")
    actions = story.on(PreemptionNotice(node="b", preempted_at=story.now))
    assert actions[0] == ReplaceNode(node="b")
    assert causes(actions) == ["notice"]


def test_notice__margin_from_tick__drains_when_reached() -> None:
    story = training("a", "b")
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 30))
    story.now += 5
    assert causes(story.on(Tick(margin_s=25.0))) == ["notice"]


def test_notice__spare_node__replaced_only() -> None:
    story = training("a", high=1)
    story.on(came("spare"))
    assert story.on(PreemptionNotice(node="spare", preempted_at=story.now)) == [ReplaceNode(node="spare")]
    assert story.state.phase is Phase.TRAINING


def test_notice__while_starting__drains_after_first_step() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    assert story.on(PreemptionNotice(node="b", preempted_at=story.now)) == [ReplaceNode(node="b")]
    assert causes(story.on(GenerationReady(generation=1))) == ["notice"]


def test_notice__joining_node__not_taken_in() -> None:
    story = training("a")
    story.on(came("b"))
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 60))
    assert story.after(JOIN_WINDOW_S) == []


def test_notice__node_needed_for_minimum__used_until_margin() -> None:
    story = training("a", "b", "c", low=2)
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 30))
    story.on(lost("c"))
    assert starts(story.stopped("a", "b")) == [start(2, "a", "b")]
    story.on(GenerationReady(generation=2))
    held = snapshots(6, 0, 1, of=2, generation=2)
    story.on(ReplicasHeld(node="a", replicas=held))
    assert causes(story.after(30 - story.state.margin_s)) == ["notice"]
    story.drained()
    assert story.stopped("a", "b") == [
        WaitForNodes(have=1, need=2),
        FlushToStorage(step=6, generation=2, world_size=2),
    ]


# --- hangs


def hung(rank: int, generation: int = 1) -> HangDetected:
    return HangDetected(generation=generation, rank=rank, silent_s=5.0)


def test_hang__slot_quarantined_for_a_while() -> None:
    story = training("a", "b")
    actions = story.on(hung(1))
    assert causes(actions) == ["hang"]
    assert actions[1:] == stops("a", "b")
    assert story.stopped("a", "b") == [start(2, "a")]
    story.on(GenerationReady(generation=2))
    assert story.after(QUARANTINE_S - 0.1) == []
    story.after(0.1)
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


def test_hang__node_with_two_slots__one_is_quarantined() -> None:
    story = training("a", "a", "b")
    story.on(hung(0))
    assert starts(story.stopped("a", "b")) == [start(2, "a", "b")]


def test_hang__slot_needed_for_minimum__used() -> None:
    story = training("a", "b", low=2)
    story.on(hung(1))
    assert story.stopped("a", "b") == [start(2, "a", "b")]


def test_hang__earlier_generation__ignored() -> None:
    story = training("a", "b")
    assert story.on(hung(1, generation=0)) == []


# --- too few machines


def test_waiting__below_minimum__flushes_newest_step() -> None:
    story = training("a", "b", low=2)
    story.on(lost("b"))
    actions = story.stopped("a", a=snapshots(6, 0, 1, of=2))
    assert actions == [WaitForNodes(have=1, need=2), FlushToStorage(step=6, generation=1, world_size=2)]
    assert story.after(1.0) == []  # the replacement is requested once
    assert story.on(came("c")) == [start(2, "a", "c", step=6, source=(1, 2))]


def test_waiting__newest_step_stored__no_flush() -> None:
    story = training("a", "b", low=2, stored_step=6)
    story.on(lost("b"))
    assert story.stopped("a", a=snapshots(6, 0, 1, of=2)) == [WaitForNodes(have=1, need=2)]


@pytest.mark.parametrize("happens", [came("b"), lost("b")], ids=["it reconnects", "it is lost"])
def test_waiting__flush_may_be_lost__repeated(happens: Event) -> None:
    story = training("a", "b", "c", low=3)
    story.on(lost("c"))
    both = snapshots(6, 0, 1, 2, of=3)
    persist = FlushToStorage(step=6, generation=1, world_size=3)
    assert story.stopped("a", "b", a=both, b=both)[-1] == persist
    event = replace(happens, replicas=both) if isinstance(happens, AgentAttached) else happens
    assert story.on(event) == [persist]


# --- another run waits


def test_yield__above_minimum__shrinks_and_releases_for_a_while() -> None:
    story = training("a", "b", "c", low=1)
    story.state = replace(
        story.state, nodes={**story.state.nodes, "b": MemberNode(num_slots=1, num_guaranteed=1, is_ready=True)}
    )
    actions = story.on(YieldRequested())
    assert causes(actions) == ["yield"]
    story.drained()
    assert story.stopped("a", "b", "c") == [start(2, "b"), ReleaseSlots()]  # onto its firm place
    story.on(GenerationReady(generation=2))
    assert story.after(YIELD_S - 0.1) == []
    assert story.after(0.1) == [ClaimSlots()]
    assert story.after(0.1) == []
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


def test_yield__repeated__claims_later() -> None:
    story = training("a", low=1)
    for _ in range(20):
        assert story.on(YieldRequested()) == [ReleaseSlots()]
        assert story.after(2.0) == []
    assert story.after(YIELD_S) == [ClaimSlots()]


def test_yield__below_minimum__restarts_at_minimum() -> None:
    story = training("a", "b", low=2)
    story.on(YieldRequested())
    story.on(lost("b"))
    assert story.stopped("a") == [WaitForNodes(have=1, need=2)]
    assert story.after(YIELD_S) == [ClaimSlots()]


def test_yield__during_a_change__releases_only() -> None:
    for phase in (Phase.STARTING, Phase.DRAINING, Phase.STOPPING):
        story = training("a", "b", phase=phase, stopping_nodes=frozenset({"a"}))
        assert story.on(YieldRequested()) == [ReleaseSlots()]
        assert story.state.phase is phase


# --- the end


def test_done__all_ranks__finishes() -> None:
    story = training("a", "b")
    assert story.on(ended(0, EndReason.DONE, step=50)) == []
    assert story.on(ended(1, EndReason.DONE, step=50)) == [FinishRun(step=50)]
    assert story.on(came("c")) == []


@pytest.mark.parametrize("happens", [lost("b"), ended(1)], ids=["node lost", "rank broke"])
def test_done__remaining_rank_lost__finishes(happens: Event) -> None:
    story = training("a", "b")
    story.on(ended(0, EndReason.DONE, step=50))
    assert story.on(happens) == [FinishRun(step=50)]


def test_done__remaining_rank_hangs__stopped_and_finishes() -> None:
    story = training("a", "b")
    story.on(ended(0, EndReason.DONE, step=50))
    story.on(hung(1))
    assert story.stopped("a", "b") == [FinishRun(step=50)]


def test_failed_rank__fails_the_run() -> None:
    story = training("a", "b")
    failed = ended(1, EndReason.FAILED, reason="the loss is nan", error="RunError")
    assert story.on(failed) == [*stops("a", "b"), FailRun(error="RunError", reason="the loss is nan")]
    assert story.state.phase is Phase.DONE


def test_stop__before_first_generation__finishes() -> None:
    assert waiting(stored_step=3).on(StopRequested()) == [FinishRun(step=3)]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.TRAINING, Phase.DRAINING])
def test_stop__finishes_when_ranks_are_done(phase: Phase) -> None:
    story = training("a", phase=phase)
    assert story.on(StopRequested()) == []
    assert story.on(ended(0, EndReason.DONE, step=8)) == [FinishRun(step=8)]


def test_stop__no_further_changes() -> None:
    story = training("a", "b")
    story.on(StopRequested())
    story.on(came("c"))
    assert story.after(JOIN_WINDOW_S) == []
    assert story.on(PreemptionNotice(node="a", preempted_at=story.now)) == [ReplaceNode(node="a")]
    assert story.on(YieldRequested()) == [ReleaseSlots()]


def test_stop__while_draining__one_more_generation() -> None:
    story = training("a", phase=Phase.DRAINING)
    story.on(StopRequested())
    assert story.drained() == stops("a")
    assert story.stopped("a", a=snapshots(5, 0, of=1)) == [start(2, "a", step=5, source=(1, 1))]


def test_stop__returning_node_holds_newer_step__continues_from_it() -> None:
    story = training("a", is_stopping=True, phase=Phase.TRAINING)
    story.state = replace(story.state, generation=2)
    story.on(came("b", generation=1, replicas=snapshots(20, 0, of=1)))
    story.on(RankEnded(generation=2, rank=0, end=EndReason.DONE, step=11))
    (begun,) = starts(story.stopped("a", "b"))
    assert (begun.generation, begun.step, begun.source) == (3, 20, (1, 1))


def test_stop__only_storage_left__finishes() -> None:
    story = training("a", "b", stored_step=4)
    story.on(lost("b"))
    story.on(StopRequested())
    assert story.stopped("a", a=snapshots(6, 0, of=2)) == [FinishRun(step=4)]


def test_stop__while_waiting__finishes_after_flush() -> None:
    story = training("a", "b", low=2)
    story.on(lost("b"))
    story.stopped("a", a=snapshots(6, 0, 1, of=2))
    assert story.on(StopRequested()) == []
    assert story.on(CheckpointCommitted(step=6)) == [FinishRun(step=6)]


def test_stop__while_waiting_and_memory_lost__finishes_with_storage() -> None:
    story = training("a", "b", low=2, stored_step=2)
    story.on(lost("b"))
    story.stopped("a", a=snapshots(6, 0, 1, of=2))
    story.on(StopRequested())
    assert story.on(lost("a")) == [FinishRun(step=2)]


# --- failures


def break_while_starting(story: Story, *, is_lost: bool = False) -> list[Action]:
    """A rank breaks; with `is_lost`, the loss of its node is noticed afterwards."""
    generation = story.state.generation
    story.on(ended(0, generation=generation, reason="out of memory"))
    actions = story.on(lost("b")) if is_lost else []
    return actions + story.stopped(*story.state.stopping_nodes)


def test_startup_failures__budget_exceeded__fails_the_run() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    for _ in range(MAX_STARTUP_FAILURES - 1):
        assert starts(break_while_starting(story))
    (fail,) = break_while_starting(story)
    assert isinstance(fail, FailRun)
    assert "3 generations in a row" in fail.reason
    assert "out of memory" in fail.reason


def test_startup_failures__node_lost__not_counted() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    for _ in range(2 * MAX_STARTUP_FAILURES):
        assert starts(break_while_starting(story, is_lost=True))
        story.on(came("b"))
    assert story.state.num_failures == 0


def test_startup_failures__first_step__reset() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    break_while_starting(story)
    story.on(GenerationReady(generation=story.state.generation))
    assert story.state.num_failures == 0


def test_startup_failures__after_first_step__not_counted() -> None:
    story = training("a", "b")
    story.on(ended(0))
    story.stopped("a", "b")
    assert story.state.num_failures == 0


# --- connections


def test_reconnect__with_its_ranks__training_continues() -> None:
    story = training("a", "b")
    assert story.on(came("b", generation=1, running_ranks={1: 2})) == []
    assert story.state.phase is Phase.TRAINING


@pytest.mark.parametrize("running_ranks", [{}, {1: 3}], ids=["all", "one"])
def test_reconnect__without_its_ranks__generation_stops(running_ranks: dict[int, int]) -> None:
    story = training("a", "b", "b")
    actions = story.on(came("b", generation=1, running_ranks=running_ranks))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "b")


def test_reconnect__rank_has_drained__not_missed() -> None:
    story = training("a", "b", phase=Phase.DRAINING)
    story.on(ended(1, EndReason.DRAINED))
    assert story.on(came("b", generation=1)) == []
    assert story.on(ended(0, EndReason.DRAINED)) == stops("a", "b")


@pytest.mark.parametrize("running_ranks", [{}, {1: 2}], ids=["without ranks", "with ranks"])
def test_reconnect__while_stopping__stop_repeated(running_ranks: dict[int, int]) -> None:
    story = training("a", "b")
    story.on(ended(0))
    assert story.on(came("b", generation=1, running_ranks=running_ranks)) == stops("b")
    story.stopped("a")
    assert story.stopped("b") == [start(2, "a", "b")]


def test_reconnect__lost_node_while_stopping__stopped_and_waited_for() -> None:
    story = training("a", "b")
    story.on(lost("b"))
    assert story.on(came("b", generation=1, running_ranks={1: 2})) == stops("b")
    assert story.stopped("a") == []
    assert story.stopped("b") == [start(2, "a", "b")]


def test_reconnect__old_ranks__stopped_before_node_is_used() -> None:
    story = training("a", "b")
    story.on(lost("b"))
    story.stopped("a")
    story.on(GenerationReady(generation=2))
    assert story.on(came("b", generation=1, running_ranks={1: 2})) == stops("b", generation=2, keep_replicas=True)
    actions = story.after(JOIN_WINDOW_S) + story.after(JOIN_WINDOW_S)
    assert causes(actions) == ["growth"]
    story.drained()
    assert story.stopped("a") == []
    assert story.stopped("b") == [start(3, "a", "b")]


def test_events_of_unknown_node__ignored() -> None:
    story = training("a")
    before = story.state
    for event in (
        lost("x"),
        NodeReady(node="x"),
        PreemptionNotice(node="x", preempted_at=0.0),
        SlotsChanged(node="x", num_slots=9),
    ):
        assert story.on(event) == []
    assert story.on(ReplicasHeld(node="x", replicas=snapshots(9, 0, of=1))) == []
    assert story.on(AgentStopped(node="x", generation=1, replicas=snapshots(9, 0, of=1))) == []
    assert story.state == before


# --- the supervisor was restarted


def restarted(**more: Any) -> Story:
    return waiting(low=2, former_generation=5, stored_step=3, recovery_deadline=100.0 + RECOVERY_S, **more)


def test_recovery__running_generation__continues() -> None:
    story = restarted()
    assert story.on(came("a", generation=5, running_ranks={0: 3, 1: 3})) == []
    assert story.after(RECOVERY_S / 2) == []
    assert story.on(came("b", generation=5, running_ranks={2: 3})) == []
    assert story.after(RECOVERY_S) == []
    assert (story.state.phase, story.state.assignment) == (Phase.TRAINING, ("a", "a", "b"))
    story.on(lost("b"))
    story.on(came("c"))
    assert starts(story.stopped("a"))[0].generation == 6


def test_recovery__spare_node_first__running_generation_found() -> None:
    story = restarted()
    assert story.on(came("spare", generation=4)) == []
    assert story.on(came("a", generation=5, running_ranks={0: 1})) == []
    assert (story.state.phase, story.state.generation, story.state.assignment) == (Phase.TRAINING, 5, ("a",))


def test_recovery__two_generations__older_is_stopped() -> None:
    story = restarted()
    story.on(came("cut off", generation=4, running_ranks={0: 2}))
    assert story.on(came("a", generation=5, running_ranks={0: 2})) == stops(
        "cut off", generation=5, keep_replicas=True
    )
    assert story.on(came("b", generation=5, running_ranks={1: 2})) == []
    assert (story.state.phase, story.state.assignment) == (Phase.TRAINING, ("a", "b"))


def test_recovery__agent_missing__generation_stops() -> None:
    story = restarted()
    story.on(came("a", generation=5, running_ranks={0: 3}))
    story.on(came("b", generation=5, running_ranks={1: 3}))
    actions = story.after(RECOVERY_S)
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "b", generation=5)
    assert story.stopped("a", "b") == [start(6, "a", "b", step=3)]


def test_recovery__no_running_generation__starts_after_deadline() -> None:
    story = restarted()
    held = snapshots(7, 0, 1, of=2, generation=5)
    assert story.on(came("a", generation=5, replicas=held)) == []
    assert story.on(came("b", generation=5)) == []
    story.after(RECOVERY_S)
    assert story.stopped("a", "b") == [start(6, "a", "b", step=7, source=(5, 2))]


def test_recovery__too_few_nodes__flushes_memory() -> None:
    story = restarted()
    story.on(came("a", generation=5, replicas=snapshots(7, 0, 1, of=2, generation=5)))
    story.after(RECOVERY_S)
    assert story.stopped("a") == [WaitForNodes(have=1, need=2), FlushToStorage(step=7, generation=5, world_size=2)]


def test_recovery__stop_requested__running_generation_found_first() -> None:
    story = restarted()
    assert story.on(StopRequested()) == []
    story.on(came("a", generation=5, running_ranks={0: 1}))
    assert story.on(ended(0, EndReason.DONE, 5, step=9)) == [FinishRun(step=9)]


def test_recovery__yield_requested__ignored() -> None:
    assert restarted().on(YieldRequested()) == []
