"""Time of a training loop, on the CPU or on a GPU."""

from __future__ import annotations

import time

import torch


def now() -> float:
    """Return `time.perf_counter()` once the GPU, if there is one, has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
