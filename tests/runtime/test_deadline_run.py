"""A real run with a deadline and an automatic interval between checkpoints, resumed after its deadline."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.cloud.other_regions import ClusterRegions, to_variable
from forge.elastic.states import MemberNode, MembershipState
from forge.events import DeadlineForecast, Event
from forge.runtime.deadlines import recorded_ends, watch_deadlines
from forge.ui.run_view import RunView
from tests.support.command import environment, forge, wait_for
from tests.support.elastic import write_job
from tests.support.jobs import tiny_plan
from tests.support.pages import own_text
from tests.support.placement import FixedPlacement
from tests.support.runs import History

STEPS = 60


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    write_job(home, steps=STEPS, workers="2")
    return home


def train(home: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run `forge train`. Returns: its JSON output, and what it printed for people."""
    # A machine that lasts 114 years: the interval must become longer than the shortest one.
    env = environment(home, FORGE_MTBF_HOURS="1e6")
    done = forge("train", *arguments, "-o", "json", cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    run: dict[str, Any] = json.loads(done.stdout)
    return run, done.stderr


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_recorded_ends__first_record_and_last_event_of_a_kind(tmp_path: Path) -> None:
    history = tmp_path / "events.jsonl"
    assert recorded_ends(history, "B") == (None, None)
    kinds = ("A", "B", "B", "A")
    lines = [json.dumps({"time": float(at), "event": kind}) for at, kind in enumerate(kinds, start=5)]
    history.write_text("\n".join(["not json", "[]", *lines, '{"time": 1']))
    assert recorded_ends(history, "B") == ({"time": 5.0}, {"time": 7.0, "event": "B"})
    assert recorded_ends(history, "B", limit="deadline")[1] == {"time": 7.0, "event": "B"}
    assert recorded_ends(history, "B", limit="max_hours")[1] is None


def test_watch_deadlines__resumed_run__counts_the_hours_that_it_ran(tmp_path: Path) -> None:
    history = History(began=time.time() - 86_400)
    history.start()
    history.spend(3600.0, "training")
    history.stop()
    history.spend(36_000.0, "other")  # between the sessions
    history.start()
    folder = history.write(tmp_path, "run")
    plan = tiny_plan(resources={"max_hours": 3, "deadline": "48h"})
    events: list[Event] = []
    deadline, hours = watch_deadlines(plan, folder=folder, placement=FixedPlacement(1), record_event=events.append)
    state = MembershipState(min_workers=1, max_workers=4)
    state = replace(state, nodes={"a": MemberNode(num_slots=1, is_ready=True)}, assignment=("a",))
    for watch in (deadline, hours):
        watch.check(state=state, connections={}, step=1, step_worker_s=3600.0)
    found = {event.limit: event for event in events if isinstance(event, DeadlineForecast)}
    assert found["deadline"].deadline == pytest.approx(history.events[0]["time"] + 48 * 3600)
    assert found["max_hours"].deadline == pytest.approx(time.time() + 2 * 3600, abs=60)
    assert found["max_hours"].needed_workers == 3  # 5 steps of one hour are left, and 2 hours


def test_watch_deadlines__cluster_that_may_move__knows_prices_and_what_it_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = ClusterRegions(
        here="us-west-2",
        storage_region="us-east-1",
        on_demand_usd_per_hour=10.0,
        spot_usd_per_hour={"us-west-2": 3.0, "us-east-1": 3.1, "ap-south-1": 3.2},
    )
    monkeypatch.setenv("FORGE_CLOUD", "aws")
    monkeypatch.setenv("FORGE_REGIONS", to_variable(regions))
    began = time.time() - 7200
    moves = [("us-east-1", "us-west-2", began), ("us-west-2", "us-east-1", began + 100)]  # the second one failed
    lines = [
        json.dumps({"time": at, "event": "RegionMoveAdvised", "here": here, "to": to}) for here, to, at in moves
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    plan = tiny_plan(resources={"deadline": "48h"})
    placement = FixedPlacement(1)
    (watch,) = watch_deadlines(plan, folder=tmp_path, placement=placement, record_event=lambda _: None)
    assert watch.regions is not None
    terms = watch.regions.terms
    assert (terms.here, terms.usd_per_hour, terms.advised_at) == ("us-west-2", 3.0, began + 100)
    east, south = terms.others
    assert (east.place, east.left_at, east.move_usd) == ("us-east-1", began, 0.0)
    assert (south.place, south.left_at) == ("ap-south-1", None) and 0 < south.move_usd < south.assumed_usd
    monkeypatch.delenv("FORGE_REGIONS")
    (watch,) = watch_deadlines(plan, folder=tmp_path, placement=placement, record_event=lambda _: None)
    assert watch.regions is None


@pytest.mark.slow
def test_train__deadline_and_auto_interval__are_watched_and_survive_a_resume(home: Path) -> None:
    changes = ("--set", "checkpoint.every=auto", "--set", "resources.deadline=2h")
    run, said = train(home, "job.yaml", *changes)
    assert "before its deadline" in said
    (met,) = events_of(home / run["folder"], "DeadlineForecast")
    assert met["ends_at"] < met["deadline"] and not met["can_rent"]
    changed = events_of(home / run["folder"], "CheckpointIntervalChanged")
    assert changed and changed[0]["before_s"] == 60 and changed[0]["seconds"] > 90
    assert len(changed) <= 3  # the first from snapshots; the cost of checkpoints may differ from it

    longer = ("--set", f"training.total_steps={2 * STEPS}", "--set", "resources.deadline=1s")
    again, said = train(home, "--resume", run["folder"], *longer)
    assert again["step"] == 2 * STEPS  # it is late, and goes on
    passed = events_of(home / run["folder"], "DeadlineForecast")[-1]
    assert passed["needed_workers"] is None
    assert passed["deadline"] == pytest.approx(met["deadline"] - 7199)  # from the first start
    assert "has passed" in said
    shown = forge("runs", "show", run["folder"], cwd=home, env=environment(home)).stdout
    assert "the run goes on" in shown


@pytest.mark.slow
def test_train__longer_than_max_hours__warns_alerts_and_goes_on(home: Path) -> None:
    page = home / "page"
    page.write_text(f"#!/bin/sh\ncat >> {home / 'pages.jsonl'}\n")
    page.chmod(0o755)
    alerts = f"alerts={{command: [{page}], on: [late]}}"
    run, said = train(home, "job.yaml", "--set", "resources.max_hours=2", "--set", alerts)
    folder = home / run["folder"]
    assert "before resources.max_hours are over" in said
    (kept,) = events_of(folder, "DeadlineForecast")
    assert (kept["limit"], kept["can_rent"]) == ("max_hours", False)
    assert kept["deadline"] - kept["time"] == pytest.approx(7200, abs=120)
    longer = ("--set", f"training.total_steps={2 * STEPS}", "--set", "resources.max_hours=0.0005")
    again, said = train(home, "--resume", run["folder"], *longer)
    assert again["step"] == 2 * STEPS
    assert "resources.max_hours were over" in said and "the run goes on" in said
    (message,) = [json.loads(line) for line in (home / "pages.jsonl").read_text().splitlines()]
    assert message["kind"] == "late" and "resources.max_hours were over" in message["text"]
    page, warning = folder / "report.html", 'class="card warn">resources.max_hours were over'
    wait_for(lambda: warning in own_text(page), timeout_s=60)  # it is written after the client has ended
    assert "delivered to command" in own_text(page)
    assert "resources.max_hours were over" in RunView(folder).state()["problem"]["max_hours"][0]
