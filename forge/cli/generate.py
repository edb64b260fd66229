"""`forge generate`: what a model answers to a prompt or a file of them: text, labels, tokens for masks, vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from forge.cli.checkpoints import StepOption, parse_step
from forge.cli.options import ClusterOption, RunsOption, complete_run

_FORMATS = ("table", "json")


SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|FOLDER",
        help="A run's id, a unique prefix of it, its folder, or latest; or a folder with a model.",
        autocompletion=complete_run,
    ),
]
PromptOption = Annotated[str, typer.Option("--prompt", "-p", help="The text to continue, or the source.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="The prompt is a turn of the user, in the chat template.")]
SystemOption = Annotated[str | None, typer.Option(help="The system message; implies --chat.")]
InputOption = Annotated[
    Path | None, typer.Option("--input", help="JSON lines of prompts: strings, or objects with prompt or messages.")
]
AnswersOption = Annotated[
    str, typer.Option("--output", "-o", help="table or json; with --input, the file to write.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Largest number of tokens to generate; by default 128.")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option(min=0.0, help="0: the likeliest token; the default for targets and beams, else 0.8."),
]
TopPOption = Annotated[
    float | None, typer.Option(help="Sample among the likeliest tokens up to this share; by default 1.")
]
TopKOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Sample among so many likeliest tokens, 0: all; by default 50. Of a masked language model, how many "
        "tokens are given for each mask; by default 5.",
    ),
]
MinPOption = Annotated[
    float | None, typer.Option(help="Sample among tokens with this share of the largest probability; by default 0.")
]
PenaltyOption = Annotated[
    float | None, typer.Option(help="Above 1: tokens that occurred are less likely; by default 1.")
]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
BeamsOption = Annotated[int | None, typer.Option(min=1, help="Beam search with so many beams.")]
NumOption = Annotated[int | None, typer.Option("-n", min=1, help="Texts for each prompt; by default 1.")]
LogprobsOption = Annotated[
    int | None, typer.Option(min=0, help="Give each token's log-probability and so many likeliest tokens.")
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Random seed; by default 1.")]
DtypeOption = Annotated[str, typer.Option(help="fp32 or bf16: in which the model computes.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="With --input: answer with so many processes, on Ray; by default all of --cluster."),
]
EmaOption = Annotated[bool, typer.Option("--ema", help="Use the averaged (EMA) weights.")]


def generate(
    source: SourceArgument = "latest",
    prompt: PromptOption = "",
    chat: ChatOption = False,
    system: SystemOption = None,
    input_file: InputOption = None,
    output: AnswersOption = "table",
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = None,
    stop: StopOption = None,
    beams: BeamsOption = None,
    n: NumOption = None,
    logprobs: LogprobsOption = None,
    seed: SeedOption = None,
    dtype: DtypeOption = "fp32",
    workers: WorkersOption = None,
    cluster: ClusterOption = None,
    ema: EmaOption = False,
    step: StepOption = None,
    runs: RunsOption = Path("runs"),
) -> None:
    """Continue a prompt, answer a chat turn, translate, classify, fill masks or embed, as the model was trained.

    Example:  forge generate latest --prompt 'def main('

    With --input and --output all prompts of a file are answered; started again, it continues where it was stopped.
    """
    from forge.cli import display
    from forge.inference.answer_request import named_model
    from forge.runs.find_model import find_model, require_weights
    from forge.runtime.torch_subprocess import answer_prompts

    is_chat = chat or system is not None
    _check(output, input_file=input_file, prompt=prompt, is_chat=is_chat, dtype=dtype)
    _check_used(output, input_file=input_file, workers=workers, cluster=cluster, logprobs=logprobs)
    given = {
        **{"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p},
        **{"repetition_penalty": repetition_penalty, "stop": stop or None, "num_beams": beams, "n": n},
        **{"logprobs": logprobs, "seed": seed},
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    _check_sampling(sampling)
    folder = find_model(source, root=runs)
    require_weights(folder, step=parse_step(step), ema=ema, is_elsewhere=cluster is not None)
    config = {
        **{"source": str(folder), "step": parse_step(step), "ema": ema, "dtype": dtype},
        **{"chat": is_chat, "system": system, "sampling": sampling},
    }
    if input_file is not None:
        _answer_file(config, source=input_file, output=Path(output), num_workers=workers, cluster=cluster)
        return
    display.message(f"importing torch and transformers, then loading {named_model(folder, step=parse_step(step))}")
    answer = answer_prompts(config, [prompt], on_message=display.message)
    if output == "json":
        display.print_json({**answer.pop("answers")[0], **answer, "prompt": prompt})
    else:
        _print(answer, prompt=prompt, is_chat=is_chat)


def _check_sampling(given: Mapping[str, Any]) -> None:
    """Raises: ArgumentError for a value out of range, before the model is loaded."""
    from forge.inference.sampling import SamplingParams

    is_drawn = given.get("num_beams", 1) == 1
    SamplingParams(**{"temperature": float(is_drawn), **given, "stop": tuple(given.get("stop", ()))})


def _check_used(
    output: str, *, input_file: Path | None, workers: int | None, cluster: str | None, logprobs: int | None
) -> None:
    """Raises: ArgumentError for an option that would have no effect."""
    from forge.errors import ArgumentError

    if input_file is not None:
        return
    for option, value in (("--cluster", cluster), ("--workers", workers)):
        if value is not None:
            raise ArgumentError(f"{option} is for files of prompts: give --input and --output, or leave it out")
    if logprobs is not None and output == "table":
        raise ArgumentError("--logprobs are printed by --output json, and written with --input; add one of them")


def _check(output: str, *, input_file: Path | None, prompt: str, is_chat: bool, dtype: str) -> None:
    """Raises: ArgumentError for options that do not go together, or a file of prompts that does not exist."""
    from forge.environment import looked_in
    from forge.errors import ArgumentError

    if dtype not in ("fp32", "bf16"):
        raise ArgumentError(f"--dtype is fp32 or bf16, not {dtype}")
    if input_file is None and output not in _FORMATS:
        raise ArgumentError(
            f"--output {output}: without --input it is table or json; give the prompts by --input FILE"
        )
    if input_file is not None and output in _FORMATS:
        raise ArgumentError("--input needs --output FILE, for the answers")
    if input_file is not None and Path(output).exists():
        raise ArgumentError(f"{output} exists; name another file, or remove it")
    if input_file is not None and not input_file.is_file():
        lacks = "is a folder" if input_file.is_dir() else f"does not exist{looked_in(input_file)}"
        raise ArgumentError(f"--input {input_file} {lacks}; give a file of prompts, one JSON line each")
    if is_chat and input_file is None and not prompt:
        raise ArgumentError("--chat and --system need the user's turn: give --prompt TEXT, or --input FILE")
    if input_file is not None and prompt:
        raise ArgumentError("give --prompt or --input, not both")


def _answer_file(
    config: dict[str, Any], *, source: Path, output: Path, num_workers: int | None, cluster: str | None
) -> None:
    from forge.cli import display
    from forge.cli.progress import ExportScreen, answers_kept
    from forge.runtime.torch_subprocess import answer_file
    from forge.units import counted, format_duration

    with answers_kept(), ExportScreen() as screen:
        found = answer_file(
            config,
            source=source,
            output=output,
            num_workers=num_workers,
            cluster=cluster,
            on_progress=screen.show_answers,
            on_message=display.message,
        )
    reused = f" ({found['num_reused']:,} of them from before)" if found["num_reused"] else ""
    display.message(
        f"{counted(found['num_answers'], 'answer')}{reused} in {output}, in {format_duration(found['answer_s'])}"
    )


def _print(answer: dict[str, Any], *, prompt: str, is_chat: bool) -> None:
    from forge.cli import display
    from forge.units import counted, format_duration

    [first] = answer["answers"]
    texts = first.get("texts", [first])
    for number, made in enumerate(texts):
        if number:
            display.print_text("")
        display.print_text(_shown(made, prompt=prompt, kind=answer["kind"], is_chat=is_chat))
        if made.get("cut_tokens"):
            cut = counted(made["cut_tokens"], "token")
            display.warning(f"the beginning of the prompt, {cut}, was cut: the model has no room")
    if answer["has_chat_template"] and not is_chat and answer["kind"] == "causal-lm":
        display.message("the model has a chat template: with --chat the prompt is a turn of the user")
    took = f"{format_duration(answer['load_s'])} to load, {format_duration(answer['answer_s'])} to answer"
    where = answer["name"] if answer["step"] is None else f"step {answer['step']}"
    display.message(f"{where}: {took}")


def _shown(made: dict[str, Any], *, prompt: str, kind: str, is_chat: bool) -> str:
    """An answer as text: what was generated, behind the prompt that it continues; labels; or numbers."""
    if "text" in made:
        if is_chat or kind == "seq2seq":
            return str(made["text"])
        return prompt + str(made["text"])
    if "masks" in made:
        return "\n\n".join(
            "\n".join(f"{one['probability']:6.1%}  {one['token']}" for one in mask) for mask in made["masks"]
        )
    if "embedding" in made:
        return " ".join(f"{value:.6f}" for value in made["embedding"])
    if "value" in made:
        return f"{made['value']:.6g}"
    shares = sorted(made["probabilities"].items(), key=lambda item: -item[1])
    return "\n".join(f"{share:6.1%}  {name}" for name, share in shares) or " ".join(made["labels"])
