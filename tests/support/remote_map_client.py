"""Answer a file of prompts on a cluster that shares no files with this machine, as a process that can be killed.

python -m tests.support.remote_map_client HERE THERE MODEL INPUT OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from forge.errors import ForgeError
from forge.evaluate.answer_map import answer
from forge.runtime.shard_process import ShardProcess
from tests.support.command import environment
from tests.support.remote_client import Elsewhere


def request_of(model: Path, prompts: Path, output: Path) -> dict[str, Any]:
    """A request for `forge.evaluate.answer_map`."""
    config = {"source": str(model), "sampling": {"max_tokens": 12, "temperature": 0}}
    paths = {"input": str(prompts), "output": str(output)}
    return {**paths, "config": config, "num_workers": 1, "cluster": "elsewhere"}


def _main() -> None:
    here, there, model, prompts, output = map(Path, sys.argv[1:])
    os.environ |= environment(here) | {"FORGE_STATE": str(there / "state")}
    with mock.patch("forge.evaluate.answer_map.find_cluster", return_value=Elsewhere(there)):
        try:
            found = answer(request_of(model, prompts, output), ShardProcess(sys.stdout, parent=os.getppid()))
        except ForgeError as error:
            found = {"error": str(error)}
    print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    _main()
