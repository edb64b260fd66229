"""A driver of `forge.runtime.torch_subprocess.run_driver` that says its pid and works until it is stopped."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from forge.errors import DataError
from forge.runtime.shard_process import ShardProcess, answer_request


def handle(request: dict[str, Any], process: ShardProcess) -> dict[str, Any]:
    process.message(f"pid {os.getpid()}")
    process.progress(1, 3)
    if request["work"] == "fail":
        raise DataError("no such data")
    if request["work"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if request["work"] == "wait":
        time.sleep(600)
    return {"work": request["work"], "ray": os.environ.get("RAY_AUTH_MODE")}


if __name__ == "__main__":
    answer_request(handle)
