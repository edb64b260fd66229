"""`forge runs report` and `forge runs compare`: pages of a run, a search and several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge.cli.options import Output, OutputOption, RunArgument, RunsOption, complete_run

_RUNS = Path("runs")


def report(run: RunArgument = "latest", runs: RunsOption = _RUNS) -> None:
    """Write report.html of a run or a search so far, one file to open in a browser; for a search also best.yaml.

    Example:  forge runs report latest
    """
    from forge.cli import display
    from forge.errors import ArgumentError
    from forge.report.run_report import write_run_report
    from forge.report.search_record import write_results
    from forge.runs.reader import find_run, read_run

    folder = find_run(run, root=runs)
    found = read_run(folder)
    if found.plan.search is None:
        write_run_report(folder)
    elif any(event["event"] == "TrialSuggested" for event in found.events):
        write_results(folder)
    else:
        raise ArgumentError(f"{folder.name} has no trials yet, so there is nothing to report")
    display.print_text(str(folder / "report.html"))


def compare(
    names: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Two or more runs.", show_default=False, autocompletion=complete_run),
    ],
    runs: RunsOption = _RUNS,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Also write a page with their loss curves.", show_default=False
        ),
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compare runs: results, scores, speed, cost, and what differs between their jobs.

    Example:  forge runs compare tiny-0101-000000-abcd latest --html compare.html
    """
    from forge.cli import display
    from forge.report.run_compare import compare_runs, comparison_rows, difference_rows, write_comparison
    from forge.runs.reader import find_run, read_run

    compared = compare_runs([read_run(find_run(name, root=runs)) for name in names])
    if html is not None:
        write_comparison(compared, path=html)
    if output is Output.JSON:
        display.print_json(compared.to_json())
        return
    display.table(["", *(f"#{name}" for name in compared.names)], comparison_rows(compared))
    if compared.differences:
        display.heading("jobs", "what differs between them")
        display.table(["key", *compared.names], difference_rows(compared))
    for note in compared.notes:
        display.message(note)
    if html is not None:
        display.message(f"page: {html}")
