"""Where a run's time went: to the second, whatever happened, and whatever the records say."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.events import (
    NodeJoined,
    NodeLeft,
    PreemptionNoticeReceived,
    RunFailed,
    RunFinished,
    RunStarted,
    SampleGenerated,
    WaitingForMachines,
)
from forge.runs.goodput import GoodputTracker, goodput_of, moment
from forge.runs.goodput_report import BUCKETS, GoodputReport
from tests.support.runs import History

SECONDS = st.floats(min_value=0.001, max_value=100.0)
ACTS = [
    "step",
    "evaluated step",
    "saved step",
    "loss",
    "late loss",
    "hang",
    "growth",
    "broken",
    "wait",
    "stop",
    "die",
]
TIMES = st.sampled_from([math.nan, -1.0, 1.0, 2.0, 2, 5.5, 70.0, 1e9])
ANYTHING = st.sampled_from([None, "", "a", math.nan, math.inf, -1, 0, 1, 2.5, 1e300])
KINDS = st.sampled_from(
    [
        *[
            "RunStarted",
            "RunFailed",
            "RunStopped",
            "MembershipChangeStarted",
            "GenerationStarting",
            "GenerationStarted",
            "Evaluated",
        ],
        *[
            "WaitingForMachines",
            "StepRepeated",
            "CheckpointSaved",
            "NodeJoined",
            "NodeLeft",
            "PreemptionNoticeReceived",
            "X",
        ],
    ]
)
NUMBERS = ["step", "seconds", "seconds_since_cause", "step_s", "stall_s", "speed/step_s", "world_size", "node"]
NONSENSE = {"event": KINDS, "cause": st.sampled_from(["loss", "hang"])} | dict.fromkeys(NUMBERS, ANYTHING)


def report_of(history: History, *, now: float | None = None) -> GoodputReport:
    return goodput_of(history.events, history.steps, now=now)


def spent(found: GoodputReport) -> dict[str, float]:
    """The buckets that are not empty."""
    return {bucket: seconds for bucket, seconds in found.seconds.items() if seconds > 1e-9}


def started(*, forming_s: float = 5.0) -> History:
    history = History()
    history.start()
    history.form(forming_s)
    return history


def join(history: History, *nodes: str) -> None:
    for node in nodes:
        history.record(NodeJoined(node=node, host="10.0.0.1", num_slots=1, agent_pid=1))


def history_of(acts: Sequence[tuple[str, float]]) -> History:
    """A run to which all of this happens; what cannot happen just then does not."""
    history = History()
    history.start()
    for act, seconds in acts:
        if not history.is_training and act in ("step", "evaluated step", "saved step"):
            history.form(seconds)
        step = history.last_step + 1
        if act == "step":
            history.step(step, seconds, gap_s=seconds / 7 if history.is_training else 0.0)
        elif act == "evaluated step":
            history.step(step, seconds, evaluation_s=seconds / 3)
        elif act == "saved step" and history.is_training:
            history.spend(seconds / 5, "saving")
            history.step(step, seconds)
            history.saved(step - 1, seconds=seconds, stall_s=seconds / 5)
        elif act == "loss" and history.is_training:
            history.spend(seconds, "repeated")
            history.change("loss")
            history.form(seconds)
            history.step(step - 1, seconds)
        elif act == "late loss" and history.is_training:  # the step that was going on had ended all the same
            history.spend(seconds, "training")
            history.change("loss")
            history.record_step(step, seconds)
            history.change("loss")
        elif act == "hang" and history.is_training:
            history.spend(seconds / 2, "repeated")
            history.spend(seconds, "stalled")
            history.change("hang", since_s=seconds)
        elif act == "growth" and history.is_training:
            history.spend(seconds / 7, "other")
            history.spend(seconds, "training")
            history.change("growth")
            history.spend(seconds, "training")
            history.record_step(step, 2 * seconds)
            history.spend(seconds / 9, "starting")
            history.form(seconds)
            history.step(step + 1, seconds)
        elif act == "broken" and not history.is_training:
            history.form(seconds)
            history.change("failure")
        elif act == "wait" and not history.is_training:
            history.wait(seconds)
            history.form(seconds)
        elif act == "stop" or (act == "die" and history.now == max(last_times(history))):
            if act == "stop":
                history.stop(saving_s=seconds)
            history.now += 1000 * seconds  # nobody works
            history.start()
    history.stop()
    return history


def last_times(history: History) -> list[float]:
    return [records[-1]["time"] for records in (history.events, history.steps) if records]


class TestSpeed:
    def test_speed__several_steps__mean_by_time_without_repeated_ones(self) -> None:
        history = started()
        for step, (step_s, tokens_per_s, mfu) in enumerate([(1.0, 400.0, 0.4), (3.0, 100.0, 0.1)], start=1):
            history.step(step, step_s)
            history.steps[-1] |= {"speed/tokens_per_s": tokens_per_s, "speed/mfu": mfu}
        history.change("loss")
        history.form(1.0)
        history.step(2, 100.0)  # repeated
        found = report_of(history)
        assert (found.tokens_per_s, found.mfu) == pytest.approx((175.0, 0.175))

    def test_speed__mfu_unknown__nan(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.steps[-1] |= {"speed/tokens_per_s": 8.0, "speed/mfu": None}
        found = report_of(history)
        assert found.tokens_per_s == 8.0
        assert math.isnan(found.mfu)


class TestBuckets:
    @given(st.lists(st.tuples(st.sampled_from(ACTS), SECONDS), max_size=40))
    def test_buckets__history__every_second_in_its_bucket(self, acts: list[tuple[str, float]]) -> None:
        history = history_of(acts)
        found = report_of(history)
        for bucket in BUCKETS:
            assert found.seconds[bucket] == pytest.approx(history.spent[bucket], abs=1e-4), bucket
        assert found.wall_s == pytest.approx(sum(history.spent.values()), abs=1e-4)

    @given(
        st.lists(st.tuples(st.sampled_from(ACTS), SECONDS), max_size=25),
        st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.004, -0.004, -3600.0, 86400.0]), min_size=1),
        st.none() | st.floats(min_value=0, max_value=2e6),
    )
    def test_buckets__any_clock__add_up_to_the_wall_time(
        self, acts: list[tuple[str, float]], shifts: list[float], now: float | None
    ) -> None:
        history = history_of(acts)
        for number, record in enumerate([*history.events, *history.steps]):
            record["time"] += shifts[number % len(shifts)]
        check_consistent(report_of(history, now=now))

    @given(st.lists(st.fixed_dictionaries({"time": TIMES}, optional=NONSENSE), max_size=15))
    def test_buckets__nonsense_records__add_up_to_the_wall_time(self, records: list[dict[str, Any]]) -> None:
        tracker = GoodputTracker()
        for record in records:
            tracker.add(record)
        check_consistent(tracker.report())

    def test_goodput__no_node_events__assumes_one_node(self) -> None:
        history = History()
        history.start()
        history.spend(9.0, "starting")
        history.step(1, 2.0)
        history.step(2, 1.0, gap_s=0.5, evaluation_s=3.0)
        history.stop(saving_s=0.25)
        for record in history.events:
            record.pop("ranks", None)
        found = report_of(history)
        assert spent(found) == pytest.approx(
            {"starting": 9.0, "training": 3.0, "other": 0.5, "evaluating": 3.0, "saving": 0.25}
        )
        assert (found.num_changes, found.num_nodes, found.node_goodput) == (0, 1, pytest.approx(3.0 / 15.75))

    def test_repeated__step_completed_during_a_change__not_lost(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.spend(0.75, "training")
        history.change("notice")
        history.spend(0.25, "training")
        history.record_step(2, 1.0)
        history.form(2.0)
        history.step(3, 1.0)
        assert spent(report_of(history)) == pytest.approx({"starting": 7.0, "training": 3.0})

    def test_repeated__step_broken_during_a_change__lost(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.spend(0.75, "repeated")
        history.change("notice")
        history.spend(0.25, "starting")
        history.form(2.0)
        history.step(2, 1.0)
        assert spent(report_of(history)) == pytest.approx({"starting": 7.25, "training": 2.0, "repeated": 0.75})

    def test_stalled__unknown_length__since_the_last_step(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.spend(8.0, "stalled")
        history.change("hang")
        assert report_of(history).seconds["stalled"] == 8.0

    def test_saving__checkpoint_at_the_time_of_a_step__does_not_take_the_step(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.step(2, 4.0, gap_s=0.1)
        history.saved(1, seconds=3.0, stall_s=0.1)
        found = report_of(history)
        assert (found.seconds["training"], found.seconds["saving"]) == pytest.approx((5.0, 0.1))

    def test_saving__stall_inside_a_step__is_not_training(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.step(2, 4.0, gap_s=0.1)
        history.saved(1, seconds=3.0, stall_s=0.6)
        assert spent(report_of(history)) == pytest.approx({"starting": 5.0, "training": 4.5, "saving": 0.6})

    def test_saving__checkpoint_while_waiting__is_waiting(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.change("loss")
        history.wait(3.0)
        history.saved(1, seconds=2.0, stall_s=0.0)
        history.form(1.0)
        history.stop()
        assert spent(report_of(history)) == pytest.approx({"starting": 6.0, "training": 1.0, "waiting": 3.0})

    def test_saving__after_the_last_checkpoint__is_other(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.spend(2.0, "saving")
        history.saved(1, seconds=2.0, stall_s=0.1)
        history.spend(3.0, "other")
        history.record(SampleGenerated(step=1, prompt="", text=""))
        history.record(RunFinished(step=1))
        assert spent(report_of(history)) == pytest.approx(dict(+history.spent))

    def test_starting__start_of_ray__counts_from_the_start_of_the_driver(self) -> None:
        history = History()
        history.spend(4.0, "starting")
        history.record(RunStarted(run_id="r", total_steps=9, resumed_from_step=0, startup_s=4.0))
        history.form(2.0)
        history.step(1, 1.0)
        found = report_of(history)
        assert spent(found) == pytest.approx(dict(+history.spent))
        assert found.wall_s == pytest.approx(7.0)

    def test_sampling__sample_of_text__has_its_own_bucket(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.spend(0.5, "other")
        history.spend(7.5, "sampling")
        history.record(SampleGenerated(step=1, prompt="", text="", seconds=7.5))
        history.record(RunFinished(step=1))
        assert spent(report_of(history)) == pytest.approx(dict(+history.spent))

    def test_repeated__step_ended_by_a_failure__lost(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.spend(2.0, "repeated")
        history.record(RunFailed(error="RunError", message="why"))
        assert spent(report_of(history)) == pytest.approx(dict(+history.spent))

    @pytest.mark.parametrize("has_died", [False, True])
    def test_wall_time__between_sessions__not_counted(self, has_died: bool) -> None:
        history = started()
        history.step(1, 1.0)
        if not has_died:
            history.stop()
        history.now += 5000.0
        history.start()
        history.form(5.0)
        history.step(2, 1.0)
        assert report_of(history).wall_s == pytest.approx(12.0)

    def test_wall_time__no_start_event__from_the_first_step(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.step(2, 1.0)
        assert spent(goodput_of([], history.steps, now=None)) == pytest.approx({"training": 2.0})


class TestWhileItGoesOn:
    def test_report__running_step__training_up_to_the_ideal_time(self) -> None:
        history = started()
        history.step(1, 1.0)
        found = report_of(history, now=history.now + 3.0)
        assert spent(found) == pytest.approx({"starting": 5.0, "training": 2.0, "other": 2.0})
        assert found.wall_s == pytest.approx(9.0)

    def test_report__waiting__counts_until_now(self) -> None:
        history = History()
        history.start()
        history.record(WaitingForMachines(have=0, need=2))
        assert spent(report_of(history, now=history.now + 60.0)) == {"waiting": 60.0}

    def test_report__ended_run__ignores_now(self) -> None:
        history = started()
        history.stop()
        assert report_of(history, now=history.now + 60.0).wall_s == pytest.approx(5.0)

    @given(st.lists(st.tuples(st.sampled_from(ACTS), SECONDS), max_size=15))
    def test_report__repeated_calls__change_nothing(self, acts: list[tuple[str, float]]) -> None:
        history = history_of(acts)
        whole = report_of(history).as_record()
        tracker = GoodputTracker()
        for record in sorted([*history.events, *history.steps], key=moment):
            tracker.add(record)
            check_consistent(tracker.report(now=record["time"] + 1.0))
        again = tracker.report().as_record()
        assert again["seconds"] == pytest.approx(whole["seconds"], abs=1e-4)
        assert again["goodput"] == pytest.approx(whole["goodput"])

    def test_evaluating__read_after_its_step__same_result(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.step(2, 1.0, evaluation_s=4.0)
        tracker = GoodputTracker()
        for record in (*history.events[:3], *history.steps, *history.events[3:]):
            tracker.add(record)
        assert spent(tracker.report()) == pytest.approx({"starting": 5.0, "training": 2.0, "evaluating": 4.0})


class TestFigures:
    def test_goodput__steps_at_the_ideal_time__over_wall_time(self) -> None:
        history = started(forming_s=3.0)
        for step, step_s in enumerate([4.0, 1.0, 1.0, 1.0], start=1):
            history.step(step, step_s)
        history.nodes = ("a",)
        history.change("loss")
        history.form(2.0)
        history.step(5, 8.0)
        found = report_of(history)
        assert (found.ideal_step_s, found.wall_s) == pytest.approx((1.0, 20.0))
        assert found.goodput == pytest.approx(5 * 1.0 / 20.0)

    def test_ideal_step__median_at_the_largest_world_size(self) -> None:
        history = History()
        history.start()
        for nodes, steps_s in ((("a",), [1.0, 1.0, 1.0, 1.0]), (("a", "b"), [9.0, 2.0, 2.5]), (("a",), [1.0, 1.0])):
            history.nodes = nodes
            history.form(1.0)
            for step_s in steps_s:
                history.step(history.last_step + 1, step_s)
        assert report_of(history).ideal_step_s == 2.5

    def test_node_goodput__counts_each_node_while_available(self) -> None:
        history = History()
        history.start()
        join(history, "a", "b", "c")
        history.nodes = ("a", "b", "c")
        history.form(2.0)
        history.step(1, 4.0)  # 3 x 4 useful
        history.record(NodeLeft(node="c", reason="gone"))
        history.change("loss", reason="node c lost: gone")
        history.nodes = ("a", "b")
        history.form(1.0)
        history.step(1, 1.0)
        history.step(2, 5.0)  # 2 x 5 useful
        found = report_of(history)
        assert found.node_goodput == pytest.approx((3 * 4 + 2 * 5) / (3 * 6 + 2 * 7))
        assert (found.num_nodes, found.num_steps, found.num_repeated_steps) == (2, 2, 1)

    def test_node_goodput__two_ranks_of_a_node__one_node(self) -> None:
        history = History()
        history.start()
        history.nodes = ("a", "a", "b")
        history.form(1.0)
        history.step(1, 1.0)
        assert report_of(history).num_nodes == 2

    def test_counts__preemption__is_not_a_failure(self) -> None:
        history = started()
        history.step(1, 1.0)
        for source in ("aws", "ray"):  # both announce the same machine
            history.record(PreemptionNoticeReceived(node="b", source=source, seconds_left=120.0))
        history.record(
            PreemptionNoticeReceived(node="c", source="aws", seconds_left=None, is_certain=False)
        )  # it stayed
        history.change("loss", reason="node b lost: it was quicker than its notice")
        history.change("loss", reason="node a lost: connection closed")
        history.change("growth")
        history.change("hang")
        history.change("failure")
        found = report_of(history)
        assert (found.num_preemptions, found.num_failures, found.num_changes) == (2, 2, 5)

    def test_changes__last_until_the_next_step_ends(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.nodes = ("a",)
        history.change("hang", reason="rank 1 hung", since_s=0.5)
        history.wait(10.0)
        history.form(2.0)
        history.step(1, 1.0, evaluation_s=7.0)
        history.step(2, 1.0)
        (change,) = report_of(history).changes
        assert change.seconds == pytest.approx(13.0)
        assert (change.cause, change.reason, change.source) == ("hang", "rank 1 hung", "memory")
        assert (change.from_world_size, change.to_world_size, change.from_step) == (2, 1, 1)
        assert (dict(change.parts), change.seconds_since_cause) == ({"fork": 0.1, "build": 0.2}, 0.5)

    def test_changes__late_parts__are_added(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.change("loss")
        history.form(1.0)
        history.step(2, 1.0)
        formed = history.events.pop()
        history.step(3, 1.0)
        history.events.append(formed | {"time": history.now})
        (change,) = report_of(history).changes
        assert (change.seconds, dict(change.parts)) == (pytest.approx(2.0), {"fork": 0.1, "build": 0.2})

    def test_changes__next_change__keeps_the_one_before(self) -> None:
        history = started()
        for step, nodes in enumerate([("a",), ("a", "b", "c")], start=1):
            history.step(step, 1.0)
            history.change("loss")
            history.nodes = nodes
            history.form(float(step))
        history.step(3, 1.0)
        changes = report_of(history).changes
        assert [(c.from_world_size, c.to_world_size, c.from_step) for c in changes] == [(2, 1, 1), (1, 3, 2)]
        assert [change.seconds for change in changes] == pytest.approx([2.0, 3.0])

    def test_changes__without_a_step__have_no_end(self) -> None:
        history = started()
        history.step(1, 1.0)
        history.change("loss")
        history.record(RunFailed(error="ClusterError", message="why"))
        assert [change.seconds for change in report_of(history).changes] == [None]

    def test_report__before_the_first_step__nan(self) -> None:
        for history in (History(), started()):
            found = report_of(history)
            assert math.isnan(found.goodput)
            assert found.as_record()["goodput"] is None

    @given(st.lists(st.tuples(st.sampled_from(ACTS), SECONDS), max_size=15))
    def test_as_record__is_complete_json(self, acts: list[tuple[str, float]]) -> None:
        found = report_of(history_of(acts))
        record = found.as_record()
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert sum(record["seconds"].values()) == pytest.approx(record["wall_s"], rel=1e-6, abs=1e-4)
        assert len(record["changes"]) == record["num_changes"]


def check_consistent(found: GoodputReport) -> None:
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=1e-9, abs=1e-6)
    assert min(found.seconds.values()) >= 0
    assert math.isnan(found.node_goodput) or 0 <= found.node_goodput <= 1
    assert all(change.seconds is None or change.seconds >= 0 for change in found.changes)
