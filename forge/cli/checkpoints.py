"""`forge checkpoints`: list, verify and export the checkpoints of a run or a storage folder."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge.cli.options import Output, OutputOption, RunsOption

if TYPE_CHECKING:
    from forge.runs.checkpoints import CheckpointEntry

app = typer.Typer(help="List, verify and export checkpoints.", no_args_is_help=True, rich_markup_mode=None)

_RUNS = Path("runs")


class Precision(StrEnum):
    """The dtype of exported weights."""

    BF16 = "bf16"
    FP32 = "fp32"


LocationArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="A run's id, a unique prefix of it, its folder, or latest; or a folder or URL of checkpoints.",
    ),
]
StepOption = Annotated[
    str | None, typer.Option("--step", metavar="STEP", help="The checkpoint of this step, or best.")
]


@app.command("list")
def list_(
    location: LocationArgument = "latest", runs: RunsOption = _RUNS, output: OutputOption = Output.TABLE
) -> None:
    """List a run's checkpoints, newest first. File sizes are checked, contents are not read.

    Example:  forge checkpoints list latest -o json
    """
    from forge.cli import display
    from forge.runs.checkpoints import entries, locate

    url = locate(location, root=runs).url
    found = list(entries(url))
    if output is Output.JSON:
        display.print_json([asdict(entry) for entry in found])
        return
    if not found:
        display.message(f"no checkpoints in {url}")
        return
    display.table(_COLUMNS, [_row(entry, whole="complete") for entry in found])
    display.next_command(f"forge checkpoints verify {shlex.quote(location)}", purpose="verify their contents")


@app.command()
def verify(
    location: LocationArgument = "latest",
    step: StepOption = None,
    runs: RunsOption = _RUNS,
    output: OutputOption = Output.TABLE,
) -> None:
    """Verify every byte of a run's checkpoints against their checksums. Exit code 2 if one is broken.

    Example:  forge checkpoints verify latest
    """
    from forge.cli import display
    from forge.errors import CheckpointError
    from forge.runs.checkpoints import entries, locate

    url = locate(location, root=runs).url
    found = []
    for entry in entries(url, step=parse_step(step), with_checksums=True):
        found.append(entry)
        if output is not Output.JSON:
            display.message(f"{entry.name}  {entry.problem or 'verified'}")
    if output is Output.JSON:
        display.print_json([asdict(entry) for entry in found])
    else:
        display.table(_COLUMNS, [_row(entry, whole="verified") for entry in found])
    broken = [entry for entry in found if entry.problem is not None]
    if not found:
        raise CheckpointError(f"no checkpoints in {url}")
    if broken:
        newest = next((entry.name for entry in found if entry.problem is None), None)
        resumed = f"a run resumes from {newest}" if newest else "none is left to resume from"
        raise CheckpointError(f"{len(broken)} of {len(found)} checkpoints in {url} are broken; {resumed}")
    display.next_command(
        f"forge checkpoints export {shlex.quote(location)} --to DIR", purpose="export one as a Hugging Face folder"
    )


@app.command()
def export(
    location: LocationArgument = "latest",
    to: Annotated[Path, typer.Option("--to", help="The folder to create.", show_default=False)] = ...,  # type: ignore[assignment]
    step: StepOption = None,
    dtype: Annotated[Precision, typer.Option(help="dtype of the weights.")] = Precision.BF16,
    ema: Annotated[bool, typer.Option("--ema", help="Export the averaged (EMA) weights.")] = False,
    adapters: Annotated[bool, typer.Option("--adapters", help="Export LoRA adapters alone, for peft.")] = False,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest size of one file.")] = "5GB",
    runs: RunsOption = _RUNS,
    output: OutputOption = Output.TABLE,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder for `from_pretrained`.

    LoRA adapters are merged into the weights. With --adapters the folder holds them alone, for
    `PeftModel.from_pretrained`. Of a model of your own: the safetensors files of its state dict.

    Example:  forge checkpoints export latest --to my-model --dtype bf16
    """
    from forge.cli import display
    from forge.cli.progress import ExportScreen
    from forge.runs.checkpoints import embedding_of, locate
    from forge.runtime.torch_subprocess import export_weights
    from forge.units import format_bytes, format_count, parse_bytes

    try:
        max_shard_bytes = parse_bytes(shard_size)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shard-size") from error
    wanted = parse_step(step)
    found = locate(location, root=runs)
    display.message(f"exporting {found.url}")
    with ExportScreen() as screen:
        answer = export_weights(
            on_progress=screen.show,
            url=found.url,
            to=str(to),
            step=wanted,
            dtype=dtype.value,
            ema=ema,
            adapters=adapters,
            max_shard_bytes=max_shard_bytes,
            tokenizer=str(found.tokenizer) if found.tokenizer else None,
            embedding=embedding_of(found.job) if not adapters else None,
        )
    if output is Output.JSON:
        display.print_json(answer)
        return
    files = "1 file" if answer["num_files"] == 1 else f"{answer['num_files']} files"
    display.message(
        f"step {answer['step']}: {format_count(answer['num_parameters'])} parameters, "
        f"{format_bytes(answer['size_bytes'])} in {files}, in {answer['folder']}"
    )
    if adapters:
        load = f'PeftModel.from_pretrained(model, "{answer["folder"]}")'
        display.message(f"adapters alone, for the model {answer['base']}")
        display.next_command(load, purpose="in Python")
        return
    if answer["is_embedding"]:
        display.next_command(f'SentenceTransformer("{answer["folder"]}")', purpose="in Python")
        return
    if answer["is_transformers"]:
        display.next_command(f'{answer["auto_class"]}.from_pretrained("{answer["folder"]}")', purpose="in Python")
        return
    file = "model.safetensors" if answer["num_files"] == 1 else "model-*.safetensors"
    display.message(f"a model of your own has no config.json: {file} holds its state dict")
    display.next_command(f'safetensors.torch.load_file("{answer["folder"]}/{file}")', purpose="in Python")


def parse_step(text: str | None) -> int | str | None:
    """Return the number of a step, or `best`. Raises: typer.BadParameter for anything else."""
    if text is None or text == "best":
        return text
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a step from 1 on nor best", param_hint="--step")
    return int(text)


_COLUMNS = ("checkpoint", "#tokens", "#size", "#parts", "average", "evaluation", "")


def _row(entry: CheckpointEntry, *, whole: str) -> list[str]:
    from forge.units import format_bytes, format_count

    return [
        entry.name,
        "-" if entry.num_tokens is None else format_count(entry.num_tokens),
        "-" if entry.size_bytes is None else format_bytes(entry.size_bytes),
        "-" if entry.num_parts is None else str(entry.num_parts),
        "yes" if entry.has_average else "",
        "" if entry.metric_value is None else f"{entry.metric} {entry.metric_value:.4f}{' (best)' * entry.is_best}",
        whole if entry.problem is None else f"broken: {entry.problem}",
    ]
