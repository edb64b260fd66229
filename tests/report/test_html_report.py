"""The page and the record of a search, at every time of its life."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from forge.config.load import load_job
from forge.errors import JobFileError
from forge.events import RunFailed
from forge.report.figures import log_ticks, names_on_axis, script
from forge.report.html_report import write_page
from forge.report.search_record import search_record, write_results
from forge.runs.reader import read_run
from tests.support.runs import make_run
from tests.support.searches import LR, WARMUP, SearchHistory, lifelike, search_plan


def own_text(page: Path) -> str:
    """The page without the script that draws."""
    return page.read_text(encoding="utf-8").replace(script(), "")


def test_a_search_that_is_over_has_all_of_it_on_one_page(tmp_path: Path) -> None:
    folder = lifelike().write(tmp_path, search_plan({"scheduler": {"kind": "asha"}}))
    write_results(folder)
    whole = (folder / "report.html").read_text(encoding="utf-8")
    text = own_text(folder / "report.html")
    assert whole.count(script()) == 1
    for said in ("12 finished, 2 stopped, 1 diverged, 1 failed", "1.76 USD", "CUDA out of memory on rank 0"):
        assert said in text
    for figure in ("best-so-far", "learning-curves", "parallel-coordinates", "importances"):
        assert text.count(f'id="{figure}"') == 1
    assert text.count("<tr>") + text.count('<tr class="chosen">') == 1 + 16
    assert load_job(folder / "best.yaml").job.search is None
    assert not list(folder.glob("*.draft"))


def test_the_page_asks_nobody_for_anything(tmp_path: Path) -> None:
    folder = lifelike().write(tmp_path, search_plan())
    text = own_text(write_page(folder))
    for asking in ('src="', 'href="', "@import", "url("):
        assert asking not in text
    assert "default-src 'none'" in text


def going_on() -> SearchHistory:
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
    history.tell(RunFailed(error="RunError", message="every trial failed"))
    return history


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (going_on, "1 finished, 1 running, 1 waiting"),
        (SearchHistory, "No trial has been begun."),
        (only_failed, "every trial failed"),
    ],
)
def test_a_search_has_a_page_however_far_it_came(
    make: Callable[[], SearchHistory], said: str, tmp_path: Path
) -> None:
    space = {LR: {"loguniform": [1e-4, 1e-1]}, WARMUP: {"int": [0, 4]}}
    folder = make().write(tmp_path, search_plan({"space": space}))
    write_results(folder)
    assert said in own_text(folder / "report.html")
    assert (folder / "best.yaml").exists() == (make is going_on)
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
def test_a_single_key_is_enough(space: dict, values: list[dict], tmp_path: Path) -> None:
    history = SearchHistory()
    for count, drawn in enumerate(values):
        history.run(drawn, [2.0 + count])
    text = own_text(write_page(history.write(tmp_path, search_plan({"space": space}))))
    assert 'id="parallel-coordinates"' in text


def test_what_the_job_and_the_events_say_is_text_on_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><b>\"'&"
    history = SearchHistory()
    for value in (evil, "x"):
        history.run({"data.source": value, evil: 1}, [2.0], status="stopped", reason=evil)
    history.tell(RunFailed(error="RunError", message=evil))
    plan = search_plan({"space": {"data.source": {"choice": ["x", evil]}, evil: {"int": [1, 2]}}})
    text = own_text(write_page(history.write(tmp_path, plan, name="<b>x<i>")))
    assert "alert(1)" in text
    for markup in ("<script>alert", "</script><script>alert", "<b>\"'&", "<i>"):
        assert markup not in text


def test_a_run_is_no_search(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="there is no search in it"):
        write_page(make_run(tmp_path))


def test_the_record_has_every_trial_and_the_files_that_are_there(tmp_path: Path) -> None:
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
    told = "trial trial_id value step values status reports moves start_s seconds reason"
    assert list(record["trials"][0]) == told.split()


def test_keys_are_shown_by_as_much_of_their_path_as_tells_them_apart() -> None:
    names = names_on_axis(["training.optimizer.lr", "training.ema.lr", "model.hidden_size", "a.decay", "decay"])
    assert list(names.values()) == ["optimizer.lr", "ema.lr", "hidden_size", "a.decay", "decay"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1e-4, 1e-1, [1e-4, 1e-3, 1e-2, 1e-1]),
        (3e-4, 5e-3, [3e-4, 5e-4, 1e-3, 2e-3, 5e-3]),
        (9.5e-4, 1e-1, [9.5e-4, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]),
        (2.1e-4, 2.2e-4, [2.1e-4, 2.2e-4]),
    ],
)
def test_a_logarithmic_axis_has_round_numbers_and_its_ends(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)
