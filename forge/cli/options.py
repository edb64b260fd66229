"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def complete_run(context: typer.Context, incomplete: str) -> list[str]:
    """Return the ids of runs that begin so, for the shell: those of the folder of runs, then those used before."""
    from forge.runs.index import known_ids

    root = context.params.get("runs") or Path("runs")
    return [name for name in ["latest", *known_ids(Path(root))] if name.startswith(incomplete)]


class Output(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="table; or json, with nothing else on stdout.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the job file, as in training.total_steps=50."
    ),
]
JobArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The job file.", show_default=False)]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's id, a unique prefix of it, its folder, or latest.",
        autocompletion=complete_run,
    ),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs.")]
ResumableJobArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="The job file; not needed with --resume.", show_default=False),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop.")]
ClusterOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Run on this cluster: a name from forge cluster up, or a cluster file."),
]
DetachOption = Annotated[bool, typer.Option("--detach", help="Start it without following it.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before money is spent.")]
NodeOption = Annotated[
    str | None,
    typer.Option("--node", metavar="NODE", help="A node: its number in the order of joining, or its id."),
]
