"""`forge data`: prepare a corpus, and look at what the model will see of it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import JobArgument, Output, OutputOption, SetOption

if TYPE_CHECKING:
    from forge.config.load import LoadedJob

app = typer.Typer(help="Prepare data, and see what a model will see.", no_args_is_help=True, rich_markup_mode=None)

_JOB_SUFFIXES = {".yaml", ".yml"}


class SplitName(StrEnum):
    """The side of a corpus."""

    TRAIN = "train"
    HELD_OUT = "held_out"


@app.command()
def prepare(file: JobArgument, overrides: SetOption = None, output: OutputOption = Output.TABLE) -> None:
    """Tokenize the corpus of a job into the cache, so that training starts at once; print what is there.

    Example:  forge data prepare jobs/chat.yaml
    """
    from forge import api
    from forge.cli import display
    from forge.cli.progress import PrepareScreen
    from forge.report.data_view import corpus_facts

    loaded = api.load_job(file, overrides or [])
    with PrepareScreen() as screen:
        corpus = api.prepare_data(loaded, on_progress=screen.show)
    if output is Output.JSON:
        display.print_json(asdict(corpus))
        return
    parts = [(f"part {part.name}", text) for part in corpus.parts for _, text in corpus_facts(part.corpus)]
    display.facts([*corpus_facts(corpus), *parts, ("folder", corpus.folder)])
    arguments = shlex.join([str(file), *(word for one in overrides or [] for word in ("--set", one))])
    display.next_command(f"forge data inspect {arguments}", purpose="see examples")


@app.command()
def inspect(
    file: Annotated[
        str,
        typer.Argument(
            metavar="JOB|FILE", help="A job file, or data: a file, pattern or URL as data.files takes it."
        ),
    ],
    count: Annotated[int, typer.Option("-n", "--count", min=1, max=1000, help="How many examples.")] = 3,
    index: Annotated[
        int | None,
        typer.Option("--index", min=0, help="From this example on, in the order of the records, counted from 0."),
    ] = None,
    split: Annotated[
        SplitName | None, typer.Option("--split", help="Examples that are trained on, or held out.")
    ] = None,
    part: Annotated[str | None, typer.Option("--part", help="Only of this part of data.mixture.")] = None,
    max_chars: Annotated[
        int, typer.Option("--max-chars", min=20, max=1_000_000, help="Cut longer texts in the middle.")
    ] = 4000,
    overrides: SetOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show examples as the model will see them, and mark what it learns to predict. Starts nothing.

    Of data without a job, say what it is with --set, as in --set data.format=chat
    --set data.tokenizer.from_pretrained=FOLDER.

    Example:  forge data inspect jobs/chat.yaml -n 10
    """
    from forge import api
    from forge.cli import display
    from forge.cli.data_view import show_examples
    from forge.cli.progress import PrepareScreen
    from forge.report.data_view import example_facts, view_facts

    loaded = _loaded(file, overrides=overrides or [])
    with PrepareScreen() as screen:
        view = api.inspect_data(
            loaded,
            count=count,
            index=index,
            split=split,
            part=part,
            max_chars=max_chars,
            on_progress=screen.show,
        )
    if output is Output.JSON:
        display.print_json(asdict(view))
        return
    facts = view_facts(view)
    display.facts(facts if view.num_sampled_records is not None else [*example_facts(view), *facts])
    show_examples(view.examples, console=display.OUT, is_whole=True)


def _loaded(file: str, *, overrides: list[str]) -> LoadedJob:
    """Load a job file, or make a job of data."""
    from forge import api
    from forge.config.load import load_job_text

    if Path(file).suffix in _JOB_SUFFIXES:
        return api.load_job(file, overrides)
    job = {
        "name": "inspect",
        "model": {"architecture": "llama"},
        "data": {},
        "training": {"total_steps": 1, "global_batch_size": 1, "optimizer": {"lr": 1e-3}},
    }
    # As --set, the data have no line in a job file that errors would name.
    return load_job_text(json.dumps(job), path=file, overrides=[f"data.files={json.dumps(file)}", *overrides])
