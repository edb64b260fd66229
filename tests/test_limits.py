"""CPUs and memory within affinity and cgroup limits, read from trees such as containers see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from forge.elastic.workers.worker_group import killed_reason
from forge.limits import free_memory_bytes, out_of_memory_kills, usable_cpus, usable_memory_bytes

GIB = 2**30
NUM_CPUS = len(os.sched_getaffinity(0))


def tree(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2 = "0::/\n"
V1 = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n"
SMALL = {"quota": "5000", "period": "100000"}
KUBERNETES = "0::/kubepods/pod1/box\n"


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        (V2, {"sys/fs/cgroup/cpu.max": "100000 100000\n"}),
        (V2, {"sys/fs/cgroup/cpu.max": "150000 100000\n"}),
        (V2, {"sys/fs/cgroup/cpu.max": "20000 100000\n"}),
        # The limit of a cgroup above holds too, and the cgroup's own path may not be visible.
        (KUBERNETES, {"sys/fs/cgroup/kubepods/pod1/cpu.max": "100000 100000\n"}),
        (KUBERNETES, {"sys/fs/cgroup/cpu.max": "100000 100000\n"}),
        (V1, {f"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_{name}_us": "100000" for name in ("quota", "period")}),
        (V1, {f"sys/fs/cgroup/cpu/docker/abc/cpu.cfs_{name}_us": us for name, us in SMALL.items()}),
    ],
)  # fmt: skip
def test_usable_cpus__a_quota_below_two__is_one(tmp_path: Path, cgroup: str, files: dict[str, str]) -> None:
    assert usable_cpus(tree(tmp_path, cgroup, files)) == 1


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("", {}),
        (V2, {"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}),
        (V2, {"sys/fs/cgroup/cpu.max": "nonsense\n", "sys/fs/cgroup/memory.max": "\n"}),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
              "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}),
    ],
)  # fmt: skip
def test_limits__none_set__are_those_of_the_machine(tmp_path: Path, cgroup: str, files: dict[str, str]) -> None:
    root = tree(tmp_path, cgroup, files)
    assert usable_cpus(root) == NUM_CPUS
    assert usable_memory_bytes(root) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_memory__cgroup_v2__is_the_limit_and_what_is_left_of_it(tmp_path: Path) -> None:
    names = {
        "memory.max": 1 * GIB,
        "memory.current": GIB // 2,
        "memory.stat": f"anon 1\ninactive_file {GIB // 4}\n",
    }
    root = tree(tmp_path, V2, {f"sys/fs/cgroup/{name}": str(value) for name, value in names.items()})
    assert usable_memory_bytes(root) == GIB
    assert free_memory_bytes(root) == GIB - GIB // 4


def test_memory__cgroup_v1_without_the_hosts_path__is_the_limit_of_the_container(tmp_path: Path) -> None:
    names = {"limit_in_bytes": GIB, "usage_in_bytes": GIB // 2}
    root = tree(tmp_path, V1, {f"sys/fs/cgroup/memory/memory.{name}": str(value) for name, value in names.items()})
    assert (usable_memory_bytes(root), free_memory_bytes(root)) == (GIB, GIB // 2)


def test_usable_cpus__affinity_to_one_cpu__is_one() -> None:
    cpu = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, [{cpu}]); from forge.limits import usable_cpus; print(usable_cpus())"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True).stdout == b"1\n"


def test_out_of_memory_kills__of_the_kernel__are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path, V2, {"proc/vmstat": "pgfault 12\noom_kill 4\noom_kill_disable 9\n"})
    assert out_of_memory_kills(root) == 4
    assert out_of_memory_kills(tmp_path / "without") == 0  # an older kernel does not say
    assert out_of_memory_kills() >= 0


def test_killed__kernel_ran_out_of_memory_meanwhile__says_so_with_the_numbers() -> None:
    assert killed_reason(num_kills_before=out_of_memory_kills()) == "its process was killed"
    reason = killed_reason(num_kills_before=out_of_memory_kills() - 1)
    assert "the kernel's out-of-memory killer was at work on its machine meanwhile (" in reason
    assert "use fewer workers there, or a machine with more memory" in reason
