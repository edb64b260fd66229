"""Which model a folder holds, found without loading its weights; its kind alone needs transformers."""

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
from forge.data.tokenizer import load_tokenizer
from forge.environment import expand_home
from forge.errors import ArgumentError, ForgeError
from forge.foreign import parse_object, read_file
from forge.fs import default_cache_dir
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
_MAX_CONFIG_BYTES = 2**24


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


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsIdentity:
    """Which weights a folder holds."""

    step: int | None
    """Of the checkpoint; None for a folder of weights."""
    digest: str
    """As `LoadedModel.digest`."""


def identify(source: str | Path, *, step: int | str | None = None, ema: bool = False) -> ModelIdentity:
    """Find which model `load` would load. Raises: as `load`."""
    folder = Path(expand_home(str(source)))
    is_run = (folder / "plan.json").is_file()
    weights = identify_weights(folder, step=step, ema=ema)
    kind = _kind_of_run(folder) if is_run else _kind_of_folder(folder)
    return ModelIdentity(
        name=folder.resolve().name, kind=kind, step=weights.step, digest=weights.digest, is_run=is_run
    )


def identify_weights(source: str | Path, *, step: int | str | None = None, ema: bool = False) -> WeightsIdentity:
    """Find which weights `load` would load, without importing transformers. Raises: as `load`."""
    folder = Path(expand_home(str(source)))
    if not (folder / "plan.json").is_file():
        return WeightsIdentity(step=None, digest=digest_of_folder(folder))
    checkpoint = open_verified(open_storage(read_plan(folder).job.checkpoint.url_of(str(folder))), step=step)
    return WeightsIdentity(step=checkpoint.progress.step, digest=digest_of(checkpoint, ema=ema))


def vocabulary_of(source: str | Path) -> int:
    """How many token ids a model knows, from its tokenizer and config alone. Raises: DataError, ArgumentError."""
    folder = Path(expand_home(str(source)))
    if (folder / "plan.json").is_file():
        return read_plan(folder).corpus.vocab_size
    try:
        config = parse_object(read_file(folder / "config.json", max_bytes=_MAX_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{folder / 'config.json'} cannot be read: {one_line(error)}") from error
    size, own = load_tokenizer(str(folder)).vocab_size, config.get("vocab_size")
    return min(size, own) if isinstance(own, int) and own > 0 else size


def _kind_of_run(folder: Path) -> Kind:
    training = read_plan(folder).job.training
    return "reward" if training.objective == "reward" else KINDS[training.auto_class]


def _kind_of_folder(folder: Path) -> Kind:
    from forge.model.auto_classes import auto_class_of_config  # imports transformers, which takes seconds
    from forge.model.transformers_config import load_config

    return KINDS[auto_class_of_config(load_config(str(folder)))]


def digest_of_folder(folder: Path) -> str:
    """Digest of the weights of a folder. Raises: ArgumentError if they cannot be read."""
    from forge.model.weight_files import content_digests, open_weight_files  # imports torch

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
