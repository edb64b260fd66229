"""`forge generate`: text from a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge.cli.checkpoints import StepOption, parse_step
from forge.cli.options import Output, OutputOption, RunArgument, RunsOption


def generate(
    run: RunArgument = "latest",
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue, or the source.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to generate.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Sampling temperature; 0: always the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=1, help="Sample among this many likeliest tokens.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 1,
    ema: Annotated[bool, typer.Option("--ema", help="Use the averaged (EMA) weights.")] = False,
    step: StepOption = None,
    runs: RunsOption = Path("runs"),
    output: OutputOption = Output.TABLE,
) -> None:
    """Continue a prompt with a run's newest checkpoint, or another one; an encoder-decoder writes its target.

    Example:  forge generate latest --prompt 'def main('
    """
    from forge.cli import display
    from forge.runs.reader import find_run
    from forge.runtime.torch_subprocess import sample_text
    from forge.units import format_duration

    folder = find_run(run, root=runs)
    wanted = parse_step(step)
    which = "newest checkpoint" if wanted is None else "best checkpoint" if wanted == "best" else f"step {wanted}"
    display.message(f"importing torch and transformers, then loading the {which} of {folder.name}")
    answer = sample_text(
        folder,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        ema=ema,
        step=wanted,
    )
    if output is Output.JSON:
        display.print_json(answer)
    else:
        display.print_text(answer["prompt"] + ("" if answer["continues"] else "\n\n") + answer["text"])
        took = f"{format_duration(answer['load_s'])} to load, {format_duration(answer['generate_s'])} to generate"
        display.message(f"step {answer['step']}: {took}")
