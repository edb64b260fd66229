"""Two ranks that train and save, one way after the other, in one process group.

    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.peers.checkpoint_saves REQUEST

REQUEST is JSON: folder, answer (a file), repeats, steps, is_small. What each part measures is said at its
function. At the end the folder holds a checkpoint of forge and one of DeepSpeed, of the same state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import llama  # first: it chooses DeepSpeed's accelerator

import torch.distributed as dist  # isort: skip

from benchmarks.peers.checkpointers import Checkpointer, ForgeCheckpointer, checkpointers_of
from benchmarks.peers.memory import growth
from forge.config.job import JobSpec
from forge.train.engine import Engine

# With a checkpoint every ten steps, and for the other settings of the peers their stall alone.
_LONG = ("none", "forge", "deepspeed", "dcp process")
_SHORT = ("deepspeed unzipped", "dcp thread")
_SHORT_STEPS = 2


@dataclass(slots=True)
class Loop:
    """Training on this rank, and the number of its last step."""

    engine: Engine
    spec: JobSpec
    step: int = 0

    def advance(self, num_steps: int) -> list[float]:
        """Take steps. Returns: the seconds of each."""
        seconds = []
        for _ in range(num_steps):
            self.step += 1
            began = time.perf_counter()
            llama.take_step(self.engine, self.step, spec=self.spec)
            seconds.append(time.perf_counter() - began)
        return seconds


def main() -> None:
    request = json.loads(sys.argv[1])
    llama.join()
    spec, folder = llama.job(is_small=request["is_small"]), Path(request["folder"])
    loop = Loop(llama.build(spec, changes={}), spec)
    loop.advance(2)
    builders = checkpointers_of(loop.engine, spec=spec, folder=folder)
    checkpointers: dict[str, Checkpointer] = {}
    memory = {}
    for name in _LONG[1:]:
        with growth() as grown:
            checkpointers[name] = builders[name]()
            save_idle(loop, checkpointers[name], times=3)
        memory[name] = sum(gathered(grown.peak_bytes))
    checkpointers |= {name: builders[name]() for name in _SHORT}
    for name in _SHORT:
        save_idle(loop, checkpointers[name], times=1)
    forge = checkpointers["forge"]
    assert isinstance(forge, ForgeCheckpointer)
    rates = [bandwidths(loop, forge, folder=folder) for _ in range(request["repeats"])]
    blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in (*_LONG, *_SHORT)}
    for repeat in range(request["repeats"]):
        turn = repeat % len(_LONG)
        for name in (*_LONG[turn:], *_LONG[:turn], *_SHORT):
            num_steps = request["steps"] if name in _LONG else _SHORT_STEPS
            blocks[name].append(run_block(loop, checkpointers.get(name), num_steps=num_steps))
            say(f"{name}: {blocks[name][-1]}")
    for name in ("forge", "deepspeed"):
        save_idle(loop, checkpointers[name], times=1)
    forge.close()
    if dist.get_rank() == 0:
        answer = {
            "steps": request["steps"],
            "num_parameters": llama.num_parameters(loop.engine),
            "save_growth_bytes": memory,
            "bandwidths": rates,
            "blocks": blocks,
        }
        Path(request["answer"]).write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads may abort a process that ends without


def save_idle(loop: Loop, checkpointer: Checkpointer, *, times: int) -> float:
    """Save while training waits. Returns: seconds of the last one until it was complete."""
    seconds = 0.0
    for _ in range(times):
        loop.step += 1  # a new name; the state is the same
        checkpointer.save(loop.step)
        checkpointer.before_update()
        seconds = checkpointer.complete()
    return seconds


def run_block(loop: Loop, checkpointer: Checkpointer | None, *, num_steps: int) -> dict[str, Any]:
    """Some steps with one checkpoint at their beginning, by the slowest rank.

    The disk is quiet when it begins, and what is left of the checkpoint at its end is awaited afterwards.
    Returns: `stall_s` of the checkpoint, `seconds` of the steps with it, `complete_s` from the call to the end,
        and `steps`, the seconds of each, the first with the call.
    """
    settle_disk()
    stall_s = 0.0

    def before_update() -> None:
        nonlocal stall_s
        since = time.perf_counter()
        if checkpointer is not None:
            checkpointer.before_update()
        stall_s += time.perf_counter() - since

    began = time.perf_counter()
    if checkpointer is not None:
        checkpointer.save(loop.step)
    call_s = time.perf_counter() - began
    stall_s += call_s
    loop.engine.before_update = before_update
    first_s, *rest = loop.advance(num_steps)
    dist.barrier()
    seconds = time.perf_counter() - began
    loop.engine.before_update = lambda: None
    complete_s = 0.0 if checkpointer is None else checkpointer.complete()
    return {
        "stall_s": max(gathered(stall_s)),
        "seconds": max(gathered(seconds)),
        "complete_s": max(gathered(complete_s)),
        "steps": [first_s + call_s, *rest],
    }


def bandwidths(loop: Loop, checkpointer: ForgeCheckpointer, *, folder: Path) -> dict[str, float]:
    """Bytes per second of a whole save while training waits, and of `dd` writing the same bytes there."""
    settle_disk()
    seconds = save_idle(loop, checkpointer, times=1)
    newest = max((folder / "forge").glob("step-*"))  # the one before may not have been removed yet
    parts = sorted(newest.glob("*.safetensors"))
    settle_disk()
    dd_seconds = time_dd(parts, folder=folder) if dist.get_rank() == 0 else 0.0
    dist.barrier()
    return {
        "forge": sum(path.stat().st_size for path in newest.iterdir()) / seconds,
        "dd": sum(path.stat().st_size for path in parts) / max(gathered(dd_seconds)),
    }


def time_dd(parts: list[Path], *, folder: Path) -> float:
    """Copy every part by a `dd` of its own, all at once, each flushed."""
    copies = [folder / f"dd-{part.name}" for part in parts]
    began = time.perf_counter()
    running = [
        subprocess.Popen(["dd", f"if={part}", f"of={copy}", "bs=8M", "conv=fsync", "status=none"])
        for part, copy in zip(parts, copies, strict=True)
    ]
    if any(process.wait() for process in running):
        raise RuntimeError("dd failed")
    seconds = time.perf_counter() - began
    for copy in copies:
        copy.unlink()
    return seconds


def settle_disk() -> None:
    """Write out what others have left in the page cache; collective."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()


def gathered(value: float) -> list[float]:
    """Of every rank; collective."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def say(text: str) -> None:
    """To the log, by the first rank."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
