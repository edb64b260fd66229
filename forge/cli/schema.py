"""`forge schema`: JSON schemas for editors."""

from __future__ import annotations

import typer

app = typer.Typer(help="Print JSON schemas for editors.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _schemas() -> None:
    """Keep `job` a subcommand: other files will have schemas too."""


@app.command()
def job() -> None:
    """Print the job file's JSON schema.

    Example:  forge schema job > job.schema.json
    """
    from forge.cli import display
    from forge.config.schema import job_schema

    display.print_json(job_schema())
