"""Kill processes in the middle of DeepSpeed's own `save_checkpoint`, as `tests.support.kills` does with forge's."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

from tests.support.kills import KillReport
from tests.support.ranks import free_port


def kill_deepspeed(folder: Path, *, num_kills: int, seed: int, world_size: int = 2) -> KillReport:
    """Kill processes in the middle of DeepSpeed's `save_checkpoint`, and ask whether what `latest` names loads.

    One of the ranks, or all of them at once, gets SIGKILL at a moment drawn from the duration of a save; the
    others go on until they notice. A folder that is broken is emptied, as DeepSpeed has no way back from it.
    """
    draw, report = random.Random(seed), KillReport(save_ms=20.0)
    began, newest = time.monotonic(), 0
    for _ in range(num_kills):
        victim, returned = _kill_deepspeed_once(folder, draw, report, world_size=world_size, first_step=newest + 1)
        newest = max(newest, returned)
        step, problem = _judge_deepspeed(folder, world_size=world_size)
        if problem is not None and newest:
            report.broken.append(f"after kill {report.num_kills} ({victim}): {problem}")
            shutil.rmtree(folder)
        elif step < newest:
            report.lost.append(f"step {step}, not {newest}, after kill {report.num_kills} ({victim})")
        newest = step
        for tag in folder.glob("global_step*"):
            if tag.name != f"global_step{step}":
                shutil.rmtree(tag)
    report.seconds = time.monotonic() - began
    return report


def _kill_deepspeed_once(
    folder: Path, draw: random.Random, report: KillReport, *, world_size: int, first_step: int
) -> tuple[str, int]:
    """Returns: which process was killed, and the newest step whose `save_checkpoint` returned; 0 if none did."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.fork_server"])
    hearing, telling = context.Pipe(duplex=False)
    arguments = (world_size, free_port(), str(folder), first_step, telling)
    ranks = [context.Process(target=_deepspeed_rank, args=(r, *arguments), daemon=True) for r in range(world_size)]
    for process in ranks:
        process.start()
    telling.close()
    messages = _SaveMessages(hearing)
    messages.listen(until=2, timeout_s=60)
    report.save_ms = messages.save_ms or report.save_ms
    time.sleep(draw.uniform(0, report.save_ms * 1.1e-3))
    victim = draw.randrange(world_size + 1)
    for process in ranks if victim == world_size else [ranks[victim]]:
        process.kill()
    for process in ranks:  # to the end of the save, and to the barrier where it misses the others
        process.join(timeout=10)
        process.kill()
        process.join()
    messages.listen()
    hearing.close()
    report.num_kills += 1
    report.num_committed += len(messages.returned)
    name = "all" if victim == world_size else f"rank {victim}"
    report.victims[name] += 1
    report.phases["between" if len(messages.begun) == len(messages.returned) else "save"] += 1
    return name, max(messages.returned, default=0)


class _SaveMessages:
    """Collects DeepSpeed rank 0's messages about its saves."""

    def __init__(self, hearing: Any) -> None:
        self._hearing = hearing
        self.begun: list[int] = []
        self.returned: list[int] = []
        self.save_ms: float | None = None
        """How long the last save took."""

    def listen(self, *, until: int | None = None, timeout_s: float = 0.0) -> None:
        """Read all messages, or wait until `until` saves have begun."""
        with contextlib.suppress(EOFError):
            while (until is None or len(self.begun) < until) and self._hearing.poll(timeout_s):
                step, save_ms = self._hearing.recv()
                if save_ms is None:
                    self.begun.append(step)
                else:
                    self.returned.append(step)
                    self.save_ms = save_ms


def _deepspeed_rank(rank: int, world_size: int, port: int, folder: str, first_step: int, telling: Any) -> None:
    """Train a small model with DeepSpeed, and save it after every step."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it says at length that its peer is gone
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import deepspeed
    import torch

    from forge.train.process_group import join_process_group

    torch.set_num_threads(1)
    join_process_group(device=torch.device("cpu"))
    module = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 256))
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    config |= {"zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(module.parameters()), config=config)
    engine.global_steps = first_step - 1
    for step in itertools.count(first_step):
        engine.backward(engine(torch.ones(1, 256)).square().mean())
        engine.step()
        began = time.monotonic()
        if rank == 0:
            telling.send((step, None))
        engine.save_checkpoint(folder, client_state={"step": step})
        if rank == 0:
            telling.send((step, 1e3 * (time.monotonic() - began)))


def _judge_deepspeed(folder: Path, *, world_size: int) -> tuple[int, str | None]:
    """Return the step that `latest` names, and what is wrong with the files that `load_checkpoint` would read."""
    import torch

    latest = folder / "latest"
    tag = latest.read_text() if latest.is_file() else None
    if not tag:
        return 0, "latest is missing" if tag is None else "latest is empty"
    files = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
    try:
        for file in files:
            torch.load(folder / tag / file, weights_only=False)
        step = torch.load(folder / tag / "mp_rank_00_model_states.pt", weights_only=False)["step"]
    except Exception as error:  # torch raises whatever the bytes of a torn file make it raise
        return 0, f"{tag} does not load: {error}"
    return step, None if tag == f"global_step{step}" else f"{tag} holds step {step}"
