"""What a person sees; with `trials_screen`, which shows a search, the only user of rich.

Tables and summaries go to stdout, progress and messages to stderr. Colours and live displays are for
terminals alone; on a pipe the same news come as plain lines. NO_COLOR is respected by rich.

It is long because all that people see stands together, so that it looks alike.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forge.cluster.base import NodeProgress
from forge.data.prepare import PrepareProgress
from forge.plan.plan import DraftPlan, Plan
from forge.report.curve import loss_curve
from forge.report.text import (
    bucket_rows,
    change_rows,
    headline,
    ledger_facts,
    ledger_line,
    number,
    plan_facts,
    search_facts,
    summary_facts,
)
from forge.runs.event_text import EventDescriber, workers
from forge.runs.goodput import GoodputReport, GoodputTracker
from forge.runs.reader import RunSummary
from forge.units import format_bytes, format_count, format_duration

_REFRESH_PER_S = 2
_PLAIN_INTERVAL_S = 5.0
_MOST_CHANGES = 10

_out = Console(highlight=False, markup=False, emoji=False, soft_wrap=not sys.stdout.isatty())
_err = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=not sys.stderr.isatty())


def message(text: str) -> None:
    """One line of news, to stderr."""
    _err.print(Text(text))


def warning(text: str) -> None:
    """Something that went wrong and was survived."""
    _err.print(Text(f"! {text}", style="yellow"))


def error(text: str) -> None:
    """The last word of a command that failed."""
    _err.print(Text.assemble(("error:", "bold red"), " ", text))


def next_command(command: str, *, purpose: str) -> None:
    """The next useful command, in a dim line."""
    _err.print(Text(f"{purpose}: {command}", style="dim"))


def print_json(value: Any) -> None:
    """Machine-readable output, to stdout alone; what is not finite becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Text as it is, to stdout."""
    if sys.stdout.isatty():
        text = _harmless(text)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; columns whose name begins with `#` are numbers and stand to the right."""
    _print_table(_out, columns, rows)


def heading(name: str, text: str) -> None:
    """A line above facts, to stdout."""
    _out.print()
    _out.print(Text.assemble((name, "bold"), f"  {text}"))


def facts(rows: Sequence[tuple[str, str]]) -> None:
    """Names and texts, to stdout."""
    _print_facts(_out, rows)


def width() -> int | None:
    """Of the terminal that stdout is, in characters; None for a pipe."""
    return _out.width if _out.is_terminal else None


def show_plan(plan: DraftPlan, *, to_stderr: bool = False) -> None:
    """What will happen, before it happens."""
    console = _err if to_stderr else _out
    console.print(Text.assemble((plan.job.name, "bold"), "  ", headline(plan)))
    _print_facts(console, [*plan_facts(plan), *search_facts(plan)])
    columns = ["#workers", "#micro", "#accum.", "#pad", "#weights", "#grads", "#states", "#host", "#~total"]
    rows = []
    for world in plan.worlds:
        batch, need = world.batch, world.memory
        rows.append(
            [
                str(batch.world_size),
                str(batch.micro_batch_size),
                str(batch.gradient_accumulation_steps),
                str(batch.padding),
                format_bytes(need.weights_bytes),
                format_bytes(need.gradients_bytes),
                format_bytes(need.optimizer_bytes + need.ema_bytes),
                format_bytes(need.host_bytes),
                format_bytes(need.total_bytes),
            ]
        )
    if any(world.fits is False for world in plan.worlds):
        columns.append("")
        rows = [[*row, "" if world.fits else "does not fit"] for row, world in zip(rows, plan.worlds, strict=True)]
    _print_table(console, columns, rows)


class LiveScreen:
    """A panel that is drawn anew at the end of a terminal, and lines that stay above it; on a pipe the lines alone.

    Whoever ends this process by SIGTERM leaves the run alone, and finds the terminal as it was.
    """

    def __init__(self) -> None:
        self._phase = ""
        self._drawn_at = 0.0
        self._live: Live | None = None
        if _err.is_terminal and not _err.is_dumb_terminal:
            self._live = Live(console=_err, auto_refresh=False, transient=True)

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
        """Of the terminal, width and height in characters."""
        return _err.width, _err.height

    def note(self, text: str) -> None:
        """A line that stays, above the live panel."""
        message(text)

    def phase(self, text: str) -> None:
        """What the run does while it does not train."""
        if text != self._phase and not self._live:
            message(text)
        self._phase = text

    def draw(self, panel: Callable[[], Group], *, is_idle: bool) -> None:
        """Draw the panel anew, if there is one and it was not drawn just now.

        Args:
            is_idle: there is no more news for now, so it is drawn in any case.
        """
        if self._live and (is_idle or time.monotonic() - self._drawn_at > 1 / _REFRESH_PER_S):
            self._drawn_at = time.monotonic()
            self._live.update(panel(), refresh=True)


class TrainScreen(LiveScreen):
    """A run while it goes on."""

    def __init__(self, plan: Plan, *, losses: Sequence[float] = (), book: GoodputTracker | None = None) -> None:
        """Args:
        losses: of steps that are known already, when a run is resumed or watched.
        book: where its time went until now.
        """
        super().__init__()
        self._plan = plan
        self._losses = list(losses)
        self._last: dict[str, Any] = {}
        self._held_out: dict[str, Any] = {}
        self._book = book or GoodputTracker()
        self._news = EventDescriber()
        self._phase = "starting"
        self._world_size = 0
        self._began = time.monotonic()
        self._last_plain = 0.0
        self._recent: list[tuple[float, int]] = []

    def show(self, record: dict[str, Any] | None) -> None:
        """Take in one record of the run (None: nothing new) and redraw."""
        if record is not None:
            self._book.add(record)
        if record is not None and "event" in record:
            self._take_event(record)
        elif record is not None:
            self._take_step(record)
        self.draw(self._panel, is_idle=record is None)

    def _take_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "RunStarted":
            self.phase("forming the ranks")
        elif kind == "GenerationStarted":
            self._world_size = event["world_size"]
            peak = event["peak_flops"]
            measured = f", peak {format_count(peak)}FLOP/s ({event['peak_source']})" if peak else ""
            self.note(f"training on {workers(self._world_size)} ({event['device'].split(':')[0]}){measured}")
        elif kind == "Evaluated":
            self._held_out = event
            which = "" if event["weights"] == "current" else f" ({event['weights']} weights)"
            loss, ppl = number(event["loss"], ".4f"), number(event["perplexity"], ".2f")
            self.note(f"step {event['step']:>6}  held-out loss {loss}, perplexity {ppl}{which}")
        elif kind == "CheckpointSaved":
            size, seconds = format_bytes(event["size_bytes"]), format_duration(event["seconds"])
            waited = format_duration(event["stall_s"])
            self.note(
                f"step {event['step']:>6}  checkpoint of {size} written in {seconds}, training waited {waited}"
            )
        elif kind == "CheckpointFailed":
            warning(f"step {event['step']}: {event['reason']}")
        elif kind == "CheckpointSkipped":
            warning(f"passed over {event['folder']}: {event['reason']}")
        elif kind == "TrackingDegraded":
            warning(event["reason"])
        self._take_news(event)

    def _take_news(self, event: dict[str, Any]) -> None:
        line = self._news.line(event)
        if line is None:
            return
        is_phase = event["event"] in ("GenerationStarting", "WaitingForMachines")
        if not is_phase or (self._live and event.get("generation") != 1):
            self.note(line)
        if is_phase:
            self.phase(line)

    def _take_step(self, record: dict[str, Any]) -> None:
        self._last, self._phase = record, ""
        loss = record["train/loss"]
        self._losses.append(math.nan if loss is None else loss)
        self._recent.append((time.monotonic(), record["step"]))
        del self._recent[:-50]
        now = time.monotonic()
        is_notable = record["step"] in (1, self._plan.total_steps)
        if not self._live and (is_notable or now - self._last_plain >= _PLAIN_INTERVAL_S):
            self._last_plain = now
            message(self._line())

    def _line(self) -> str:
        last = self._last
        parts = [
            f"step {last['step']:>6}/{self._plan.total_steps}",
            f"loss {number(last['train/loss'], '.4f')}",
            f"lr {number(last['train/learning_rate'], '.2e')}",
            f"{number(last['speed/tokens_per_s'], ',.0f')} tokens/s",
            f"MFU {number(last['speed/mfu'], '.2f')}",
            f"{self._time_left()} left",
        ]
        return "  ".join(parts)

    def _panel(self) -> Group:
        width = max(20, _err.width - 2)
        elapsed = format_duration(time.monotonic() - self._began)
        if not self._last:
            return Group(Text(f"{self._phase} … {elapsed}", style="dim", no_wrap=True, overflow="ellipsis"))
        step, total = self._last["step"], self._plan.total_steps
        head = Table.grid(padding=(0, 1))
        for _ in range(3):
            head.add_column(no_wrap=True, overflow="ellipsis")
        bar = [ProgressBar(total=total, completed=step, width=min(40, width - 50))] if width >= 60 else []
        head.add_row(Text(f"step {step}/{total}"), *bar, Text(f"{elapsed}, {self._time_left()} left", style="dim"))
        last = self._last
        numbers = (
            f"loss {number(last['train/loss'], '.4f')}   {number(last['speed/tokens_per_s'], ',.0f')} tokens/s   "
            f"MFU {number(last['speed/mfu'], '.2f')}   lr {number(last['train/learning_rate'], '.2e')}"
        )
        if self._held_out:
            numbers += f"   held-out ppl {number(self._held_out['perplexity'], '.1f')}"
        spent = ledger_line(self._book.ledger(now=time.time()), width=width)
        lines: list[Any] = [head, Text(numbers, no_wrap=True, overflow="ellipsis")]
        lines += [
            Text(text, style="dim", no_wrap=True, overflow="ellipsis") for text in (spent, self._phase) if text
        ]
        if _err.height >= 12:
            lines += [
                Text(row, style="cyan", no_wrap=True) for row in loss_curve(self._losses, width=min(width, 72))
            ]
        return Group(*lines)

    def _time_left(self) -> str:
        """By the pace of the last steps, evaluations and checkpoints included."""
        if len(self._recent) < 2:
            return "-"
        (first_at, first), (last_at, last) = self._recent[0], self._recent[-1]
        pace = (last_at - first_at) / max(1, last - first)
        seconds = pace * (self._plan.total_steps - last)
        return format_duration(seconds) if seconds >= 1 else "0s"


def show_summary(run: RunSummary, *, losses: Sequence[float]) -> None:
    """How a run ended, what it reached and where it lies."""
    heading(run.run_id, f"{run.status} at step {run.step} of {run.plan.total_steps}")
    width = min(72, max(20, _out.width - 12))
    if _out.is_terminal and len(losses) > 1:
        for row in loss_curve(losses, width=width):
            _out.print(Text(row, style="cyan", no_wrap=True))
    _print_facts(_out, summary_facts(run))
    sample = run.newest("SampleGenerated")
    if sample:
        _out.print()
        _out.print(Text("a sample of its text", style="dim"))
        _out.print(Text.assemble((_harmless(sample["prompt"]), "bold"), _harmless(sample["text"])))


def show_ledger(ledger: GoodputReport, *, started: float) -> None:
    """Where a run's time went, and what made it change.

    Args:
        started: seconds since the epoch.
    """
    if not ledger.wall_s:
        return
    _out.print()
    _print_facts(_out, ledger_facts(ledger))
    _out.print()
    table(["where the time went", "#seconds", "#share"], bucket_rows(ledger))
    if ledger.changes:
        _out.print()
        rows = change_rows(ledger, started=started, limit=_MOST_CHANGES)
        table(["#after", "change", "workers", "#took", "what happened"], rows)
    if ledger.num_changes > _MOST_CHANGES:
        message(f"these are the last {_MOST_CHANGES} of {ledger.num_changes} changes; -o json has them all")


def _print_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    if not console.is_terminal:
        for name, text in facts:
            console.print(Text(f"{name:<11} {text}"))
        return
    drawn = Table.grid(padding=(0, 2))
    drawn.add_column(style="dim", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, text in facts:
        drawn.add_row(name, Text(text))
    console.print(drawn)


def _print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not console.is_terminal:
        _print_plain_table(console, columns, rows)
        return
    drawn = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        is_number = column.startswith("#")
        drawn.add_column(column.lstrip("#"), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console.print(drawn)


def _print_plain_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    names = [column.lstrip("#") for column in columns]
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [
            cell.rjust(width) if column.startswith("#") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        console.print(Text("  ".join(cells).rstrip()))


def _harmless(text: str) -> str:
    """Text that somebody else wrote, without what could command a terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class StageScreen:
    """What happens on a cluster's machines: a line for each on a terminal, else one for each piece of news."""

    def __init__(self) -> None:
        self._stages: dict[str, NodeProgress] = {}
        self._began = time.monotonic()
        self._lock = threading.Lock()  # machines are worked on by threads
        self._live = Live(console=_err, refresh_per_second=_REFRESH_PER_S * 2, get_renderable=self._lines)

    def __enter__(self) -> StageScreen:
        if _err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def show(self, stage: NodeProgress) -> None:
        """Take news of one machine."""
        with self._lock:
            self._stages[stage.name] = stage
            if not self._live.is_started:
                message(f"{stage.name}: {'! ' if stage.is_failure else ''}{stage.message}")

    def _lines(self) -> Group:
        with self._lock:
            shown = list(self._stages.values())
        room = max(1, _err.height - 2)
        lines = [
            Text(
                f"{stage.name:<16} {stage.message}",
                style="yellow" if stage.is_failure else "",
                no_wrap=True,
                overflow="ellipsis",
            )
            for stage in shown[-room:]
        ]
        return Group(*lines, Text(f"… {format_duration(time.monotonic() - self._began)}", style="dim"))


class PrepareScreen:
    """The preparation of a corpus: one line that changes on a terminal, a few lines on a pipe."""

    def __init__(self) -> None:
        self._stage = ""
        self._shown_at = 0.0

    def __enter__(self) -> PrepareScreen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stage and _err.is_terminal:
            sys.stderr.write("\r\033[K")

    def show(self, progress: PrepareProgress) -> None:
        """Show how far it is."""
        now = time.monotonic()
        is_new = progress.stage != self._stage
        if not is_new and now - self._shown_at < 1 / _REFRESH_PER_S:
            return
        self._stage, self._shown_at = progress.stage, now
        text = _PREPARE_STAGES[progress.stage]
        if progress.stage == "tokens" and progress.num_documents:
            done = f"{progress.num_documents:,} documents, {format_count(progress.num_tokens)} tokens"
            text = f"{text}: {done}"
        if _err.is_terminal:
            sys.stderr.write("\r\033[K" + f"{text} …"[: _err.width - 1])
            sys.stderr.flush()
        elif is_new:
            message(text)


_PREPARE_STAGES = {
    "fingerprint": "looking at the corpus",
    "waiting": "waiting for another process that prepares the same corpus",
    "tokenizer": "training the tokenizer",
    "tokens": "turning text into tokens",
}
