"""`forge runs`: list, show, watch, stop, annotate and delete runs and searches."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import Output, OutputOption, RunArgument, RunsOption
from forge.cli.run_logs import logs
from forge.cli.run_reports import compare, report

if TYPE_CHECKING:
    from forge.runs.reader import RunSummary

app = typer.Typer(
    help="List, show, watch, stop, annotate and delete runs and searches.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_RUNS = Path("runs")
_MAX_LISTED = 5


@app.command("list")
def list_(
    runs: RunsOption = _RUNS,
    every: Annotated[
        bool, typer.Option("--all", help="Also list the runs of other folders that were used on this machine.")
    ] = False,
    tag: Annotated[
        str | None, typer.Option("--tag", metavar="TAG", help="Only runs with this tag.", show_default=False)
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the runs of a folder, newest first.

    Example:  forge runs list -o json
    """
    from forge.cli import display
    from forge.cli.follow import handle
    from forge.errors import ForgeError
    from forge.report.run_rows import list_cells
    from forge.runs.annotations import read_annotations
    from forge.runs.glance import glance_of
    from forge.runs.reader import list_runs, summary_record
    from forge.units import format_duration

    def on_skip(folder: Path, error: Exception) -> None:
        display.warning(f"{folder.name} was skipped: {error}")

    found = list_runs(runs, on_skip=on_skip) if not every else _all_runs(runs, on_skip=on_skip)
    if tag is not None:
        found = [run for run in found if tag in read_annotations(run.folder).tags]
    if output is Output.JSON:
        records = []
        for run in found:
            try:
                records.append(summary_record(run))
            except ForgeError as error:
                on_skip(run.folder, error)
        display.print_json(records)
        return
    if not found:
        _say_where(runs, every=every, tag=tag)
        return
    tags = [", ".join(read_annotations(run.folder).tags) for run in found]
    rows = []
    for run, its_tags in zip(found, tags, strict=True):
        age = format_duration(max(1.0, time.time() - run.updated))
        extra = [its_tags] if any(tags) else []
        extra += [str(run.folder.parent.absolute())] if every else []
        rows.append([run.run_id, run.status, *list_cells(glance_of(run))[:3], f"{age} ago", *extra])
    columns = ["run", "status", "#step", "#loss", "#held-out ppl", "#updated"]
    columns += (["tags"] if any(tags) else []) + (["folder"] if every else [])
    display.table(columns, rows)
    display.next_command(f"forge runs show {handle(found[0].folder)}", purpose="show one")


@app.command()
def show(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Show a run: plan, loss curve, held-out perplexity, files and where its time went; for a search, its trials.

    Example:  forge runs show latest
    """
    from forge.cli import display
    from forge.cli.follow import print_record, show_search
    from forge.cli.plan_table import show_plan
    from forge.cli.run_screen import show_goodput, show_summary
    from forge.runs.annotations import read_annotations
    from forge.runs.reader import failure_of, find_run, read_metrics, read_run

    folder = find_run(run, root=runs)
    found = read_run(folder)
    if output is Output.JSON:
        print_record(found)
        return
    show_plan(found.plan)
    if found.plan.search is not None:
        show_search(found, has_table=True)
    else:
        losses = [record["train/loss"] for record in read_metrics(folder) if record["train/loss"] is not None]
        goodput = found.goodput()
        show_summary(found, goodput=goodput, losses=losses)
        show_goodput(goodput)
    annotations = read_annotations(folder)
    if annotations.tags or annotations.note:
        display.heading("notes", ", ".join(annotations.tags))
        if annotations.note:
            display.print_text(annotations.note)
    failure = failure_of(found)
    if failure is not None:
        display.warning(str(failure))
    if found.num_invalid:
        display.warning(f"{found.num_invalid} lines of events.jsonl are not valid records and were skipped")


app.command()(logs)


@app.command()
def watch(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Follow a running run or search. Ctrl-C stops watching, not the run.

    Example:  forge runs watch latest
    """
    from forge.cli.follow import conclude, past_of, watch_run
    from forge.cli.mover import Mover
    from forge.remote.mirror import find_run_handle
    from forge.runs.reader import find_run, read_run, search_folder

    folder = find_run(run, root=runs)
    past, found, search = past_of(folder), read_run(folder), search_folder(folder)
    running = find_run_handle(search or folder)
    if running is not None and found.status == "running":
        while running is not None:
            mover = Mover(running, found.plan)
            watch_run(running, found.plan, folder=folder, past=past, mover=mover)
            if search is None:
                running.wait()
            past, running = past_of(folder), mover.continue_elsewhere()
    conclude(folder, interrupted=False, output=output)


@app.command()
def stop(run: RunArgument = "latest", runs: RunsOption = _RUNS) -> None:
    """Stop a run, or all trials of a search, after the current step, with a checkpoint.

    Example:  forge runs stop latest
    """
    from forge.cli import display
    from forge.cli.follow import handle
    from forge.remote.mirror import find_stoppable, stop_text
    from forge.runs.reader import find_run, read_plan

    folder = find_run(run, root=runs)
    is_search = read_plan(folder).search is not None
    running = find_stoppable(folder)
    if running is None:
        display.message(f"{folder.name} is not running")
        return
    running.request_stop()
    display.message(stop_text(folder))
    running.wait()
    display.next_command(f"forge {'tune' if is_search else 'train'} --resume {handle(folder)}", purpose="resume")


app.command()(report)
app.command()(compare)


@app.command()
def sync(run: RunArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE) -> None:
    """Send the trackers of a run that is over the steps that they lack, such as after a server did not answer.

    Example:  forge runs sync latest
    """
    from dataclasses import asdict

    from forge.cli import display
    from forge.errors import RunError
    from forge.runs.reader import find_run
    from forge.runs.sync import sync_run

    folder = find_run(run, root=runs)
    results = sync_run(folder, on_reason=display.warning)
    if output is Output.JSON:
        display.print_json([asdict(result) for result in results])
    for result in results:
        display.message(f"{result.run_id}: sent {result.num_sent} steps to {result.tracker}")
    missing = sorted({result.tracker for result in results if not result.is_complete})
    if missing:
        raise RunError(f"{', '.join(missing)} did not take every step; try again: forge runs sync {folder.name}")


@app.command()
def tag(
    run: RunArgument,
    tags: Annotated[list[str], typer.Argument(metavar="TAG...", help="Tags to add.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tags instead.")] = False,
    runs: RunsOption = _RUNS,
) -> None:
    """Add tags to a run; `forge runs list --tag TAG` lists the runs that have one.

    Example:  forge runs tag latest baseline lr-sweep
    """
    from forge.cli import display
    from forge.runs.annotations import change_tags
    from forge.runs.reader import find_run

    folder = find_run(run, root=runs)
    now = change_tags(folder, remove=tags) if remove else change_tags(folder, add=tags)
    display.message(f"{folder.name}: {', '.join(now.tags) or 'no tags'}")


@app.command()
def note(
    run: RunArgument,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The note; '' removes it.", show_default=False)],
    runs: RunsOption = _RUNS,
) -> None:
    """Write a note about a run, which `forge runs show` prints. It replaces the note before.

    Example:  forge runs note latest 'diverged at 300; lr too high'
    """
    from forge.cli import display
    from forge.runs.annotations import set_note
    from forge.runs.reader import find_run

    folder = find_run(run, root=runs)
    set_note(folder, text)
    display.message(f"the note of {folder.name} was {'written' if text else 'removed'}")


@app.command()
def delete(
    run: RunArgument,
    runs: RunsOption = _RUNS,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run's folder, with its logs and checkpoints. A run that is running is refused.

    Example:  forge runs delete tiny-0101-000000-abcd
    """
    import sys

    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.runs.delete import delete_run, require_deletable
    from forge.runs.reader import find_run

    folder = find_run(run, root=runs)
    require_deletable(folder)
    if not yes:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ArgumentError(f"refusing to delete {folder} without confirmation; pass --yes")
        display.message(f"everything in {folder.absolute()} will be deleted")
        if not typer.confirm("Delete it?", err=True):
            raise typer.Exit(2)
    elsewhere = _kept_elsewhere(folder)
    delete_run(folder)
    display.message(f"deleted {folder}")
    for kept in elsewhere:
        display.message(f"kept: {kept}")


def _all_runs(root: Path, *, on_skip: Callable[[Path, Exception], None]) -> list[RunSummary]:
    """Return the runs of a folder and the known runs elsewhere; say which have vanished, and forget them."""
    from forge.cli import display
    from forge.runs.index import forget_runs, read_index
    from forge.runs.reader import list_runs, read_runs

    index = read_index()
    if index.problem is not None:
        display.warning(f"the index of runs cannot be read, so runs elsewhere are not listed: {index.problem}")
    vanished = index.vanished()
    if vanished:
        listed = ", ".join(map(str, vanished[:_MAX_LISTED])) + (", ..." if len(vanished) > _MAX_LISTED else "")
        number = "1 run is" if len(vanished) == 1 else f"{len(vanished)} runs are"
        display.message(f"{number} no longer there and will not be listed again: {listed}")
        forget_runs(vanished)
    here = list_runs(root, on_skip=on_skip)
    known = {run.folder.resolve() for run in here}
    others = read_runs([path for path in index.existing() if path.resolve() not in known], on_skip=on_skip)
    return sorted([*here, *others], key=lambda run: run.updated, reverse=True)


def _say_where(root: Path, *, every: bool, tag: str | None) -> None:
    """Say that no runs were found, where they were looked for, and where others are."""
    from forge.cli import display
    from forge.runs.index import read_index

    tagged = f" with the tag {tag}" if tag is not None else ""
    display.message(f"no runs{tagged} in {root.absolute()}" + (", and none known elsewhere" if every else ""))
    elsewhere = 0 if every else len(read_index().existing())
    if elsewhere:
        number = "1 run is" if elsewhere == 1 else f"{elsewhere} runs are"
        display.message(f"{number} in other folders; a run is found by its id from any folder")
        more = f" --tag {shlex.quote(tag)}" if tag is not None else ""
        display.next_command(f"forge runs list --all{more}", purpose="list them")
    elif tag is None:
        display.next_command("forge train jobs/pretrain.yaml", purpose="start one")


def _kept_elsewhere(folder: Path) -> list[str]:
    """Return what belongs to a run and is outside its folder, which deleting it keeps."""
    from forge.errors import ForgeError
    from forge.runs.reader import read_plan
    from forge.runs.remote_ref import read_remote_ref

    kept, ref = [], read_remote_ref(folder)
    if ref is not None:
        kept.append(f"its folder on the cluster '{ref.cluster}': {ref.folder}")
    try:
        url = read_plan(folder).job.checkpoint.url_of(str(folder))
    except ForgeError:
        return kept
    return [*kept, f"its checkpoints in {url}"] if "://" in url else kept
