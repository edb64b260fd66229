"""`forge train` and `forge plan`: plan, show, run, follow."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli.options import JobArgument, Output, OutputOption, SetOption

if TYPE_CHECKING:
    from forge.cli.display import TrainScreen
    from forge.plan.plan import Plan
    from forge.run.submit import Carried

INTERRUPTED = 130


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
    detach: Annotated[bool, typer.Option("--detach", help="Start the run and do not follow it.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Train the model that a job file describes.

    Example:  forge train jobs/pretrain.yaml --set training.total_steps=50
    """
    from forge.cli import display

    if dry_run and file is not None:
        plan(file, overrides=overrides, output=output)
        return
    resolved, folder = _resolve(file, overrides=overrides or [], resume=resume)
    display.show_plan(resolved, to_stderr=output is Output.JSON)
    from forge.run.submit import carry, create_run, reopen_run

    if folder is None:
        folder = create_run(resolved)
    else:
        reopen_run(folder, resolved)
    past_events, past_losses = _past(folder)
    carried = carry(folder)
    display.message(f"run {folder.name} in {folder}")
    if detach:
        display.next_command(f"forge runs watch {folder.name}", purpose="follow it")
        return
    interrupted = follow_run(carried, resolved, past_events=past_events, past_losses=past_losses)
    conclude(folder, interrupted=interrupted, output=output)


def plan(file: JobArgument, overrides: SetOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show what a job will do: batch, memory, arithmetic, steps. Trains nothing.

    Example:  forge plan jobs/pretrain.yaml -o json
    """
    from forge.cli import display
    from forge.plan.plan import plan_to_json
    from forge.run.submit import resolve
    from forge.spec.load import load_job

    loaded = load_job(file, overrides=overrides or [])
    resolved = resolve(loaded, is_dry_run=True, on_progress=display.PrepareScreen().show)
    if output is Output.JSON:
        display.print_text(plan_to_json(resolved))
        return
    display.show_plan(resolved)
    display.next_command(f"forge train {file}", purpose="train it")


def follow_run(carried: Carried, resolved: Plan, *, past_events: int, past_losses: list[float]) -> bool:
    """Show a run until it ends. Ctrl-C once asks it to stop, twice ends it. Returns: whether it was asked."""
    from forge.cli import display
    from forge.report.runs import follow
    from forge.run.submit import request_stop

    asked = 0
    with display.TrainScreen(resolved, losses=past_losses) as screen:

        def on_interrupt(number: int, frame: object) -> None:
            nonlocal asked
            asked += 1
            request_stop(carried.pid)
            _say_stopping(screen, asked)

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            for record in follow(
                carried.folder, pid=carried.pid, past_events=past_events, past_steps=len(past_losses)
            ):
                screen.show(record)
        finally:
            signal.signal(signal.SIGINT, before)
    return asked > 0


def conclude(folder: Path, *, interrupted: bool, output: Output) -> None:
    """Say how a run ended, and leave with its exit code."""
    from forge import errors
    from forge.cli import display
    from forge.report.runs import read_metrics, read_run
    from forge.run.submit import wait_until_free

    wait_until_free(folder)
    run = read_run(folder)
    if output is Output.JSON:
        display.print_json(summary_record(folder))
    else:
        losses = [record["train/loss"] for record in read_metrics(folder) if record["train/loss"] is not None]
        display.show_summary(run, losses=losses)
    if run.status == "finished":
        display.next_command(f"forge generate {run.run_id} --prompt 'import '", purpose="try it")
        return
    if run.status == "failed":
        failed = run.newest("RunFailed") or {}
        display.error(failed.get("message", "the run failed"))
        kind = getattr(errors, failed.get("error", ""), errors.RunError)
        code = kind.exit_code
    else:
        if run.status == "died":
            display.error(f"the run's process ended without a word; its log is {folder / 'logs' / 'run.log'}")
        code = INTERRUPTED if interrupted or run.status == "stopped" else errors.RunError.exit_code
    if (folder / "checkpoints").is_dir():
        display.next_command(f"forge train --resume {run.run_id}", purpose="go on")
    raise typer.Exit(code)


def summary_record(folder: Path) -> dict[str, Any]:
    """A run as JSON."""
    from forge.report.runs import read_run

    run = read_run(folder)
    evaluated = run.newest("Evaluated", weights="current") or {}
    averaged = run.newest("Evaluated", weights="ema") or {}
    saved = run.newest("CheckpointSaved") or {}
    return {
        "run_id": run.run_id,
        "folder": str(run.folder),
        "status": run.status,
        "step": run.step,
        "total_steps": run.plan.total_steps,
        "started": run.started,
        "updated": run.updated,
        "last_step": run.last,
        "held_out_perplexity": evaluated.get("perplexity"),
        "held_out_perplexity_ema": averaged.get("perplexity"),
        "unigram_perplexity": run.plan.corpus.unigram_perplexity if run.plan.corpus else None,
        "checkpoint": saved.get("folder"),
        "failure": (run.newest("RunFailed") or {}).get("message") if run.status == "failed" else None,
    }


def _resolve(file: Path | None, *, overrides: list[str], resume: str | None) -> tuple[Plan, Path | None]:
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.report.runs import carrier_pid, find_run
    from forge.run.submit import resolve
    from forge.spec.load import load_job

    if resume is None and file is None:
        raise typer.BadParameter("give a job file, or --resume RUN", param_hint="FILE")
    folder = None
    if resume is not None:
        root = Path(load_job(file, overrides=overrides).job.checkpoint.to) if file else Path("runs")
        folder = find_run(resume, root=root)
        pid = carrier_pid(folder)
        if pid is not None:
            raise ArgumentError(
                f"{folder.name} is still being carried, by process {pid}; watch it: forge runs watch"
            )
    loaded = load_job(file or Path(folder or ".") / "job.yaml", overrides=overrides)
    with display.PrepareScreen() as screen:
        return resolve(loaded, is_dry_run=False, on_progress=screen.show), folder


def _past(folder: Path) -> tuple[int, list[float]]:
    """What a run has written before: the number of its events, and its losses."""
    from forge.report.runs import read_metrics, read_run

    losses = [record["train/loss"] for record in read_metrics(folder)]
    return len(read_run(folder).events), [float("nan") if loss is None else loss for loss in losses]


def _say_stopping(screen: TrainScreen, asked: int) -> None:
    if asked == 1:
        screen.note("stopping after this step, with a checkpoint; Ctrl-C again stops now, without one")
    elif asked == 2:
        screen.note("stopping now")
