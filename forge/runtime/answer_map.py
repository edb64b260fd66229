"""Answer a file of prompts on several workers; started by `torch_subprocess.run_driver`.

A request has `config`, the fields of `forge.inference.answer.AnswerConfig`, `input`, `output`, `num_workers`. A
lost worker repeats its own shard (`forge.runtime.shard_map`); the answers are those of a single process.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.inference.answer import AnswerConfig
from forge.inference.identity import identify
from forge.runtime.answer_process import (
    RECORDS_PER_SHARD,
    count_records,
    digest_of,
    join_shards,
    read_shards,
    require_new,
    shard_folder,
)
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_process import ShardProcess, answer_request
from forge.runtime.shard_worker import ShardWorkerSpec


def _handle(request: dict[str, Any], process: ShardProcess) -> dict[str, Any]:
    began = time.monotonic()
    source, output = Path(request["input"]), Path(request["output"])
    require_new(output)
    count = count_records(source)
    config = AnswerConfig(**request["config"])
    model = identify(config.source, step=config.step, ema=config.ema)
    config = replace(config, source=str(Path(config.source).absolute()), step=model.step)
    files = ShardFiles(folder=shard_folder(output), digest=digest_of(config, weights=model.digest))
    totals = process.map(
        lambda: read_shards(source),
        spec=ShardWorkerSpec(function="forge.inference.answer:Answerer", config=config),
        files=files,
        total=-(-count // RECORDS_PER_SHARD),
        num_workers=request["num_workers"],
    )
    join_shards(files, shards=read_shards(source), output=output)
    reused = min(count, totals.num_reused * RECORDS_PER_SHARD)
    return {"num_answers": count, "num_reused": reused, "answer_s": time.monotonic() - began}


def main() -> None:
    """Answer one request."""
    answer_request(_handle)


if __name__ == "__main__":
    main()
