"""report.html and the JSON record of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.config.load import load_job
from forge.errors import JobFileError
from forge.events import AlertSent, RunFailed
from forge.report.figures import axis_labels, build_study
from forge.report.html_report import write_report
from forge.report.page import plotly_code
from forge.report.search_record import search_record, write_results
from forge.runs.reader import read_run
from tests.support.pages import Elements, own_text
from tests.support.runs import make_run
from tests.support.searches import LR, WARMUP, SearchHistory, lifelike, search_plan, search_spec


def test_report__finished_search__holds_figures_trials_and_cost(tmp_path: Path) -> None:
    folder = lifelike().write(tmp_path, search_plan({"scheduler": {"kind": "asha"}}))
    write_results(folder)
    whole = (folder / "report.html").read_text(encoding="utf-8")
    text = own_text(folder / "report.html")
    assert whole.count(plotly_code()) == 1
    for expected in ("12 finished, 2 stopped, 1 diverged, 1 failed", "1.76 USD", "CUDA out of memory on rank 0"):
        assert expected in text
    for figure in ("optimization-history", "learning-curves", "parallel-coordinates", "importances"):
        assert text.count(f'id="{figure}"') == 1
    assert text.count("<tr>") + text.count('<tr class="chosen">') == 1 + 16
    assert load_job(folder / "best.yaml").job.search is None
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.yaml",
        "events.jsonl",
        "plan.json",
        "report.html",
    ]


def test_report__loads_nothing(tmp_path: Path) -> None:
    folder = lifelike().write(tmp_path, search_plan())
    text = own_text(write_report(folder))
    for asking in ('src="', 'href="', "@import", "url("):
        assert asking not in text
    assert "default-src 'none'" in text


def unfinished() -> SearchHistory:
    history = SearchHistory()
    history.run({LR: 1e-3, WARMUP: 1}, [3.0])
    history.start(history.suggest({LR: 1e-2, WARMUP: 2}))
    history.suggest({LR: 1e-2, WARMUP: 4})
    history.report(2, 1, 2.5)
    return history


def only_failed() -> SearchHistory:
    history = SearchHistory()
    history.run({LR: 1e-3, WARMUP: 1}, [], status="failed", reason="no room")
    history.run({LR: 1e-3, WARMUP: 1}, [math.nan], status="diverged")
    history.record(RunFailed(error="RunError", message="every trial failed"))
    return history


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (unfinished, "1 finished, 1 running, 1 waiting"),
        (SearchHistory, "No trial has started."),
        (only_failed, "every trial failed"),
    ],
)
def test_report__search_in_any_state__is_written(
    make: Callable[[], SearchHistory], expected: str, tmp_path: Path
) -> None:
    space = {LR: {"loguniform": [1e-4, 1e-1]}, WARMUP: {"int": [0, 4]}}
    folder = make().write(tmp_path, search_plan({"space": space}))
    write_results(folder)
    assert expected in own_text(folder / "report.html")
    assert (folder / "best.yaml").exists() == (make is unfinished)
    json.dumps(search_record(read_run(folder)), allow_nan=False)


@pytest.mark.parametrize(
    ("space", "values"),
    [
        ({LR: {"loguniform": [3e-4, 7e-4]}}, [{LR: 3e-4}, {LR: 8e-4}]),
        ({LR: {"uniform": [0.0, 1.0]}}, [{LR: 0.5}]),
        ({WARMUP: {"choice": [2]}}, [{WARMUP: 2}, {WARMUP: 2}]),
        ({"data.text_key": {"choice": ["a", None, ["b"]]}}, [{"data.text_key": ["b"]}, {"data.text_key": "gone"}]),
    ],
)
def test_report__one_searched_key__parallel_coordinates(space: dict, values: list[dict], tmp_path: Path) -> None:
    history = SearchHistory()
    for count, drawn in enumerate(values):
        history.run(drawn, [2.0 + count])
    text = own_text(write_report(history.write(tmp_path, search_plan({"space": space}))))
    assert 'id="parallel-coordinates"' in text


def test_report__hostile_names_and_values__are_text_and_never_elements(tmp_path: Path) -> None:
    evil = "</script><evil x=\"'&"
    history = SearchHistory()
    history.record(AlertSent(receiver="command", kind="finished", text=evil, count=1, until=1.0))
    for value in (evil, "x"):
        history.run({"data.source": value, evil: 1}, [2.0], status="stopped", reason=evil)
    history.record(RunFailed(error="RunError", message=evil))
    plan = search_plan({"space": {"data.source": {"choice": ["x", evil]}, evil: {"int": [1, 2]}}})
    harmless = search_plan({"space": {"data.source": {"choice": ["x", "y"]}, "z": {"int": [1, 2]}}})
    same = SearchHistory()
    same.record(AlertSent(receiver="command", kind="finished", text="t", count=1, until=1.0))
    for value in ("y", "x"):
        same.run({"data.source": value, "z": 1}, [2.0], status="stopped", reason="r")
    same.record(RunFailed(error="RunError", message="m"))
    hostile_page = Elements(own_text(write_report(history.write(tmp_path, plan, name="<evil>"))))
    harmless_page = Elements(own_text(write_report(same.write(tmp_path, harmless, name="name"))))
    assert hostile_page.tags == harmless_page.tags
    assert "<evil>" in hostile_page.text and "delivered to command" in hostile_page.text
    assert len(hostile_page.figures) >= 3
    assert "<evil" not in json.dumps(hostile_page.figures)


def test_report__run_without_search__raises(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="search: is missing"):
        write_report(make_run(tmp_path))


def test_search_record__holds_every_trial_and_existing_files(tmp_path: Path) -> None:
    folder = lifelike().write(tmp_path, search_plan({"scheduler": {"kind": "asha"}}))
    bare = search_record(read_run(folder))
    assert (bare["report"], bare["best_yaml"]) == (None, None)
    write_results(folder)
    record = search_record(read_run(folder))
    json.dumps(record, allow_nan=False)
    assert (record["report"], record["best_yaml"]) == (str(folder / "report.html"), str(folder / "best.yaml"))
    assert (record["metric"], record["mode"], record["num_trials"], record["usd"]) == ("eval/loss", "min", 16, 1.76)
    assert record["status"] == "finished" and 200 < record["seconds"] < 1000
    assert record["best"]["trial_id"] == f"{folder.name}-0003" and set(record["importances"]) == set(
        record["best"]["values"]
    )
    diverged, failed = record["trials"][4], record["trials"][8]
    assert (diverged["status"], diverged["value"], diverged["reports"][-1]) == ("diverged", None, [3, None])
    assert (failed["reports"], failed["reason"], failed["step"]) == ([], "CUDA out of memory on rank 0", 0)
    keys = "trial trial_id value step values status reports moves start_s seconds reason"
    assert list(record["trials"][0]) == keys.split()


def test_axis_labels__keys_with_equal_ends__as_many_parts_as_tell_them_apart() -> None:
    names = axis_labels(["training.optimizer.lr", "training.ema.lr", "model.hidden_size", "a.decay", "decay"])
    assert list(names.values()) == ["optimizer.lr", "ema.lr", "hidden_size", "a.decay", "decay"]


def test_build_study__lifelike_search__numbers_values_and_curves_of_the_trials() -> None:
    history = lifelike()
    study = build_study(search_spec(), history.table)
    for number, trial in history.table.trials.items():
        drawn = study.trials[number]
        is_comparable = trial.status in ("finished", "stopped")
        assert drawn.number == number
        assert drawn.value == (trial.value if is_comparable else None)
        finite = {step: value for step, value in trial.reports if math.isfinite(value)}
        assert drawn.intermediate_values == finite
