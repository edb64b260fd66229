"""How the C library of ranks takes memory from the system, by environment variables.

By default glibc returns and maps thousands of pages again in every step: 5 to 30 % of the time of a step on a CPU,
and half of it where logits are blocks of 32 MiB or more. With these settings it keeps the memory of a step for the
next one, and takes it in huge pages. Blocks above the threshold are mapped one by one and returned.

Source: mallopt(3), "Memory Allocation Tunables" of the GNU C Library's manual; benchmarks/RESULTS.md.
"""

from __future__ import annotations

import os

_HUGE_PAGES_SINCE = (2, 35)
"""Of glibc. Older ones refuse a threshold above 32 MiB, and would map every block above 128 KiB one by one."""


def allocator_settings() -> dict[str, str]:
    """Return environment variables for a process that computes; other C libraries ignore them."""
    settings = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    if _glibc_version() >= _HUGE_PAGES_SINCE:
        settings |= {"MALLOC_MMAP_THRESHOLD_": str(2**30), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return settings


def _glibc_version() -> tuple[int, ...]:
    """Return glibc's version, `(2, 36)`; empty with another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return ()
    return tuple(int(part) for part in version.split(".") if part.isdigit()) if name == "glibc" else ()
