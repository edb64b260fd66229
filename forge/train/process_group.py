"""Join the process group of a generation, without anything that is compiled at run time."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler

from forge.train.cuda import set_up_nccl

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Address of a generation's TCP store, on rank 0's machine."""

    host: str
    port: int
    listen_fd: int | None = None
    """On rank 0: a socket that already listens on the port, so that no other process can take it."""


def join_process_group(*, device: torch.device, rendezvous: Rendezvous | None = None) -> None:
    """Join the process group of `WORLD_SIZE` ranks as rank `RANK`; collective.

    Args:
        rendezvous: address of the store; by default `MASTER_ADDR` and `MASTER_PORT`.
    """
    import_late_modules(device=device.type)
    if device.type == "cuda":
        set_up_nccl()
    if rendezvous is not None:
        _init_with_store(rendezvous, device=device)  # DeepSpeed uses the existing group
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        timeout=COLLECTIVE_TIMEOUT,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def num_visible_devices() -> int:
    """Return how many GPUs this process sees, as DeepSpeed counts them."""
    return int(get_accelerator().device_count())


def import_late_modules(*, device: str) -> None:
    """Import modules that DeepSpeed would import when an engine is built, and choose its accelerator."""
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed compiles this operator on first use where it can; it serves inference only.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    _import_muon_uncompiled()


def _init_with_store(rendezvous: Rendezvous, *, device: torch.device) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        rendezvous.host,
        rendezvous.port,
        world_size,
        rank == 0,
        COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=rendezvous.listen_fd,
    )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        # NCCL then connects now and not in the first collective; a single rank has none to connect with.
        device_id=device if device.type == "cuda" and world_size > 1 else None,
    )


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler, which its decorators would load (1.2 s a rank).

    `deepspeed.initialize` imports it to ask whether its optimizer is a Muon; forge's never is.
    """
    compile_ = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_
