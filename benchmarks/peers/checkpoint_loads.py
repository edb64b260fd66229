"""Ranks of another world size that load one training state, by forge and by DeepSpeed's universal checkpoint.

    python -m torch.distributed.run --nproc_per_node 3 -m benchmarks.peers.checkpoint_loads REQUEST

REQUEST is JSON: folder, answer (a file), repeats, is_small. Both load into the same
engine, in turn. Building it is not counted. Fails if they do not load the same state, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.peers import llama  # first: it chooses DeepSpeed's accelerator

import torch.distributed as dist  # isort: skip

from benchmarks.peers.checkpoint_saves import gathered
from benchmarks.peers.memory import peak_bytes, reset_peak
from forge.train.engine import Engine
from forge.train.state import bytes_of
from forge.train.worker import _load_newest


def main() -> None:
    request = json.loads(sys.argv[1])
    llama.join()
    spec = llama.job(is_small=request["is_small"])
    engine = llama.build(spec, changes={"checkpoint": {"load_universal": True}})
    plan: Any = SimpleNamespace(job=spec, corpus=SimpleNamespace(digest=llama.CORPUS), code=None, former_lengths=())
    reporter: Any = SimpleNamespace(event=print)

    def load_forge() -> None:
        _load_newest(engine, f"{request['folder']}/forge", plan, reporter)

    def load_universal() -> None:
        llama.deepspeed_engine(engine).load_checkpoint(request["folder"], tag="universal")

    touch(engine)
    seconds: dict[str, list[float]] = {"forge": [], "universal": []}
    grown: dict[str, list[float]] = {"forge": [], "universal": []}
    for _ in range(request["repeats"]):
        states = []
        for name, load in (("forge", load_forge), ("universal", load_universal)):
            base = reset_peak()
            seconds[name].append(timed(load))
            grown[name].append(sum(gathered(peak_bytes() - base)))
            states.append(gathered_digest(engine))
        if states[0] != states[1]:
            raise RuntimeError("the two checkpoints hold different states")
    if dist.get_rank() == 0:
        Path(request["answer"]).write_text(json.dumps({"seconds": seconds, "growth_bytes": grown}))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads may abort a process that ends without


def timed(load: Callable[[], None]) -> float:
    """Seconds until the last rank has loaded."""
    dist.barrier()
    began = time.perf_counter()
    load()
    dist.barrier()
    return max(gathered(time.perf_counter() - began))


def touch(engine: Engine) -> None:
    """Write to every page of the state, so that it counts as held before it is loaded."""
    for shard in engine.state.shards:
        for kind in engine.state.kinds_of(shard):
            engine.state.tensor(shard, kind).mul_(1)


def gathered_digest(engine: Engine) -> list[Any]:
    """What every rank's master weights and moments are."""
    digest = hashlib.blake2b()
    for shard in engine.state.shards:
        if shard.constant is None:
            for kind in ("master", "exp_avg", "exp_avg_sq"):
                digest.update(bytes_of(engine.state.tensor(shard, kind)))
    return gathered(digest.hexdigest())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
