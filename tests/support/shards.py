"""What the workers of tests of `forge.runtime.shard_map` compute, and which of their processes did."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forge.errors import DataError


class Digests:
    """Digests of texts. `config` has `marks`: a folder for a file of each shard begun; `seconds` of each text."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._marks, self._seconds = Path(config["marks"]), float(config.get("seconds", 0.0))
        if config.get("fails_to_load"):
            raise DataError("no such model")

    def __call__(self, inputs: list[str], *, report: Callable[[], None]) -> list[str]:
        mark = self._marks / f"{inputs[0]}.{os.getpid()}.{time.monotonic_ns()}"
        mark.touch()
        is_first = len(list(self._marks.glob(f"{inputs[0]}.*"))) == 1
        if "fails" in inputs:
            raise DataError("this text cannot be read")
        if "dies" in inputs or ("dies once" in inputs and is_first):
            os.kill(os.getpid(), signal.SIGKILL)
        if "stops once" in inputs and is_first:
            os.kill(os.getpid(), signal.SIGSTOP)
        found = []
        for text in inputs:
            time.sleep(600 if text == "hangs once" and is_first else self._seconds)
            report()
            found.append(hashlib.sha256(text.encode()).hexdigest())
        return found
