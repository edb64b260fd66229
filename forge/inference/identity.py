"""Which model a folder holds, found without loading its weights."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from forge.checkpoint.best import open_verified
from forge.checkpoint.reader import Checkpoint
from forge.checkpoint.storage import open_storage
from forge.environment import expand_home
from forge.errors import ArgumentError, ForgeError
from forge.fs import default_cache_dir
from forge.model.auto_classes import auto_class_of_config
from forge.model.transformers_config import load_config
from forge.model.weight_files import content_digests, open_weight_files
from forge.objective.registry import AutoClass
from forge.process import one_line, take_stdout
from forge.runs.reader import read_plan

Kind = Literal["causal-lm", "seq2seq", "classification", "token-classification", "embedding", "masked-lm", "reward"]

KINDS: Mapping[AutoClass, Kind] = {
    "AutoModelForCausalLM": "causal-lm",
    "AutoModelForSeq2SeqLM": "seq2seq",
    "AutoModelForSequenceClassification": "classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForMaskedLM": "masked-lm",
    "AutoModel": "embedding",
}
WRITES: tuple[Kind, ...] = ("causal-lm", "seq2seq")
"""The kinds that write text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """Which model a folder holds, known without its weights."""

    name: str
    kind: Kind
    step: int | None
    """Of the checkpoint; None for a folder of weights."""
    digest: str
    """As `LoadedModel.digest`."""
    is_run: bool


def identify(source: str | Path, *, step: int | str | None = None, ema: bool = False) -> ModelIdentity:
    """Find which model `load` would load. Raises: as `load`."""
    folder = Path(expand_home(str(source)))
    if (folder / "plan.json").is_file():
        plan = read_plan(folder)
        checkpoint = open_verified(open_storage(plan.job.checkpoint.url_of(str(folder))), step=step)
        is_reward = plan.job.training.objective == "reward"
        return ModelIdentity(
            name=folder.resolve().name,
            kind="reward" if is_reward else KINDS[plan.job.training.auto_class],
            step=checkpoint.progress.step,
            digest=digest_of(checkpoint, ema=ema),
            is_run=True,
        )
    return ModelIdentity(
        name=folder.resolve().name,
        kind=KINDS[auto_class_of_config(load_config(str(folder)))],
        step=None,
        digest=digest_of_folder(folder),
        is_run=False,
    )


def digest_of_folder(folder: Path) -> str:
    """Digest of the weights of a folder. Raises: ArgumentError if they cannot be read."""
    try:
        digests = content_digests(open_weight_files(str(folder)), cache=default_cache_dir() / "digests")
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be read: {one_line(error)}") from error
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def digest_of(checkpoint: Checkpoint, *, ema: bool) -> str:
    """Digest of the weights of a checkpoint."""
    base = checkpoint.shape.base
    body = {
        "parts": sorted((part.crc32, part.size_bytes) for part in checkpoint.manifest.parts),
        "base": None if base is None else dict(base.files),
        "ema": ema,
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def main() -> None:
    """Answer a request on stdin, the arguments of `identify` and `environment`, as `forge.remote` asks it."""
    stdout = take_stdout()
    request = json.load(sys.stdin)
    os.environ.update(request.pop("environment"))
    try:
        line: dict[str, object] = {"answer": asdict(identify(**request))}
    except ForgeError as error:
        line = {"error": {"class": type(error).__name__, "message": str(error)}}
    with stdout:
        stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
