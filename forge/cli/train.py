"""`forge train` and `forge plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli.launch import Request, launch, run_arguments, show_dry
from forge.cli.options import (
    ClusterOption,
    DetachOption,
    DryRunOption,
    JobArgument,
    Output,
    OutputOption,
    ResumableJobArgument,
    SetOption,
    YesOption,
)


def train(
    file: ResumableJobArgument = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Resume this run (or: latest) from its newest checkpoint.")
    ] = None,
    cluster: ClusterOption = None,
    detach: DetachOption = False,
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Train the model of a job file: plan, show the plan, start the run and follow it.

    Example:  forge train jobs/pretrain.yaml --set training.total_steps=50
    """
    launch(
        Request(
            file=file,
            overrides=overrides or [],
            is_search=False,
            dry_run=dry_run,
            resume=resume,
            cluster=cluster,
            detach=detach,
            yes=yes,
            output=output,
        )
    )


def plan(file: JobArgument, overrides: SetOption = None, output: OutputOption = Output.TABLE) -> None:
    """Show what a job will do: batch, memory, FLOPs and steps at every number of workers. Starts nothing.

    Example:  forge plan jobs/pretrain.yaml -o json
    """
    from forge.config.load import load_job

    show_dry(
        load_job(file, overrides=overrides or []), arguments=run_arguments(file, overrides or []), output=output
    )
