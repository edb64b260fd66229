"""A process that records steps until it is killed: `python -m tests.support.tracked_run FOLDER TRACKING STEPS`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from forge.events import GenerationStarting, MembershipChangeStarted
from tests.support.runs import metrics, open_recorder

_TIMEOUT_S = 90.0


def kill_when(folder: Path, tracking: dict[str, Any], *, steps: int, is_time: Callable[[], bool]) -> None:
    """Record the steps 1 to `steps` in a process of its own, and kill it and its children once `is_time()`."""
    with _recording(folder, tracking, steps) as process:
        deadline = time.monotonic() + _TIMEOUT_S
        while not is_time():
            assert process.poll() is None and time.monotonic() < deadline, (
                "the process ended, or nothing was tracked"
            )
            time.sleep(0.02)


@contextlib.contextmanager
def _recording(folder: Path, tracking: dict[str, Any], steps: int) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", __name__, str(folder), json.dumps(tracking), str(steps)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        yield process
    finally:
        # W&B's process, which would otherwise write what it still has, goes first.
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            os.kill(one.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    """Record steps, with a membership change in the middle, and wait to be killed."""
    folder, tracking, steps = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    recorder = open_recorder(folder, **tracking)
    for step in range(1, steps + 1):
        if step == steps // 2:
            lose_a_node(recorder, step)
        recorder.step(metrics(step))
    threading.Event().wait(_TIMEOUT_S)


def lose_a_node(recorder: Any, step: int) -> None:
    """Record the loss of a node and the next generation, at times that differ from those of the steps around."""
    time.sleep(0.01)
    recorder.event(
        MembershipChangeStarted(generation=1, cause="loss", reason="node b was lost", seconds_since_cause=0.1)
    )
    recorder.event(GenerationStarting(generation=2, world_size=1, from_step=step - 1, source="memory"))
    time.sleep(0.01)


if __name__ == "__main__":
    main()
