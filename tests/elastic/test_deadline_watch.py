"""A run compared with its deadline, and the machines that are rented for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.deadline_watch import DeadlineTerms, DeadlineWatch
from forge.elastic.region_watch import OtherRegion, RegionTerms, RegionWatch
from forge.elastic.states import MemberNode, MembershipState
from forge.events import DeadlineForecast, Event, MachinesChosen, RegionMoveAdvised
from tests.support.placement import FixedPlacement

HOUR = 3600.0
TERMS = DeadlineTerms(
    started_at=0.0, deadline_at=10 * HOUR, total_steps=1000, max_workers=4, step_worker_s=4 * 28.8
)
"""8 hours with all four workers."""


class Placement(FixedPlacement):
    def __init__(self) -> None:
        super().__init__(1)
        self.extra = 0
        self.replaced: list[str] = []

    def request_extra(self, num_slots: int) -> None:
        self.extra = num_slots

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        assert seconds_left
        self.replaced.append(node)


class Limits:
    def __init__(self) -> None:
        self.wanted: tuple[int, int] | None = None

    def write(self, *, num_spot: int, num_on_demand: int) -> None:
        self.wanted = (num_spot, num_on_demand)

    def clear(self) -> None:
        self.wanted = None


class Run:
    """A run whose machines have one worker each; names of on-demand ones begin with `o`."""

    def __init__(
        self,
        terms: DeadlineTerms = TERMS,
        *,
        rents: bool = False,
        was_met: bool | None = None,
        regions: RegionTerms | None = None,
    ) -> None:
        self.now, self.placement, self.limits = 0.0, Placement(), Limits()
        self.events: list[Event] = []
        self.watch = DeadlineWatch(
            terms,
            placement=self.placement,
            record_event=self.events.append,
            machines=self.limits if rents else None,
            regions=None if regions is None else RegionWatch(regions, record_event=self.events.append),
            was_met=was_met,
            clock=lambda: self.now,
        )

    def check(self, at_h: float, *, step: int, nodes: str, worker_s: float | None = None) -> None:
        """Check with nodes such as `s1 s2 o1`; one with `-` is not ready yet."""
        self.now = at_h * HOUR
        names = nodes.split()
        state = MembershipState(min_workers=1, max_workers=4)
        members = {name.strip("-"): MemberNode(num_slots=1, is_ready="-" not in name) for name in names}
        state = replace(state, nodes=members, assignment=tuple(name for name in names if "-" not in name)[:4])
        self.watch.check(
            state=state,
            connections={name: _connection(name) for name in members},
            step=step,
            step_worker_s=worker_s,
        )

    @property
    def verdicts(self) -> list[tuple[float | None, int | None]]:
        found = [event for event in self.events if isinstance(event, DeadlineForecast)]
        return [(None if event.ends_at is None else event.ends_at / HOUR, event.needed_workers) for event in found]


def _connection(name: str) -> AgentConnection:
    prices: dict[str, Any] = {"usd_per_hour": 10.0}
    if name.startswith("s"):
        prices = {"usd_per_hour": 3.0, "saving_usd_per_hour": 7.0}
    return AgentConnection(
        node=name,
        host=name,
        endpoint=(name, 1),
        rendezvous_port=1,
        agent_pid=1,
        send=lambda message: None,
        close=lambda: None,
        heard_at=0.0,
        **prices,
    )


def test_check__fixed_cluster__says_once_that_it_is_met_and_when_that_changes() -> None:
    run = Run()
    run.check(0, step=0, nodes="n1 n2 n3 n4")
    run.check(0.001, step=5, nodes="n1")  # a minute has not passed
    run.check(1, step=125, nodes="n1 n2 n3 n4")
    assert run.verdicts == [(8.0, 4)]
    run.check(2, step=250, nodes="n1 n2")  # two machines lost: 6 h of four workers are left
    assert run.verdicts[1:] == [(14.0, 3)]
    run.check(3, step=312, nodes="n1 n2 n3 n4")
    assert len(run.verdicts) == 3 and run.verdicts[2][0] < 10
    assert not [event for event in run.events if isinstance(event, MachinesChosen)]


def test_check__workers_join_seconds_after_the_first_check__says_at_once_whether_it_is_met() -> None:
    run = Run()
    run.check(0, step=0, nodes="")
    assert run.verdicts == []
    run.check(0.005, step=0, nodes="n1 n2 n3 n4")
    assert len(run.verdicts) == 1


def test_check__measured_steps__replace_the_forecast() -> None:
    run = Run()
    run.check(1, step=100, nodes="n1 n2 n3 n4", worker_s=4 * 40.0)
    assert run.verdicts == [(11.0, 5)]  # more than the job allows: fewer steps, or a later deadline


def test_check__a_little_better__is_not_good_again() -> None:
    run = Run()
    run.check(0, step=0, nodes="n1 n2 n3 n4", worker_s=4 * 36.1)
    run.check(0.1, step=0, nodes="n1 n2 n3 n4", worker_s=4 * 35.5)  # on time by 36 s
    assert len(run.verdicts) == 1
    run.check(0.2, step=0, nodes="n1 n2 n3 n4", worker_s=4 * 30.0)
    assert len(run.verdicts) == 2


def test_check__deadline_has_passed__is_said_once_and_no_more_workers_help() -> None:
    run = Run(was_met=True)
    run.check(10.5, step=990, nodes="n1 n2 n3 n4")
    run.check(10.6, step=992, nodes="n1 n2 n3 n4")
    assert [needed for _, needed in run.verdicts] == [None]


def test_check__hours_of_the_run__name_their_limit() -> None:
    run = Run(replace(TERMS, limit="max_hours"))
    run.check(1, step=50, nodes="n1 n2")
    (event,) = run.events
    assert isinstance(event, DeadlineForecast) and (event.limit, event.needed_workers) == ("max_hours", 4)


def test_check__restarted_supervisor__does_not_repeat_the_verdict() -> None:
    run = Run(was_met=True)
    run.check(1, step=125, nodes="n1 n2 n3 n4")
    assert run.events == []


def test_check__nothing_is_known_of_the_speed__waits() -> None:
    run = Run(replace(TERMS, step_worker_s=None), rents=True)
    run.check(0, step=0, nodes="n1")
    assert run.events == [] and run.limits.wanted is None


def test_check__machines_have_not_joined_yet__are_not_limited_to_none() -> None:
    run = Run(rents=True)
    run.check(0.0, step=0, nodes="")
    assert run.limits.wanted is None
    run.check(0.001, step=0, nodes="o1 o2")  # at once, not with the next minute
    assert run.limits.wanted == (4, 2)
    resumed = Run(rents=True, was_met=True)
    resumed.check(0.0, step=0, nodes="")
    resumed.check(0.001, step=0, nodes="o1 o2")
    assert resumed.limits.wanted == (4, 2)
    alone = Run(rents=True)
    alone.check(0.0, step=0, nodes="")
    alone.check(0.02, step=0, nodes="")  # a minute later none has joined
    assert alone.limits.wanted == (4, 0)


def test_check__slack_left__rents_spot_machines_alone() -> None:
    run = Run(rents=True)
    run.check(0, step=0, nodes="s1 s2-")
    assert run.limits.wanted == (4, 0)
    assert run.placement.extra == 0
    run.watch.close()
    assert run.limits.wanted is None


def test_check__spot_missing_until_the_slack_is_used_up__on_demand_machines_fill() -> None:
    run = Run(rents=True)
    run.check(0, step=0, nodes="s1 s2")
    run.check(1, step=62, nodes="s1 s2")
    assert run.limits.wanted == (4, 0)
    run.check(3, step=160, nodes="s1 s2")  # 6.7 h of work, 7 h left
    assert run.limits.wanted == (4, 2)
    chosen = [event for event in run.events if isinstance(event, MachinesChosen)]
    assert [(event.num_spot, event.num_on_demand) for event in chosen] == [(4, 0), (4, 2)]
    run.check(3.1, step=200, nodes="s1 s2 o1 o2")
    assert run.placement.extra == 2  # spot machines are looked for beside those that fill
    assert run.placement.replaced == []


def test_check__spot_returns__on_demand_machines_go_when_it_works() -> None:
    run = Run(rents=True)
    run.check(4, step=300, nodes="s1 s2 o1 o2 s3-")
    assert run.placement.replaced == []
    run.check(4.1, step=315, nodes="s1 s2 o1 o2 s3")
    assert run.placement.replaced == ["o1"]
    assert run.watch.has_returned("o1")
    run.check(4.2, step=330, nodes="s1 s2 o1 o2 s3")  # it is still there for a moment
    assert run.placement.replaced == ["o1"]
    assert run.limits.wanted == (4, 1)


def test_check__no_slack__every_machine_on_demand() -> None:
    run = Run(rents=True)
    run.check(2.01, step=0, nodes="s1 s2 s3 s4")
    assert run.limits.wanted == (4, 4)  # spot machines work until those have started


def test_check__limits_cannot_be_written__goes_on() -> None:
    run = Run(rents=True)

    def refuse(**_: int) -> None:
        raise OSError("disk full")

    run.limits.write = refuse  # type: ignore[method-assign]
    run.check(0, step=0, nodes="s1")
    assert isinstance(run.events[-1], MachinesChosen)


PLACES = RegionTerms(
    here="east",
    usd_per_hour=3.0,
    on_demand_usd_per_hour=10.0,
    others=[
        OtherRegion(place="west", usd_per_hour=3.5, move_usd=0.2, assumed_usd=2.0),
        OtherRegion(place="north", usd_per_hour=3.2, move_usd=None, assumed_usd=2.0),
    ],
    move_s=900.0,
)
LONG = replace(TERMS, deadline_at=14 * HOUR)


def advice(run: Run) -> list[tuple[str, str, int]]:
    found = [event for event in run.events if isinstance(event, RegionMoveAdvised)]
    return [(event.here, event.to, event.num_spot) for event in found]


@pytest.mark.parametrize("rents", [True, False])
def test_check__spot_missing_for_as_long_as_a_move_takes__advises_the_cheapest_region(rents: bool) -> None:
    run = Run(LONG, rents=rents, regions=PLACES)
    run.check(0, step=0, nodes="")
    run.check(0.25, step=0, nodes="")  # shorter than pause and start
    assert advice(run) == []
    run.check(0.31, step=0, nodes="")
    assert advice(run) == [("east", "north", 0)]
    run.check(1.2, step=0, nodes="")
    assert len(advice(run)) == 1, "at most once an hour"
    run.check(1.4, step=0, nodes="")
    assert len(advice(run)) == 2


def test_check__half_of_the_spot_machines__stay_unless_another_region_has_twice_as_many() -> None:
    run = Run(LONG, rents=True, regions=PLACES)
    for at in (0, 1):
        run.check(at, step=10, nodes="s1 s2 s3")
    assert advice(run) == []
    run.check(2, step=20, nodes="s1")
    run.check(2.5, step=20, nodes="s1")
    assert [to for _, to, _ in advice(run)] == ["north"]


def test_check__region_was_left_lately__counts_as_empty() -> None:
    left = [replace(one, left_at=0.0) if one.place == "north" else one for one in PLACES.others]
    run = Run(LONG, regions=replace(PLACES, others=left))
    for at in (0, 0.5):
        run.check(at, step=0, nodes="")
    assert [to for _, to, _ in advice(run)] == ["west"]
    run = Run(replace(LONG, deadline_at=40 * HOUR), regions=replace(PLACES, others=left))
    for at in (2.1, 2.6):
        run.check(at, step=0, nodes="")
    assert [to for _, to, _ in advice(run)] == ["north"], "two hours later it is tried again"


def test_check__no_slack_for_the_pause_or_dear_traffic__stays() -> None:
    run = Run(TERMS, rents=True, regions=PLACES)
    run.check(0, step=0, nodes="")
    run.check(1.6, step=0, nodes="")  # 8 h of work, 8.4 h left: a pause of 15 min would use up the slack
    assert advice(run) == []
    dear = [replace(one, move_usd=1000.0) for one in PLACES.others]
    run = Run(LONG, rents=True, regions=replace(PLACES, others=dear))
    for at in (0, 0.5):
        run.check(at, step=0, nodes="")
    assert advice(run) == []
