"""`forge doctor`: checks of this machine, from Python and packages to GPU, memory, disk, cluster and trackers."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

from forge.cluster.local.ray_cluster import find_local, token_path
from forge.cluster.tools import TOOLS, missing_tools, remedies
from forge.environment import (
    LEAST_FILES,
    child_environment,
    foreign_variables,
    is_writable,
    nearest_existing,
    ray_folder_problem,
    require_loopback,
    require_ray_folder,
)
from forge.errors import ClusterError, ForgeError
from forge.fs import default_cache_dir, state_home
from forge.limits import cpu_name, free_memory_bytes, usable_cpus, usable_memory_bytes
from forge.runs.trackers.registry import PACKAGES
from forge.runtime.local_gpus import local_gpu
from forge.units import format_bytes

# `jobs/pretrain.yaml` needs these with room to spare.
_LEAST_MEMORY_BYTES = 4 * 2**30
_LEAST_DISK_BYTES = 2 * 2**30
_LEAST_SHARED_BYTES = 256 * 2**20
_WANTED_FILES = 4096
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
        *(_python(), *_packages(), _processor(), _gpu(), _memory(), *_disks()),
        *(_temporary_files(), _open_files(), _loopback(), *_variables(), *_cluster(), *_providers()),
        *(_wandb(), *_trackers()),
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
    num_cpus, num_cores = usable_cpus(), os.cpu_count() or 1
    limit = f" of {num_cores}, by affinity or a container's limit" if num_cpus < num_cores else ""
    found = f"{num_cpus} core{'s' * (num_cpus > 1)}{limit}, {cpu_name()}"
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
    free, total = free_memory_bytes(), usable_memory_bytes()
    limit = ", the container's limit" if total < psutil.virtual_memory().total else ""
    found = f"{format_bytes(free)} free of {format_bytes(total)}{limit}"
    return Finding(what="memory", state="ok" if free > _LEAST_MEMORY_BYTES else "note", found=found)


def _disks() -> list[Finding]:
    return [
        _folder("runs", Path.cwd, least=_LEAST_DISK_BYTES, fix="change to a folder that this user can write"),
        _folder("cache", default_cache_dir, least=_LEAST_DISK_BYTES, fix="set HOME or FORGE_CACHE"),
        _folder("state", state_home, least=0, fix="set HOME or FORGE_STATE"),
        _folder("Ray's token", lambda: token_path().parent, least=0, fix="set HOME"),
        _folder("shared memory", lambda: Path("/dev/shm"), least=_LEAST_SHARED_BYTES, fix="mount it"),
    ]


def _folder(what: str, find: Callable[[], Path], *, least: int, fix: str) -> Finding:
    """Check a folder that is written to.

    Args:
        find: returns it; it need not exist yet.
        least: the free space that it should have, in bytes.
        fix: what to do if it cannot be written.
    """
    try:
        path = find()
        if not is_writable(path):
            return Finding(what=what, state="broken", found=f"{path} cannot be written; {fix}")
        free = shutil.disk_usage(nearest_existing(path)).free
    except ForgeError as error:
        return Finding(what=what, state="broken", found=str(error))
    except OSError as error:  # such as a current folder that was deleted
        return Finding(what=what, state="broken", found=f"{error.strerror}; {fix}")
    is_low = free < least
    found = f"{format_bytes(free)} free at {path}" + (f", want {format_bytes(least)}" if is_low else "")
    return Finding(what=what, state="note" if is_low else "ok", found=found)


def _temporary_files() -> Finding:
    what, environment = "temporary files", child_environment()
    try:
        require_ray_folder()
    except ClusterError as error:
        return Finding(what=what, state="broken", found=str(error))
    given, used = os.environ.get("TMPDIR"), environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    problem = ray_folder_problem(given) if given and used != given else None
    if problem is not None:
        return Finding(what=what, state="note", found=f"TMPDIR is {given}: {problem}; Ray's are in {used}")
    return Finding(what=what, state="ok", found=f"Ray's are in {used}")


def _open_files() -> Finding:
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= _WANTED_FILES:
        return Finding(what="open files", state="ok", found="no limit" if limit < 0 else f"at most {limit}")
    found = f"at most {limit}, want {_WANTED_FILES}: raise the hard limit (ulimit -Hn, LimitNOFILE)"
    return Finding(what="open files", state="broken" if limit < LEAST_FILES else "note", found=found)


def _loopback() -> Finding:
    try:
        require_loopback()
    except ClusterError as error:
        return Finding(what="loopback", state="broken", found=str(error))
    return Finding(what="loopback", state="ok", found="this machine reaches itself at 127.0.0.1")


def _variables() -> list[Finding]:
    """Variables of the environment that forge ignores, or that weaken it."""
    findings = []
    if ignored := ", ".join(foreign_variables()):
        found = f"{ignored}: forge uses none of another Ray job or W&B run"
        findings.append(Finding(what="variables", state="note", found=found))
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        found = f"RAY_AUTH_MODE is {mode}: Ray's ports ask for no token"
        findings.append(Finding(what="Ray's ports", state="note", found=found, remedy="unset RAY_AUTH_MODE"))
    return findings


def _cluster() -> list[Finding]:
    try:
        cluster = find_local()
    except (ForgeError, OSError):  # the state folder is a finding of its own
        return []
    if cluster is None:
        return [Finding(what="cluster", state="ok", found="none up; each run starts its own")]
    return [Finding(what="cluster", state="ok", found=f"up at {cluster.address}, {len(cluster.nodes)} nodes")]


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


def _trackers() -> list[Finding]:
    """Packages that only some jobs need: a note where one is missing."""
    findings = []
    for needed in PACKAGES:
        if needed.version:
            findings.append(Finding(what=needed.key, state="ok", found=f"{needed.package} {needed.version}"))
        else:
            found = f"{needed.package} is not installed"
            findings.append(Finding(what=needed.key, state="note", found=found, remedy=needed.remedy))
    return findings


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
