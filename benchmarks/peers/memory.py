"""Peak memory of processes, as the kernel counts it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil

_SAMPLE_S = 0.05


class Growth:
    """How far the memory of this process and its children has grown, at its highest."""

    def __init__(self) -> None:
        self.peak_bytes = 0


@contextlib.contextmanager
def growth() -> Iterator[Growth]:
    """Sample while it lasts; memory that processes share counts once among them (`Pss`)."""
    found, is_over, base = Growth(), threading.Event(), _family_bytes()

    def sample() -> None:
        while not is_over.wait(_SAMPLE_S):
            found.peak_bytes = max(found.peak_bytes, _family_bytes() - base)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        is_over.set()
        thread.join()


def reset_peak() -> int:
    """Forget this process's highest memory so far. Returns: what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most that this process held since `reset_peak`."""
    return _status_bytes("VmHWM")


def _family_bytes() -> int:
    return sum(_pss_bytes(pid) for pid in [os.getpid(), *(child.pid for child in psutil.Process().children(True))])


def _pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):  # it has just ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
