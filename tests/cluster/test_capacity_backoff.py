"""Which instance types the autoscaler may request, from its log and in its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.cluster.cloud.capacity_backoff import CapacityBackoff, refused_types
from forge.cluster.cloud.machine_limits import (
    AutoscalerLimits,
    find_limits,
    kind_of,
    limit_types,
    limits_folder,
    wanted_machines,
)
from forge.plan.deadline import DEADLINE_POLICIES, RegionOffer, Situation, decide

REFUSED = (
    "2026-01-01 00:00:00,000 INFO node_provider.py:491 -- Failed to launch 2 nodes of type {}: Node Launch "
    "Exception (InsufficientInstanceCapacity): There is no capacity.\n"
)


class Box:
    """An autoscaler's file and log, and the numbers of existing nodes."""

    def __init__(self, folder: Path, *, min_workers: int = 0) -> None:
        self.file, self.log = folder / "config.yaml", folder / "monitor.log"
        names = ("spot-a", "spot-b", "on-demand-a")  # the preferred first, as `build_ray_config` writes them
        types = {
            name: {"max_workers": 4, "node_config": {}, "priority": 3 - rank} for rank, name in enumerate(names)
        }
        self.file.write_text(json.dumps({"cluster_name": "big", "available_node_types": types}))
        self.there = {"spot-a": 1, "spot-b": 0, "on-demand-a": 0}
        self.backoff = CapacityBackoff(
            file=self.file,
            log=self.log,
            count=lambda config, name: self.there[name],
            limits=limits_folder(folder),
            min_workers=min_workers,
        )

    def say(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text)

    @property
    def limits(self) -> dict[str, int]:
        types = json.loads(self.file.read_text())["available_node_types"]
        return {name: kind["max_workers"] for name, kind in types.items()}

    @property
    def allowed(self) -> list[int]:
        types = json.loads(self.file.read_text())["available_node_types"]
        return [types[name]["max_workers"] for name in ("spot-a", "spot-b")]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_poll__refused_type__is_limited_to_existing_nodes_for_a_while(box: Box) -> None:
    box.backoff.poll(0.0)  # before the log exists
    box.say(REFUSED.format("spot-a"))
    box.backoff.poll(1.0)
    assert box.allowed == [1, 4]
    box.backoff.poll(120.0)
    assert box.allowed == [1, 4]
    box.backoff.poll(122.0)
    assert box.allowed == [4, 4]


def test_poll__refused_twice__restores_the_original_limit(box: Box) -> None:
    for moment, name in ((0.0, "spot-a"), (60.0, "spot-b"), (100.0, "spot-a")):
        box.say(REFUSED.format(name))
        box.backoff.poll(moment)
    assert box.allowed == [1, 0]
    box.backoff.poll(181.0)
    assert box.allowed == [1, 4]
    box.backoff.poll(221.0)
    assert box.allowed == [4, 4]


def test_poll__partial_line_and_new_log__are_read_completely(box: Box) -> None:
    line = REFUSED.format("spot-a")
    box.say("x\n" + line[:60])
    box.backoff.poll(0.0)
    assert box.allowed == [4, 4]
    box.say(line[60:])
    box.backoff.poll(1.0)
    assert box.allowed == [1, 4]
    box.log.unlink()
    box.say(REFUSED.format("spot-b"))
    box.backoff.poll(2.0)
    assert box.allowed == [1, 0]


def test_poll__cloud_does_not_answer__tries_again(box: Box, tmp_path: Path) -> None:
    before = box.file.read_text()
    box.say(REFUSED.format("spot-a"))
    del box.there["spot-a"]
    box.backoff.poll(0.0)
    assert box.file.read_text() == before
    box.there["spot-a"] = 2
    box.say(REFUSED.format("spot-a"))
    box.backoff.poll(1.0)
    assert box.allowed == [2, 4]
    assert (box.file.stat().st_mode & 0o077) == 0


def test_refused_types__only_capacity_errors__count() -> None:
    denied = "Failed to launch 1 nodes of type spot-a: An error occurred (UnauthorizedOperation) when calling\n"
    assert refused_types(denied) == set()
    assert refused_types(REFUSED.format("spot-a") + denied + REFUSED.format("spot-b")) == {"spot-a", "spot-b"}


def test_poll__run_with_a_deadline__limits_both_kinds_and_never_below_what_exists(box: Box, tmp_path: Path) -> None:
    now = [1000.0]
    limits = AutoscalerLimits("run", home=tmp_path, clock=lambda: now[0])
    limits.write(num_spot=3, num_on_demand=0)
    box.backoff.poll(1000.0)
    assert box.limits == {"spot-a": 3, "spot-b": 0, "on-demand-a": 0}  # one of the three exists
    limits.write(num_spot=3, num_on_demand=2)
    box.say(REFUSED.format("spot-a"))
    box.backoff.poll(1001.0)
    assert box.limits == {"spot-a": 1, "spot-b": 2, "on-demand-a": 2}  # the next type gets what the first one had
    box.there |= {"spot-a": 4, "on-demand-a": 2}
    limits.write(num_spot=1, num_on_demand=1)
    box.backoff.poll(1002.0)
    assert box.limits == {"spot-a": 4, "spot-b": 0, "on-demand-a": 2}  # the run itself returns machines
    box.there |= {"on-demand-a": 1}
    box.backoff.poll(1003.0)
    assert box.limits["on-demand-a"] == 2
    box.backoff.poll(1033.0)
    assert box.limits["on-demand-a"] == 1
    limits.clear()
    box.backoff.poll(1200.0)
    assert box.limits == {"spot-a": 4, "spot-b": 4, "on-demand-a": 4}


def test_poll__several_runs_and_one_that_has_ended__adds_those_that_renew(box: Box, tmp_path: Path) -> None:
    for name, at in (("a", 1000.0), ("b", 1500.0), ("c", 1600.0)):
        AutoscalerLimits(name, home=tmp_path, clock=lambda at=at: at).write(num_spot=4, num_on_demand=1)
    (limits_folder(tmp_path) / "odd.json").write_text('{"spot": "many"}')
    assert wanted_machines(limits_folder(tmp_path), now=1650.0) == {"spot": 8, "on_demand": 2}
    assert wanted_machines(limits_folder(tmp_path), now=9999.0) is None
    assert wanted_machines(tmp_path / "nowhere", now=0.0) is None


def test_find_limits__only_where_both_kinds_are_rented(box: Box, tmp_path: Path) -> None:
    assert find_limits("run", home=tmp_path) is None
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(box.file.read_text())
    assert find_limits("run", home=tmp_path) is not None
    file.write_text(json.dumps({"available_node_types": {"spot-a": {}, "head": {}}}))
    assert find_limits("run", home=tmp_path) is None
    file.write_text("provider: [")
    assert find_limits("run", home=tmp_path) is None


NODE_TYPES = ("spot-a", "spot-b", "on-demand-a", "on-demand-b")


@settings(max_examples=50)
@given(
    wanted=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    largest=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    there=st.lists(st.integers(0, 6), min_size=4, max_size=4),
    min_workers=st.integers(0, 12),
)
def test_limit_types__any_choice__is_within_the_file_and_keeps_its_minimum(
    wanted: tuple[int, int], largest: list[int], there: list[int], min_workers: int
) -> None:
    max_workers = dict(zip(NODE_TYPES, largest, strict=True))
    existing = dict(zip(NODE_TYPES, there, strict=True))
    kinds = {"spot": wanted[0], "on_demand": wanted[1]}
    found = limit_types(kinds, max_workers=max_workers, existing=existing, min_workers=min_workers)
    for name in NODE_TYPES:
        assert existing[name] <= found[name] <= max(existing[name], max_workers[name]), (
            "ends none, exceeds no limit"
        )
    reachable = sum(max(existing[name], max_workers[name]) for name in NODE_TYPES)
    assert sum(found.values()) >= min(min_workers, reachable)
    for kind, asked in kinds.items():
        of_kind = [name for name in NODE_TYPES if kind_of(name) == kind]
        most = max(asked, sum(existing[name] for name in of_kind))
        assert min_workers or sum(found[name] for name in of_kind) <= most, "no more than the policy wants"


def test_poll__minimum_of_the_file_without_spot_capacity__is_filled_on_demand(tmp_path: Path) -> None:
    box = Box(tmp_path, min_workers=3)
    AutoscalerLimits("run", home=tmp_path, clock=lambda: 0.0).write(num_spot=3, num_on_demand=0)
    box.backoff.poll(0.0)
    assert box.limits == {"spot-a": 3, "spot-b": 0, "on-demand-a": 0}
    for name in ("spot-a", "spot-b"):
        box.say(REFUSED.format(name))
    box.backoff.poll(1.0)
    assert box.limits == {"spot-a": 1, "spot-b": 0, "on-demand-a": 2}


@settings(max_examples=50)
@given(
    slack=st.floats(-2, 12),
    counts=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    available=st.integers(0, 8),
)
def test_decide__any_situation__asks_for_no_more_than_the_machines_of_the_run(
    slack: float, counts: list[int], available: int
) -> None:
    now = Situation(
        now_s=0.0,
        done_s=0.0,
        work_s=8 * 3600.0,
        deadline_s=(8 + slack) * 3600.0,
        num_nodes=4,
        start_s=180.0,
        interval_s=60.0,
        on_demand_usd_per_hour=10.0,
        regions=[RegionOffer(num_available=available, usd_per_hour=3.0)],
        region=0,
        num_spot=counts[0],
        num_spot_working=min(counts[0], counts[1]),
        num_on_demand=counts[2],
        num_on_demand_working=min(counts[2], counts[3]),
    )
    for policy in DEADLINE_POLICIES:
        chosen = decide(policy, now)
        assert 0 <= chosen.num_spot <= 4 and 0 <= chosen.num_on_demand <= 4
