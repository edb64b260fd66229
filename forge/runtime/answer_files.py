"""A file of prompts and the file of their answers, as JSON lines.

Answers are computed in shards that are stored one by one beside the output (`forge.runtime.shard_files`), so that a
second start computes what is missing; the output appears when it is whole. Nothing here imports torch, but for the
digest of a folder of weights.
"""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, DataError
from forge.foreign import parse_json
from forge.fs import write_atomic
from forge.inference.answer_request import AnswerConfig, check_record, require_known_ids
from forge.inference.identity import identify_weights, vocabulary_of
from forge.process import one_line
from forge.runtime.shard_files import ShardFiles

RECORDS_PER_SHARD = 256
_MAX_LINE_BYTES = 64 * 2**20


def read_shards(path: Path) -> Iterator[list[Any]]:
    """The prompts of a JSONL file, in shards. Raises: DataError naming the line that is no prompt."""
    records = _records(path)
    while shard := list(islice(records, RECORDS_PER_SHARD)):
        yield shard


def count_records(path: Path, *, model: str) -> int:
    """Check every line of a JSONL file of prompts.

    Args:
        model: the folder whose vocabulary bounds token ids.

    Raises: DataError naming a line; ArgumentError for no prompts, or a model whose vocabulary cannot be read.
    """
    vocabulary = cache(lambda: vocabulary_of(model))
    count = sum(1 for _ in _records(path, vocabulary=vocabulary))
    if not count:
        raise ArgumentError(f"{path} has no prompts")
    return count


def shard_folder(output: Path) -> Path:
    """Where the shards of an output file are until it is whole."""
    return output.with_name(f".{output.name}.shards")


def require_new(output: Path) -> None:
    """Raises: ArgumentError if a file exists, or cannot be written."""
    if output.exists():
        raise ArgumentError(f"{output} exists; name another file, or remove it")
    if not output.parent.is_dir():
        raise ArgumentError(f"there is no folder {output.parent}")


def join_shards(files: ShardFiles, *, shards: Iterator[list[Any]], output: Path) -> None:
    """Write the answers in the order of the prompts, and remove the shards. Raises: ArgumentError."""

    def lines() -> Iterator[bytes]:
        index = 0
        for answers in files.read_all(shards):
            for answer in answers:
                yield json.dumps({"index": index, **answer}, ensure_ascii=False).encode() + b"\n"
                index += 1

    try:
        write_atomic(output, lines())
    except OSError as error:
        raise ArgumentError(f"{output} cannot be written: {error.strerror or error}") from error
    shutil.rmtree(files.folder, ignore_errors=True)


def digest_of(config: AnswerConfig, *, weights: str) -> str:
    """A digest of all that answers depend on but the prompts."""
    body = {**asdict(config), "sampling": dict(config.sampling), "weights": weights}
    return json.dumps({key: value for key, value in body.items() if key not in ("source", "step")}, sort_keys=True)


def has_all(files: ShardFiles, *, source: Path) -> bool:
    """Whether the answers to all prompts are stored, for this model and sampling."""
    return all(files.read(files.key(shard)) is not None for shard in read_shards(source))


def finish_stored(config: AnswerConfig, *, source: Path, output: Path, count: int) -> bool:
    """Write the output if the answers to all prompts are stored, by the same weights and sampling.

    Args:
        count: number of prompts.

    Returns: whether it was written.
    Raises: as `identify_weights`, `join_shards`; ArgumentError if another process computes them.
    """
    stored = sum(1 for _ in shard_folder(output).glob("*.jsonl"))
    if stored < -(-count // RECORDS_PER_SHARD):
        return False
    weights = identify_weights(config.source, step=config.step, ema=config.ema)
    files = ShardFiles(folder=shard_folder(output), digest=digest_of(config, weights=weights.digest))
    with files.locked():
        if not has_all(files, source=source):
            return False
        join_shards(files, shards=read_shards(source), output=output)
    return True


def _records(path: Path, *, vocabulary: Callable[[], int] | None = None) -> Iterator[Any]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise DataError(f"{path}:{number}: the line has more than {_MAX_LINE_BYTES} bytes")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield _record(line, where=f"{path}:{number}", vocabulary=vocabulary)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _record(line: bytes, *, where: str, vocabulary: Callable[[], int] | None) -> Any:
    try:
        record = parse_json(line, is_strict=True)
        check_record(record)
        if vocabulary is not None and isinstance(record, dict) and "ids" in record:
            require_known_ids(record, vocabulary=vocabulary())
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} of the line, {line[error.start]:#04x}, is not UTF-8"
        ) from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: the text has half of a surrogate pair, which UTF-8 cannot write") from None
    except ValueError as error:
        raise DataError(f"{where}: {one_line(error)}") from None
    return record
