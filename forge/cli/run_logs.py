"""`forge runs logs`: a run's own lines, or the log of one of its processes."""

from __future__ import annotations

import heapq
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli.options import RunArgument, RunsOption

if TYPE_CHECKING:
    from forge.cli.run_screen import TrainScreen
    from forge.cli.trials_screen import TuneScreen
    from forge.plan.plan import Plan
    from forge.runs.logs import LibraryWarnings


def logs(
    run: RunArgument = "latest",
    runs: RunsOption = Path("runs"),
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="The log of one process: rank-0, rank-1, ..., recorder or driver; by default the run's own lines, "
            "then those of rank 0 (of a search: of its driver).",
            show_default=False,
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Number of lines.")] = 50,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what is written, until the run ends or Ctrl-C.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Also show the warnings of libraries.")] = False,
) -> None:
    """Print the last lines of a run: its steps, evaluations, checkpoints and events, and what its rank 0 printed.

    Example:  forge runs logs latest --file driver -n 20 -f
    """
    from forge.runs.logs import LibraryWarnings
    from forge.runs.reader import find_run

    folder, warnings = find_run(run, root=runs), LibraryWarnings(are_shown=every)
    if file is not None:
        _print_file(folder, name=file, lines=lines, follow=follow, warnings=warnings)
    else:
        _print_run(folder, lines=lines, follow=follow, warnings=warnings)
    _say_folded(warnings)


def _print_file(folder: Path, *, name: str, lines: int, follow: bool, warnings: LibraryWarnings) -> None:
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.remote.mirror import remote_log
    from forge.runs.lock import driver_pid
    from forge.runs.logs import follow_log, last_lines, log_size
    from forge.runs.reader import search_folder
    from forge.runs.remote_ref import read_remote_ref

    if read_remote_ref(folder) is not None:
        if follow:
            raise ArgumentError(
                f"{folder.name} runs on another machine, whose logs cannot be followed; follow its steps with: "
                f"forge runs logs {folder.name} -f"
            )
        display.print_text(warnings.fold(remote_log(folder, name=name, lines=lines)) or "(empty)")
        return
    size = log_size(folder, name=name)
    display.print_text(last_lines(folder, name=name, lines=lines, warnings=warnings) or "(empty)")
    if not follow:
        return
    owner = search_folder(folder) or folder
    for text in follow_log(folder, name=name, offset=size, goes_on=lambda: driver_pid(owner) is not None):
        _write(warnings.feed(text))
    _write(warnings.close())


def _print_run(folder: Path, *, lines: int, follow: bool, warnings: LibraryWarnings) -> None:
    """Print the lines that `forge train` prints on a pipe, then what rank 0 printed itself."""
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.runs.logs import last_lines, log_size
    from forge.runs.reader import count_records, read_plan

    plan, counts = read_plan(folder), count_records(folder)
    name = "rank-0" if plan.search is None else "driver"
    size = log_size(folder, name=name)
    _print_lines(_past_lines(folder, plan)[-lines:] or ["(no steps yet)"])
    try:
        own = last_lines(folder, name=name, lines=lines, warnings=warnings)
    except ArgumentError:  # it does not exist yet, or is on another machine
        own = ""
    if own:
        display.print_text(f"--- {name}.log\n{own}")
    if follow:
        _follow_run(folder, plan, past=counts, name=name, offset=size, warnings=warnings)


def _past_lines(folder: Path, plan: Plan) -> list[str]:
    """The lines of the records until now."""
    from forge.runs.goodput import moment
    from forge.runs.reader import failure_of, iter_metrics, read_run

    run, screen = read_run(folder), _Screen(plan)
    records = heapq.merge(run.events, iter_metrics(folder), key=moment)
    lines = [line for record in records for line in screen.lines_of(record)]
    failure = failure_of(run)
    return [*lines, *(f"failed: {failure}".splitlines() if failure is not None else ())]


def _follow_run(
    folder: Path, plan: Plan, *, past: tuple[int, int], name: str, offset: int, warnings: LibraryWarnings
) -> None:
    from forge.remote.mirror import find_run_handle
    from forge.runs.logs import read_new
    from forge.runs.reader import follow, search_folder

    handle = find_run_handle(search_folder(folder) or folder)
    if handle is None:
        return
    screen = _Screen(plan)
    for record in follow(folder, goes_on=handle.is_alive, past_events=past[0], past_steps=past[1]):
        if record is not None:
            _print_lines(screen.lines_of(record))
            continue
        text, offset = read_new(folder, name=name, offset=offset)
        _write(warnings.feed(text))
    _write(warnings.feed(read_new(folder, name=name, offset=offset)[0]) + warnings.close())


class _Screen:
    """The plain lines of a run's screen, by the clock of its records."""

    def __init__(self, plan: Plan) -> None:
        from forge.cli.display import HarmlessConsole
        from forge.cli.run_screen import TrainScreen
        from forge.cli.trials_screen import TuneScreen

        self._sent = io.StringIO()
        console = HarmlessConsole(
            file=self._sent, soft_wrap=True, force_terminal=False, highlight=False, markup=False, emoji=False
        )
        self._now = 0.0
        screen: type[TrainScreen] | type[TuneScreen] = TrainScreen if plan.search is None else TuneScreen
        self._screen: TrainScreen | TuneScreen = screen(plan, console=console, clock=lambda: self._now)

    def lines_of(self, record: Mapping[str, Any]) -> list[str]:
        """Take in a record, and return the lines that it adds."""
        self._now = record["time"]
        self._screen.show(dict(record))
        lines = self._sent.getvalue().splitlines()
        self._sent.seek(0)
        self._sent.truncate()
        return lines


def _print_lines(lines: Sequence[str]) -> None:
    from forge.cli import display

    for line in lines:
        display.message(line, console=display.OUT)


def _write(text: str) -> None:
    from forge.cli import display

    if text:
        sys.stdout.write(display.harmless(text))
        sys.stdout.flush()


def _say_folded(warnings: LibraryWarnings) -> None:
    from forge.cli import display

    if warnings.counts:
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(warnings.counts.items()))
        display.message(f"not shown: warnings of libraries ({counted}); --all shows them")
