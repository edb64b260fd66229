"""A run as a person sees it: live while it is running, and as a summary afterwards."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forge.cli import display
from forge.plan.plan import Plan
from forge.report.curve import loss_curve
from forge.report.text import (
    bucket_rows,
    change_rows,
    evaluating_text,
    evaluation_text,
    goodput_facts,
    goodput_line,
    number,
    step_text,
    summary_facts,
)
from forge.runs.event_text import EventDescriber, workers
from forge.runs.goodput import GoodputTracker
from forge.runs.goodput_report import GoodputReport
from forge.runs.reader import RunSummary
from forge.units import format_bytes, format_count, format_duration

_REFRESH_PER_S = 2
_PLAIN_INTERVAL_S = 5.0
_MAX_CHANGES = 10
_PACE_STEPS = 50


class LiveScreen:
    """A panel that is redrawn at the bottom of a terminal, below lines that stay; on a pipe only the lines.

    SIGTERM ends this process, not the run, and restores the terminal.

    Args:
        console: where to draw; by default stderr.
        clock: seconds since the epoch.
    """

    def __init__(self, *, console: Console | None = None, clock: Callable[[], float] = time.time) -> None:
        self._console, self._clock = console or display.ERR, clock
        self._phase = ""
        self._drawn_at = -math.inf
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._on_terminate = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        signal.signal(signal.SIGTERM, self._on_terminate)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the terminal in characters."""
        return self._console.width, self._console.height

    def note(self, text: str) -> None:
        """Print a line that stays above the panel."""
        display.message(text, console=self._console)

    def warn(self, text: str) -> None:
        """Print a warning that stays above the panel."""
        display.warning(text, console=self._console)

    def phase(self, text: str) -> None:
        """Set what the run is doing while it does not train."""
        if text != self._phase and not self._live:
            self.note(text)
        self._phase = text

    def draw(self, panel: Callable[[], Group], *, is_idle: bool) -> None:
        """Redraw the panel, unless it was drawn less than half a second ago.

        Args:
            is_idle: nothing else is coming for now, so redraw in any case.
        """
        if self._live and (is_idle or self._clock() - self._drawn_at > 1 / _REFRESH_PER_S):
            self._drawn_at = self._clock()
            self._live.update(panel(), refresh=True)


class TrainScreen(LiveScreen):
    """A training run while it is running.

    Args:
        losses: of the steps before, when a run is resumed or watched.
        tracker: the goodput until now.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        losses: Sequence[float] = (),
        tracker: GoodputTracker | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(console=console, clock=clock)
        self._plan = plan
        self._losses = list(losses)
        self._last: dict[str, Any] = {}
        self._evaluated: dict[str, Any] = {}
        self._tracker = tracker or GoodputTracker()
        self._events = EventDescriber()
        self._phase = "starting"
        self._world_size = 0
        self._began = clock()
        self._last_line_at = -math.inf
        self._recent: list[tuple[float, int]] = []

    def show(self, record: dict[str, Any] | None) -> None:
        """Add one record of the run (None: no new record) and redraw."""
        if record is not None:
            self._tracker.add(record)
            if "event" in record:
                self._take_event(record)
            else:
                self._take_step(record)
        self.draw(self._panel, is_idle=record is None)

    def _take_event(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "RunStarted":
                self.phase("starting the workers")
            case "GenerationStarted":
                self._world_size = event["world_size"]
                peak = event["peak_flops"]
                measured = f", peak {format_count(peak)}FLOP/s ({event['peak_source']})" if peak else ""
                self.note(f"training on {workers(self._world_size)} ({event['device'].split(':')[0]}){measured}")
            case "EvaluationProgress":
                self._show_evaluation(event)
            case "Evaluated":
                self._evaluated, self._phase = event, ""
                which = "" if event["weights"] == "current" else f" ({event['weights']} weights)"
                self.note(f"step {event['step']:>6}  held-out {evaluation_text(event)}{which}")
            case "CheckpointSaved":
                size = format_bytes(event["size_bytes"])
                how = "written by a process that outlived its worker"
                if event["seconds"] is not None:
                    seconds, stall = format_duration(event["seconds"]), format_duration(event["stall_s"])
                    how = f"written in {seconds}, training waited {stall}"
                if event["removed"]:
                    steps = ", ".join(map(str, event["removed"]))
                    how += f"; the disk had no room beside those of step {steps}, which were removed first"
                best = ", the best so far" if event["is_best"] else ""
                self.note(f"step {event['step']:>6}  checkpoint of {size} {how}{best}")
            case "CheckpointFailed":
                self.warn(f"step {event['step']}: {event['reason']}")
            case "CheckpointSkipped":
                self.warn(f"skipped {event['folder']}: {event['reason']}")
            case "TrackingDegraded":
                self.warn(event["reason"])
            case "AlertNotSent":
                self.warn(f"the {event['receiver']} of alerts did not take '{event['text']}': {event['reason']}")
        self._describe(event)

    def _show_evaluation(self, event: dict[str, Any]) -> None:
        text, now = evaluating_text(event), self._clock()
        if self._live:
            self._phase = text
        elif now - self._last_line_at >= _PLAIN_INTERVAL_S:
            self._last_line_at = now
            self.note(f"step {event['step']:>6}  {text}")

    def _describe(self, event: dict[str, Any]) -> None:
        line = self._events.describe(event)
        if line is None:
            return
        is_phase = event["event"] in ("GenerationStarting", "WaitingForMachines")
        if not is_phase or (self._live and event.get("generation") != 1):
            self.note(line)
        if is_phase:
            self.phase(line)

    def _take_step(self, record: dict[str, Any]) -> None:
        self._last, self._phase = record, ""
        loss, now = record["train/loss"], self._clock()
        self._losses.append(math.nan if loss is None else loss)
        self._recent.append((now, record["step"]))
        del self._recent[:-_PACE_STEPS]
        is_first_or_last = record["step"] in (1, self._plan.total_steps)
        if not self._live and (is_first_or_last or now - self._last_line_at >= _PLAIN_INTERVAL_S):
            self._last_line_at = now
            self.note(self._line())

    def _line(self) -> str:
        return f"{step_text(self._last, total_steps=self._plan.total_steps)}  {self._time_left()} left"

    def _panel(self) -> Group:
        width, height = self.size
        width = max(20, width - 2)
        elapsed = format_duration(self._clock() - self._began)
        if not self._last:
            return Group(_dim(f"{self._phase} … {elapsed}"))
        report = self._tracker.report(now=self._clock())
        goodput = goodput_line(report, width=width)
        lines: list[Any] = [self._progress(width, format_duration(report.wall_s)), self._numbers()]
        lines += [_dim(text) for text in (goodput, self._phase) if text]
        if height >= 12:
            lines += [
                Text(row, style="cyan", no_wrap=True) for row in loss_curve(self._losses, width=min(width, 72))
            ]
        return Group(*lines)

    def _progress(self, width: int, wall_time: str) -> Table:
        step, total = self._last["step"], self._plan.total_steps
        row = Table.grid(padding=(0, 1))
        for _ in range(3):
            row.add_column(no_wrap=True, overflow="ellipsis")
        bar = [ProgressBar(total=total, completed=step, width=min(40, width - 50))] if width >= 60 else []
        row.add_row(Text(f"step {step}/{total}"), *bar, Text(f"{wall_time}, {self._time_left()} left", style="dim"))
        return row

    def _numbers(self) -> Text:
        last = self._last
        numbers = (
            f"loss {number(last['train/loss'], '.4f')}   {number(last['speed/tokens_per_s'], ',.0f')} tokens/s   "
            f"MFU {number(last['speed/mfu'], '.2f')}   lr {number(last['train/learning_rate'], '.2e')}"
        )
        if self._evaluated:
            numbers += f"   held-out loss {number(self._evaluated['loss'], '.4f')}"
        return Text(numbers, no_wrap=True, overflow="ellipsis")

    def _time_left(self) -> str:
        """Estimate by the pace of the last steps, evaluations and checkpoints included."""
        if len(self._recent) < 2:
            return "-"
        (first_at, first), (last_at, last) = self._recent[0], self._recent[-1]
        seconds_per_step = (last_at - first_at) / max(1, last - first)
        seconds = seconds_per_step * (self._plan.total_steps - last)
        return format_duration(seconds) if seconds >= 1 else "0s"


def show_summary(run: RunSummary, *, goodput: GoodputReport, losses: Sequence[float]) -> None:
    """Print how a run ended, its results, its files and a sample of its answers."""
    status = "finished early" if run.is_stopped_early else run.status
    display.heading(run.run_id, f"{status} at step {run.step} of {run.plan.total_steps}")
    width = display.terminal_width()
    if width is not None and len(losses) > 1:
        for row in loss_curve(losses, width=min(72, max(20, width - 12))):
            display.OUT.print(Text(row, style="cyan", no_wrap=True))
    display.facts(summary_facts(run, goodput))
    sample, failed = run.newest("SampleGenerated"), run.newest("SampleFailed")
    if failed:
        display.message(f"no sample of its answers: {display.harmless(failed['reason'])}")
    if sample:
        display.OUT.print()
        display.OUT.print(Text("a sample of its answers", style="dim"))
        prompt, text = display.harmless(sample["prompt"]), display.harmless(sample["text"])
        display.OUT.print(Text.assemble((prompt, "bold"), text))


def show_goodput(goodput: GoodputReport) -> None:
    """Print where a run's time went, and its membership changes."""
    if not goodput.wall_s:
        return
    display.OUT.print()
    display.facts(goodput_facts(goodput))
    display.OUT.print()
    display.table(["where the time went", "#seconds", "#share"], bucket_rows(goodput))
    if goodput.changes:
        display.OUT.print()
        rows = change_rows(goodput, limit=_MAX_CHANGES)
        display.table(["#after", "change", "workers", "#took", "what happened"], rows)
    if goodput.num_changes > _MAX_CHANGES:
        display.message(f"these are the last {_MAX_CHANGES} of {goodput.num_changes} changes; -o json has them all")


def _dim(text: str) -> Text:
    return Text(display.harmless(text), style="dim", no_wrap=True, overflow="ellipsis")
