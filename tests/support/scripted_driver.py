"""A driver that trains nothing: `python -m tests.support.scripted_driver RUN_FOLDER [--address ADDRESS]`.

It owns the run as `forge.runtime.driver` does, by a lock with its pid, appends the events of the file named by
`FORGE_TEST_SCRIPT`, and ends. If the script says `until_stopped`, it waits for SIGTERM before it ends, and records
that the run was stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    folder, script = Path(sys.argv[1]), json.loads(Path(os.environ["FORGE_TEST_SCRIPT"]).read_text())
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _record(folder, {"event": "RunStarted", "run_id": folder.name, "total_steps": 6, "resumed_from_step": 0})
        for record in script["events"]:
            _record(folder, record)
        if script["until_stopped"]:
            signal.sigwait([signal.SIGTERM])
            _record(folder, {"event": "RunStopped", "step": 0, "reason": ""})


def _record(folder: Path, record: dict[str, Any]) -> None:
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps({"time": time.time()} | record) + "\n")


if __name__ == "__main__":
    main()
