"""The options of `forge serve`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class EngineName(StrEnum):
    """The engines of `forge serve`."""

    AUTO = "auto"
    FORGE = "forge"
    VLLM = "vllm"


SourceArgument = Annotated[
    str, typer.Argument(metavar="RUN|FOLDER", help="A run, or a folder of a model in the form of transformers.")
]
ServerArgument = Annotated[
    str | None, typer.Argument(metavar="[SERVER]", help="A server's name; by default the only one that runs.")
]
EmaOption = Annotated[bool, typer.Option("--ema", help="Serve the averaged (EMA) weights.")]
NameOption = Annotated[str, typer.Option("--name", help="Of the server, for the other commands.")]
ModelNameOption = Annotated[
    str | None,
    typer.Option("--model-name", help="What clients give as model; by default the run's or folder's name."),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option("--adapter", metavar="NAME=RUN|FOLDER", help="LoRA adapters over the model, served as NAME."),
]
OtherAdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=RUN|FOLDER", help="Other adapters; by default those of the server stay."
    ),
]
EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="What generates: forge's own engine, or vLLM in an environment of its own, which is installed at its "
        "first use. auto: vLLM where it is installed and replicas have an NVIDIA GPU.",
    ),
]
HostOption = Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback require keys.")]
PortOption = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
KeysOption = Annotated[
    Path | None, typer.Option("--keys", metavar="FILE", help="File of API keys, made by forge serve key.")
]
TlsCertOption = Annotated[
    Path | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate chain (PEM) for https.")
]
TlsKeyOption = Annotated[
    Path | None, typer.Option("--tls-key", metavar="FILE", help="Private key of the certificate.")
]
ReplicasOption = Annotated[
    str,
    typer.Option("--replicas", metavar="N or N..M", help="Copies of the model; of a range as many as needed."),
]
MaxRunningOption = Annotated[
    int | None,
    typer.Option(
        "--max-running",
        min=1,
        max=4096,
        help="Texts that one replica computes at once; by default 64 that it generates, or 256 of another model.",
    ),
]
MaxQueueOption = Annotated[
    int, typer.Option("--max-queue", min=1, help="Requests that may wait; more are refused with 429.")
]
MaxConnectionsOption = Annotated[
    int, typer.Option("--max-connections", min=1, max=60_000, help="Open at once; more are refused with 503.")
]
ClientConnectionsOption = Annotated[
    int,
    typer.Option("--max-connections-per-client", min=1, max=60_000, help="Of one address; raise it for a proxy's."),
]
RequestsOption = Annotated[float | None, typer.Option("--requests-per-minute", help="Of each key.")]
TokensOption = Annotated[
    float | None, typer.Option("--tokens-per-minute", help="Of each key, of prompts and answers.")
]
SecondsOption = Annotated[float | None, typer.Option("--seconds-per-request", help="An answer is cut there.")]
DrainOption = Annotated[float, typer.Option("--drain", min=0, help="Seconds for running requests at the end.")]
CheckOption = Annotated[
    bool, typer.Option("--check/--no-check", help="First compare served log-probabilities with the model's own.")
]


def absolute(path: Path | None) -> str | None:
    """A file as the server, which runs in another folder, is given it."""
    return None if path is None else str(path.expanduser().absolute())
