"""Run a peer's program under torchrun, one core for each rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

from forge.elastic.workers.allocator import allocator_settings

LIMIT_S = 1800.0
_LOCK_AGE_S = 600.0
"""DeepSpeed's operator for CPUs, the only one that peers build, compiles in one minute."""


def run_under_torchrun(
    module: str, *, world_size: int, request: dict[str, Any], stdout: int | IO[str], quiet: bool = False
) -> str:
    """Run `benchmarks.peers.MODULE` with a request as JSON. Returns: its output if `stdout` is a pipe.

    Raises: subprocess.CalledProcessError or TimeoutExpired.
    """
    remove_stale_locks(extensions_folder())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world_size)]
    command += ["-m", f"benchmarks.peers.{module}", json.dumps(request)]
    done = subprocess.run(
        command,
        check=True,
        text=True,
        stdout=stdout,
        stderr=subprocess.DEVNULL if quiet else None,
        env=allocator_settings() | os.environ | {"OMP_NUM_THREADS": "1"},  # as forge's ranks have them
        timeout=LIMIT_S,
    )
    return done.stdout or ""


def extensions_folder() -> Path:
    """Return where torch keeps the operators that it has compiled."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(named) if named else Path.home() / ".cache" / "torch_extensions"


def remove_stale_locks(folder: Path) -> None:
    """Remove the locks of builds that were killed: torch waits for them for ever."""
    for lock in folder.glob("*/*/lock"):
        if time.time() - lock.stat().st_mtime > _LOCK_AGE_S:
            lock.unlink()
            print(f"removed the lock of an interrupted build: {lock}", file=sys.stderr)
