"""A search as a person sees it: its trials while it is running, and its results.

The tables come from `forge.report.trial_rows`, as text that fits the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from forge.cli import display
from forge.cli.run_screen import LiveScreen
from forge.config.overrides import search_of
from forge.plan.plan import Plan
from forge.report.search_summary import SearchSummary, outcome_facts
from forge.report.trial_event_text import TrialEventDescriber
from forge.report.trial_rows import (
    bars,
    columns,
    cut,
    fit_table,
    format_value,
    select_trials,
    trial_rows,
    values_in_short,
)
from forge.runs.event_text import EventDescriber
from forge.runs.goodput import GoodputTracker
from forge.runs.trials import seconds_left
from forge.units import format_duration

_MAX_TRIALS = 50
_BAD_ENDINGS = ("failed", "diverged")


class TuneScreen(LiveScreen):
    """A search while it is running: a table of its trials on a terminal, one line per event on a pipe.

    Args:
        past: the events before, when a search is resumed or watched.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        past: Sequence[Mapping[str, Any]] = (),
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(console=console, clock=clock)
        assert plan.search is not None, "TuneScreen shows searches only"
        self._plan, self._planned, self._search = plan, plan.search, search_of(plan.job)
        self._trials = TrialEventDescriber(self._search, past=past)
        self._events = EventDescriber()
        self._cost: Mapping[str, Any] = {}
        self._began = clock()
        self._wall_time = GoodputTracker()
        self._phase = "starting"
        for record in past:
            self._take_state(record)

    def show(self, record: dict[str, Any] | None) -> None:
        """Take in one record of the search (None: nothing new) and redraw."""
        if record is not None and "event" in record:
            self._take_state(record)
            self._describe(record)
        self.draw(self._panel, is_idle=record is None)

    def _take_state(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        self._wall_time.add(event)
        if kind == "CostUpdated":
            self._cost = event
        elif kind == "TrialStarted":
            self._phase = ""

    def _describe(self, event: dict[str, Any]) -> None:
        line = self._trials.describe(event)
        if line is not None:
            if event["event"] == "TrialEnded" and event["status"] in _BAD_ENDINGS:
                self.warn(line)
            elif not self._live:
                self.note(line)
        elif event["event"] == "RunStarted":
            self.phase("starting the first trials")
        elif event["event"] == "WaitingForMachines":
            self.phase(self._events.describe(event) or "")
        elif (text := self._events.describe(event)) is not None:
            self.note(text)

    def _panel(self) -> Group:
        width, height = self.size
        width = max(1, width - 1)
        head = [
            Text(cut(display.harmless(line), width=width), no_wrap=True, overflow="ellipsis")
            for line in self._head()
        ]
        if self._phase:
            phase = cut(display.harmless(f"{self._phase} … {self._elapsed()}"), width=width)
            head.append(Text(phase, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*head, *self._table(width, room=height - len(head) - 1))

    def _head(self) -> list[str]:
        """Progress, the best trial so far, and the cost."""
        table, planned = self._trials.table, self._planned
        if not table.trials:
            return []
        num_over = sum(trial.is_over for trial in table.trials.values())
        left_s = seconds_left(table, num_trials=planned.num_trials, at_once=planned.trials_at_once)
        left = "" if left_s is None else f", about {format_duration(left_s)} left"
        lines = [f"{num_over}/{planned.num_trials} trials  {self._elapsed()}{left}"]
        best = table.best(self._search.direction)
        if best is not None:
            value = f"{self._search.metric} {format_value(best.value)}"
            lines.append(f"best: trial {best.number}, {value}  {values_in_short(best.values)}")
        if self._cost:
            usd = self._cost["usd_per_hour"] * (left_s or 0.0) / 3600
            lines.append(f"{self._cost['usd']:.2f} USD" + ("" if left_s is None else f", about {usd:.2f} more"))
        return lines

    def _elapsed(self) -> str:
        """Wall time of the search; before its first event, the time since the screen was opened."""
        now = self._clock()
        return format_duration(self._wall_time.report(now=now).wall_s or now - self._began)

    def _table(self, width: int, *, room: int) -> list[Text]:
        """The table in at most `room` lines, including its header and the line that counts hidden trials."""
        table, mode = self._trials.table, self._search.direction
        if not table.trials or room < 2:
            return []
        is_whole = len(table.trials) <= room - 1
        shown = select_trials(table, mode=mode, room=room - 1 if is_whole else room - 2)
        best = table.best(mode)
        rows = trial_rows(shown, now=self._clock(), total_steps=self._plan.total_steps, best=best)
        head, *lines = fit_table(self._search.metric, rows, width=width)
        texts = [Text(display.harmless(head), style="dim", no_wrap=True, overflow="ellipsis")]
        for trial, line in zip(shown, lines, strict=True):
            style = "bold" if trial is best else "dim" if trial.is_over else ""
            texts.append(Text(display.harmless(line), style=style, no_wrap=True, overflow="ellipsis"))
        if not is_whole:
            hidden = f"… and {len(table.trials) - len(shown)} more"
            texts.append(Text(cut(hidden, width=width), style="dim", no_wrap=True, overflow="ellipsis"))
        return texts


def show_outcome(summary: SearchSummary, *, importances: Mapping[str, float]) -> None:
    """Print how a search ended, its best trial, and the importance of each key."""
    display.heading(
        summary.run.run_id, f"{summary.run.status} after {summary.num_over} of {summary.num_trials} trials"
    )
    display.facts(outcome_facts(summary))
    if importances:
        display.heading("importance", f"of each key for {summary.search.metric}")
        rows = bars(importances, width=(display.terminal_width() or 80) // 4)
        widest = max(len(name) for name, _, _ in rows)
        display.facts([(f"{name:<{widest}}", f"{share:>4} {bar}") for name, share, bar in rows])


def show_trials(summary: SearchSummary) -> None:
    """Print the table of a search's trials; of more than 50 the running, the best and the newest."""
    if not summary.table.trials:
        return
    now = time.time() if summary.run.status == "running" else None
    shown = select_trials(summary.table, mode=summary.search.direction, room=_MAX_TRIALS)
    rows = trial_rows(shown, now=now, total_steps=summary.run.plan.total_steps, best=summary.best)
    display.heading("trials", "running ones, the best (*), then the newest")
    display.table(columns(summary.search.metric), rows)
    hidden = len(summary.table.trials) - len(shown)
    if hidden:
        display.message(f"{hidden} more trials are not shown; -o json has them all")
