"""One run or search as its page shows it: texts that change, figures, and the newest points of its curves.

It reads the records of the run as they are written, each once, and uses what the reports use to describe them.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, harmless
from forge.report.alert_rows import AlertTable
from forge.report.page import PageFigure, PageTile
from forge.report.progress_lines import ProgressLines
from forge.report.run_figures import new_points
from forge.report.run_report import MAX_ALERTS, bucket_shares, cost_facts, run_figures, run_tiles
from forge.report.run_series import SeriesBuilder
from forge.report.search_summary import search_summary
from forge.report.search_tiles import search_headline, search_tiles
from forge.report.text import change_rows, goodput_facts, headline, summary_facts
from forge.report.time_limits import late_texts
from forge.report.trial_rows import select_trials, trial_rows
from forge.runs.glance import is_rewritten, stamps_of
from forge.runs.goodput import GoodputTracker, moment
from forge.runs.goodput_report import GoodputReport
from forge.runs.reader import RunSummary, ending_of, failure_of, read_plan, status_of
from forge.runs.records import RecordReader
from forge.ui.live import State

_IN_TILES = ("loss", "speed", "wall time", "cost")
_MAX_CHANGES = 100
_MAX_TRIALS = 1000
_MAX_LINES = 200
_MAX_STEPS_KEPT = 2000
_MAX_POINTS = 10
"""That are sent at once for one curve: steps of a second are reduced to as many."""
_REFRESH_S = 0.5
_EVAL_FIGURE = "parallel-coordinates"
"""plotly.js compiles its shaders at run time, which the policy of this page does not allow."""
_REDRAWN = {
    *("GenerationStarted", "MembershipChangeStarted", "CostUpdated", "RunStarted", "RunFinished", "RunStopped"),
    *("RunFailed", "TrialReported", "TrialEnded", "TrialExploited"),
}


class RunView:
    """A run's page. Raises: as `read_plan`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_opened = 0
        """Grows when the run's files were written again from their start."""
        self._lock = threading.Lock()
        self._refreshed_at = 0.0
        self._stamps = stamps_of(folder)
        self.run = self._open()

    def refresh(self) -> None:
        """Read what was written since the last call.

        Raises: ArgumentError if the folder holds no run any more, or cannot be read; as `read_plan`.
        """
        with self._lock:
            if time.monotonic() - self._refreshed_at < _REFRESH_S:
                return
            now = stamps_of(self.folder)
            if now["plan.json"] is None or self.folder.is_symlink():
                raise ArgumentError(f"{self.folder.name} is no longer there: its folder was moved or deleted")
            if is_rewritten(self._stamps, now):
                self.run = self._open()
            status = status_of(self.folder, ending=ending_of(self._events))
            if now != self._stamps or status != self.run.status:
                self._read()
                self._stamps = now
                status = status_of(self.folder, ending=ending_of(self._events))
                self.run = replace(self.run, status=status, last=self._last, events=tuple(self._events))
            self._refreshed_at = time.monotonic()

    def state(self) -> State:
        """Return the texts of the page."""
        with self._lock:
            run, failure = self.run, failure_of(self.run)
            status = "finished early" if run.is_stopped_early else run.status
            common: dict[str, dict[str, list[str]]] = {
                "status": {"status": [status]},
                "problem": {
                    **({} if failure is None else {"failure": [str(failure)]}),
                    **{limit: [text] for limit, text in late_texts(run).items()},
                },
                "events": {f"{number}": [line] for number, line in self._lines},
                "alerts": self._alerts.rows(limit=MAX_ALERTS),
            }
            return common | (self._of_search() if run.plan.search is not None else self._of_training())

    @property
    def num_events(self) -> int:
        """Events that it holds in memory."""
        return len(self._events)

    @property
    def num_redraws(self) -> int:
        """Grows when the figures have to be drawn again, since more than points at their ends has changed."""
        return self._num_redraws

    @property
    def num_steps(self) -> int:
        """Steps read so far; `points` takes it."""
        return self._num_steps

    def points(self, *, since: int) -> dict[str, dict[str, list[list[float | None]]]]:
        """Return what the steps after the first `since` ones add to the figures."""
        with self._lock:
            steps = [step for number, step in self._steps if number > since]
            builder = SeriesBuilder(max_points=_MAX_POINTS)
            for step in steps:
                builder.add(step)
            return new_points(builder.series(), since=self.run.started)

    def figures(self) -> list[PageFigure]:
        """Draw the figures of the report."""
        with self._lock:
            if self.run.plan.search is None:
                return list(run_figures(self.run, self._goodput(), series=self._series.series()))
            run = self.run
        return _search_figures(run)

    def headline(self) -> str:
        """Describe the run in one line."""
        if self.run.plan.search is None:
            return headline(self.run.plan)
        return search_headline(search_summary(self.run))

    def _open(self) -> RunSummary:
        """Read the run from its start."""
        plan = read_plan(self.folder)
        self._stamps = stamps_of(self.folder)
        self._event_reader = RecordReader(self.folder, kind="event")
        self._step_reader = RecordReader(self.folder, kind="step")
        self._events: list[dict[str, Any]] = []
        self._last: dict[str, Any] = {}
        self._tracker, self._series = GoodputTracker(), SeriesBuilder()
        self._steps: deque[tuple[int, dict[str, Any]]] = deque(maxlen=_MAX_STEPS_KEPT)
        self._lines: deque[tuple[int, str]] = deque(maxlen=_MAX_LINES)
        self._alerts = AlertTable(run_id=self.folder.name)
        self._num_steps = self._num_lines = self._num_redraws = 0
        self.num_opened += 1
        self._now = 0.0
        self._describer = ProgressLines(plan, clock=lambda: self._now)
        began = (self._stamps["plan.json"] or (0, 0, 0))[2] / 1e9
        self._read()
        return RunSummary(
            run_id=self.folder.name,
            folder=self.folder,
            status=status_of(self.folder, ending=ending_of(self._events)),
            plan=plan,
            started=self._events[0]["time"] if self._events else began,
            updated=began,
            last=self._last,
            events=tuple(self._events),
        )

    def _read(self) -> None:
        try:
            new_events = list(self._event_reader.read())
            for record in heapq.merge(new_events, self._step_reader.read(), key=moment):
                self._take(record)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{self.folder.name} cannot be read: {error}") from error

    def _take(self, record: dict[str, Any]) -> None:
        self._tracker.add(record)
        if "event" not in record:
            self._num_steps += 1
            self._last = record
            self._series.add(record)
            self._steps.append((self._num_steps, record))
            return
        self._events.append(record)
        self._alerts.add(record)
        self._num_redraws += record["event"] in _REDRAWN
        self._now = record["time"]
        line = self._describer.line(record)
        if line is not None:
            self._num_lines += 1
            at = time.strftime("%m-%d %H:%M:%S", time.gmtime(self._now))
            self._lines.append((self._num_lines, f"{at}  {line}"))

    def _goodput(self) -> GoodputReport:
        return self._tracker.report(now=time.time() if self.run.status == "running" else None)

    def _of_training(self) -> dict[str, dict[str, list[str]]]:
        goodput = self._goodput()
        changes = change_rows(goodput, limit=_MAX_CHANGES)
        first = goodput.num_changes - len(changes)
        parts = bucket_shares(goodput)
        return {
            "tiles": _tiles(run_tiles(self.run, goodput)),
            "time": {part.name: [f"{100 * part.share:.1f}", f"{part.seconds:.0f}"] for part in parts},
            "goodput": _facts(goodput_facts(goodput)),
            "cost": _facts(cost_facts(self.run)),
            "results": _facts(fact for fact in summary_facts(self.run, goodput) if fact[0] not in _IN_TILES),
            "changes": {f"{first + number}": row for number, row in enumerate(changes)},
        }

    def _of_search(self) -> dict[str, dict[str, list[str]]]:
        summary = search_summary(self.run)
        now = time.time() if self.run.status == "running" else None
        chosen = select_trials(summary.table, mode=summary.search.direction, room=_MAX_TRIALS)
        chosen.sort(key=lambda trial: trial.number)
        rows = trial_rows(chosen, now=now, total_steps=self.run.plan.total_steps, best=summary.best)
        return {
            "tiles": _tiles(search_tiles(summary)),
            "trials": {f"{trial.number}": row for trial, row in zip(chosen, rows, strict=True)},
        }


def _search_figures(run: RunSummary) -> list[PageFigure]:
    """Draw the figures of a search; this imports Optuna, which takes a second or two."""
    from forge.report.figures import build_figures
    from forge.search.importance import importances

    summary = search_summary(run)
    found = build_figures(summary.search, summary.table, importances(summary.search, summary.table))
    note = f"In the report alone: forge runs report {harmless(run.run_id)}"
    return [
        replace(figure, spec=None, note=note) if figure.key == _EVAL_FIGURE and figure.spec else figure
        for figure in found
    ]


def _tiles(tiles: Iterable[PageTile]) -> dict[str, list[str]]:
    return {tile.name: [tile.value, tile.note] for tile in tiles}


def _facts(facts: Iterable[tuple[str, str]] | Mapping[str, str]) -> dict[str, list[str]]:
    pairs = facts.items() if isinstance(facts, Mapping) else facts
    return {f"{number}": [name, text] for number, (name, text) in enumerate(pairs)}
