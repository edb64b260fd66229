"""The GPUs of this machine according to their driver. Imports little: a cluster's head asks at each submission."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence


def local_gpu() -> tuple[str, int] | None:
    """Name and memory in bytes of this machine's first GPU according to its driver; None if no GPU may be used."""
    return next(iter(local_gpus()), None)


def local_gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of this machine's GPUs that CUDA may use, according to their driver."""
    found = _listed_gpus()
    count = num_visible_gpus(len(found), os.environ)
    return _of_devices(found, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:count])[:count]


def smallest_gpu(devices: Sequence[str]) -> tuple[str, int] | None:
    """Name and memory in bytes of the smallest of this machine's GPUs among devices; None if none is a known GPU.

    Args:
        devices: `cpu`, or `cuda:` and the number or UUID of a GPU by the driver.
    """
    wanted = [device.removeprefix("cuda:") for device in devices if device.startswith("cuda:")]
    found = _of_devices(_listed_gpus(), wanted) if wanted else []
    return min(found, key=lambda gpu: gpu[1], default=None)


def _listed_gpus() -> list[tuple[str, int]]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = (line.rsplit(",", 1) for line in answer.splitlines())
        return [(name.strip(), int(mib) * 2**20) for name, mib in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _of_devices(found: list[tuple[str, int]], numbers: Sequence[str]) -> list[tuple[str, int]]:
    """Return the GPUs with these numbers; all if some are no numbers but UUIDs, or do not exist."""
    is_known = numbers and all(one.strip().isdecimal() and int(one) < len(found) for one in numbers)
    return [found[int(one)] for one in numbers] if is_known else found


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
