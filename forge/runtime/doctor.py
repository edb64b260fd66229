"""`forge doctor`: checks of this machine, from Python and packages to GPU, memory, disk, cluster and W&B."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from forge.cluster.local.ray_cluster import find_local
from forge.cluster.tools import TOOLS, missing_tools, remedies
from forge.fs import default_cache_dir
from forge.runtime.probe import local_cpu, local_gpu
from forge.units import format_bytes

# `jobs/pretrain.yaml` needs these with room to spare.
_LEAST_MEMORY_BYTES = 4 * 2**30
_LEAST_DISK_BYTES = 2 * 2**30
_LEAST_SHARED_BYTES = 256 * 2**20
_NEEDED = {
    "torch": "2.9",
    "deepspeed": "0.19.8",
    "transformers": "5",
    "ray": "2.60",
    "tokenizers": "0.22",
    "wandb": "0.25",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check."""

    what: str
    state: Literal["ok", "note", "broken"]
    found: str
    remedy: str | None = None
    """A command that fixes it."""


def examine() -> list[Finding]:
    """Run all checks."""
    return [
        _python(),
        *_packages(),
        _processor(),
        _gpu(),
        _memory(),
        *_disks(),
        _cluster(),
        *_providers(),
        _wandb(),
    ]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    return Finding(what="python", state="ok", found=found)


def _packages() -> list[Finding]:
    findings = []
    for name, least in _NEEDED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding(what=name, state="broken", found="not installed", remedy="make setup"))
            continue
        is_old = _numbers(found) < _numbers(least)
        findings.append(
            Finding(
                what=name,
                state="broken" if is_old else "ok",
                found=f"{found}, needs {least}" if is_old else found,
                remedy="make setup" if is_old else None,
            )
        )
    return findings


def _processor() -> Finding:
    flags = ""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
    found = f"{os.cpu_count()} cores, {local_cpu()}"
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        return Finding(what="processor", state="ok", found=f"{found}, bf16 in hardware")
    return Finding(
        what="processor", state="note", found=f"{found}, no bf16 in hardware: precision fp32 is faster on CPU"
    )


def _gpu() -> Finding:
    gpu = local_gpu()
    if gpu is None:
        return Finding(what="gpu", state="note", found="none; ranks run on CPU with gloo")
    name, memory_bytes = gpu
    if "+cpu" in version("torch"):
        return Finding(
            what="gpu",
            state="broken",
            found=f"{name}, but torch is a CPU build",
            remedy="make setup TORCH=torch",
        )
    return Finding(what="gpu", state="ok", found=f"{name}, {format_bytes(memory_bytes)}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    return Finding(what="memory", state="ok" if memory.available > _LEAST_MEMORY_BYTES else "note", found=found)


def _disks() -> list[Finding]:
    findings = []
    paths = {"runs": Path.cwd(), "cache": default_cache_dir(), "shared memory": Path("/dev/shm")}
    for what, path in paths.items():
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        least = _LEAST_SHARED_BYTES if what == "shared memory" else _LEAST_DISK_BYTES
        if not os.access(path, os.W_OK):
            findings.append(Finding(what=what, state="broken", found=f"{path} cannot be written"))
        else:
            is_low = free < least
            found = f"{format_bytes(free)} free at {path}" + (f", want {format_bytes(least)}" if is_low else "")
            findings.append(Finding(what=what, state="note" if is_low else "ok", found=found))
    return findings


def _cluster() -> Finding:
    cluster = find_local()
    if cluster is None:
        return Finding(what="cluster", state="ok", found="none up; each run starts its own")
    return Finding(what="cluster", state="ok", found=f"up at {cluster.address}, {len(cluster.nodes)} nodes")


def _providers() -> list[Finding]:
    """What clusters elsewhere need on this machine; a note where something is missing, as few people use all."""
    findings = []
    for provider, tools in TOOLS.items():
        missing = missing_tools(provider)
        names = ", ".join(tool.name for tool in missing or tools)
        findings.append(
            Finding(
                what=f"clusters: {provider}",
                state="note" if missing else "ok",
                found=f"missing: {names}" if missing else names,
                remedy="; ".join(remedies(missing)) or None,
            )
        )
    return findings


def _wandb() -> Finding:
    if os.environ.get("WANDB_API_KEY"):
        return Finding(what="wandb key", state="ok", found="in the environment")
    return Finding(what="wandb key", state="note", found="not set: runs are recorded offline (WANDB_API_KEY)")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
