"""Everything a person sees; the only user of rich.

Tables and summaries go to stdout, progress and messages to stderr. Colours and live displays are for
terminals alone; on a pipe the same news come as plain lines. NO_COLOR is respected by rich.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forge.data.prepare import PrepareProgress
from forge.plan.plan import Plan
from forge.report.runs import RunSummary
from forge.units import format_bytes, format_count, format_duration

_REFRESH_PER_S = 2
_PLAIN_INTERVAL_S = 5.0
_BLOCKS = " ▁▂▃▄▅▆▇█"
_CURVE_ROWS = 5

_out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
_err = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


def message(text: str) -> None:
    """One line of news, to stderr."""
    _err.print(escape(text))


def warning(text: str) -> None:
    """Something that went wrong and was survived."""
    _err.print(f"[yellow]! {escape(text)}[/]")


def error(text: str) -> None:
    """The last word of a command that failed."""
    _err.print(f"[bold red]error:[/] {escape(text)}")


def next_command(command: str, *, purpose: str) -> None:
    """The next useful command, in a dim line."""
    _err.print(f"[dim]{escape(purpose)}: {escape(command)}[/]")


def print_json(value: Any) -> None:
    """Machine-readable output, to stdout alone; what is not finite becomes null."""
    sys.stdout.write(json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False) + "\n")


def print_text(text: str) -> None:
    """Text as it is, to stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table; columns whose name begins with `#` are numbers and stand to the right."""
    if not sys.stdout.isatty():
        _plain_table(columns, rows)
        return
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column.startswith("#")
        drawn.add_column(column.lstrip("#"), justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(cell) for cell in row))
    _out.print(drawn)


def show_plan(plan: Plan, *, to_stderr: bool = False) -> None:
    """What will happen, before it happens."""
    console = _err if to_stderr else _out
    console.print(f"[bold]{escape(plan.job.name)}[/]  {escape(_headline(plan))}")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for name, text in _plan_facts(plan):
        facts.add_row(name, escape(text))
    console.print(facts)
    worlds = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    sizes = ("weights", "grads", "optimizer", "~total")
    for column in ("workers", "micro", "accum.", "padding", *sizes, ""):
        worlds.add_column(column, justify="right")
    for world in plan.worlds:
        batch, need = world.batch, world.footprint
        worlds.add_row(
            str(batch.world_size),
            str(batch.micro_batch_size),
            str(batch.gradient_accumulation_steps),
            str(batch.padding),
            format_bytes(need.weights_bytes),
            format_bytes(need.gradients_bytes),
            format_bytes(need.optimizer_bytes + need.ema_bytes),
            format_bytes(need.total_bytes),
            "[red]does not fit[/]" if world.fits is False else "",
        )
    console.print(worlds)


class TrainScreen:
    """A run while it goes on: a live panel on a terminal, plain lines on a pipe."""

    def __init__(self, plan: Plan, *, losses: Sequence[float] = ()) -> None:
        """Args:
        losses: of steps that are known already, when a run is resumed or watched.
        """
        self._plan = plan
        self._losses = list(losses)
        self._last: dict[str, Any] = {}
        self._held_out: dict[str, Any] = {}
        self._phase = "starting"
        self._world_size = 0
        self._began = time.monotonic()
        self._last_plain = 0.0
        self._recent: list[tuple[float, int]] = []
        self._live: Live | None = None
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            self._live = Live(console=_err, auto_refresh=False, transient=True)

    def __enter__(self) -> TrainScreen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, record: dict[str, Any] | None) -> None:
        """Take in one record of the run (None: nothing new) and redraw."""
        if record is not None and "event" in record:
            self._take_event(record)
        elif record is not None:
            self._take_step(record)
        if self._live and (record is None or time.monotonic() - self._last_plain > 1 / _REFRESH_PER_S):
            self._last_plain = time.monotonic()
            self._live.update(self._panel(), refresh=True)

    def note(self, text: str) -> None:
        """A line that stays, above the live panel."""
        _err.print(escape(text))

    def phase(self, text: str) -> None:
        """What the run does while it does not train."""
        if text != self._phase and not self._live:
            _err.print(escape(text))
        self._phase = text

    def _take_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "RunStarted":
            self.phase("forming the ranks")
        elif kind == "GenerationFormed":
            self._world_size = event["world_size"]
            peak = event["peak_flops"]
            measured = f", peak {format_count(peak)}FLOP/s ({event['peak_source']})" if peak else ""
            workers = "1 worker" if self._world_size == 1 else f"{self._world_size} workers"
            self.note(f"training on {workers} ({event['device'].split(':')[0]}){measured}")
            self.phase("first step")
        elif kind == "Evaluated":
            self._held_out = event
            which = "" if event["weights"] == "current" else f" ({event['weights']} weights)"
            loss, ppl = _number(event["loss"], ".4f"), _number(event["perplexity"], ".2f")
            self.note(f"step {event['step']:>6}  held-out loss {loss}, perplexity {ppl}{which}")
        elif kind == "CheckpointSaved":
            size, seconds = format_bytes(event["size_bytes"]), format_duration(event["seconds"])
            self.note(f"step {event['step']:>6}  checkpoint of {size} written in {seconds}")
        elif kind == "CheckpointFailed":
            warning(f"step {event['step']}: {event['reason']}")
        elif kind == "CheckpointSkipped":
            warning(f"passed over {event['folder']}: {event['reason']}")
        elif kind == "TrackingDegraded":
            warning(event["reason"])

    def _take_step(self, record: dict[str, Any]) -> None:
        self._last = record
        loss = record["train/loss"]
        self._losses.append(math.nan if loss is None else loss)
        self._recent.append((time.monotonic(), record["step"]))
        del self._recent[:-50]
        now = time.monotonic()
        is_notable = record["step"] in (1, self._plan.total_steps)
        if not self._live and (is_notable or now - self._last_plain >= _PLAIN_INTERVAL_S):
            self._last_plain = now
            _err.print(self._line())

    def _line(self) -> str:
        last = self._last
        parts = [
            f"step {last['step']:>6}/{self._plan.total_steps}",
            f"loss {_number(last['train/loss'], '.4f')}",
            f"lr {_number(last['train/learning_rate'], '.2e')}",
            f"{_number(last['speed/tokens_per_s'], ',.0f')} tokens/s",
            f"MFU {_number(last['speed/mfu'], '.2f')}",
            f"{self._time_left()} left",
        ]
        return "  ".join(parts)

    def _panel(self) -> Group:
        width = max(20, _err.width - 2)
        elapsed = format_duration(time.monotonic() - self._began)
        if not self._last:
            return Group(Text(f"{self._phase} … {elapsed}", style="dim"))
        step, total = self._last["step"], self._plan.total_steps
        bar = ProgressBar(total=total, completed=step, width=max(10, min(40, width - 50)))
        head = Table.grid(padding=(0, 1))
        head.add_row(Text(f"step {step}/{total}"), bar, Text(f"{elapsed}, {self._time_left()} left", style="dim"))
        last = self._last
        numbers = (
            f"loss {_number(last['train/loss'], '.4f')}   {_number(last['speed/tokens_per_s'], ',.0f')} tokens/s   "
            f"MFU {_number(last['speed/mfu'], '.2f')}   lr {_number(last['train/learning_rate'], '.2e')}"
        )
        if self._held_out:
            numbers += f"   held-out ppl {_number(self._held_out['perplexity'], '.1f')}"
        lines: list[Any] = [head, Text(numbers, no_wrap=True, overflow="ellipsis")]
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
        if pace == 0:
            return "-"
        return format_duration(pace * (self._plan.total_steps - last))


def show_summary(run: RunSummary, *, losses: Sequence[float]) -> None:
    """How a run ended, what it reached and where it lies."""
    corpus = run.plan.corpus
    _out.print()
    _out.print(f"[bold]{escape(run.run_id)}[/]  {run.status} at step {run.step} of {run.plan.total_steps}")
    width = min(72, max(20, _out.width - 12))
    if sys.stdout.isatty() and len(losses) > 1:
        for row in loss_curve(losses, width=width):
            _out.print(f"[cyan]{row}[/]")
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _summary_facts(run, unigram=corpus.unigram_perplexity if corpus else math.nan):
        facts.add_row(name, escape(text))
    _out.print(facts)
    sample = run.newest("SampleGenerated")
    if sample:
        _out.print()
        _out.print("[dim]a sample of its text[/]")
        _out.print(f"[bold]{escape(sample['prompt'])}[/]{escape(sample['text'])}")


def loss_curve(losses: Sequence[float], *, width: int, rows: int = _CURVE_ROWS) -> list[str]:
    """The losses as a small picture of block characters, the largest and smallest at its left.

    Each column is the mean of the steps it stands for.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    columns = max(1, width - 9)
    if not finite:
        return []
    count = min(columns, len(finite))
    means = []
    for column in range(count):
        part = finite[column * len(finite) // count : (column + 1) * len(finite) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    levels = [1 + round((value - low) / span * (rows * 8 - 1)) for value in means]
    picture = []
    for row in reversed(range(rows)):
        label = f"{high:8.3f} " if row == rows - 1 else f"{low:8.3f} " if row == 0 else " " * 9
        picture.append(label + "".join(_BLOCKS[min(8, max(0, level - row * 8))] for level in levels))
    return picture


def _headline(plan: Plan) -> str:
    return (
        f"{format_count(plan.model.num_parameters)} parameters, "
        f"{format_count(plan.total_tokens)} tokens, {plan.total_steps:,} steps"
    )


def _plan_facts(plan: Plan) -> list[tuple[str, str]]:
    training, corpus = plan.job.training, plan.corpus
    total_flops = plan.flops_per_token * plan.total_tokens
    facts = [
        ("model", f"{plan.model.class_name}, {plan.model.num_layers} layers of {plan.model.hidden_size}"),
        (
            "batch",
            f"{training.global_batch_size} sequences of {plan.job.data.seq_len} tokens, "
            f"the same at every number of workers",
        ),
        ("training", f"{training.precision}, ZeRO {training.zero.stage}, lr {training.optimizer.lr:g} "
         f"({training.schedule.kind}, {training.schedule.warmup_steps} steps of warm-up)"),
        ("arithmetic", f"{format_count(plan.flops_per_token)}FLOP per token, "
         f"{format_count(total_flops)}FLOP in all"),
        ("hardware", _hardware(plan)),
    ]  # fmt: skip
    if corpus:
        epochs = plan.total_steps * training.global_batch_size / max(1, corpus.num_train_sequences)
        facts.insert(1, (
            "corpus",
            f"{corpus.num_documents:,} documents, {format_count(corpus.num_train_tokens)} training tokens "
            f"({epochs:.2f} epochs), {format_count(corpus.num_held_out_tokens)} held out, "
            f"vocabulary {corpus.vocab_size:,}",
        ))  # fmt: skip
    return facts


def _hardware(plan: Plan) -> str:
    hardware = plan.hardware
    memory = f", {format_bytes(hardware.memory_bytes)} a worker" if hardware.memory_bytes else ""
    return f"{'GPU' if hardware.device == 'cuda' else 'CPU'} {hardware.name}{memory}"


def _summary_facts(run: RunSummary, *, unigram: float) -> list[tuple[str, str]]:
    facts: list[tuple[str, str]] = []
    if run.last:
        facts.append(("loss", f"{_number(run.last['train/loss'], '.4f')} on the last batch"))
    for weights, name in (("current", "held out"), ("ema", "held out, ema")):
        evaluated = run.newest("Evaluated", weights=weights)
        if evaluated:
            text = f"perplexity {_number(evaluated['perplexity'], '.2f')}"
            if weights == "current" and math.isfinite(unigram):
                text += f" (a unigram model of the same tokens has {unigram:.1f})"
            facts.append((name, text))
    if run.last:
        facts.append(
            ("speed", f"{_number(run.last['speed/tokens_per_s'], ',.0f')} tokens/s, "
             f"MFU {_number(run.last['speed/mfu'], '.3f')}, {format_duration(run.updated - run.started)} in all")
        )  # fmt: skip
    saved = run.newest("CheckpointSaved")
    if saved:
        facts.append(("checkpoint", f"{saved['folder']}"))
    facts.append(("files", f"{run.folder} (metrics.jsonl, events.jsonl, logs, wandb)"))
    failed = run.newest("RunFailed")
    if failed and run.status == "failed":
        facts.append(("failed", failed["message"]))
    return facts


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    names = [column.lstrip("#") for column in columns]
    widths = [max(len(cell) for cell in column) for column in zip(names, *rows, strict=True)]
    for row in (names, *rows):
        cells = [
            cell.rjust(width) if column.startswith("#") else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _number(value: float | None, shape: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, shape)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PrepareScreen:
    """The preparation of a corpus: one line that changes on a terminal, a few lines on a pipe."""

    def __init__(self) -> None:
        self._stage = ""
        self._shown_at = 0.0

    def __enter__(self) -> PrepareScreen:
        return self

    def __exit__(self, *_: object) -> None:
        if self._stage and sys.stderr.isatty():
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
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{text} …"[: _err.width + 4])
            sys.stderr.flush()
        elif is_new:
            _err.print(text)


_PREPARE_STAGES = {
    "fingerprint": "looking at the corpus",
    "waiting": "waiting for another process that prepares the same corpus",
    "tokenizer": "training the tokenizer",
    "tokens": "turning text into tokens",
}
