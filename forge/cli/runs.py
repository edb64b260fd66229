"""`forge runs`: what was trained here, and what is being trained."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Annotated

import typer

from forge.cli.options import Output, OutputOption, RunArgument, RunsOption

app = typer.Typer(help="List, show, watch and stop runs.", no_args_is_help=True, rich_markup_mode=None)

_RUNS = Path("runs")


@app.command("list")
def list_(runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """List the runs of a folder, newest first.

    Example:  forge runs list -o json
    """
    from forge.cli import display
    from forge.cli.train import handle
    from forge.report.runs import list_runs, summary_record
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
        evaluated = run.newest("Evaluated", weights="current")
        perplexity = f"{evaluated['perplexity']:.2f}" if evaluated and evaluated["perplexity"] else "-"
        loss = run.last.get("train/loss")
        age = format_duration(max(1.0, time.time() - run.updated))
        last_loss = f"{loss:.4f}" if loss is not None else "-"
        progress = f"{run.step}/{run.plan.total_steps}"
        rows.append([run.run_id, run.status, progress, last_loss, perplexity, f"{age} ago"])
    display.table(["run", "status", "#step", "#loss", "#held-out ppl", "#updated"], rows)
    display.next_command(f"forge runs show {handle(found[0].folder)}", purpose="look at one")


@app.command()
def show(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Show one run: its curve, its held-out perplexity, its files, where its time went.

    Example:  forge runs show latest
    """
    from forge.cli import display
    from forge.report.runs import failure_of, find_run, read_metrics, read_run, summary_record

    folder = find_run(run, root=runs)
    found = read_run(folder)
    if output is Output.JSON:
        display.print_json(summary_record(found))
        return
    display.show_plan(found.plan)
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
    name: Annotated[str, typer.Option("--file", help="rank-0, rank-1, ..., recorder or run.")] = "rank-0",
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last lines.")] = 50,
) -> None:
    """Print the end of a run's log.

    Example:  forge runs logs latest --file run -n 20
    """
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.report.runs import find_run
    from forge.run.mirror import remote_log, whereabouts_of

    found = find_run(run, root=runs)
    if whereabouts_of(found) is not None:
        display.print_text(remote_log(found, name=name, lines=lines) or "(empty)")
        return
    folder = found / "logs"
    path = folder / f"{name}.log"
    if not path.is_file():
        there = ", ".join(sorted(log.stem for log in folder.glob("*.log"))) or "none yet"
        raise ArgumentError(f"{path} does not exist; the logs there are: {there}")
    with path.open(errors="replace") as file:
        last = deque(file, maxlen=lines)
    display.print_text("".join(last) or "(empty)")


@app.command()
def watch(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Follow a run that goes on. Ctrl-C leaves it alone.

    Example:  forge runs watch latest
    """
    from forge.cli import display
    from forge.cli.train import conclude, past_of
    from forge.report.runs import find_run, follow, read_run
    from forge.run.mirror import find_carried

    folder = find_run(run, root=runs)
    past = past_of(folder)
    carried = find_carried(folder)
    if carried is not None:
        with display.TrainScreen(read_run(folder).plan, losses=past.losses, book=past.book) as screen:
            for record in follow(
                folder, goes_on=carried.is_alive, past_events=past.num_events, past_steps=len(past.losses)
            ):
                for line in carried.news():
                    screen.note(line)
                screen.show(record)
        carried.end()
    conclude(folder, interrupted=False, output=output)


@app.command()
def stop(run: RunArgument = "latest", runs: RunsOption = _RUNS) -> None:
    """Let a run finish its step, write a checkpoint and stop.

    Example:  forge runs stop latest
    """
    from forge.cli import display
    from forge.cli.train import handle
    from forge.report.runs import find_run
    from forge.run.mirror import find_carried

    folder = find_run(run, root=runs)
    carried = find_carried(folder)
    if carried is None:
        display.message(f"{folder.name} does not run")
        return
    carried.request_stop()
    display.message(f"{folder.name} stops after its current step, with a checkpoint")
    carried.end()
    display.next_command(f"forge train --resume {handle(folder)}", purpose="go on")
