"""`forge train` and `forge plan`: plan, show, run, follow."""

from __future__ import annotations

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import JobArgument, Output, OutputOption, SetOption

if TYPE_CHECKING:
    from forge.plan.plan import Plan
    from forge.report.ledger import LedgerBook
    from forge.run.remote import Site
    from forge.run.submit import Carried
    from forge.spec.load import LoadedJob

INTERRUPTED = 130
_STOPPING = (
    "stopping after this step, with a checkpoint; Ctrl-C again stops now, without one",
    "stopping now",
)


def train(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The job file; not needed with --resume.", show_default=False),
    ] = None,
    overrides: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")] = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Go on with a run from its newest checkpoint (or: latest).")
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Run on this cluster: a name from forge cluster up, or a cluster file."),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Start the run and do not follow it.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Train the model that a job file describes.

    Example:  forge train jobs/pretrain.yaml --set training.total_steps=50
    """
    from forge.cli import display
    from forge.report.runs import read_run, summary_record
    from forge.run.submit import carry, create_run, reopen_run
    from forge.spec.load import load_job

    if file is None and resume is None:
        raise typer.BadParameter("give a job file, or --resume RUN", param_hint="FILE")
    folder = _find_resumable(resume, file=file, overrides=overrides or []) if resume is not None else None
    job_file = file or Path(folder or ".") / "job.yaml"
    if dry_run:
        plan(job_file, overrides=overrides, output=output)
        return
    if folder is not None and read_run(folder).status == "finished":
        display.message(f"{folder.name} has reached its last step already")
        conclude(folder, interrupted=False, output=output)
        return
    loaded = load_job(job_file, overrides=overrides or [])
    site = _site_of(cluster, folder)
    resolved = _resolve(loaded, site)
    display.show_plan(resolved, to_stderr=output is Output.JSON)
    if folder is None:
        folder = create_run(resolved, root=loaded.job.checkpoint.runs)
    else:
        reopen_run(folder, resolved)
    past = past_of(folder)
    carried = carry(folder) if site is None else _submit(site, resolved, folder)
    display.message(f"run {folder.name} in {folder}")
    if detach:
        if output is Output.JSON:
            display.print_json(summary_record(read_run(folder)))
        display.next_command(f"forge runs watch {handle(folder)}", purpose="follow it")
        return
    interrupted = follow_run(carried, resolved, past=past)
    conclude(folder, interrupted=interrupted, output=output, past_events=past.num_events)


def plan(file: JobArgument, overrides: SetOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show what a job will do: batch, memory, arithmetic, steps. Trains nothing.

    Example:  forge plan jobs/pretrain.yaml -o json
    """
    from forge.cli import display
    from forge.plan.plan import plan_to_json
    from forge.run.submit import resolve
    from forge.spec.load import load_job

    loaded = load_job(file, overrides=overrides or [])
    with display.PrepareScreen() as screen:
        resolved = resolve(loaded, is_dry_run=True, on_progress=screen.show)
    if output is Output.JSON:
        display.print_text(plan_to_json(resolved))
        return
    display.show_plan(resolved)
    display.next_command(f"forge train {file}", purpose="train it")


def follow_run(carried: Carried, resolved: Plan, *, past: Past) -> bool:
    """Show a run until it ends. Ctrl-C once asks it to stop, twice ends it. Returns: whether it was asked."""
    from forge.cli import display
    from forge.report.runs import follow

    asked = told = 0

    def on_interrupt(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        carried.request_stop()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with display.TrainScreen(resolved, losses=past.losses, book=past.book) as screen:
            for record in follow(
                carried.folder, goes_on=carried.is_alive, past_events=past.num_events, past_steps=len(past.losses)
            ):
                for line in carried.news():
                    screen.note(line)
                # Said here and not by the handler, which may have interrupted the screen in the middle of a line.
                while told < min(asked, len(_STOPPING)):
                    screen.note(_STOPPING[told])
                    told += 1
                screen.show(record)
    finally:
        signal.signal(signal.SIGINT, before)
    carried.end()
    return asked > 0


def conclude(folder: Path, *, interrupted: bool, output: Output, past_events: int = 0) -> None:
    """Say how a run ended, and leave with its exit code.

    Args:
        past_events: how many there were before the run was carried on; an end among them is not its end.
    """
    from forge.cli import display
    from forge.errors import RunError
    from forge.report.runs import failure_of, read_metrics, read_run, summary_record
    from forge.run.submit import wait_until_free

    wait_until_free(folder)
    run = read_run(folder)
    if past_events and len(run.events) <= past_events:
        run = replace(run, status="died")
    if output is Output.JSON:
        display.print_json(summary_record(run))
    else:
        losses = [record["train/loss"] for record in read_metrics(folder) if record["train/loss"] is not None]
        display.show_summary(run, losses=losses)
    if run.status == "finished":
        display.next_command(f"forge generate {handle(folder)} --prompt 'import '", purpose="try it")
        return
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
    purpose = "go on" if run.newest("CheckpointSaved") else "try again"
    display.next_command(f"forge train --resume {handle(folder)}", purpose=purpose)
    raise typer.Exit(code)


def handle(folder: Path) -> str:
    """What names a run on the command line: its id, or its folder where it is not under `runs`."""
    return folder.name if folder.parent == Path("runs") else str(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a run has written until now."""

    num_events: int
    losses: list[float]
    book: LedgerBook


def past_of(folder: Path) -> Past:
    """What a screen needs that goes on with a run."""
    from forge.report.ledger import book_of
    from forge.report.runs import read_metrics, read_run

    events, steps = read_run(folder).events, read_metrics(folder)
    losses = [record["train/loss"] for record in steps]
    return Past(
        num_events=len(events),
        losses=[float("nan") if loss is None else loss for loss in losses],
        book=book_of(events, steps),
    )


def _find_resumable(name: str, *, file: Path | None, overrides: list[str]) -> Path:
    from forge.errors import ArgumentError
    from forge.report.runs import carrier_pid, find_run
    from forge.spec.load import load_job

    root = Path(load_job(file, overrides=overrides).job.checkpoint.runs) if file else Path("runs")
    folder = find_run(name, root=root)
    pid = carrier_pid(folder)
    if pid is not None:
        raise ArgumentError(
            f"{folder.name} is still being carried, by process {pid}; watch it: forge runs watch {handle(folder)}"
        )
    return folder


def _site_of(cluster: str | None, folder: Path | None) -> Site | None:
    """Where a run is to go: the cluster that is asked for, or that it was on before; None for this machine."""
    from forge.cluster.known import find_cluster
    from forge.run.mirror import whereabouts_of
    from forge.run.remote import survey

    at = whereabouts_of(folder) if folder is not None else None
    name = cluster or (at.cluster if at is not None else None)
    return None if name is None else survey(find_cluster(name))


def _resolve(loaded: LoadedJob, site: Site | None) -> Plan:
    from forge.cli import display
    from forge.run.submit import resolve

    if site is None:
        with display.PrepareScreen() as screen:
            return resolve(loaded, is_dry_run=False, on_progress=screen.show)
    from forge.run.remote import fit_to, hardware_there

    fitting, there = fit_to(site, loaded), hardware_there(site)
    with display.PrepareScreen() as screen:
        return resolve(fitting, is_dry_run=False, on_progress=screen.show, find_hardware=there)


def _submit(site: Site, resolved: Plan, folder: Path) -> Carried:
    from forge.cli import display
    from forge.run.remote import submit

    display.message(f"sending the run to the cluster '{site.cluster.name}'")
    return submit(site, resolved, folder=folder)
