"""Answer prompts with a model in a process of its own, because the client never imports torch.

    python -m forge.runtime.answer_process < request.json > answer.json

A request has `config`, the fields of `forge.inference.answer.AnswerConfig`, and either `records`, the prompts, or
`input` and `output`, JSONL files. The answers of a file are computed in shards that are stored one by one
(`forge.runtime.shard_files`), so that a second start computes what is missing; the output appears when it is whole.
"""

from __future__ import annotations

import codecs
import json
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, DataError, ForgeError
from forge.foreign import parse_json
from forge.fs import write_atomic
from forge.inference.answer import AnswerConfig, Answerer, check_record
from forge.process import die_with_parent, one_line, take_stdout
from forge.runtime.forwarded_warnings import forward_warnings
from forge.runtime.shard_files import ShardFiles

RECORDS_PER_SHARD = 256
_MAX_LINE_BYTES = 64 * 2**20


def read_shards(path: Path) -> Iterator[list[Any]]:
    """The prompts of a JSONL file, in shards. Raises: DataError naming the line that is no prompt."""
    records = _records(path)
    while shard := list(islice(records, RECORDS_PER_SHARD)):
        yield shard


def count_records(path: Path) -> int:
    """Check every line of a JSONL file of prompts. Raises: DataError naming one; ArgumentError for no prompts."""
    count = sum(1 for _ in _records(path))
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


def _records(path: Path) -> Iterator[Any]:
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
                    yield _record(line, where=f"{path}:{number}")
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _record(line: bytes, *, where: str) -> Any:
    try:
        record = parse_json(line, is_strict=True)
        check_record(record)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {error.start + 1} of the line, {line[error.start]:#04x}, is not UTF-8"
        ) from None
    except UnicodeEncodeError:
        raise DataError(f"{where}: the text has half of a surrogate pair, which UTF-8 cannot write") from None
    except ValueError as error:
        raise DataError(f"{where}: {one_line(error)}") from None
    return record


def _answer_file(answerer: Answerer, *, source: Path, output: Path, show: Any) -> dict[str, Any]:
    total, done, reused = count_records(source), 0, 0
    files = ShardFiles(
        folder=shard_folder(output), digest=digest_of(answerer.config, weights=answerer.loaded.digest)
    )
    with files.locked():
        require_new(output)  # another process may have written it meanwhile
        files.prepare()
        for shard in read_shards(source):
            key = files.key(shard)
            if files.read(key) is None:
                files.write(key, _answers(answerer, shard, before=done, source=source))
            else:
                reused += len(shard)
            done += len(shard)
            show(done, total)
        join_shards(files, shards=read_shards(source), output=output)
    return {"num_answers": total, "num_reused": reused, "output": str(output)}


def _answers(answerer: Answerer, shard: list[Any], *, before: int, source: Path) -> list[dict[str, Any]]:
    try:
        return answerer(shard)
    except DataError as error:
        raise DataError(f"{source}, prompts after the first {before}: {error}") from None


def main() -> None:
    """Answer a request: `{"answer": {...}}`, or `{"error": {...}}`.

    Lines of `{"progress": [done, all]}` and `{"message": "..."}` come before it.
    """
    stdout = take_stdout()  # the user's model may print

    def write(line: dict[str, Any]) -> None:
        stdout.write(json.dumps(line) + "\n")
        stdout.flush()

    def show(done: int, total: int) -> None:
        write({"progress": [done, total]})

    forward_warnings(lambda text: write({"message": text}))

    request = json.load(sys.stdin)
    die_with_parent(request["parent"])
    try:
        if "output" in request:
            require_new(Path(request["output"]))
            count_records(Path(request["input"]))
        answerer = Answerer(AnswerConfig(**request["config"]))
        began = time.monotonic()
        if "output" in request:
            found = _answer_file(answerer, source=Path(request["input"]), output=Path(request["output"]), show=show)
        else:
            found = {"answers": answerer(request["records"])}
        loaded = answerer.loaded
        found |= {"name": loaded.name, "kind": loaded.kind, "step": loaded.step, "digest": loaded.digest}
        found |= {"has_chat_template": loaded.chat_template is not None, "answer_s": time.monotonic() - began}
        answer: dict[str, Any] = {"answer": found}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    with stdout:
        json.dump(answer, stdout)


if __name__ == "__main__":
    main()
