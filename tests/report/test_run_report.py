"""report.html of a run."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.errors import ArgumentError
from forge.events import AlertNotSent, AlertSent, CostUpdated, NodeJoined, RunFailed, RunFinished, SampleGenerated
from forge.plan.durations import ClusterCost, Forecast, WorldHours
from forge.plan.inputs import HardwareInfo
from forge.plan.memory import STANDBY_BYTES
from forge.plan.plan import make_plan, plan_to_json
from forge.plan.throughput import Estimate
from forge.report.run_forecast import forecast_rows
from forge.report.run_report import write_end_report, write_run_report
from forge.report.run_series import read_series
from forge.runs.annotations import change_tags, set_note
from forge.runs.reader import read_run
from forge.runs.scores import TaskScore, TaskValue, append_score
from forge.units import format_bytes
from tests.support.jobs import UNPREPARED, tiny_facts, tiny_job, tiny_plan
from tests.support.pages import Elements, own_text
from tests.support.runs import History, make_run, metrics
from tests.support.searches import SearchHistory, search_plan

EVIL = "</script><evil x=\"'&"


def eventful(*, text: str = "lost") -> History:
    """40 steps on two nodes, of which one is lost at step 20 and replaced at step 30."""
    history = History()
    history.start()
    for node in history.nodes:
        history.record(NodeJoined(node=node, host=text, num_slots=1, agent_pid=1))
    history.form(10.0)
    for step in range(1, 41):
        history.step(step, 1.0, evaluation_s=2.0 if step % 20 == 0 else 0.0)
        if step % 20 == 0:
            history.steps[-1]["eval/loss"] = 1.0
        if step == 20:
            history.change("loss", reason=text)
            history.nodes = ("a",)
            history.form(5.0)
        if step == 30:
            history.change("growth", reason=text)
            history.nodes = ("a", "c")
            history.form(5.0)
    message: dict[str, Any] = {"kind": "preempted", "text": f"r: {text}", "count": 1, "until": history.now}
    history.record(AlertSent(receiver="webhook", **message))
    history.record(AlertNotSent(receiver="command", reason=text, **message))
    history.record(CostUpdated(usd=1.25, usd_per_hour=3.0, saved_usd=3.75))
    return history


def score(task: str) -> TaskScore:
    value = TaskValue(value=0.8125, low=0.75, high=0.875, direction="max", num_examples=160, signature="")
    return TaskScore(
        task=task,
        kind="labels",
        model="r",
        step=40,
        ema=False,
        model_digest="m",
        task_digest="t",
        values={"accuracy": value},
        num_examples=160,
        num_skipped=0,
        contamination=None,
        examples="x.jsonl",
    )


def test_report__run_with_changes__has_figures_changes_cost_and_scores(tmp_path: Path) -> None:
    history = eventful()
    history.record(RunFinished(step=40))
    folder = history.write(tmp_path, "run")
    append_score(folder, score("support"))
    change_tags(folder, add=["baseline"])
    page = Elements(own_text(write_run_report(folder)))
    text = " ".join(page.text)
    for expected in (
        "1.25 USD",
        "5.00 USD for the same hours, of which 75% was saved",
        "2 → 1",
        "1 → 2",
        "0.8125",
        "0.75 to 0.875",
        "baseline",
        "2 changes",
    ):
        assert expected in text, expected
    figures = page.figures
    assert set(figures) == {"loss", "speed", "workers", "cost"}
    assert [shape["x0"] for shape in figures["loss"]["layout"]["shapes"]] == [20, 30]
    training, held_out, changes = figures["loss"]["data"]
    assert training["x"] == list(range(1, 41))
    assert training["y"] == [metrics(step).loss for step in range(1, 41)]
    assert held_out["x"] == [] or held_out["name"] == "held out"
    assert changes["x"] == [20, 30]
    (workers,) = figures["workers"]["data"]
    assert workers["y"] == [0, 2, 0, 1, 0, 2, 0, 0]


def test_report__bar__widths_are_the_shares_of_the_wall_time(tmp_path: Path) -> None:
    text = own_text(write_run_report(eventful().write(tmp_path, "run")))
    widths = [float(width) for width in re.findall(r'<i style="width:([0-9.]+)%', text)]
    assert len(widths) >= 3
    assert math.isclose(sum(widths), 100.0, abs_tol=0.01)


def test_report__loads_nothing_and_runs_only_its_own_scripts(tmp_path: Path) -> None:
    first, second = (own_text(write_run_report(make_run(tmp_path, name))) for name in ("a-1", "b-1"))
    for asking in ('src="', 'href="', "@import", "url(", "unsafe-eval"):
        assert asking not in first
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="([^"]*)"', first)
    assert "default-src 'none'" in policy
    (nonce,) = re.findall(r"script-src 'nonce-([\w-]+)';", policy)
    assert re.findall(r"<script([^>]*)>", first) == [f' nonce="{nonce}"'] * 2
    assert nonce not in second


def test_report__hostile_names_and_events__are_text_and_never_elements(tmp_path: Path) -> None:
    pages = []
    for place, text in (("<evil>", EVIL), ("name", "harmless")):
        history = eventful(text=text)
        history.record(SampleGenerated(step=40, prompt=text, text=text))
        history.record(RunFailed(error="RunError", message=text))
        folder = history.write(tmp_path, place)
        set_note(folder, text)
        append_score(folder, score(text))
        pages.append(Elements(own_text(write_run_report(folder))))
    hostile_page, harmless_page = pages
    assert hostile_page.tags == harmless_page.tags
    assert EVIL in hostile_page.text
    assert "<evil" not in json.dumps(hostile_page.figures)


def test_report__plan_with_a_forecast__is_beside_what_happened(tmp_path: Path) -> None:
    history = eventful()
    folder = history.write(tmp_path, "run")
    estimate = Estimate(low=0.02, likely=0.025, high=0.03)
    world = WorldHours(world_size=2, hours=estimate, step_s=2.0, evaluation_s=8.0, checkpoint_s=0.0, startup_s=40.0)
    cost = ClusterCost(
        machines="2 x g5.xlarge", hours=estimate, usd=Estimate(low=1.0, likely=2.5, high=4.0), usd_per_hour=9.0
    )
    plan = replace(tiny_plan(), forecast=Forecast(worlds=(world,), notes=(), cost=cost))
    (folder / "plan.json").write_text(plan_to_json(plan))
    run = read_run(folder)
    rows, note = forecast_rows(run, run.goodput())
    found = {row.name: (row.forecast, row.happened, row.ratio) for row in rows}
    assert found["wall time"] == ("1m 30s (1m 12s to 1m 48s)", "1m 04s", "0.71")
    assert found["a step"] == ("2s", "1s", "0.50")
    assert found["starts"] == ("40s", "20s", "0.50")
    assert found["evaluations"] == ("8s", "4s", "0.50")
    assert found["checkpoints"][2] == "-"
    assert found["USD"] == ("2.50 (1.00 to 4.00) on 2 x g5.xlarge", "1.25", "0.50")
    assert found["memory of a worker"][1] == "512 MiB"
    assert note.startswith("at 2 workers")
    assert "Forecast and what happened" in own_text(write_run_report(folder))


def test_forecast__peak_memory_of_a_gpu__is_beside_the_plan_without_the_standby_process(tmp_path: Path) -> None:
    folder = eventful().write(tmp_path, "run")
    hours = Estimate(low=0.02, likely=0.025, high=0.03)
    world = WorldHours(world_size=2, hours=hours, step_s=2.0, evaluation_s=8.0, checkpoint_s=0.0, startup_s=40.0)
    gpu = HardwareInfo(device="cuda", name="test", memory_bytes=None, peak_flops=None)
    plan = replace(
        make_plan(tiny_job(), model=tiny_facts(num_parameters=2**26), corpus=UNPREPARED, hardware=gpu),
        forecast=Forecast(worlds=(world,), notes=(), cost=None),
    )
    (folder / "plan.json").write_text(plan_to_json(plan))
    rows, _ = forecast_rows(read_run(folder), read_run(folder).goodput())
    [memory] = [row for row in rows if row.name == "memory of a worker"]
    need = plan.for_world_size(2).memory
    assert need.total_bytes > STANDBY_BYTES == need.standby_bytes
    assert memory.forecast == format_bytes(need.total_bytes - STANDBY_BYTES)


def only_started() -> History:
    history = History()
    history.start()
    return history


def diverged() -> History:
    history = History()
    history.start()
    history.form(1.0)
    history.step(1, 1.0)
    history.steps[-1] |= {"train/loss": None, "speed/tokens_per_s": None}
    history.record(RunFailed(error="DivergedError", message="the loss is no number"))
    return history


@pytest.mark.parametrize(
    ("make", "expected"),
    [(History, "Nothing to draw yet."), (only_started, "0 of 6"), (diverged, "the loss is no number")],
)
def test_report__run_in_any_state__is_written(make: Callable[[], History], expected: str, tmp_path: Path) -> None:
    assert expected in own_text(write_run_report(make().write(tmp_path, "run")))


def test_report__repeat__command_works_in_a_shell(tmp_path: Path) -> None:
    folder = eventful().write(tmp_path, "it's $(a) run")
    text = " ".join(Elements(own_text(write_run_report(folder))).text)
    command = text[text.index("forge train") :].splitlines()[0]
    assert shlex.split(command) == ["forge", "train", str(folder / "job.yaml")]


def test_report__folder_without_a_run__raises(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="holds no run"):
        write_run_report(tmp_path)


@pytest.mark.parametrize("damage", ["plan.json", "events.jsonl", "metrics.jsonl", "evaluation.jsonl"])
def test_write_end_report__damaged_folder__never_raises(damage: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    assert write_end_report(folder) is None
    (folder / "report.html").unlink()
    (folder / damage).unlink(missing_ok=True)
    (folder / damage).mkdir()
    problem = write_end_report(folder)
    assert (problem is None) == (folder / "report.html").exists() == (damage == "evaluation.jsonl")


def test_write_end_report__very_many_steps__names_the_command_instead(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.truncate(2**27)
    assert "128 MiB; forge runs report tiny" in (write_end_report(folder) or "")
    assert not (folder / "report.html").exists()


def test_write_end_report__search__is_left_to_its_client(tmp_path: Path) -> None:
    folder = SearchHistory().write(tmp_path, search_plan())
    assert write_end_report(folder) is None
    assert not (folder / "report.html").exists()


@given(st.integers(0, 300), st.integers(1, 40))
def test_read_series__any_length__means_of_equal_parts(count: int, max_points: int) -> None:
    records = [
        replace(metrics(step), loss=float(step)).as_record() | {"time": float(step)} for step in range(1, count + 1)
    ]
    series = read_series(records, max_points=max_points)
    assert len(series.steps) <= max_points
    assert list(series.steps[-1:]) == list(range(1, count + 1))[-1:]
    assert series.times == tuple(map(float, series.steps))
    begins = (0, *series.steps)
    means = [(begin + 1 + end) / 2 for begin, end in zip(begins, series.steps, strict=False)]
    assert series.values["train/loss"] == pytest.approx(means)
    assert all(end - begin == series.steps_per_point for begin, end in zip(begins, series.steps[:-1], strict=False))


def test_read_series__loss_that_is_no_number__is_counted_and_left_out() -> None:
    records = [metrics(step, loss=loss).as_record() | {"time": 1.0} for step, loss in ((1, math.nan), (2, 3.0))]
    series = read_series(records, max_points=1)
    assert (series.num_not_finite, series.values["train/loss"]) == (1, (3.0,))
