"""What is done on GPUs only: choose them, create the CUDA context, set NCCL up, copy inputs to a GPU.

CUDA cannot be used in a process forked from one that has used it, so a fork server must not, and its ranks choose
their GPUs after the fork.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from forge.errors import UserCodeError
from forge.limits import cpu_name

_NCCL = {
    # A communicator that fails ends its process, without ncclCommAbort, which can hang: the agent starts it again.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    # The others are told over the store, in case nothing else ends them (Ray Train).
    "TORCH_NCCL_PROPAGATE_ERROR": "1",
    # Writing what each rank waited for takes longer than restarting; the supervisor names a rank that hangs.
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
"""Unless they are set. Source: torch.distributed, ProcessGroupNCCL environment variables."""


def set_visible_gpus(gpus: Sequence[str]) -> None:
    """Have CUDA number these GPUs from 0, in this order.

    DeepSpeed uses the GPU with the number `LOCAL_RANK`, while Ray assigns any GPUs of a node to a run.

    Args:
        gpus: as of `CUDA_VISIBLE_DEVICES`: numbers of the node's GPUs, or UUIDs.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


def require_unused_cuda(what: str) -> None:
    """Raises: UserCodeError if this process, from which ranks are forked, has used CUDA."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        raise UserCodeError(
            f"{what} uses CUDA when it is imported, and a process forked afterwards cannot use it: move what calls "
            "torch.cuda, or creates tensors on a GPU, into the functions that need it"
        )


def create_context(device: torch.device) -> None:
    """Select a GPU, create this process's CUDA context on it, and load cuBLAS; nothing on CPU."""
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    one = torch.ones(1, 1, device=device)
    torch.mm(one, one)
    torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return the name of a GPU as CUDA gives it, or of this machine's processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def set_up_nccl(*, interface: str | None = None) -> None:
    """Set NCCL's environment variables that are not set, before the first communicator.

    Args:
        interface: name of the network interface that this node is reached by, where ranks are on several nodes.
    """
    for name, value in _NCCL.items():
        os.environ.setdefault(name, value)
    if interface is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # with `=`: no prefix of other names


def move_to(device: torch.device, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move tensors to a device; to a GPU from page-locked memory, so that this process need not wait for them."""
    on_gpu = device.type == "cuda"
    return {
        name: (tensor.pin_memory() if on_gpu and tensor.device.type == "cpu" else tensor).to(
            device, non_blocking=True
        )
        for name, tensor in inputs.items()
    }


def abort_collectives() -> None:
    """End the collectives that this rank has queued or waits for, so that it can end without its peers."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        with contextlib.suppress(RuntimeError):  # of a broken context; the error that led here is the one to report
            dist.group.WORLD.abort()  # type: ignore[union-attr]
