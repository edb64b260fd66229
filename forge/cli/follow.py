"""A run or a search while it goes on, and how it ended; what `train`, `tune` and `runs` share."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from forge.cli.options import Output

if TYPE_CHECKING:
    from forge.cli.display import TrainScreen
    from forge.cli.trials_screen import TuneScreen
    from forge.plan.plan import Plan
    from forge.runs.reader import RunSummary
    from forge.runtime.driver_process import RunHandle

INTERRUPTED = 130
_STOPPING = (
    "stopping after this step, with a checkpoint; Ctrl-C again stops now, without one",
    "stopping now",
)
_STOPPING_ALL = (
    "stopping every trial after its step, with a checkpoint; Ctrl-C again stops now, without one",
    "stopping now",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a run has written until now."""

    events: tuple[dict[str, Any], ...]
    steps: tuple[dict[str, Any], ...]


def past_of(folder: Path) -> Past:
    """What a screen needs that goes on with a run."""
    from forge.runs.reader import read_metrics, read_run

    return Past(events=read_run(folder).events, steps=tuple(read_metrics(folder)))


def screen_of(plan: Plan, *, past: Past) -> TrainScreen | TuneScreen:
    """The screen of a run or of a search, with what it has written until now."""
    if plan.search is not None:
        from forge.cli.trials_screen import TuneScreen

        return TuneScreen(plan, past=past.events)
    from forge.cli.display import TrainScreen
    from forge.runs.goodput import tracker_of

    losses = [record["train/loss"] for record in past.steps]
    known = [float("nan") if loss is None else loss for loss in losses]
    return TrainScreen(plan, losses=known, book=tracker_of(past.events, past.steps))


def follow_run(carried: RunHandle, resolved: Plan, *, past: Past) -> bool:
    """Show a run until it ends. Ctrl-C once asks it to stop, twice ends it. Returns: whether it was asked."""
    asked = told = 0
    words = _STOPPING if resolved.search is None else _STOPPING_ALL

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        carried.request_stop()

    def tell_asked(screen: TrainScreen | TuneScreen) -> None:
        # Said here and not by the handler, which may have interrupted the screen in the middle of a line.
        nonlocal told
        while told < min(asked, len(words)):
            screen.note(words[told])
            told += 1

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        watch_run(carried, resolved, folder=carried.folder, past=past, on_record=tell_asked)
    finally:
        signal.signal(signal.SIGINT, before)
    carried.wait()
    return asked > 0


def watch_run(
    carried: RunHandle,
    plan: Plan,
    *,
    folder: Path,
    past: Past,
    on_record: Callable[[TrainScreen | TuneScreen], None] = lambda _: None,
) -> None:
    """Show a run until it ends.

    Args:
        folder: the run's, or that of a trial of the search that is carried.
        on_record: called before each record is shown, and also while there is none.
    """
    from forge.runs.reader import follow

    with screen_of(plan, past=past) as screen:
        for record in follow(
            folder, goes_on=carried.is_alive, past_events=len(past.events), past_steps=len(past.steps)
        ):
            for line in carried.connection_messages():
                screen.note(line)
            on_record(screen)
            screen.show(record)


def conclude(folder: Path, *, interrupted: bool, output: Output, past_events: int = 0) -> None:
    """Say how a run ended, and leave with its exit code.

    Args:
        past_events: how many there were before the run was carried on; an end among them is not its end.
    """
    from forge.runs.reader import read_run
    from forge.runtime.driver_process import wait_until_free

    wait_until_free(folder)
    run = read_run(folder)
    if past_events and len(run.events) <= past_events:
        run = replace(run, status="died")
    if run.plan.search is not None:
        _conclude_search(run, interrupted=interrupted, output=output)
    else:
        _conclude_training(run, interrupted=interrupted, output=output)


def print_record(run: RunSummary) -> None:
    """A run or a search as JSON, to stdout."""
    from forge.cli import display
    from forge.runs.reader import summary_record

    if run.plan.search is None:
        display.print_json(summary_record(run))
        return
    from forge.report.search_record import search_record

    display.print_json(search_record(run))


def show_search(run: RunSummary, *, has_table: bool) -> None:
    """What came out of a search, until now if it goes on."""
    from forge.cli import trials_screen
    from forge.report.search_summary import search_summary
    from forge.search.importance import importances

    summary = search_summary(run)
    if has_table:
        trials_screen.show_trials(summary)
    trials_screen.show_outcome(summary, importances=importances(summary.search, summary.book))


def handle(folder: Path) -> str:
    """What names a run on the command line: its id, or its folder where it is not under `runs`."""
    from forge.runs.reader import search_folder

    search = search_folder(folder)
    return folder.name if (search or folder).parent == Path("runs") else str(folder)


def _conclude_training(run: RunSummary, *, interrupted: bool, output: Output) -> None:
    from forge.cli import display
    from forge.runs.reader import read_metrics, search_folder

    if output is Output.JSON:
        print_record(run)
    else:
        losses = [record["train/loss"] for record in read_metrics(run.folder) if record["train/loss"] is not None]
        display.show_summary(run, losses=losses)
    if run.status == "finished":
        display.next_command(f"forge generate {handle(run.folder)} --prompt 'import '", purpose="try it")
        return
    code = _tell_end(run, interrupted=interrupted)
    search = search_folder(run.folder)
    if search is not None:
        display.next_command(f"forge runs show {handle(search)}", purpose="see its search")
    else:
        purpose = "go on" if run.newest("CheckpointSaved") else "try again"
        display.next_command(f"forge train --resume {handle(run.folder)}", purpose=purpose)
    raise typer.Exit(code)


def _conclude_search(run: RunSummary, *, interrupted: bool, output: Output) -> None:
    from forge.cli import display
    from forge.errors import JobFileError
    from forge.report.search_record import write_results
    from forge.report.search_summary import no_result_error, search_summary

    summary = search_summary(run)
    if summary.book.trials:
        try:
            write_results(run.folder)
        except JobFileError as error:  # the job itself cannot have what its proxy could
            display.warning(str(error))
    if output is Output.JSON:
        print_record(run)
    else:
        show_search(run, has_table=False)
    if summary.book.trials:
        display.message(f"its trials side by side: {run.folder / 'report.html'}")
    if (run.folder / "best.yaml").exists():
        display.next_command(f"forge train {run.folder / 'best.yaml'}", purpose="train the best")
    futility = no_result_error(summary)
    is_at_limit = run.status == "stopped" and bool((run.newest("RunStopped") or {}).get("reason"))
    if run.status == "finished" and futility is not None:
        display.error(str(futility))
        raise typer.Exit(futility.exit_code)
    if run.status == "finished":
        return
    code = _tell_end(run, interrupted=interrupted)
    if is_at_limit and futility is not None:
        display.error(str(futility))
    purpose = "go on" if summary.book.trials else "try again"
    display.next_command(f"forge tune --resume {handle(run.folder)}", purpose=purpose)
    if not (is_at_limit and summary.best is not None):
        raise typer.Exit(code)


def _tell_end(run: RunSummary, *, interrupted: bool) -> int:
    """Say why a run ended before its last step. Returns: the exit code."""
    from forge.cli import display
    from forge.errors import RunError
    from forge.runs.reader import failure_of

    failure, code = failure_of(run), INTERRUPTED
    spent = run.newest("RunStopped") or {}
    if run.status == "stopped" and spent.get("reason"):
        display.warning(f"stopped: {spent['reason']}")
        code = RunError.exit_code
    if interrupted and run.status == "died":
        display.message("stopped at once, as asked; what came after the newest checkpoint is lost")
    elif failure is not None:
        display.error(str(failure))
        code = failure.exit_code
    return code
