"""Who is a member, decided without a cluster: one event at a time, and any history of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forge.elastic.membership import BENCH_S, JOIN_WINDOW_S, REUNION_S, YIELD_S, decide
from forge.elastic.vocabulary import (
    Action,
    Change,
    Claim,
    End,
    Event,
    Fail,
    Finish,
    Forget,
    Formed,
    GiveBack,
    Holding,
    Holds,
    Hung,
    Leave,
    NodeCame,
    NodeLost,
    NodeWarm,
    Noticed,
    Persist,
    Phase,
    RankEnded,
    Replace,
    Saved,
    SlotsChanged,
    Start,
    State,
    Stop,
    Stopped,
    StopWished,
    Ticked,
    Wait,
    YieldWished,
)


class Story:
    """A run as events tell it, with what was decided."""

    def __init__(self, *, low: int = 1, high: int = 3, state: State | None = None) -> None:
        self.state = state or State(low=low, high=high)
        self.now = 0.0
        self.actions: tuple[Action, ...] = ()

    def tell(self, *events: Event) -> tuple[Action, ...]:
        """Returns: what all of them together led to."""
        self.actions = ()
        for event in events:
            self.state, actions = decide(self.state, event, now=self.now)
            self.actions += actions
        return self.actions

    def after(self, seconds: float) -> tuple[Action, ...]:
        self.now += seconds
        return self.tell(Ticked())

    def trains(self, *nodes: str, step: int = 10) -> Story:
        """Machines with a place each come, form a generation, and hold the copies of a step."""
        for node in nodes:
            self.tell(NodeCame(node=node, num_slots=1, num_firm=1 if node == "a" else 0, is_warm=True))
        self.after(JOIN_WINDOW_S)
        self.after(JOIN_WINDOW_S)
        while self.state.phase is not Phase.TRAINING or len(self.state.places) < len(nodes):
            if self.state.phase is Phase.FORMING:
                self.tell(Formed(generation=self.state.generation))
                self.after(JOIN_WINDOW_S)
                self.after(JOIN_WINDOW_S)
            elif self.state.phase is Phase.LEAVING:
                self.leave(step=1)
        self.hold(step)
        return self

    def hold(self, step: int) -> tuple[Action, ...]:
        """Every rank's copy of a step is whole on its machine and on the next one."""
        places, size = self.state.places, len(self.state.places)
        told: list[Event] = []
        for node in dict.fromkeys(places):
            ranks = [r for r, name in enumerate(places) if name == node or places[(r + 1) % size] == node]
            told.append(Holds(node=node, holdings=frozenset(self.copy(r, step) for r in ranks)))
        return self.tell(*told)

    def copy(self, rank: int, step: int) -> Holding:
        return Holding(generation=self.state.generation, rank=rank, world_size=len(self.state.places), step=step)

    def leave(self, *, step: int) -> tuple[Action, ...]:
        """All ranks end after a step, and every agent answers with its copies."""
        generation, size = self.state.generation, len(self.state.places)
        self.hold(step)
        self.tell(*(RankEnded(generation=generation, rank=r, end=End.LEFT, step=step) for r in range(size)))
        return self.answer()

    def answer(self) -> tuple[Action, ...]:
        """Every agent that was asked says that its ranks are gone."""
        return self.tell(
            *(
                Stopped(node=n, generation=self.state.generation, holdings=self.state.nodes[n].holdings)
                for n in sorted(self.state.unanswered)
            )
        )


def of(kind: type, actions: tuple[Action, ...]) -> list[Action]:
    return [action for action in actions if isinstance(action, kind)]


def start_in(actions: tuple[Action, ...]) -> Start:
    (start,) = of(Start, actions)
    assert isinstance(start, Start)
    return start


def test_the_first_generation_starts_when_the_smallest_number_is_warm() -> None:
    story = Story(low=2)
    assert story.tell(NodeCame(node="a", num_slots=1, is_warm=True), NodeCame(node="b", num_slots=1)) == ()
    start = start_in(story.tell(NodeWarm(node="b")))
    assert (start.generation, set(start.places), start.step, start.source) == (1, {"a", "b"}, 0, None)


def test_machines_that_come_soon_after_each_other_are_taken_in_together() -> None:
    story = Story().trains("a")
    story.tell(NodeCame(node="b", num_slots=1, is_warm=True))
    story.after(JOIN_WINDOW_S / 2)
    story.tell(NodeCame(node="c", num_slots=1, is_warm=True))
    assert of(Leave, story.after(JOIN_WINDOW_S)) == [Leave(generation=1)]
    start = start_in(story.leave(step=11))
    assert (len(start.places), start.step, start.source) == (3, 11, (1, 1))


def test_after_a_loss_the_next_generation_waits_for_every_answer_and_goes_on_from_memory() -> None:
    story = Story().trains("a", "b", "c")
    generation = story.state.generation
    actions = story.tell(NodeLost(node="b", reason="gone"))
    assert {stop.node for stop in of(Stop, actions) if isinstance(stop, Stop)} == {"a", "c"}
    assert not of(
        Start, story.tell(Stopped(node="a", generation=generation, holdings=story.state.nodes["a"].holdings))
    )
    start = start_in(story.answer())
    assert (start.generation, len(start.places), start.step) == (generation + 1, 2, 10)
    assert "b" not in start.places


def test_who_is_lost_while_it_is_waited_for_need_not_answer() -> None:
    story = Story().trains("a", "b", "c")
    story.tell(NodeLost(node="b", reason="gone"))
    story.tell(Stopped(node="a", generation=story.state.generation, holdings=frozenset()))
    start = start_in(story.tell(NodeLost(node="c", reason="gone")))
    assert start.places == ("a",)


def test_a_step_counts_only_if_every_ranks_copy_of_it_is_somewhere() -> None:
    story = Story().trains("a", "b", "c", step=10)
    newest = frozenset({story.copy(0, 11), story.copy(0, 10), story.copy(2, 10)})
    story.tell(Holds(node="a", holdings=newest))
    story.tell(NodeLost(node="b", reason="gone"))
    assert start_in(story.answer()).step == 10


def test_storage_is_gone_on_from_where_it_is_newer_than_memory() -> None:
    story = Story().trains("a", "b", step=10)
    story.tell(Saved(step=12), NodeLost(node="b", reason="gone"))
    start = start_in(story.answer())
    assert (start.step, start.source) == (12, None)


def test_a_killed_rank_changes_the_generation_and_not_its_machines() -> None:
    story = Story().trains("a", "b")
    places, generation = story.state.places, story.state.generation
    story.tell(RankEnded(generation=generation, rank=1, end=End.BROKEN))
    assert set(start_in(story.answer()).places) == set(places)


def test_a_machine_under_notice_is_used_until_a_change_takes_what_is_left() -> None:
    story = Story().trains("a", "b")
    actions = story.tell(Noticed(node="b", goes_at=story.now + 30))
    assert actions == (Replace(node="b"),)
    assert not of(Leave, story.after(20))
    (change,) = of(Change, story.after(30 - 20 - story.state.margin_s))
    assert isinstance(change, Change)
    assert change.cause == "notice"
    assert start_in(story.leave(step=20)).places == ("a",)


def test_a_machine_that_is_to_go_now_is_left_at_once() -> None:
    story = Story().trains("a", "b")
    assert of(Leave, story.tell(Noticed(node="a", goes_at=story.now)))


def test_a_replacement_that_is_ready_ends_the_waiting_and_takes_the_place() -> None:
    story = Story(high=2).trains("a", "b")
    story.tell(Noticed(node="b", goes_at=story.now + 100))
    assert of(Leave, story.tell(NodeCame(node="c", num_slots=1, is_warm=True)))
    assert set(start_in(story.leave(step=12)).places) == {"a", "c"}


def test_a_place_whose_rank_hung_is_left_out_for_a_while() -> None:
    story = Story().trains("a", "b", "c")
    culprit = story.state.places[1]
    story.tell(Hung(generation=story.state.generation, rank=1, silent_s=5.0))
    assert culprit not in start_in(story.answer()).places
    story.tell(Formed(generation=story.state.generation))
    story.hold(20)
    story.after(BENCH_S)
    assert of(Leave, story.after(JOIN_WINDOW_S))
    assert culprit in start_in(story.leave(step=30)).places


def test_a_place_is_not_left_out_where_the_run_could_not_go_on_without_it() -> None:
    story = Story(low=2).trains("a", "b")
    story.tell(Hung(generation=story.state.generation, rank=0, silent_s=5.0))
    assert len(start_in(story.answer()).places) == 2


def test_below_the_minimum_the_run_waits_and_makes_its_state_durable() -> None:
    story = Story(low=2).trains("a", "b")
    story.tell(NodeLost(node="b", reason="gone"))
    actions = story.answer()
    assert of(Wait, actions) == [Wait(have=1, need=2)]
    (persist,) = of(Persist, actions)
    assert isinstance(persist, Persist)
    assert persist.step == 10
    start = start_in(story.tell(NodeCame(node="c", num_slots=1, is_warm=True)))
    assert (start.step, set(start.places)) == (10, {"a", "c"})


def test_what_another_run_needs_is_given_back_and_claimed_again_after_its_time() -> None:
    story = Story().trains("a", "b", "c")
    assert of(Leave, story.tell(YieldWished()))
    actions = story.leave(step=12)
    assert start_in(actions).places == ("a",)  # the firm place
    assert of(GiveBack, actions)
    story.tell(Formed(generation=story.state.generation))
    story.hold(13)
    assert not of(Leave, story.after(JOIN_WINDOW_S) + story.after(JOIN_WINDOW_S))
    assert of(Claim, story.after(YIELD_S))


def test_at_its_minimum_a_run_gives_nothing_back_that_it_uses() -> None:
    story = Story(low=2).trains("a", "b")
    assert story.tell(YieldWished()) == (GiveBack(),)
    assert story.state.phase is Phase.TRAINING


@pytest.mark.parametrize("has_copies", [True, False])
def test_a_run_that_waits_is_stopped_once_its_state_is_durable(has_copies: bool) -> None:
    story = Story(low=2).trains("a", "b", step=10)
    story.tell(Saved(step=0 if has_copies else 10), NodeLost(node="b", reason="gone"))
    story.answer()
    actions = story.tell(StopWished())
    if has_copies:
        assert not actions
        story.tell(Saved(step=10))
        actions = story.after(0.1)
    assert of(Finish, actions) == [Finish(step=10)]


def test_a_run_is_over_when_every_rank_has_reached_the_end_or_is_lost() -> None:
    story = Story().trains("a", "b")
    generation = story.state.generation
    assert not of(Finish, story.tell(RankEnded(generation=generation, rank=0, end=End.DONE, step=99)))
    assert of(Finish, story.tell(NodeLost(node=story.state.places[1], reason="gone"))) == [Finish(step=99)]


def test_an_error_that_would_come_again_ends_the_run() -> None:
    story = Story().trains("a", "b")
    ended = RankEnded(generation=story.state.generation, rank=1, end=End.FAILED, reason="nan", error="RunError")
    assert of(Fail, story.tell(ended)) == [Fail(error="RunError", reason="nan")]


def test_generations_that_break_by_themselves_are_tried_three_times() -> None:
    story = Story()
    story.tell(NodeCame(node="a", num_slots=1, is_warm=True))
    for _ in range(2):
        story.tell(RankEnded(generation=story.state.generation, rank=0, end=End.BROKEN, reason="no memory"))
        assert of(Start, story.answer())
    (fail,) = of(Fail, story.tell(RankEnded(generation=3, rank=0, end=End.BROKEN, reason="no memory")))
    assert isinstance(fail, Fail)
    assert "no memory" in fail.reason


def test_machines_that_are_lost_while_generations_form_are_no_failures() -> None:
    story = Story()
    for number in range(6):
        story.tell(NodeCame(node=f"n{number}", num_slots=1, is_warm=True))
        assert story.state.phase is Phase.FORMING
        assert not of(Fail, story.tell(NodeLost(node=f"n{number}", reason="gone")))
    assert story.state.num_failures == 0


def test_a_restarted_supervisor_adopts_the_generation_that_all_its_agents_tell_of() -> None:
    story = Story(state=State(low=1, high=3, reunites_until=REUNION_S, former_generation=4))
    for rank, node in enumerate("ab"):
        came = NodeCame(node=node, num_slots=1, is_warm=True, generation=4, places={rank: 2})
        assert not of(Start, story.tell(came))
    assert (story.state.phase, story.state.generation, story.state.places) == (Phase.TRAINING, 4, ("a", "b"))


def test_it_breaks_a_generation_that_is_not_whole_any_more() -> None:
    story = Story(state=State(low=1, high=3, reunites_until=REUNION_S, former_generation=4))
    story.tell(NodeCame(node="a", num_slots=1, is_warm=True, generation=4, places={0: 2}))
    assert of(Stop, story.after(REUNION_S)) == [Stop(node="a", generation=4)]
    assert start_in(story.answer()).generation == 5


def test_it_forms_nothing_before_it_knows_that_there_is_nothing() -> None:
    story = Story(state=State(low=1, high=3, reunites_until=REUNION_S, former_generation=4))
    assert not of(Start, story.tell(NodeCame(node="a", num_slots=1, is_warm=True)))
    assert start_in(story.after(REUNION_S)).generation == 5


def test_a_machine_that_comes_back_with_ranks_of_an_old_generation_must_end_them() -> None:
    story = Story().trains("a", "b")
    old = story.state.generation
    story.tell(NodeLost(node="b", reason="silent"))
    story.answer()
    back = NodeCame(node="b", num_slots=1, is_warm=True, generation=old, places={1: 2})
    assert of(Stop, story.tell(back)) == [Stop(node="b", generation=old)]


def test_an_agent_whose_connection_was_away_is_told_again_to_stop() -> None:
    story = Story().trains("a", "b", "c")
    story.tell(NodeLost(node="b", reason="gone"))
    again = story.tell(NodeCame(node="a", num_slots=1, is_warm=True, generation=story.state.generation))
    assert of(Stop, again) == [Stop(node="a", generation=story.state.generation)]


def test_old_copies_are_let_go_only_when_the_new_ones_are_whole() -> None:
    story = Story().trains("a", "b")
    story.tell(RankEnded(generation=story.state.generation, rank=0, end=End.BROKEN))
    story.answer()
    story.tell(Formed(generation=story.state.generation))
    generation = story.state.generation
    assert not story.tell(Holds(node="a", holdings=frozenset({story.copy(0, 11)})))
    assert story.tell(Holds(node="b", holdings=frozenset({story.copy(1, 11)}))) == (Forget(generation=generation),)


def test_places_that_the_cluster_adds_to_a_machine_are_taken() -> None:
    story = Story().trains("a")
    story.tell(SlotsChanged(node="a", num_slots=2))
    assert of(Leave, story.after(JOIN_WINDOW_S) + story.after(JOIN_WINDOW_S))
    assert start_in(story.leave(step=11)).places == ("a", "a")


def test_a_machine_whose_warm_process_died_is_no_place_for_a_new_generation() -> None:
    story = Story().trains("a", "b")
    generation = story.state.generation
    story.tell(NodeWarm(node="b", is_warm=False), RankEnded(generation=generation, rank=1, end=End.BROKEN))
    assert start_in(story.answer()).places == ("a",)


def test_an_unknown_node_is_no_reason_to_do_anything() -> None:
    story = Story().trains("a")
    before = story.state
    assert story.tell(NodeLost(node="x", reason=""), Noticed(node="x", goes_at=0.0), NodeWarm(node="x")) == ()
    assert story.state == replace(before)
