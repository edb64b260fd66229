"""Answer a file of prompts on several workers; started by `torch_subprocess.run_driver`.

A request has `config`, the fields of `forge.inference.answer_request.AnswerConfig`, `input`, `output`,
`num_workers`, `address` of a Ray cluster, and `cluster`, the name of one of other machines. A lost worker repeats
its own shard (`forge.runtime.shard_map`); the answers are those of a single process.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from forge.cluster.registry import find_cluster
from forge.inference.answer_request import AnswerConfig, named_model
from forge.inference.identity import WeightsIdentity, identify_weights
from forge.remote.models import place_model
from forge.remote.shard_task import RemoteMap
from forge.remote.submit import preflight
from forge.runs.run_files import pack_run
from forge.runtime.answer_files import (
    RECORDS_PER_SHARD,
    count_records,
    digest_of,
    has_all,
    join_shards,
    read_shards,
    require_new,
    shard_folder,
)
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_process import ShardProcess, answer_request
from forge.runtime.shard_worker import ShardWorkerSpec


def answer(request: dict[str, Any], process: ShardProcess) -> dict[str, Any]:
    """Answer the prompts of a request. Raises: as `forge.runtime.torch_subprocess.answer_file`."""
    began = time.monotonic()
    source, output = Path(request["input"]), Path(request["output"])
    require_new(output)
    config = AnswerConfig(**request["config"])
    count = count_records(source, model=config.source)
    packed, elsewhere = pack_run(Path(config.source)), None
    if request.get("cluster") is None:
        config = replace(config, source=str(Path(config.source).absolute()))
        weights = identify_weights(config.source, step=config.step, ema=config.ema)
    else:
        target = preflight(find_cluster(request["cluster"]))
        placed = place_model(target, Path(config.source), step=config.step, on_message=process.message)
        config, elsewhere = replace(config, source=placed.folder), RemoteMap(target, placed)
        found = placed.identify(step=config.step, ema=config.ema)
        weights = WeightsIdentity(step=found["step"], digest=found["digest"])
    config = replace(config, step=weights.step)
    files = ShardFiles(folder=shard_folder(output), digest=digest_of(config, weights=weights.digest))
    if not has_all(files, source=source):
        named = named_model(config.source, step=config.step)
        process.message(f"each worker imports torch and transformers, then loads {named}")
    totals = process.map(
        lambda: read_shards(source),
        spec=ShardWorkerSpec(
            function="forge.evaluate.worker:AnswerWorker", config={**asdict(config), "packed": packed}
        ),
        files=files,
        total=-(-count // RECORDS_PER_SHARD),
        num_workers=request["num_workers"],
        address=request.get("address"),
        elsewhere=elsewhere,
    )
    join_shards(files, shards=read_shards(source), output=output)
    reused = min(count, totals.num_reused * RECORDS_PER_SHARD)
    return {"num_answers": count, "num_reused": reused, "answer_s": time.monotonic() - began}


def main() -> None:
    """Answer one request."""
    answer_request(answer)


if __name__ == "__main__":
    main()
