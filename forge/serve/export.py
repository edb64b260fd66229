"""Export a checkpoint as a Hugging Face folder that `from_pretrained` loads.

Adapters are merged into their weights, or exported alone as a folder of peft (`forge.serve.merge`). A model of the
user's own has no such folder: its state dict is exported as safetensors files.

    python -m forge.serve.export < request.json > answer.json

The weights are copied from the checkpoint's shards to safetensors files a few MiB at a time: the optimizer state is
not read, and the model is never whole in memory. The folder is renamed to its final name when it is complete.
Export runs in its own process, because the client never imports torch.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from forge.checkpoint.best import open_verified
from forge.checkpoint.intervals import ITEM_BYTES, safetensors_header
from forge.checkpoint.peft_folder import WEIGHTS_FILE
from forge.checkpoint.reader import Checkpoint
from forge.checkpoint.storage import open_storage
from forge.errors import ArgumentError, ForgeError
from forge.foreign import parse_object, read_file
from forge.inference.weights import CheckpointWeights
from forge.model.auto_classes import AUTO_CLASSES, auto_class_of_config
from forge.model.transformers_config import config_from_record
from forge.process import take_stdout
from forge.serve.merge import (
    MergedWeights,
    exported_names,
    require_adapters,
    write_adapter_config,
)
from forge.serve.sentence_transformers import EmbeddingModel, write_embedding_files
from forge.train.state import bytes_of

_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_MAX_TOKENIZER_BYTES = 2**30
_PIECE_NUMEL = 4 * 2**20
_PROGRESS_S = 0.5
_DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What to export, and how."""

    url: str
    """Folder or URL of the run's checkpoints."""
    to: str
    """The folder to write; it must be empty or not exist."""
    step: int | str | None = None
    """A step, or `best`; None: the newest checkpoint that verifies."""
    dtype: str = "bf16"
    """`bf16` or `fp32`, for floating-point tensors."""
    ema: bool = False
    """Export the averaged (EMA) weights."""
    max_shard_bytes: int = 5 * 10**9
    """Largest file; a larger single tensor has its own file."""
    tokenizer: str | None = None
    """A folder with tokenizer files, which are copied to the export."""
    adapters: bool = False
    """Export the adapters alone, as a folder for peft; without it they are merged into the weights."""
    embedding: Mapping[str, Any] | None = None
    """Fields of EmbeddingModel, if the run trains embeddings: the folder is one of sentence-transformers, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The result of an export."""

    folder: str
    step: int
    num_parameters: int
    size_bytes: int
    num_files: int
    is_transformers: bool
    """Whether the folder has a `config.json`, which `from_pretrained` needs."""
    base: str | None = None
    """Of a folder of adapters: the model that they are for."""
    auto_class: str | None = None
    """The class of transformers that loads the folder."""
    is_embedding: bool = False
    """Whether `SentenceTransformer` of the library sentence-transformers loads it, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """One tensor of an exported file."""

    name: str
    """In the file."""
    source: str
    """Name in the checkpoint."""
    dtype: str
    shape: tuple[int, ...]
    numel: int

    @property
    def size_bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]


def export(
    request: ExportRequest, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Exported:
    """Write a Hugging Face folder, or the state dict of a model of the user's own.

    Args:
        on_progress: called with the bytes that are written and those of all weights, after each tensor.

    Raises: CheckpointError if the checkpoint does not exist, is damaged, or has no EMA weights that are asked for;
        ArgumentError if the folder is not empty or cannot be written.
    """
    checkpoint = open_verified(open_storage(request.url), step=request.step)
    weights = _weights(checkpoint, request)
    config = None if request.adapters else _config(checkpoint, request)
    to = Path(request.to)
    draft = to.with_name(f".{to.name}.{os.getpid()}.draft")
    try:
        if to.exists() and (not to.is_dir() or any(to.iterdir())):
            raise ArgumentError(f"{to} exists and is not empty; name another folder")
        draft.mkdir(parents=True)
        files = _files(checkpoint, weights, request)
        total = sum(target.size_bytes for targets in files.values() for target in targets)
        done = 0

        def on_written(target: _Target) -> None:
            nonlocal done
            done += target.size_bytes
            on_progress(done, total)

        for name, targets in files.items():
            _write_file(draft / name, targets, weights, request, on_written=on_written)
        _write_index(draft, files)
        if request.adapters:
            write_adapter_config(draft, checkpoint.shape)
        if config is not None:
            config.save_pretrained(draft)
            if auto_class_of_config(config) in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
                GenerationConfig.from_model_config(config).save_pretrained(draft)
        if request.tokenizer is not None and Path(request.tokenizer).is_dir():
            _copy_tokenizer(Path(request.tokenizer), draft)
            if config is not None:
                _name_inputs(draft / "tokenizer_config.json", config)
        is_embedding = config is not None and request.embedding is not None
        if config is not None and request.embedding is not None:
            _write_embedding_files(draft, config, EmbeddingModel(**request.embedding))
        draft.rename(to)  # over an empty folder too
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ArgumentError(f"{to} cannot be written: {error.strerror or error}{where}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    written = [target for targets in files.values() for target in targets]
    kinds = checkpoint.shape.parameters
    return Exported(
        folder=str(to),
        step=checkpoint.progress.step,
        num_parameters=sum(
            target.numel for target in written if target.source in kinds and kinds[target.source].kind != "buffer"
        ),
        size_bytes=sum(target.size_bytes for target in written),
        num_files=len(files),
        is_transformers=config is not None,
        base=checkpoint.shape.base.source if request.adapters and checkpoint.shape.base is not None else None,
        auto_class=None if config is None else auto_class_of_config(config),
        is_embedding=is_embedding,
    )


def _weights(checkpoint: Checkpoint, request: ExportRequest) -> CheckpointWeights | MergedWeights:
    """The weights to export. Raises: CheckpointError if the checkpoint does not have them."""
    weights = CheckpointWeights(checkpoint, ema=request.ema, needs_base=not request.adapters)
    if request.adapters:
        require_adapters(checkpoint)
    elif checkpoint.shape.adapters:
        return MergedWeights(weights, checkpoint)
    return weights


def _copy_tokenizer(source: Path, to: Path) -> None:
    """Copy the files of a run's tokenizer, and nothing else of its folder: no link to another file, no code, and no
    file that would replace the model's own.

    Raises: OSError, also for a link.
    """
    for path in sorted(source.iterdir()):
        is_model_file = (to / path.name).exists() and path.name != "generation_config.json"
        if path.suffix in _TOKENIZER_SUFFIXES and not is_model_file:
            (to / path.name).write_bytes(_read_tokenizer_file(path))


def _name_inputs(path: Path, config: PretrainedConfig) -> None:
    """Have the tokenizer of a classifier give the types of tokens, with which it was trained, if it knows any.

    Raises: OSError.
    """
    has_types = (getattr(config, "type_vocab_size", None) or 0) > 1
    if not AUTO_CLASSES[auto_class_of_config(config)].has_labels or not has_types or not path.exists():
        return
    try:
        body = parse_object(path.read_bytes())
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    body["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False))


def _write_embedding_files(folder: Path, config: PretrainedConfig, model: EmbeddingModel) -> None:
    """Raises: OSError."""
    try:
        write_embedding_files(folder, config, model)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(folder / "tokenizer_config.json")) from None


def _read_tokenizer_file(path: Path) -> bytes:
    try:
        return read_file(path, max_bytes=_MAX_TOKENIZER_BYTES)
    except ValueError as error:
        raise OSError(errno.EFBIG, str(error)) from None


def _config(checkpoint: Checkpoint, request: ExportRequest) -> PretrainedConfig | None:
    """The config of a transformers model; None for a model of the user's own."""
    body = dict(checkpoint.shape.config)
    if not body:
        return None
    config = config_from_record(body)
    config.dtype = _DTYPES[request.dtype][1]
    return config


def _files(
    checkpoint: Checkpoint, weights: CheckpointWeights | MergedWeights, request: ExportRequest
) -> dict[str, list[_Target]]:
    """Group the tensors, in order, into files of at most `max_shard_bytes`, named as in transformers.

    transformers ties weights by its config; the state dict of any other model has a tied one under each name.
    """
    shape = checkpoint.shape
    names = exported_names(shape, adapters=request.adapters)
    names |= {} if shape.config else {name: name for name in shape.tied}
    groups: list[list[_Target]] = []
    size = 0
    for source, name in names.items():
        parameter = shape.parameters[shape.tied.get(source, source)]
        interval = weights.interval(source)
        is_float = interval.dtype.startswith(("F", "BF"))
        dtype = _DTYPES[request.dtype][0] if is_float else interval.dtype
        target = _Target(name=name, source=source, dtype=dtype, shape=parameter.shape, numel=interval.numel)
        if not groups or (size + target.size_bytes > request.max_shard_bytes and not request.adapters):
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.size_bytes
    if len(groups) == 1:
        return {WEIGHTS_FILE if request.adapters else "model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_file(
    path: Path,
    targets: list[_Target],
    weights: CheckpointWeights | MergedWeights,
    request: ExportRequest,
    *,
    on_written: Callable[[_Target], None],
) -> None:
    header = safetensors_header({t.name: (t.dtype, t.shape) for t in targets}, metadata={"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for target in targets:
            for piece in _converted(target, weights, request):
                file.write(bytes_of(piece))
            on_written(target)
        file.flush()
        os.fsync(file.fileno())


def _converted(
    target: _Target, weights: CheckpointWeights | MergedWeights, request: ExportRequest
) -> Iterator[torch.Tensor]:
    held = weights.interval(target.source).dtype
    for piece in weights.pieces(target.source, max_numel=_PIECE_NUMEL):
        yield piece.to(_DTYPES[request.dtype][1]) if target.dtype != held else piece


def _write_index(folder: Path, files: dict[str, list[_Target]]) -> None:
    """Write the index that maps tensors to files; a single file needs none."""
    if len(files) == 1:
        return
    weight_map = {target.name: name for name, targets in files.items() for target in targets}
    total = sum(target.size_bytes for targets in files.values() for target in targets)
    body: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Answer one request, after lines of `{"progress": [bytes done, bytes in all]}`.

    The answer is `{"answer": {...}}`, or `{"error": {"class": ..., "message": ...}}`.
    """
    stdout, shown_at = take_stdout(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if done == total or time.monotonic() - shown_at > _PROGRESS_S:
            shown_at = time.monotonic()
            stdout.write(json.dumps({"progress": [done, total]}) + "\n")
            stdout.flush()

    try:
        answer = {"answer": asdict(export(ExportRequest(**json.load(sys.stdin)), on_progress=show))}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    with stdout:
        json.dump(answer, stdout)


if __name__ == "__main__":
    main()
