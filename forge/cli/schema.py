"""`forge schema`: JSON schemas for editors."""

from __future__ import annotations

import typer

app = typer.Typer(help="Print JSON schemas for editors.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def job() -> None:
    """Print the job file's JSON schema.

    Example:  forge schema job > job.schema.json
    """
    from forge.cli import display
    from forge.config.schema import job_schema

    display.print_json(job_schema())


@app.command()
def task() -> None:
    """Print the JSON schema of a task file of `forge eval`.

    Example:  forge schema task > task.schema.json
    """
    from forge.cli import display
    from forge.config.schema import task_schema

    display.print_json(task_schema())
