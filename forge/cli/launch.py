"""From a job file to a run or a search that goes on: plan, show, create or reopen, carry, follow.

`forge train` and `forge tune` are this, with jobs of their kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from forge.cli.follow import conclude, follow_run, handle, past_of, print_record
from forge.cli.options import Output

if TYPE_CHECKING:
    from forge.config.load import LoadedJob
    from forge.plan.plan import Plan
    from forge.remote.submit import RemoteTarget
    from forge.runtime.driver_process import RunHandle


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    file: Path | None
    overrides: list[str]
    is_search: bool
    dry_run: bool
    resume: str | None
    cluster: str | None
    detach: bool
    output: Output

    @property
    def name(self) -> str:
        """What the command line calls it."""
        return "SEARCH" if self.is_search else "RUN"

    @property
    def end(self) -> str:
        """What one has done that has nothing left to do."""
        return "made all its trials" if self.is_search else "reached its last step"


def launch(request: Request) -> None:
    """Carry out what was asked for. Raises: JobFileError for a job of the other kind, and what `resolve` raises."""
    from forge.cli import display
    from forge.config.load import load_job
    from forge.config.overrides import check_kind
    from forge.runs.create import create_run, reopen_run
    from forge.runs.reader import read_run
    from forge.runtime.driver_process import start_driver
    from forge.runtime.resolve_code import with_run_code

    if request.file is None and request.resume is None:
        raise typer.BadParameter(f"give a job file, or --resume {request.name}", param_hint="FILE")
    folder = _find_resumable(request) if request.resume is not None else None
    job_file = request.file or Path(folder or ".") / "job.yaml"
    if folder is not None and not request.dry_run and _has_nothing_left(folder, request, job_file):
        display.message(f"{folder.name} has {request.end} already")
        conclude(folder, interrupted=False, output=request.output)
        return
    loaded = load_job(job_file, overrides=request.overrides)
    if folder is not None and request.file is None:
        loaded = with_run_code(loaded, run_folder=folder)
    check_kind(loaded, is_search=request.is_search)
    if request.dry_run:
        show_dry(loaded, file=job_file, output=request.output)
        return
    site = _site_of(request.cluster, folder)
    resolved = _resolve(loaded, site)
    display.show_plan(resolved, to_stderr=request.output is Output.JSON)
    if folder is None:
        folder = create_run(resolved, root=loaded.job.checkpoint.runs)
    else:
        reopen_run(folder, resolved)
    past = past_of(folder)
    carried = start_driver(folder) if site is None else _submit(site, resolved, folder)
    display.message(f"{'search' if request.is_search else 'run'} {folder.name} in {folder}")
    if request.detach:
        if request.output is Output.JSON:
            print_record(read_run(folder))
        display.next_command(f"forge runs watch {handle(folder)}", purpose="follow it")
        return
    interrupted = follow_run(carried, resolved, past=past)
    conclude(folder, interrupted=interrupted, output=request.output, past_events=len(past.events))


def show_dry(loaded: LoadedJob, *, file: Path, output: Output) -> None:
    """Show what a job will do; nothing is made."""
    from forge.cli import display
    from forge.plan.plan import plan_to_json
    from forge.runtime.resolve import resolve_draft

    with display.PrepareScreen() as screen:
        resolved = resolve_draft(loaded, on_progress=screen.show)
    if output is Output.JSON:
        display.print_text(plan_to_json(resolved))
        return
    display.show_plan(resolved)
    if resolved.search is None:
        display.next_command(f"forge train {file}", purpose="train it")
    else:
        display.next_command(f"forge tune {file}", purpose="search")


def _find_resumable(request: Request) -> Path:
    from forge.config.load import load_job
    from forge.errors import ArgumentError
    from forge.runs.reader import driver_pid, find_run, read_plan, search_folder

    job_file, name = request.file, request.resume or ""
    root = Path(load_job(job_file, overrides=request.overrides).job.checkpoint.runs) if job_file else Path("runs")
    folder = find_run(name, root=root, is_search=request.is_search)
    search = search_folder(folder)
    if search is not None:
        raise ArgumentError(
            f"{folder.name} is a trial of a search, which goes on as a whole: forge tune --resume {handle(search)}"
        )
    is_search = read_plan(folder).search is not None
    if is_search != request.is_search:
        kind, verb = ("a search", "tune") if is_search else ("no search", "train")
        raise ArgumentError(f"{folder.name} is {kind}; go on with it: forge {verb} --resume {handle(folder)}")
    pid = driver_pid(folder)
    if pid is not None:
        raise ArgumentError(
            f"{folder.name} is still being carried, by process {pid}; watch it: forge runs watch {handle(folder)}"
        )
    return folder


def _has_nothing_left(folder: Path, request: Request, job_file: Path) -> bool:
    """Whether a run is at its end, a search also by the number of trials that is asked for now."""
    from forge.config.load import load_job
    from forge.plan.search import count_trials
    from forge.runs.reader import read_run
    from forge.runs.trials import TrialTable

    run = read_run(folder)
    if run.status != "finished" or not request.is_search:
        return run.status == "finished"
    search = load_job(job_file, overrides=request.overrides).job.search
    return search is not None and count_trials(search) <= len(TrialTable(run.events).trials)


def _site_of(cluster: str | None, folder: Path | None) -> RemoteTarget | None:
    """Where a run is to go: the cluster that is asked for, or that it was on before; None for this machine."""
    from forge.cluster.registry import find_cluster
    from forge.remote.mirror import remote_ref_of
    from forge.remote.submit import preflight

    at = remote_ref_of(folder) if folder is not None else None
    name = cluster or (at.cluster if at is not None else None)
    return None if name is None else preflight(find_cluster(name))


def _resolve(loaded: LoadedJob, site: RemoteTarget | None) -> Plan:
    from forge.cli import display
    from forge.runtime.resolve import resolve

    if site is None:
        with display.PrepareScreen() as screen:
            return resolve(loaded, on_progress=screen.show)
    from forge.remote.submit import resolve_there

    with display.PrepareScreen() as screen:
        return resolve_there(site, loaded, on_progress=screen.show)


def _submit(site: RemoteTarget, resolved: Plan, folder: Path) -> RunHandle:
    from forge.cli import display
    from forge.remote.submit import submit

    display.message(f"sending the run to the cluster '{site.cluster.name}'")
    return submit(site, resolved, folder=folder)
