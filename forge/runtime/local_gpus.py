"""The GPUs of this machine according to their driver. Imports little: a cluster's head asks at each submission."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping


def local_gpu() -> tuple[str, int] | None:
    """Name and memory in bytes of this machine's first GPU according to its driver; None if no GPU may be used."""
    return next(iter(local_gpus()), None)


def local_gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of this machine's GPUs that CUDA may use, according to their driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = (line.rsplit(",", 1) for line in answer.splitlines())
        found = [(name.strip(), int(mib) * 2**20) for name, mib in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    count = num_visible_gpus(len(found), os.environ)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:count]
    if count and all(entry.strip().isdecimal() for entry in visible):
        return [found[int(entry)] for entry in visible]
    return found[:count]


def num_local_gpus() -> int:
    """Number of this machine's GPUs according to their driver, as far as CUDA_VISIBLE_DEVICES allows their use."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(
            [tool, "--list-gpus"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
        return num_visible_gpus(sum(line.startswith("GPU ") for line in listed.splitlines()), os.environ)
    return 0


def num_visible_gpus(num_gpus: int, environment: Mapping[str, str]) -> int:
    """How many of the driver's GPUs CUDA shows to this process's children.

    CUDA ignores what follows the first entry that is no device.

    Source: CUDA C++ Programming Guide, CUDA environment variables.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_gpus
    names = [name.strip() for name in visible.split(",")]
    shown = itertools.takewhile(lambda name: _is_device(name, num_gpus=num_gpus), names)
    return min(num_gpus, len(list(shown)))


def _is_device(name: str, *, num_gpus: int) -> bool:
    return int(name) < num_gpus if name.isdecimal() else name.startswith(("GPU-", "MIG-"))
