"""The list of runs of `forge ui`: what it reads again, and what it does with odd, broken and hostile folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.events import CostUpdated, RunFinished, event_to_record
from forge.runs import glance
from forge.runs.annotations import change_tags
from forge.runs.reader import read_run
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.ui.run_list import RunList
from tests.support.runs import History, make_run, metrics
from tests.support.searches import lifelike, search_plan


def refreshed(root: Path) -> RunList:
    runs = RunList(root)
    runs.refresh(whole=True)
    return runs


def append(path: Path, record: dict[str, object]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.fixture
def read_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders whose plan was read."""
    found: list[Path] = []
    real = glance.read_plan
    monkeypatch.setattr(glance, "read_plan", lambda folder: (found.append(folder), real(folder))[1])
    yield found


def test_refresh__nothing_written__reads_no_file_again(
    tmp_path: Path, read_plans: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        make_run(tmp_path, f"run-{number}", endings=[RunFinished(step=3)])
    runs = refreshed(tmp_path)
    version = runs.version
    assert len(read_plans) == 3
    monkeypatch.setattr(glance, "last_step_of", None)
    monkeypatch.setattr(glance.RecordReader, "read", None)
    for _ in range(3):
        runs.refresh(whole=True)
    assert len(read_plans) == 3
    assert runs.changes(since=version) == {}


def test_refresh__steps_and_events_appended__sends_only_that_row(tmp_path: Path) -> None:
    folders = [make_run(tmp_path, f"run-{number}") for number in range(3)]
    runs = refreshed(tmp_path)
    version = runs.version
    append(folders[1] / "metrics.jsonl", metrics(4, loss=0.5).as_record() | {"time": 2e9})
    append(folders[1] / "events.jsonl", {"time": 2e9} | event_to_record(CostUpdated(usd=7.5, usd_per_hour=1.0)))
    runs.refresh(whole=True)
    rows = runs.changes(since=version)
    assert rows is not None and len(rows) == 1
    (row,) = rows.values()
    assert row is not None and row[0] == "run-1" and row[5:7] == ["4/6", "0.5000"] and row[-1] == "7.50"


@pytest.mark.parametrize("is_search", [False, True])
def test_row__read_in_parts__equals_row_of_the_whole_run(tmp_path: Path, is_search: bool) -> None:
    history = lifelike() if is_search else History()
    if not is_search:
        history.start()
        history.form(1.0)
        for step in range(1, 21):
            history.step(step, 1.0, evaluation_s=0.5 if step % 5 == 0 else 0.0)
    folder = history.write(tmp_path, search_plan()) if is_search else history.write(tmp_path, "run")
    whole = (folder / "events.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "events.jsonl").write_bytes(b"")
    reader = glance.GlanceReader(folder)
    reader.refresh()
    for number in range(0, len(whole), 7):
        with (folder / "events.jsonl").open("ab") as file:
            file.writelines(whole[number : number + 7])
        reader.refresh()
    from forge.report.run_rows import list_cells

    assert list_cells(reader.glance) == list_cells(glance.glance_of(read_run(folder)))


def test_refresh__many_events__are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = lifelike()
    history.write(tmp_path, search_plan())
    whole = refreshed(tmp_path).rows()[0].cells
    monkeypatch.setattr(glance, "_MAX_AT_ONCE", 20)
    runs = refreshed(tmp_path)
    assert runs.rows()[0].cells != whole
    for _ in range(len(history.events) // 20 + 1):
        runs.refresh()
    assert runs.rows()[0].cells == whole


def test_refresh__plan_or_records_replaced__reads_the_run_from_its_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path, steps=5)
    runs = refreshed(tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    runs.refresh(whole=True)
    assert runs.rows()[0].cells[0] == "2/6"


def test_list__broken_folder__is_listed_with_the_reason_and_recovers(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "run-0")
    plan = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text("{")
    (tmp_path / "no-run").mkdir()
    runs = refreshed(tmp_path)
    (row,) = runs.rows()
    assert row.status == "broken" and "plan" in row.problem
    (folder / "plan.json").write_text(plan)
    runs.refresh(whole=True)
    assert runs.rows()[0].status == "died"


def test_list__links__are_not_followed(tmp_path: Path) -> None:
    outside = make_run(tmp_path / "elsewhere", "private")
    root = tmp_path / "runs"
    own = make_run(root, "own")
    (root / "out").symlink_to(outside)
    (root / "again").symlink_to(own)
    (root / "nowhere").symlink_to(tmp_path / "missing")
    runs = refreshed(root)
    found = {row.folder.name: row for row in runs.rows()}
    assert set(found) == {"own", "out"}
    assert found["out"].status == "broken" and "not followed" in found["out"].problem
    assert runs.folder_of(found["out"].key) is None
    shutil.move(own, tmp_path / "moved")
    own.symlink_to(tmp_path / "moved")
    runs.refresh(whole=True)
    assert runs.folder_of(found["own"].key) is None


def test_list__linked_trials__have_no_page(tmp_path: Path) -> None:
    search = lifelike().write(tmp_path / "runs", search_plan())
    make_run(search / "trials", f"{search.name}-0001")
    runs = refreshed(tmp_path / "runs")
    (row,) = runs.rows()
    assert row.is_search and runs.folder_of(row.key, trial=1) == search / "trials" / f"{search.name}-0001"
    assert runs.folder_of(row.key, trial=2) is None
    (search / "trials").rename(tmp_path / "other")
    (search / "trials").symlink_to(tmp_path / "other")
    assert runs.folder_of(row.key, trial=1) is None


def test_list__run_vanishes__is_said_to_be_gone(tmp_path: Path) -> None:
    make_run(tmp_path, "stays")
    gone = make_run(tmp_path, "goes")
    runs = refreshed(tmp_path)
    version = runs.version
    key = next(row.key for row in runs.rows() if row.folder == gone)
    shutil.rmtree(gone)
    runs.refresh(whole=True)
    assert runs.changes(since=version) == {key: None}
    assert [row.folder.name for row in runs.rows()] == ["stays"]
    shutil.rmtree(tmp_path)
    runs.refresh(whole=True)
    assert runs.rows() == [] and "cannot be read" in runs.problem


def test_list__odd_names__have_plain_keys_and_harmless_texts(tmp_path: Path) -> None:
    names = ["a b?#%2F&<i>", "new\nline", "\u202eright", os.fsdecode(b"not-utf8-\xff"), "'\"", "-rf", "…" * 80]
    for name in names:
        make_run(tmp_path, name)
    runs = refreshed(tmp_path)
    assert len(runs.rows()) == len(names)
    for row in runs.rows():
        assert row.key.isalnum() and row.key.isascii()
        json.dumps(row.as_row(), ensure_ascii=False).encode()
        assert not any(mark in "".join(row.as_row()) for mark in ("\u202e", "\x1b"))


def test_list__tags_changed__row_has_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    runs = refreshed(tmp_path)
    change_tags(folder, add=["baseline"])
    runs.refresh(whole=True)
    assert runs.rows()[0].tags == ("baseline",)


def test_changes__version_of_another_process__is_unknown(tmp_path: Path) -> None:
    runs = refreshed(tmp_path)
    assert runs.changes(since=-1) is None and runs.changes(since=runs.version + 1) is None
    assert runs.changes(since=runs.version) == {}


def test_list_of_cluster__only_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    here, there = make_run(tmp_path, "here"), make_run(tmp_path, "there")
    write_remote_ref(there, RemoteRef(cluster="away", folder=f"/x/{there.name}", job="", events=0, steps=0))
    runs = RunList(tmp_path, cluster="local")
    runs.refresh(whole=True)
    assert [row.folder for row in runs.rows()] == [here]
