"""`forge tune`: run many trials of a job with other values of some keys, and write the best one as a job file."""

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
    YesOption,
)


def tune(
    file: ResumableJobArgument = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    resume: Annotated[
        str | None,
        typer.Option(metavar="SEARCH", help="Resume this search (or: latest) with its unfinished trials."),
    ] = None,
    cluster: ClusterOption = None,
    detach: DetachOption = False,
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Search for the best values of a job's keys, as described in its `search` section.

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
            yes=yes,
            output=output,
        )
    )
