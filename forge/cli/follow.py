"""Following a run or a search, and reporting how it ended; shared by `train`, `tune` and `runs`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from forge.cli.options import Output

if TYPE_CHECKING:
    from forge.cli.mover import Mover
    from forge.cli.run_screen import TrainScreen
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
    """The events and steps that a run recorded before it is followed."""

    events: tuple[dict[str, Any], ...]
    steps: tuple[dict[str, Any], ...]


def past_of(folder: Path) -> Past:
    """Read what a run has recorded until now."""
    from forge.runs.reader import read_metrics, read_run

    return Past(events=read_run(folder).events, steps=tuple(read_metrics(folder)))


def screen_of(plan: Plan, *, past: Past) -> TrainScreen | TuneScreen:
    """Build the screen of a run or a search, with what it has recorded until now."""
    if plan.search is not None:
        from forge.cli.trials_screen import TuneScreen

        return TuneScreen(plan, past=past.events)
    from forge.cli.run_screen import TrainScreen
    from forge.runs.goodput import tracker_of

    losses = [record["train/loss"] for record in past.steps]
    known = [float("nan") if loss is None else loss for loss in losses]
    return TrainScreen(plan, losses=known, tracker=tracker_of(past.events, past.steps))


def follow_run(run: RunHandle, plan: Plan, *, past: Past) -> bool:
    """Show a run until it ends. Ctrl-C once asks it to stop, twice stops it now; SIGTERM ends the command alone.

    A run that moves to another region is followed there.

    Returns: whether Ctrl-C was pressed.
    """
    from forge.cli.mover import Mover

    while True:
        mover = Mover(run, plan)
        is_interrupted = _follow_here(run, plan, past=past, mover=mover)
        past = past_of(run.folder)
        moved = None if is_interrupted else mover.continue_elsewhere()
        if moved is None:
            return is_interrupted
        run = moved


def _follow_here(run: RunHandle, plan: Plan, *, past: Past, mover: Mover) -> bool:
    num_interrupts = num_notes = 0
    notes = _STOPPING if plan.search is None else _STOPPING_ALL

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal num_interrupts
        num_interrupts += 1
        run.request_stop()

    def note_interrupts(screen: TrainScreen | TuneScreen) -> None:
        # Not printed by the handler, which may interrupt the screen in the middle of a line.
        nonlocal num_notes
        while num_notes < min(num_interrupts, len(notes)):
            screen.note(notes[num_notes])
            num_notes += 1

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        watch_run(run, plan, folder=run.folder, past=past, on_record=note_interrupts, mover=mover)
    except SystemExit:  # SIGTERM: see LiveScreen
        from forge.cli import display

        display.next_command(f"forge runs watch {handle(run.folder)}", purpose="the run continues; follow it")
        raise
    except BaseException:
        run.wait()
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    run.wait()
    return num_interrupts > 0


def watch_run(
    run: RunHandle,
    plan: Plan,
    *,
    folder: Path,
    past: Past,
    on_record: Callable[[TrainScreen | TuneScreen], None] = lambda _: None,
    mover: Mover | None = None,
) -> None:
    """Show a run until it ends.

    Args:
        folder: of the run, or of a trial of the running search.
        on_record: called before each record is shown, and repeatedly while there is none.
        mover: gets each event after it is shown.
    """
    from forge.runs.reader import follow

    with screen_of(plan, past=past) as screen:
        for record in follow(
            folder, goes_on=run.is_alive, past_events=len(past.events), past_steps=len(past.steps)
        ):
            for line in run.connection_messages():
                screen.note(line)
            on_record(screen)
            screen.show(record)
            if mover is not None and record is not None and "event" in record:
                mover.on_event(record, screen.note)


def conclude(folder: Path, *, interrupted: bool, output: Output, past_events: int = 0) -> None:
    """Print how a run ended, and exit with its code.

    Args:
        interrupted: Ctrl-C was pressed while following it.
        past_events: recorded before the run was resumed; an ending among them is not this one's.
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
    """Print a run or a search as JSON to stdout."""
    from forge.cli import display
    from forge.runs.reader import summary_record

    if run.plan.search is None:
        display.print_json(summary_record(run))
        return
    from forge.report.search_record import search_record

    display.print_json(search_record(run))


def show_search(run: RunSummary, *, has_table: bool) -> None:
    """Print the results of a search, so far if it is running."""
    from forge.cli import trials_screen
    from forge.report.search_summary import search_summary
    from forge.search.importance import importances

    summary = search_summary(run)
    if has_table:
        trials_screen.show_trials(summary)
    trials_screen.show_outcome(summary, importances=importances(summary.search, summary.table))


def handle(folder: Path) -> str:
    """Return a run for a command line, quoted for a shell: its id, or its folder if that is not under `runs`."""
    from forge.runs.reader import search_folder

    search = search_folder(folder)
    return shlex.quote(folder.name if (search or folder).parent == Path("runs") else str(folder))


def _conclude_training(run: RunSummary, *, interrupted: bool, output: Output) -> None:
    from forge.cli import display, run_screen
    from forge.report.run_report import write_end_report
    from forge.runs.reader import read_metrics, search_folder
    from forge.runs.remote_ref import read_remote_ref

    if read_remote_ref(run.folder) is not None:  # its driver writes the report on the cluster
        problem = write_end_report(run.folder)
        if problem is not None:
            display.message(problem)
    if output is Output.JSON:
        print_record(run)
    else:
        losses = [record["train/loss"] for record in read_metrics(run.folder) if record["train/loss"] is not None]
        run_screen.show_summary(run, goodput=run.goodput(), losses=losses)
    if run.status == "finished":
        _suggest_use(run)
        return
    code = _report_end(run, interrupted=interrupted)
    search = search_folder(run.folder)
    if search is not None:
        display.next_command(f"forge runs show {handle(search)}", purpose="see its search")
    else:
        purpose = "resume" if run.newest("CheckpointSaved") else "try again"
        purpose = f"once that is fixed, {purpose}" if _is_permanent(run) else purpose
        display.next_command(f"forge train --resume {handle(run.folder)}", purpose=purpose)
    raise typer.Exit(code)


def _suggest_use(run: RunSummary) -> None:
    """Suggest to generate with the prompt of the run's own sample, or to export a model that answers none."""
    from forge.cli import display

    sample, name = run.newest("SampleGenerated"), handle(run.folder)
    job = run.plan.job
    has_failed = sample is None and run.newest("SampleFailed") is not None
    if has_failed or job.training.objective in ("span-corruption", "reward"):
        display.next_command(f"forge checkpoints export {name} --to {name}-weights", purpose="export its weights")
        return
    shown = sample["prompt"] if sample is not None else ""
    prompt = shown.removesuffix(" → ")
    is_turn = prompt != shown and job.training.auto_class == "AutoModelForCausalLM"
    option = " --chat" * is_turn
    option += f" --prompt {shlex.quote(prompt)}" if prompt and prompt.isprintable() else ""
    display.next_command(f"forge generate {name}{option}", purpose="try it")


def _conclude_search(run: RunSummary, *, interrupted: bool, output: Output) -> None:
    from forge.cli import display
    from forge.errors import JobFileError
    from forge.report.search_record import write_results
    from forge.report.search_summary import no_result_error, search_summary

    summary = search_summary(run)
    if summary.table.trials:
        try:
            write_results(run.folder)
        except JobFileError as error:  # the full job rejects values that its proxy accepts
            display.warning(str(error))
    if output is Output.JSON:
        print_record(run)
    else:
        show_search(run, has_table=False)
    if summary.table.trials:
        display.message(f"report: {run.folder / 'report.html'}")
    if (run.folder / "best.yaml").exists():
        best = shlex.quote(str(run.folder / "best.yaml"))
        display.next_command(f"forge train {best}", purpose="train with the best values")
    no_result = no_result_error(summary)
    is_at_limit = run.status == "stopped" and bool((run.newest("RunStopped") or {}).get("reason"))
    if run.status == "finished" and no_result is not None:
        display.error(str(no_result))
        raise typer.Exit(no_result.exit_code)
    if run.status == "finished":
        return
    code = _report_end(run, interrupted=interrupted)
    if is_at_limit and no_result is not None:
        display.error(str(no_result))
    purpose = "resume" if summary.table.trials else "try again"
    display.next_command(f"forge tune --resume {handle(run.folder)}", purpose=purpose)
    if not (is_at_limit and summary.best is not None):
        raise typer.Exit(code)


def _is_permanent(run: RunSummary) -> bool:
    """Whether the run would fail again if it was resumed unchanged: by the user's input, or because it diverged."""
    from forge.errors import DivergedError, ForgeError
    from forge.runs.reader import failure_of

    failure = failure_of(run)
    if failure is None:
        return False
    return failure.exit_code == ForgeError.exit_code or isinstance(failure, DivergedError)


def _report_end(run: RunSummary, *, interrupted: bool) -> int:
    """Print why a run ended before its last step. Returns: the exit code."""
    from forge.cli import display
    from forge.errors import RunError
    from forge.runs.reader import failure_of

    failure, code = failure_of(run), INTERRUPTED
    stopped = run.newest("RunStopped") or {}
    if run.status == "stopped" and stopped.get("reason"):
        display.warning(f"stopped: {stopped['reason']}")
        code = RunError.exit_code
    if interrupted and run.status == "died":
        display.message("stopped at once; the steps after the newest checkpoint are lost")
    elif failure is not None:
        display.error(str(failure))
        code = failure.exit_code
    return code
