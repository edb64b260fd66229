"""Options that several commands share, said once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Output(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table, or json on stdout alone.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the job file, as in training.total_steps=50."
    ),
]
JobArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The job file.", show_default=False)]
RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's id, a unique beginning of it, its folder, or latest.")
]
RunsOption = Annotated[Path, typer.Option("--runs", help="The folder that holds the runs.")]
