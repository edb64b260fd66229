"""What this process may use of its machine: CPUs and memory within affinity, container limits and cgroups.

A container sees all cores and all memory of its host, and the kernel throttles or kills what goes beyond it.
So every count of cores and every size of memory in forge comes from here. The module needs nothing but Python,
because `forge.cluster.ssh.bootstrap` sends it to hosts without forge.

Source: cgroups(7); the kernel's cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")
_NO_LIMIT_BYTES = 1 << 60
"""cgroup v1 writes a number of this size where there is no limit."""


def usable_cpus(root: Path = _ROOT) -> int:
    """How many CPUs this process may use: those of its affinity, and no more than its CPU quota; at least 1.

    Half a CPU of a quota is not counted.
    """
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([num_cpus, *(int(quota) for quota in _quotas(root))]))


def cpu_name() -> str:
    """The processor's name according to the kernel."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_memory_bytes(root: Path = _ROOT) -> int:
    """The memory of this machine, or of this process's container if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *(limit for limit, _ in _memory(root))])


def free_memory_bytes(root: Path = _ROOT) -> int:
    """The memory that can still be allocated on this machine, or in this process's container if that is less."""
    free = _available_bytes()
    return max(0, min([free, *(limit - used for limit, used in _memory(root))]))


def out_of_memory_kills(root: Path = _ROOT) -> int:
    """How many processes the kernel has killed on this machine since it started, because memory ran out."""
    return _statistic(root / "proc/vmstat", "oom_kill")


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quota of this process's cgroup and of each above it that has one."""
    for folder in _folders(root, ""):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            yield int(words[0]) / int(words[1])
    for folder in _folders(root, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            yield quota / period


def _memory(root: Path) -> Iterator[tuple[int, int]]:
    """Memory limit, and use without what the kernel can drop, of this process's cgroup and those above it."""
    for controller, names in (
        ("", ("memory.max", "memory.current", "inactive_file")),
        ("memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        for folder in _folders(root, controller):
            limit = _number(folder / names[0])
            if limit is not None and limit < _NO_LIMIT_BYTES:
                used = (_number(folder / names[1]) or 0) - _statistic(folder / "memory.stat", names[2])
                yield limit, max(0, used)


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it, as far as they are visible here.

    A container may see the path that its cgroup has on the host, but only the folder of its own; so parents of a
    path that does not exist are tried too.

    Args:
        controller: of cgroup v1, such as `cpu`; empty for cgroup v2.
    """
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (number == "0" and not names) if not controller else controller in names.split(","):
            mounts = [base, base / "unified"] if not controller else [base / names, base / controller]
            relative = Path(path.strip().lstrip("/"))
            for mount in mounts:
                yield from (mount / each for each in (relative, *relative.parents) if (mount / each).is_dir())


def _statistic(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        if line.startswith(name + " "):
            return int(line.split()[1])
    return 0


def _number(path: Path) -> int | None:
    try:
        return int(_read(path))
    except ValueError:  # "max", or no such file
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
