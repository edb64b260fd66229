"""Which GPU a plan counts with where the nodes of a cluster have several kinds.

Every rank needs the same memory, and a step takes as long as on the slowest rank, so a plan counts with the least
memory and the lowest speed among all nodes, and says whose they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forge.plan.gpus import Gpu, find_gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGpu:
    """The GPU of a worker that a plan counts with."""

    name: str
    memory_bytes: int
    note: str = ""
    """Which kinds the nodes have, if there are several or another one than was stated; empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    name: str
    memory_bytes: int | None
    gpu: Gpu | None


def planned_gpu(num_gpus: Mapping[str, int], *, stated: Sequence[WorkerGpu] = ()) -> WorkerGpu | None:
    """Return the GPU to plan for: the lowest speed and the least memory of all kinds; None if nothing is known.

    Args:
        num_gpus: GPUs on the nodes, by kind: as Ray's `accelerator_type` or the driver names it.
        stated: GPUs whose memory is known exactly, of the cluster file or the head, the most certain first. Ray's
            `A100` is the stated A100 with 80 GB, without one that with 40 GB.
    """
    kinds = [_kind(name, stated=stated) for name in num_gpus]
    known = [kind for kind in kinds if kind.memory_bytes is not None]
    if not known:
        return stated[0] if stated else None
    smallest = min(known, key=lambda kind: kind.memory_bytes or 0)
    slowest = min(
        known, key=lambda kind: (kind.gpu.bf16_flops if kind.gpu else float("inf"), kind.memory_bytes or 0)
    )
    assert smallest.memory_bytes is not None
    if len(kinds) > 1:
        note = _mixture(num_gpus, kinds=kinds, smallest=smallest, slowest=slowest)
    elif stated and not _is_kind(kinds[0].name, stated[0].name):
        note = f"the nodes have {kinds[0].name}, not {stated[0].name}: the plan counts with {kinds[0].name}"
    else:
        note = ""
    return WorkerGpu(name=slowest.name, memory_bytes=smallest.memory_bytes, note=note)


def _kind(name: str, *, stated: Sequence[WorkerGpu]) -> _Kind:
    exact = next((gpu for gpu in stated if _is_kind(name, gpu.name)), None)
    if exact is not None:
        return _Kind(name=exact.name, memory_bytes=exact.memory_bytes, gpu=find_gpu(exact.name))
    gpu = find_gpu(" ".join(sorted(_words(name))))
    if gpu is None:
        return _Kind(name=name, memory_bytes=None, gpu=None)
    return _Kind(name=gpu.name, memory_bytes=gpu.memory_gib * 2**30, gpu=gpu)


def _is_kind(short: str, name: str) -> bool:
    """Whether a full name has all words of a short one: `A100` and `NVIDIA A100-SXM4-80GB`."""
    return _words(short) <= _words(name)


def _words(name: str) -> set[str]:
    words = name.lower().replace("-", " ").split()  # Ray writes A100-80G
    return {f"{word}b" if word[:-1].isdecimal() and word.endswith("g") else word for word in words}


def _mixture(num_gpus: Mapping[str, int], *, kinds: Sequence[_Kind], smallest: _Kind, slowest: _Kind) -> str:
    listed = ", ".join(f"{count} x {kind.name}" for count, kind in zip(num_gpus.values(), kinds, strict=True))
    gib = f"{(smallest.memory_bytes or 0) / 2**30:.0f} GiB"
    which = f"with {slowest.name}, the slowest, and the {gib} of {smallest.name}"
    if slowest is smallest:
        which = f"with {slowest.name} ({gib}), the slowest and smallest"
    unknown = ", ".join(kind.name for kind in kinds if kind.memory_bytes is None)
    return f"the nodes have different GPUs ({listed}): the plan counts {which}" + (
        f"; memory and speed of {unknown} are unknown, and not counted" if unknown else ""
    )
