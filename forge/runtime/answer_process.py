"""Answer prompts with a model in a process of its own, because the client never imports torch.

    python -m forge.runtime.answer_process < request.json > answer.json

A request has `config`, the fields of `forge.inference.answer_request.AnswerConfig`, and either `records`, the
prompts, or `input` and `output`, JSONL files (`forge.runtime.answer_files`). Files are checked, and answers that
are all stored are put together, before torch is imported.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge.errors import DataError, ForgeError
from forge.inference.answer_request import AnswerConfig, named_model
from forge.process import die_with_parent, take_stdout
from forge.runtime.answer_files import (
    count_records,
    digest_of,
    finish_stored,
    join_shards,
    read_shards,
    require_new,
    shard_folder,
)
from forge.runtime.forwarded_warnings import forward_warnings
from forge.runtime.shard_files import ShardFiles

if TYPE_CHECKING:
    from forge.inference.answer import Answerer


def main() -> None:
    """Answer a request: `{"answer": {...}}`, or `{"error": {...}}`.

    Lines of `{"progress": [done, all]}` and `{"message": "..."}` come before it.
    """
    stdout = take_stdout()  # the user's model may print

    def write(line: dict[str, Any]) -> None:
        stdout.write(json.dumps(line) + "\n")
        stdout.flush()

    forward_warnings(lambda text: write({"message": text}))

    request = json.load(sys.stdin)
    die_with_parent(request["parent"])
    try:
        config = AnswerConfig(**request["config"])
        if "output" in request:
            source, output = Path(request["input"]), Path(request["output"])
            found = _answer_prompt_file(config, source=source, output=output, write=write)
        else:
            found = _answer_records(config, request["records"])
        answer: dict[str, Any] = {"answer": found}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    with stdout:
        json.dump(answer, stdout)


def _answer_records(config: AnswerConfig, records: list[Any]) -> dict[str, Any]:
    from forge.inference.answer import Answerer  # imports torch and transformers, which takes seconds

    answerer = Answerer(config)
    began, loaded = time.monotonic(), answerer.loaded
    found = {"answers": answerer(records), "name": loaded.name, "kind": loaded.kind, "step": loaded.step}
    found |= {"digest": loaded.digest, "has_chat_template": loaded.chat_template is not None}
    return found | {"answer_s": time.monotonic() - began}


def _answer_prompt_file(
    config: AnswerConfig, *, source: Path, output: Path, write: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    began = time.monotonic()
    require_new(output)
    total = count_records(source, model=config.source)
    if finish_stored(config, source=source, output=output, count=total):
        return {"num_answers": total, "num_reused": total, "answer_s": time.monotonic() - began}
    named = named_model(config.source, step=config.step)
    write({"message": f"importing torch and transformers, then loading {named}"})
    from forge.inference.answer import Answerer

    answerer = Answerer(config)
    began = time.monotonic()
    found = _answer_file(
        answerer,
        source=source,
        output=output,
        total=total,
        show=lambda done, total: write({"progress": [done, total]}),
    )
    return found | {"answer_s": time.monotonic() - began}


def _answer_file(
    answerer: Answerer, *, source: Path, output: Path, total: int, show: Callable[[int, int], None]
) -> dict[str, Any]:
    done = reused = 0
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
    return {"num_answers": total, "num_reused": reused}


def _answers(answerer: Answerer, shard: list[Any], *, before: int, source: Path) -> list[dict[str, Any]]:
    try:
        return answerer(shard)
    except DataError as error:
        raise DataError(f"{source}, prompts after the first {before}: {error}") from None


if __name__ == "__main__":
    main()
