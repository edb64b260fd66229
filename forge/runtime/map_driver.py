"""The driver process of a map over shards that a client on another machine has sent to this cluster's head.

    python -m forge.runtime.map_driver FOLDER [--address ADDRESS]

The folder has `map.json` (the worker's function and its configuration) and `inputs.jsonl` (one shard a line), and
gets the results and `events.jsonl`, which the client mirrors. SIGTERM stops it; finished shards are stored by then.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forge.environment import adopt_environment
from forge.errors import ForgeError, RunError
from forge.events import Event, MapMessage, RunFailed, RunFinished, RunStopped, ShardsComputed
from forge.process import first_line
from forge.redact import redact_output
from forge.runs.lock import LOCK
from forge.runs.recorder import append_event
from forge.runtime.driver_lock import acquire_lock
from forge.runtime.driver_process import INPUTS, MAP, RESULTS
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_process import ShardProcess
from forge.runtime.shard_worker import ShardWorkerSpec

_PROGRESS_EVERY_S = 0.5


class RecordedProcess(ShardProcess):
    """Records messages and progress as events of a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(None)
        self._folder, self._shown_at = folder, -_PROGRESS_EVERY_S

    def message(self, text: str) -> None:
        append_event(self._folder, MapMessage(text=text))

    def progress(self, done: int, total: int) -> None:
        if time.monotonic() - self._shown_at >= _PROGRESS_EVERY_S:
            self._shown_at = time.monotonic()
            append_event(self._folder, ShardsComputed(num_done=done, num_shards=total))


def drive(folder: Path, *, address: str | None) -> Event:
    """Compute the shards of a folder. Returns: how it ended."""
    process = RecordedProcess(folder)
    try:
        process.take_signals()
        task = json.loads((folder / MAP).read_text())
        totals = process.map(
            lambda: _inputs(folder / INPUTS),
            spec=ShardWorkerSpec(function=task["function"], config=task["config"]),
            files=ShardFiles(folder=folder / RESULTS, digest=task["digest"]),
            total=task["num_shards"],
            num_workers=task["num_workers"],
            address=address,
        )
        done = ShardsComputed(
            num_done=totals.num_shards,
            num_shards=totals.num_shards,
            num_lost=totals.num_lost + totals.num_replaced,
            most_workers=totals.most_workers,
        )
        append_event(folder, done)
        return RunFinished(step=0)
    except ForgeError as error:
        if process.is_stopped:
            return RunStopped(step=0, reason=str(error))
        return RunFailed(error=type(error).__name__, message=str(error))
    except Exception as error:
        traceback.print_exc()
        return RunFailed(error=RunError.__name__, message=f"{type(error).__name__}: {first_line(error)}")


def main() -> None:
    """Drive the map whose folder is the command line's argument."""
    parser = argparse.ArgumentParser(prog="python -m forge.runtime.map_driver")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    redact_output()
    adopt_environment()
    lock = acquire_lock(folder / LOCK)
    ending = drive(folder, address=arguments.address)
    append_event(folder, ending)
    lock.close()
    sys.exit(0 if isinstance(ending, RunFinished) else 1)


def _inputs(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        yield from map(json.loads, file)


if __name__ == "__main__":
    main()
