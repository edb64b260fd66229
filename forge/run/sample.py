"""Ask a process of its own for text from a run, since generating needs torch and the client has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from forge.errors import RunError
from forge.report.runs import error_named


def sample_text(run_folder: Path, **request: Any) -> dict[str, Any]:
    """Continue a prompt; the request's fields are those of `forge.serve.generate.GenerateRequest`.

    Returns: `step`, `prompt`, `text`.
    Raises: CheckpointError if the run has no checkpoint that verifies; RunError if the process failed.
    """
    command = [sys.executable, "-m", "forge.serve.generate", str(run_folder)]
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env=quiet, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunError(f"no text could be generated: {lines[-1]}") from None
    if "error" in answer:
        raise error_named(answer["error"]["class"], message=answer["error"]["message"])
    generated: dict[str, Any] = answer["generated"]
    return generated
