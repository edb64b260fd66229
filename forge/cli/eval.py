"""`forge eval`: score runs and folders of weights in tasks."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.checkpoints import StepOption, parse_step
from forge.cli.options import ClusterOption, RunsOption

if TYPE_CHECKING:
    from forge.evaluate.client import Evaluation
    from forge.evaluate.compare import Comparison


class EvaluationOutput(StrEnum):
    """How scores are printed."""

    TABLE = "table"
    JSON = "json"
    MARKDOWN = "markdown"
    LATEX = "latex"


class EvaluationDtype(StrEnum):
    """In which models compute."""

    FP32 = "fp32"
    BF16 = "bf16"


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="RUN|FOLDER...", help="Runs (id, prefix, folder, latest), or folders of weights."),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option("--tasks", "-t", metavar="FILE|NAME", help="Task files, names in jobs/eval, or lm-eval:NAME."),
    ] = None,
    step: StepOption = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the averaged (EMA) weights.")] = False,
    dtype: Annotated[EvaluationDtype, typer.Option(help="In which models compute.")] = EvaluationDtype.FP32,
    limit: Annotated[int | None, typer.Option(min=1, help="Most examples of each task.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Most workers; without it, one for each CPU or GPU.")
    ] = None,
    contamination: Annotated[
        bool | None,
        typer.Option(help="Search the training data of a run for the examples; by default up to 500M tokens."),
    ] = None,
    cluster: ClusterOption = None,
    runs: RunsOption = Path("runs"),
    output: Annotated[EvaluationOutput, typer.Option("--output", "-o")] = EvaluationOutput.TABLE,
) -> None:
    """Score one model, or compare several, in tasks; started again, it asks only what was not answered yet.

    Example:  forge eval latest --tasks jobs/eval/summaries.yaml
    """
    from forge import api
    from forge.cli import display
    from forge.cli.progress import answers_kept
    from forge.errors import ArgumentError
    from forge.runs.scores import SCORES

    names = [name for given in tasks or [] for name in given.split(",") if name]
    if not names:
        raise ArgumentError("name at least one task: --tasks FILE, or a name in jobs/eval")
    with answers_kept(), ShardScreen() as screen:
        found = api.evaluate(
            models,
            names,
            root=runs,
            step=parse_step(step),
            ema=ema,
            dtype="bf16" if dtype is EvaluationDtype.BF16 else "fp32",
            limit=limit,
            workers=workers,
            contamination=contamination,
            cluster=cluster,
            on_message=screen.message,
            on_progress=screen.show,
        )
    if output is EvaluationOutput.JSON:
        display.print_json(_record(found))
    elif output is EvaluationOutput.TABLE:
        show_comparison(found.comparison)
    else:
        from forge.evaluate.table import to_latex, to_markdown

        render = to_markdown if output is EvaluationOutput.MARKDOWN else to_latex
        display.print_text(render(found.comparison))
    for one in filter(lambda model: model.scores, found.models):
        display.message(f"scores and answers: {one.folder / SCORES}")


def show_comparison(comparison: Comparison) -> None:
    """Print the table of models, what differs between their jobs, and how metrics were computed."""
    from forge.cli import display
    from forge.evaluate.table import cells_of, header_of, shown, signatures

    display.table(header_of(comparison), cells_of(comparison))
    if comparison.differences:
        display.heading("jobs", "what differs between them")
        rows = [[one.key, *map(shown, one.values)] for one in comparison.differences]
        display.table(["key", *comparison.models], rows)
    for line in (*comparison.notes, *signatures(comparison)):
        display.message(line)


class ShardScreen:
    """Progress of an evaluation: one updating line on a terminal, the messages on a pipe."""

    def __enter__(self) -> ShardScreen:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def show(self, done: int, total: int) -> None:
        """Show how many shards are done."""
        from forge.units import counted

        self._write(f"{done} of {counted(total, 'shard')} answered …")

    def message(self, text: str) -> None:
        """Print a message above the line."""
        from forge.cli import display

        self._write("")
        display.message(text)

    def _write(self, text: str) -> None:
        from forge.cli import display

        if display.ERR.is_terminal:
            sys.stderr.write("\r\033[K" + text[: display.ERR.width - 1])
            sys.stderr.flush()


def _record(found: Evaluation) -> dict[str, object]:
    from dataclasses import asdict

    models = [
        {"model": one.source, "folder": str(one.folder), "scores": [asdict(score) for score in one.scores]}
        for one in found.models
    ]
    return {"models": models, "comparison": found.comparison.to_json()}
