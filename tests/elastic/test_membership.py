"""What follows from one event: members come, are lost, hang, are announced to go; the run waits, yields, stops."""

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
    """A state, and what has happened to it so far."""

    def __init__(self, state: MembershipState) -> None:
        self.state, self.now = state, 100.0

    def on(self, event: Event) -> list[Action]:
        """What follows from an event."""
        self.state, actions = decide(self.state, event, now=self.now)
        return list(actions)

    def after(self, seconds: float) -> list[Action]:
        """What follows from the time that has passed."""
        self.now += seconds
        return self.on(Tick())

    def stopped(self, *names: str, **replicas: frozenset[ReplicaLocation]) -> list[Action]:
        """What follows from the last of these answers."""
        generation = self.state.generation
        actions: list[Action] = []
        for name in names:
            held = replicas.get(name, self.state.nodes[name].replicas)
            actions = self.on(AgentStopped(node=name, generation=generation, replicas=held))
        return actions

    def left(self) -> list[Action]:
        """Every rank has ended after its step, as it was asked to."""
        ranks = range(len(self.state.assignment))
        return [
            action for rank in ranks for action in self.on(ended(rank, EndReason.DRAINED, self.state.generation))
        ]


def waiting(*, low: int = 1, high: int = 4, **more: Any) -> Story:
    return Story(MembershipState(min_workers=low, max_workers=high, **more))


def training(*assignment: str, low: int = 1, high: int = 4, phase: Phase = Phase.TRAINING, **more: Any) -> Story:
    """Generation 1 is at work, a rank on each of these."""
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


# --- forming and growing


def test_a_run_begins_as_soon_as_the_smallest_number_of_workers_is_warm() -> None:
    story = waiting(low=2)
    assert story.on(came("a")) == []
    assert story.on(came("b", is_ready=False)) == []
    assert story.on(NodeReady(node="b")) == [start(1, "a", "b")]
    assert story.state.phase is Phase.STARTING


def test_a_machine_takes_as_many_ranks_as_it_has_places_and_the_job_allows() -> None:
    story = waiting(low=2, high=3)
    assert story.on(came("a", num_slots=4)) == [start(1, "a", "a", "a")]


def test_a_resumed_run_goes_on_from_storage_with_the_next_number() -> None:
    story = waiting(former_generation=7, stored_step=40)
    assert story.on(came("a")) == [start(8, "a", step=40)]


def test_the_first_step_makes_a_generation_train() -> None:
    story = training("a", phase=Phase.STARTING)
    assert story.on(GenerationReady(generation=1)) == []
    assert story.state.phase is Phase.TRAINING


def test_a_snapshot_shows_that_the_first_step_was_made_where_the_word_was_lost() -> None:
    story = training("a", phase=Phase.STARTING)
    story.on(ReplicasHeld(node="a", replicas=snapshots(1, 0, of=1)))
    assert story.state.phase is Phase.TRAINING


def test_machines_that_join_soon_after_each_other_are_taken_in_together() -> None:
    story = training("a")
    assert story.on(came("b")) == []
    story.now += JOIN_WINDOW_S / 2
    assert story.on(came("c")) == []
    actions = story.after(JOIN_WINDOW_S / 2)
    assert causes(actions) == ["growth"]
    assert actions[-1] == DrainGeneration(generation=1)
    assert story.left() == stops("a", "b", "c")
    assert story.stopped("a", "b", "c") == [start(2, "a", "b", "c")]


def test_a_machine_that_goes_again_before_it_is_taken_in_changes_nothing() -> None:
    story = training("a")
    story.on(came("b"))
    assert story.on(lost("b")) == []
    assert story.after(JOIN_WINDOW_S) == []
    assert story.on(came("c")) == []  # its window begins anew


def test_no_more_machines_are_taken_than_the_job_allows() -> None:
    story = training("a", "b", high=2)
    assert story.on(came("c")) == []
    assert story.after(JOIN_WINDOW_S) == []


def test_a_machine_that_gets_more_places_is_used_more() -> None:
    story = training("a")
    assert story.on(SlotsChanged(node="a", num_slots=2)) == []
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


# --- losses


def test_a_lost_member_ends_the_generation_and_the_next_waits_for_every_answer() -> None:
    story = training("a", "b", "c")
    actions = story.on(lost("b"))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "c")
    assert story.stopped("a") == []
    assert story.stopped("c") == [start(2, "a", "c")]


def test_whoever_is_lost_need_not_answer() -> None:
    story = training("a", "b", "c")
    story.on(lost("b"))
    story.stopped("a")
    assert story.on(lost("c")) == [start(2, "a")]


def test_the_next_generation_goes_on_from_the_newest_step_that_is_whole_in_memory() -> None:
    story = training("a", "b", "c")
    story.on(ReplicasHeld(node="a", replicas=snapshots(7, 0, 2, of=3) | snapshots(8, 0, 2, of=3)))
    story.on(lost("b"))
    story.stopped("a")
    held = snapshots(7, 1, of=3) | snapshots(9, 2, of=3)  # a copy of the lost rank's; its own is further
    assert story.stopped("c", c=held) == [start(2, "c", "a", step=7, source=(1, 3))]


def test_a_copy_on_a_machine_without_ranks_is_asked_for_too() -> None:
    story = training("a", high=1)
    story.on(came("spare"))
    story.on(ReplicasHeld(node="spare", replicas=snapshots(3, 0, of=1)))
    assert story.on(lost("a"))[1:] == stops("spare")
    newer = snapshots(8, 0, of=1)
    assert story.stopped("spare", spare=newer) == [start(2, "spare", step=8, source=(1, 1))]


def test_storage_that_is_newer_than_memory_is_preferred() -> None:
    story = training("a", "b")
    story.on(CheckpointCommitted(step=9))
    story.on(lost("b"))
    assert story.stopped("a", a=snapshots(8, 0, 1, of=2)) == [start(2, "a", step=9)]


def test_memory_that_is_as_new_as_storage_is_preferred() -> None:
    story = training("a", "b")
    story.on(CheckpointCommitted(step=8))
    story.on(lost("b"))
    held = snapshots(8, 0, 1, of=2)
    assert story.stopped("a", a=held) == [start(2, "a", step=8, source=(1, 2))]


def test_a_member_lost_while_forming_ends_the_generation() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    actions = story.on(lost("a"))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("b")


def test_a_member_lost_while_leaving_is_not_announced_as_another_change() -> None:
    story = training("a", "b", phase=Phase.DRAINING)
    assert story.on(lost("a")) == stops("b")


def test_a_machine_that_is_no_member_may_go_unnoticed() -> None:
    story = training("a", high=1)
    story.on(came("spare"))
    assert story.on(lost("spare")) == []
    assert story.state.phase is Phase.TRAINING


def test_a_killed_rank_is_started_again_on_the_same_machines() -> None:
    story = training("a", "b")
    actions = story.on(ended(1, reason="its process was killed"))
    assert causes(actions) == ["failure"]
    assert story.on(ended(0)) == []  # its connection to the other broke; nobody asks why
    assert story.stopped("a", "b") == [start(2, "a", "b")]


def test_the_end_of_a_rank_of_an_earlier_generation_means_nothing() -> None:
    story = training("a", "b")
    assert story.on(ended(1, generation=0)) == []
    assert story.state.phase is Phase.TRAINING


def test_a_member_whose_warm_process_died_is_left_out_until_it_is_warm_again() -> None:
    story = training("a", "b")
    assert story.on(NodeReady(node="b", is_ready=False)) == []
    story.on(ended(1))
    assert story.stopped("a", "b") == [start(2, "a")]
    story.on(GenerationReady(generation=2))
    story.on(NodeReady(node="b"))
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


def test_machines_that_hold_snapshots_are_used_first() -> None:
    story = training("a", "b", high=2)
    story.on(came("aa"))
    story.on(lost("a"))
    held = snapshots(5, 0, 1, of=2)
    assert story.stopped("aa", "b", b=held) == [start(2, "b", "aa", step=5, source=(1, 2))]


def test_older_snapshots_are_let_go_once_those_of_the_new_generation_are_whole() -> None:
    story = training("a", "b")
    story.state = replace(story.state, generation=2)
    old = snapshots(4, 0, 1, of=2)
    assert story.on(ReplicasHeld(node="a", replicas=old | snapshots(5, 0, of=2, generation=2))) == []
    assert story.on(Tick()) == []
    story.on(ReplicasHeld(node="b", replicas=snapshots(5, 1, of=2, generation=2)))
    assert story.on(Tick()) == [DropReplicas(generation=2)]
    assert story.on(Tick()) == []  # once is enough


def test_a_step_is_whole_only_if_one_generation_holds_all_of_it() -> None:
    held = snapshots(5, 0, of=2) | snapshots(5, 1, of=2, generation=2) | snapshots(3, 0, of=1, generation=3)
    node = MemberNode(num_slots=1, replicas=held)
    assert newest_complete_step(MembershipState(min_workers=1, max_workers=1, nodes={"a": node})) == ReplicatedStep(
        step=3, generation=3, world_size=1
    )
    assert newest_complete_step(MembershipState(min_workers=1, max_workers=1)) is None


# --- notices


def test_a_machine_with_time_left_trains_on_while_another_is_asked_for() -> None:
    story = training("a", "b")
    assert story.on(PreemptionNotice(node="b", preempted_at=story.now + 30)) == [ReplaceNode(node="b")]
    assert story.on(PreemptionNotice(node="b", preempted_at=story.now + 29)) == []  # it is asked for once
    assert story.after(20) == []
    actions = story.after(9 - story.state.margin_s)
    assert causes(actions) == ["notice"]
    assert actions[-1] == DrainGeneration(generation=1)
    story.left()
    assert story.stopped("a", "b") == [start(2, "a")]


def test_a_machine_that_will_go_is_left_as_soon_as_another_is_ready() -> None:
    story = training("a", "b")
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 30))
    assert story.on(came("c", is_ready=False)) == []
    assert causes(story.on(NodeReady(node="c"))) == ["notice"]
    story.left()
    assert story.stopped("a", "b", "c") == [start(2, "a", "c")]


def test_a_notice_without_time_changes_at_once() -> None:
    story = training("a", "b")
    actions = story.on(PreemptionNotice(node="b", preempted_at=story.now))
    assert actions[0] == ReplaceNode(node="b")
    assert causes(actions) == ["notice"]


def test_what_a_change_needs_is_what_was_measured() -> None:
    story = training("a", "b")
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 30))
    story.now += 5
    assert causes(story.on(Tick(margin_s=25.0))) == ["notice"]


def test_a_notice_for_a_machine_without_ranks_only_has_it_replaced() -> None:
    story = training("a", high=1)
    story.on(came("spare"))
    assert story.on(PreemptionNotice(node="spare", preempted_at=story.now)) == [ReplaceNode(node="spare")]
    assert story.state.phase is Phase.TRAINING


def test_a_notice_while_forming_is_heeded_after_the_first_step() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    assert story.on(PreemptionNotice(node="b", preempted_at=story.now)) == [ReplaceNode(node="b")]
    assert causes(story.on(GenerationReady(generation=1))) == ["notice"]


def test_a_machine_that_will_go_joins_no_more() -> None:
    story = training("a")
    story.on(came("b"))
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 60))
    assert story.after(JOIN_WINDOW_S) == []


def test_a_machine_that_the_minimum_needs_is_used_for_as_long_as_it_is_there() -> None:
    story = training("a", "b", "c", low=2)
    story.on(PreemptionNotice(node="b", preempted_at=story.now + 30))
    story.on(lost("c"))
    assert starts(story.stopped("a", "b")) == [start(2, "a", "b")]
    story.on(GenerationReady(generation=2))
    held = snapshots(6, 0, 1, of=2, generation=2)
    story.on(ReplicasHeld(node="a", replicas=held))
    assert causes(story.after(30 - story.state.margin_s)) == ["notice"]
    story.left()
    assert story.stopped("a", "b") == [
        WaitForNodes(have=1, need=2),
        FlushToStorage(step=6, generation=2, world_size=2),
    ]


# --- hangs


def hung(rank: int, generation: int = 1) -> HangDetected:
    return HangDetected(generation=generation, rank=rank, silent_s=5.0)


def test_the_place_of_a_rank_that_hung_is_left_out_for_a_while() -> None:
    story = training("a", "b")
    actions = story.on(hung(1))
    assert causes(actions) == ["hang"]
    assert actions[1:] == stops("a", "b")
    assert story.stopped("a", "b") == [start(2, "a")]
    story.on(GenerationReady(generation=2))
    assert story.after(QUARANTINE_S - 0.1) == []
    story.after(0.1)
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


def test_only_one_place_of_the_machine_is_left_out() -> None:
    story = training("a", "a", "b")
    story.on(hung(0))
    assert starts(story.stopped("a", "b")) == [start(2, "a", "b")]


def test_the_place_of_a_rank_that_hung_is_used_where_the_minimum_needs_it() -> None:
    story = training("a", "b", low=2)
    story.on(hung(1))
    assert story.stopped("a", "b") == [start(2, "a", "b")]


def test_a_hang_of_an_earlier_generation_means_nothing() -> None:
    story = training("a", "b")
    assert story.on(hung(1, generation=0)) == []


# --- too few machines


def test_below_the_minimum_the_run_waits_with_its_newest_step_on_its_way_to_storage() -> None:
    story = training("a", "b", low=2)
    story.on(lost("b"))
    actions = story.stopped("a", a=snapshots(6, 0, 1, of=2))
    assert actions == [WaitForNodes(have=1, need=2), FlushToStorage(step=6, generation=1, world_size=2)]
    assert story.after(1.0) == []  # it is asked for once
    assert story.on(came("c")) == [start(2, "a", "c", step=6, source=(1, 2))]


def test_what_is_in_storage_is_not_made_durable_again() -> None:
    story = training("a", "b", low=2, stored_step=6)
    story.on(lost("b"))
    assert story.stopped("a", a=snapshots(6, 0, 1, of=2)) == [WaitForNodes(have=1, need=2)]


@pytest.mark.parametrize("happens", [came("b"), lost("b")], ids=["it reconnects", "it is lost"])
def test_a_step_is_made_durable_again_where_one_that_was_told_may_not_have_done_it(happens: Event) -> None:
    story = training("a", "b", "c", low=3)
    story.on(lost("c"))
    both = snapshots(6, 0, 1, 2, of=3)
    persist = FlushToStorage(step=6, generation=1, world_size=3)
    assert story.stopped("a", "b", a=both, b=both)[-1] == persist
    event = replace(happens, replicas=both) if isinstance(happens, AgentAttached) else happens
    assert story.on(event) == [persist]


# --- another run waits


def test_a_run_above_its_minimum_falls_to_it_and_gives_the_rest_back_until_time_has_passed() -> None:
    story = training("a", "b", "c", low=1)
    story.state = replace(
        story.state, nodes={**story.state.nodes, "b": MemberNode(num_slots=1, num_guaranteed=1, is_ready=True)}
    )
    actions = story.on(YieldRequested())
    assert causes(actions) == ["yield"]
    story.left()
    assert story.stopped("a", "b", "c") == [start(2, "b"), ReleaseSlots()]  # onto its firm place
    story.on(GenerationReady(generation=2))
    assert story.after(YIELD_S - 0.1) == []
    assert story.after(0.1) == [ClaimSlots()]
    assert story.after(0.1) == []
    assert causes(story.after(JOIN_WINDOW_S)) == ["growth"]


def test_as_long_as_another_run_asks_nothing_is_claimed() -> None:
    story = training("a", low=1)
    for _ in range(20):
        assert story.on(YieldRequested()) == [ReleaseSlots()]
        assert story.after(2.0) == []
    assert story.after(YIELD_S) == [ClaimSlots()]


def test_a_run_that_falls_below_its_minimum_while_another_waits_claims_no_more_than_that() -> None:
    story = training("a", "b", low=2)
    story.on(YieldRequested())
    story.on(lost("b"))
    assert story.stopped("a") == [WaitForNodes(have=1, need=2)]
    assert story.after(YIELD_S) == [ClaimSlots()]


def test_a_wish_to_yield_changes_nothing_that_is_changing_anyway() -> None:
    for phase in (Phase.STARTING, Phase.DRAINING, Phase.STOPPING):
        story = training("a", "b", phase=phase, stopping_nodes=frozenset({"a"}))
        assert story.on(YieldRequested()) == [ReleaseSlots()]
        assert story.state.phase is phase


# --- the end


def test_a_run_is_over_when_all_ranks_are_done() -> None:
    story = training("a", "b")
    assert story.on(ended(0, EndReason.DONE, step=50)) == []
    assert story.on(ended(1, EndReason.DONE, step=50)) == [FinishRun(step=50)]
    assert story.on(came("c")) == []


@pytest.mark.parametrize("happens", [lost("b"), ended(1)], ids=["its machine is lost", "it breaks"])
def test_a_rank_that_is_lost_after_another_is_done_does_not_matter(happens: Event) -> None:
    story = training("a", "b")
    story.on(ended(0, EndReason.DONE, step=50))
    assert story.on(happens) == [FinishRun(step=50)]


def test_a_rank_that_hangs_after_another_is_done_is_stopped_and_that_is_all() -> None:
    story = training("a", "b")
    story.on(ended(0, EndReason.DONE, step=50))
    story.on(hung(1))
    assert story.stopped("a", "b") == [FinishRun(step=50)]


def test_a_rank_that_fails_ends_the_run() -> None:
    story = training("a", "b")
    failed = ended(1, EndReason.FAILED, reason="the loss is nan", error="RunError")
    assert story.on(failed) == [*stops("a", "b"), FailRun(error="RunError", reason="the loss is nan")]
    assert story.state.phase is Phase.DONE


def test_a_run_that_is_stopped_before_it_has_begun_is_over_at_once() -> None:
    assert waiting(stored_step=3).on(StopRequested()) == [FinishRun(step=3)]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.TRAINING, Phase.DRAINING])
def test_a_run_that_is_stopped_ends_as_its_ranks_do(phase: Phase) -> None:
    story = training("a", phase=phase)
    assert story.on(StopRequested()) == []
    assert story.on(ended(0, EndReason.DONE, step=8)) == [FinishRun(step=8)]


def test_a_run_that_is_stopped_does_not_change_any_more() -> None:
    story = training("a", "b")
    story.on(StopRequested())
    story.on(came("c"))
    assert story.after(JOIN_WINDOW_S) == []
    assert story.on(PreemptionNotice(node="a", preempted_at=story.now)) == [ReplaceNode(node="a")]
    assert story.on(YieldRequested()) == [ReleaseSlots()]


def test_a_run_that_is_stopped_while_leaving_and_leaves_all_the_same_forms_once_more_to_stop() -> None:
    story = training("a", phase=Phase.DRAINING)
    story.on(StopRequested())
    assert story.left() == stops("a")
    assert story.stopped("a", a=snapshots(5, 0, of=1)) == [start(2, "a", step=5, source=(1, 1))]


def test_a_run_that_is_stopped_does_not_end_before_what_a_machine_has_brought_back() -> None:
    story = training("a", is_stopping=True, phase=Phase.TRAINING)
    story.state = replace(story.state, generation=2)
    story.on(came("b", generation=1, replicas=snapshots(20, 0, of=1)))
    story.on(RankEnded(generation=2, rank=0, end=EndReason.DONE, step=11))
    (begun,) = starts(story.stopped("a", "b"))
    assert (begun.generation, begun.step, begun.source) == (3, 20, (1, 1))


def test_a_run_that_is_stopped_with_nothing_but_storage_left_is_over() -> None:
    story = training("a", "b", stored_step=4)
    story.on(lost("b"))
    story.on(StopRequested())
    assert story.stopped("a", a=snapshots(6, 0, of=2)) == [FinishRun(step=4)]


def test_a_run_that_is_stopped_while_it_waits_ends_when_its_newest_step_is_in_storage() -> None:
    story = training("a", "b", low=2)
    story.on(lost("b"))
    story.stopped("a", a=snapshots(6, 0, 1, of=2))
    assert story.on(StopRequested()) == []
    assert story.on(CheckpointCommitted(step=6)) == [FinishRun(step=6)]


def test_a_run_that_is_stopped_while_it_waits_ends_when_its_newest_step_is_lost() -> None:
    story = training("a", "b", low=2, stored_step=2)
    story.on(lost("b"))
    story.stopped("a", a=snapshots(6, 0, 1, of=2))
    story.on(StopRequested())
    assert story.on(lost("a")) == [FinishRun(step=2)]


# --- failures


def break_while_forming(story: Story, *, is_lost: bool = False) -> list[Action]:
    """A rank breaks, and its machine is found to be lost only afterwards, if it is."""
    generation = story.state.generation
    story.on(ended(0, generation=generation, reason="out of memory"))
    actions = story.on(lost("b")) if is_lost else []
    return actions + story.stopped(*story.state.stopping_nodes)


def test_generations_that_break_by_themselves_before_their_first_step_fail_the_run() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    for _ in range(MAX_STARTUP_FAILURES - 1):
        assert starts(break_while_forming(story))
    (fail,) = break_while_forming(story)
    assert isinstance(fail, FailRun)
    assert "3 generations in a row" in fail.reason
    assert "out of memory" in fail.reason


def test_generations_that_break_because_a_machine_is_lost_do_not_count_whoever_says_it_first() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    for _ in range(2 * MAX_STARTUP_FAILURES):
        assert starts(break_while_forming(story, is_lost=True))
        story.on(came("b"))
    assert story.state.num_failures == 0


def test_a_first_step_forgives_earlier_failures() -> None:
    story = training("a", "b", phase=Phase.STARTING)
    break_while_forming(story)
    story.on(GenerationReady(generation=story.state.generation))
    assert story.state.num_failures == 0


def test_generations_that_break_after_their_first_step_do_not_count() -> None:
    story = training("a", "b")
    story.on(ended(0))
    story.stopped("a", "b")
    assert story.state.num_failures == 0


# --- connections


def test_a_member_that_only_reconnects_trains_on() -> None:
    story = training("a", "b")
    assert story.on(came("b", generation=1, running_ranks={1: 2})) == []
    assert story.state.phase is Phase.TRAINING


@pytest.mark.parametrize("running_ranks", [{}, {1: 3}], ids=["all", "one"])
def test_a_member_that_reconnects_without_its_ranks_ends_the_generation(running_ranks: dict[int, int]) -> None:
    story = training("a", "b", "b")
    actions = story.on(came("b", generation=1, running_ranks=running_ranks))
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "b")


def test_a_member_that_reconnects_after_its_rank_has_left_is_not_missed() -> None:
    story = training("a", "b", phase=Phase.DRAINING)
    story.on(ended(1, EndReason.DRAINED))
    assert story.on(came("b", generation=1)) == []
    assert story.on(ended(0, EndReason.DRAINED)) == stops("a", "b")


@pytest.mark.parametrize("running_ranks", [{}, {1: 2}], ids=["without ranks", "with ranks"])
def test_a_member_that_reconnects_while_stopping_is_told_again(running_ranks: dict[int, int]) -> None:
    story = training("a", "b")
    story.on(ended(0))
    assert story.on(came("b", generation=1, running_ranks=running_ranks)) == stops("b")
    story.stopped("a")
    assert story.stopped("b") == [start(2, "a", "b")]


def test_a_lost_machine_that_comes_back_while_stopping_is_stopped_and_waited_for() -> None:
    story = training("a", "b")
    story.on(lost("b"))
    assert story.on(came("b", generation=1, running_ranks={1: 2})) == stops("b")
    assert story.stopped("a") == []
    assert story.stopped("b") == [start(2, "a", "b")]


def test_a_lost_machine_that_comes_back_with_old_ranks_has_them_stopped_before_it_is_used() -> None:
    story = training("a", "b")
    story.on(lost("b"))
    story.stopped("a")
    story.on(GenerationReady(generation=2))
    assert story.on(came("b", generation=1, running_ranks={1: 2})) == stops("b", generation=2, keep_replicas=True)
    actions = story.after(JOIN_WINDOW_S) + story.after(JOIN_WINDOW_S)
    assert causes(actions) == ["growth"]
    story.left()
    assert story.stopped("a") == []
    assert story.stopped("b") == [start(3, "a", "b")]


def test_what_is_said_of_an_unknown_machine_means_nothing() -> None:
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


def reborn(**more: Any) -> Story:
    return waiting(low=2, former_generation=5, stored_step=3, recovery_deadline=100.0 + RECOVERY_S, **more)


def test_a_restarted_supervisor_lets_the_generation_that_it_finds_train_on() -> None:
    story = reborn()
    assert story.on(came("a", generation=5, running_ranks={0: 3, 1: 3})) == []
    assert story.after(RECOVERY_S / 2) == []
    assert story.on(came("b", generation=5, running_ranks={2: 3})) == []
    assert story.after(RECOVERY_S) == []
    assert (story.state.phase, story.state.assignment) == (Phase.TRAINING, ("a", "a", "b"))
    story.on(lost("b"))
    story.on(came("c"))
    assert starts(story.stopped("a"))[0].generation == 6


def test_a_machine_that_was_left_out_earlier_does_not_hide_the_generation_at_work() -> None:
    story = reborn()
    assert story.on(came("spare", generation=4)) == []
    assert story.on(came("a", generation=5, running_ranks={0: 1})) == []
    assert (story.state.phase, story.state.generation, story.state.assignment) == (Phase.TRAINING, 5, ("a",))


def test_of_two_generations_that_it_finds_the_older_is_stopped() -> None:
    story = reborn()
    story.on(came("cut off", generation=4, running_ranks={0: 2}))
    assert story.on(came("a", generation=5, running_ranks={0: 2})) == stops(
        "cut off", generation=5, keep_replicas=True
    )
    assert story.on(came("b", generation=5, running_ranks={1: 2})) == []
    assert (story.state.phase, story.state.assignment) == (Phase.TRAINING, ("a", "b"))


def test_a_restarted_supervisor_ends_a_generation_of_which_an_agent_stays_away() -> None:
    story = reborn()
    story.on(came("a", generation=5, running_ranks={0: 3}))
    story.on(came("b", generation=5, running_ranks={1: 3}))
    actions = story.after(RECOVERY_S)
    assert causes(actions) == ["loss"]
    assert actions[1:] == stops("a", "b", generation=5)
    assert story.stopped("a", "b") == [start(6, "a", "b", step=3)]


def test_a_restarted_supervisor_that_finds_no_generation_forms_one_when_all_had_time_to_come() -> None:
    story = reborn()
    held = snapshots(7, 0, 1, of=2, generation=5)
    assert story.on(came("a", generation=5, replicas=held)) == []
    assert story.on(came("b", generation=5)) == []
    story.after(RECOVERY_S)
    assert story.stopped("a", "b") == [start(6, "a", "b", step=7, source=(5, 2))]


def test_a_restarted_supervisor_with_too_few_machines_has_their_memory_made_durable() -> None:
    story = reborn()
    story.on(came("a", generation=5, replicas=snapshots(7, 0, 1, of=2, generation=5)))
    story.after(RECOVERY_S)
    assert story.stopped("a") == [WaitForNodes(have=1, need=2), FlushToStorage(step=7, generation=5, world_size=2)]


def test_a_restarted_supervisor_that_is_told_to_stop_first_looks_for_what_is_running() -> None:
    story = reborn()
    assert story.on(StopRequested()) == []
    story.on(came("a", generation=5, running_ranks={0: 1}))
    assert story.on(ended(0, EndReason.DONE, 5, step=9)) == [FinishRun(step=9)]


def test_a_restarted_supervisor_gives_nothing_back_before_it_knows_what_it_uses() -> None:
    assert reborn().on(YieldRequested()) == []
