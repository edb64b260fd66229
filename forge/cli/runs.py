"""`forge runs`: what was trained and searched here, and what goes on."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import Output, OutputOption, RunArgument, RunsOption, SearchArgument

if TYPE_CHECKING:
    from forge.runs.reader import RunSummary

app = typer.Typer(help="List, show, watch and stop runs and searches.", no_args_is_help=True, rich_markup_mode=None)

_RUNS = Path("runs")


@app.command("list")
def list_(runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """List the runs of a folder, newest first.

    Example:  forge runs list -o json
    """
    from forge.cli import display
    from forge.cli.follow import handle
    from forge.runs.reader import list_runs, summary_record
    from forge.units import format_duration

    found = list_runs(runs)
    if output is Output.JSON:
        display.print_json([summary_record(run) for run in found])
        return
    if not found:
        display.message(f"no runs in {runs}")
        display.next_command("forge train jobs/pretrain.yaml", purpose="start one")
        return
    rows = []
    for run in found:
        age = format_duration(max(1.0, time.time() - run.updated))
        rows.append([run.run_id, run.status, *_progress(run), f"{age} ago"])
    display.table(["run", "status", "#step", "#loss", "#held-out ppl", "#updated"], rows)
    display.next_command(f"forge runs show {handle(found[0].folder)}", purpose="look at one")


@app.command()
def show(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Show one run: its curve, its held-out perplexity, its files, where its time went; of a search its trials.

    Example:  forge runs show latest
    """
    from forge.cli import display
    from forge.cli.follow import print_record, show_search
    from forge.runs.reader import failure_of, find_run, read_metrics, read_run

    folder = find_run(run, root=runs)
    found = read_run(folder)
    if output is Output.JSON:
        print_record(found)
        return
    display.show_plan(found.plan)
    if found.plan.search is not None:
        show_search(found, has_table=True)
    else:
        losses = [record["train/loss"] for record in read_metrics(folder) if record["train/loss"] is not None]
        display.show_summary(found, losses=losses)
        display.show_ledger(found.ledger(), started=found.started)
    failure = failure_of(found)
    if failure is not None:
        display.warning(str(failure))


@app.command()
def logs(
    run: RunArgument = "latest",
    runs: RunsOption = _RUNS,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="rank-0, rank-1, ..., recorder or run; rank-0 if not given, of a search run.",
            show_default=False,
        ),
    ] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of a run's log.

    Example:  forge runs logs latest --file run -n 20
    """
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.remote.mirror import remote_log, remote_ref_of
    from forge.runs.reader import find_run, read_plan

    found = find_run(run, root=runs)
    name = file or ("rank-0" if read_plan(found).search is None else "run")
    if remote_ref_of(found) is not None:
        display.print_text(remote_log(found, name=name, lines=lines) or "(empty)")
        return
    folder = found / "logs"
    path = folder / f"{name}.log"
    if not path.is_file():
        there = ", ".join(sorted(log.stem for log in folder.glob("*.log"))) or "none yet"
        raise ArgumentError(f"{path} does not exist; the logs there are: {there}")
    with path.open(errors="replace") as log:
        last = deque(log, maxlen=lines)
    display.print_text("".join(last) or "(empty)")


@app.command()
def watch(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Follow a run that goes on. Ctrl-C leaves it alone.

    Example:  forge runs watch latest
    """
    from forge.cli.follow import conclude, past_of, watch_run
    from forge.remote.mirror import find_run_handle
    from forge.runs.reader import find_run, read_run, search_folder

    folder = find_run(run, root=runs)
    past, found, search = past_of(folder), read_run(folder), search_folder(folder)
    carried = find_run_handle(search or folder)
    if carried is not None and found.status == "running":
        watch_run(carried, found.plan, folder=folder, past=past)
        if search is None:
            carried.wait()
    conclude(folder, interrupted=False, output=output)


@app.command()
def stop(run: RunArgument = "latest", runs: RunsOption = _RUNS) -> None:
    """Let a run, or all trials of a search, finish the step, write a checkpoint and stop.

    Example:  forge runs stop latest
    """
    from forge.cli import display
    from forge.cli.follow import handle
    from forge.errors import ArgumentError
    from forge.remote.mirror import find_run_handle
    from forge.runs.reader import find_run, read_plan, search_folder

    folder = find_run(run, root=runs)
    search = search_folder(folder)
    if search is not None:
        raise ArgumentError(
            f"{folder.name} is a trial of a search, which stops as a whole: forge runs stop {handle(search)}"
        )
    is_search = read_plan(folder).search is not None
    carried = find_run_handle(folder)
    if carried is None:
        display.message(f"{folder.name} does not run")
        return
    carried.request_stop()
    display.message(
        f"the trials of {folder.name} stop after their current steps, with checkpoints"
        if is_search
        else f"{folder.name} stops after its current step, with a checkpoint"
    )
    carried.wait()
    display.next_command(f"forge {'tune' if is_search else 'train'} --resume {handle(folder)}", purpose="go on")


@app.command()
def report(search: SearchArgument = "latest", runs: RunsOption = _RUNS) -> None:
    """Write a search's report.html and best.yaml anew, as it is now.

    Example:  forge runs report latest
    """
    from forge.cli import display
    from forge.cli.follow import handle
    from forge.errors import ArgumentError
    from forge.report.search_record import write_results
    from forge.runs.reader import find_run, read_run

    folder = find_run(search, root=runs, is_search=True)
    found = read_run(folder)
    if found.plan.search is None:
        raise ArgumentError(f"{folder.name} is no search; see it with: forge runs show {handle(folder)}")
    if not any(event["event"] == "TrialSuggested" for event in found.events):
        raise ArgumentError(f"{folder.name} has no trial yet that could be reported")
    write_results(folder)
    display.print_text(str(folder / "report.html"))


def _progress(run: RunSummary) -> list[str]:
    """How far it is, loss and held-out perplexity; of a search how many trials are over, and those of the best."""
    if run.plan.search is not None:
        from forge.report.search_summary import search_summary

        summary = search_summary(run)
        best = summary.best.last_metrics if summary.best is not None else {}
        progress, loss, perplexity = (
            f"{summary.num_over}/{summary.num_trials} trials",
            best.get("train/loss"),
            best.get("eval/perplexity"),
        )
    else:
        evaluated = run.newest("Evaluated", weights="current")
        progress, loss = f"{run.step}/{run.plan.total_steps}", run.last.get("train/loss")
        perplexity = evaluated["perplexity"] if evaluated else None
    return [
        progress,
        f"{loss:.4f}" if loss is not None else "-",
        f"{perplexity:.2f}" if perplexity is not None else "-",
    ]
