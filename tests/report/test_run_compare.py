"""The comparison of runs: values, what is best, what differs between the jobs, and the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from forge.errors import ArgumentError
from forge.events import CostUpdated, Evaluated, Event
from forge.plan.plan import plan_to_json
from forge.report.run_compare import (
    RunComparison,
    compare_runs,
    comparison_rows,
    difference_rows,
    write_comparison,
)
from forge.runs.reader import read_run
from tests.support.jobs import tiny_plan
from tests.support.pages import Elements, own_text
from tests.support.runs import make_run
from tests.support.searches import SearchHistory, search_plan


def evaluated(loss: float) -> Evaluated:
    metrics = {"perplexity": 9.0, "accuracy": loss}
    return Evaluated(step=3, loss=loss, metrics=metrics, num_tokens=1, weights="current", seconds=0.1)


def compared(
    root: Path, *endings: Sequence[Event], names: Sequence[str] = "abc", lr: float = 0.03
) -> RunComparison:
    """Compare runs with these last events; all but the first have another learning rate."""
    folders = []
    for number, (events, name) in enumerate(zip(endings, names, strict=False)):
        folders.append(make_run(root, name, steps=3 + number, endings=events))
        if number:
            plan = tiny_plan(training__optimizer={"lr": lr})
            (folders[-1] / "plan.json").write_text(plan_to_json(plan))
    return compare_runs([read_run(folder) for folder in folders])


def test_compare__two_runs__values_best_and_differences(tmp_path: Path) -> None:
    found = compared(tmp_path, [evaluated(2.0)], [evaluated(1.5), CostUpdated(usd=3.0, usd_per_hour=1.0)])
    rows = {row[0]: row[1:] for row in comparison_rows(found)}
    assert rows["steps"] == ["3", "4"]
    assert rows["train/loss"] == ["1.6667", "1.2500 *"]
    assert rows["eval/loss"] == ["2.0000", "1.5000 *"]
    assert rows["eval/perplexity"] == ["9.0000", "9.0000"]
    assert rows["USD"] == ["-", "3.00"]
    assert difference_rows(found) == [["training.optimizer.lr", "0.01", "0.03"]]
    assert found.notes == ("the runs have not trained the same number of steps",)
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["differences"] == {"training.optimizer.lr": {"a": 0.01, "b": 0.03}}
    assert {row["name"]: row["values"] for row in record["values"]}["MFU"] == [None, None]


def test_compare__equal_ids__are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / place, "same") for place in ("x", "y")]
    found = compare_runs([read_run(folder) for folder in folders])
    assert found.names == [str(folder) for folder in folders]
    write_comparison(found, path=tmp_path / "c.html")
    figure = Elements(own_text(tmp_path / "c.html")).figures["loss"]
    assert len(figure["data"]) == 2
    assert difference_rows(found) == []


@pytest.mark.parametrize(("count", "message"), [(0, "not 0"), (1, "not 1"), (21, "not 21")])
def test_compare__number_of_runs__raises(count: int, message: str, tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    with pytest.raises(ArgumentError, match=message):
        compare_runs([run] * count)


def test_compare__search_or_the_same_run__raises(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path))
    with pytest.raises(ArgumentError, match="with itself"):
        compare_runs([run, run])
    search = read_run(SearchHistory().write(tmp_path, search_plan(), name="tuned"))
    with pytest.raises(ArgumentError, match="tuned is a search"):
        compare_runs([run, search])


def test_write_comparison__hostile_names_and_values__are_text_and_never_elements(tmp_path: Path) -> None:
    found = compared(tmp_path, [evaluated(1.0)], [], names=("a", "<evil>"))
    write_comparison(found, path=tmp_path / "c.html")
    page = Elements(own_text(tmp_path / "c.html"))
    assert "evil" not in page.tags
    assert "<evil>" in page.text
    assert "<evil" not in json.dumps(page.figures)


def test_write_comparison__no_folder__raises(tmp_path: Path) -> None:
    found = compared(tmp_path, [], [])
    with pytest.raises(ArgumentError, match="cannot write"):
        write_comparison(found, path=tmp_path / "none" / "c.html")
