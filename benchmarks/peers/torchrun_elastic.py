"""torchrun's elastic mode on simulated nodes, and the DeepSpeed loop that it and Ray Train run.

    python -m benchmarks.peers.torchrun_elastic REQUEST

REQUEST is JSON: model, vocab_size, seq_len, global_batch_size, lr, checkpoint_every (steps), nodes, and
folder, in which the checkpoint and `steps.jsonl` come to lie. An agent for each node is started, of one
rank each; the line `remove N` on stdin kills node N, agent and rank at once. `steps.jsonl` has a line for
every step that was completed, by rank 0 of the moment, and one for every node that was killed.

The loop is as people write it: it imports what it needs, builds the engine, goes on from the newest
checkpoint and writes one every few steps. DeepSpeed loads no ZeRO checkpoint at another world size, save by
a conversion of seconds, so rank 0 gathers weights and moments and `torch.save`s them, which is faster.

Settings that differ from torchrun's defaults, each because it shortens the recovery:

    keep_alive_interval=1, keep_alive_max_attempt=3   a silent agent is dead after 3 s, not 15
    last_call_timeout=2                               the survivors wait 2 s for others, not 30
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1              else ranks may find addresses of an earlier round, fail
                                                      with "Connection refused", and so on forever
    max-restarts                                      as many as needed

By default the agents look after their ranks every 0.1 s. With 2 and 1 s for the first two it is a second
faster on a quiet machine; on a busy one the survivors declared each other dead and trained separately.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.ops
import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

_RENDEZVOUS = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"


def main() -> None:
    request = json.loads(sys.argv[1])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        train_rank(request)
    else:
        run_agents(request)


def run_agents(request: dict[str, Any]) -> None:
    """Start an agent for each node, and kill those that are named on stdin; the first holds the rendezvous."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{request['nodes']}"]
    command += ["--nproc-per-node=1", "--max-restarts=1000", "--rdzv-backend=c10d", "--rdzv-id=recovery"]
    command += [f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    program = ["-m", "benchmarks.peers.torchrun_elastic", json.dumps(request)]
    agents = [
        subprocess.Popen([*command, f"--rdzv-conf=is_host={int(node == 0)},{_RENDEZVOUS}", *program])
        for node in range(request["nodes"])
    ]
    for line in sys.stdin:
        node = int(line.split()[1])
        kill_node(request, node=node, pid=agents[node].pid)
    for agent in agents:
        agent.wait()


def train_rank(request: dict[str, Any]) -> None:
    """One rank under torchrun; its checkpoint is a file on a disk that all nodes share."""
    newest = Path(request["folder"]) / "newest.pt"

    def save(state: dict[str, Any] | None) -> None:
        if state is not None:
            torch.save(state, newest.with_suffix(".part"))
            newest.with_suffix(".part").replace(newest)

    train(
        request,
        resume_from=newest if newest.exists() else None,
        is_due=lambda step: step % request["checkpoint_every"] == 0,
        save=save,
    )


def train(
    request: dict[str, Any],
    *,
    resume_from: Path | None,
    is_due: Callable[[int], bool],
    save: Callable[[dict[str, Any] | None], None],
) -> None:
    """Train until the process is killed; collective.

    Args:
        resume_from: a checkpoint.
        is_due: whether there is to be a checkpoint after a step; asked on all ranks, who must agree.
        save: is given the state on rank 0, and None on the others.
    """
    torch.set_num_threads(1)
    # DeepSpeed would compile a collective for inference in the background, at the cost of 70 s of a core.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    engine = build_engine(request)
    step = 0 if resume_from is None else load_state(engine, resume_from)
    while True:
        step += 1
        take_step(engine, step, request)
        if dist.get_rank() == 0:
            record(request, step=step, world_size=dist.get_world_size())
        if is_due(step):
            save(gather_state(engine, step))


def build_engine(request: dict[str, Any]) -> Any:
    """A small Llama under ZeRO 1 in bf16, with what is fastest on CPU: plain attention and the fused AdamW."""
    config = AutoConfig.for_model(
        **request["model"], vocab_size=request["vocab_size"], max_position_embeddings=request["seq_len"]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=request["lr"], fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": -(-request["global_batch_size"] // dist.get_world_size()),
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def take_step(engine: Any, step: int, request: dict[str, Any]) -> None:
    """One update on this rank's share of the step's samples; collective."""
    batch_size, rank, world_size = request["global_batch_size"], dist.get_rank(), dist.get_world_size()
    shape = (batch_size, request["seq_len"])
    samples = torch.randint(0, request["vocab_size"], shape, generator=torch.Generator().manual_seed(step))
    mine = samples[rank * batch_size // world_size : (rank + 1) * batch_size // world_size]
    engine.backward(engine(input_ids=mine, labels=mine, use_cache=False).loss)
    engine.step()


def gather_state(engine: Any, step: int) -> dict[str, Any] | None:
    """The training state on rank 0, None on the others; collective."""
    state: dict[str, Any] = {"step": step}
    for name, part in shards_of(engine).items():
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
        dist.gather(part, parts)
        if parts is not None:
            state[name] = torch.cat(parts)[: num_parameters(engine)].clone()
    return state if dist.get_rank() == 0 else None


def load_state(engine: Any, path: Path) -> int:
    """Take over what was saved at any world size. Returns: the number of the last step."""
    state, numel = torch.load(path, mmap=True), num_parameters(engine)
    for name, part in shards_of(engine).items():
        first = dist.get_rank() * part.numel()
        mine = state[name][first : min(first + part.numel(), numel)]
        part[: len(mine)].copy_(mine)
    engine.optimizer.bit16_groups_flat[0][:numel].copy_(state["master"])
    for moments in engine.optimizer.optimizer.state.values():
        moments["step"] = torch.tensor(float(state["step"]))
    return int(state["step"])


def shards_of(engine: Any) -> dict[str, Tensor]:
    """This rank's share of the flat fp32 weights and moments; the last rank's ends with padding."""
    (master,) = engine.optimizer.single_partition_of_fp32_groups
    moments = engine.optimizer.optimizer.state[master]
    for name in ("exp_avg", "exp_avg_sq"):
        moments.setdefault(name, torch.zeros_like(master))  # the optimizer would make them at its first step
    return {"master": master.detach(), "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}


def num_parameters(engine: Any) -> int:
    """Over all ranks."""
    return sum(parameter.numel() for parameter in engine.module.parameters())


def record(request: dict[str, Any], **what: int) -> None:
    """Append a line with the time to `steps.jsonl`."""
    with (Path(request["folder"]) / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **what}) + "\n")


def kill_node(request: dict[str, Any], *, node: int, pid: int) -> None:
    """SIGKILL the process that holds a node and all below it, at once, and note when that was."""
    root = psutil.Process(pid)
    processes = [root, *root.children(recursive=True)]
    record(request, removed=node)
    kill_all(processes)


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL; some may end by themselves when others are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
