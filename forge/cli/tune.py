"""`forge tune`: many trials of one job, with other values for some of its keys; the best one's job comes out."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli.launch import Request, launch
from forge.cli.options import (
    ClusterOption,
    DetachOption,
    DryRunOption,
    Output,
    OutputOption,
    ResumableJobArgument,
    SetOption,
)


def tune(
    file: ResumableJobArgument = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="SEARCH", help="Go on with a search, its trials included (or: latest)."),
    ] = None,
    cluster: ClusterOption = None,
    detach: DetachOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Search for the best values of a job's keys, as its section search says.

    Example:  forge tune jobs/tune.yaml --set search.max_trials=8
    """
    launch(
        Request(
            file=file,
            overrides=overrides or [],
            is_search=True,
            dry_run=dry_run,
            resume=resume,
            cluster=cluster,
            detach=detach,
            output=output,
        )
    )
