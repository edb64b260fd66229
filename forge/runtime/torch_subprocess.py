"""Commands that need torch, run in a subprocess, so that the CLI never imports it: text generation and export.

Request and answer are JSON; an error is answered with its class and message and raised again here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from forge.code_archive import require_trusted
from forge.errors import RunError
from forge.runs.reader import error_named, read_plan


def sample_text(run_folder: Path, **request: Any) -> dict[str, Any]:
    """Continue a prompt; the request's fields are those of `forge.serve.generate.GenerateRequest`.

    Returns: `step`, `prompt`, `text`, `generate_s`, and `load_s`: to import torch and load the checkpoint.
    Raises: CheckpointError if the run has no intact checkpoint; UserCodeError if it brings code that was never used
        on this machine; RunError if the process failed.
    """
    plan = read_plan(run_folder)
    if plan.code is not None:
        require_trusted(plan.code.digest, run_folder=run_folder)
    began = time.monotonic()
    answer = _run("forge.serve.generate", str(run_folder), request=request, what="cannot generate text")
    return answer | {"load_s": time.monotonic() - began - answer.get("generate_s", 0.0)}


def export_weights(**request: Any) -> dict[str, Any]:
    """Write a folder of weights; the request's fields are those of `forge.serve.export.ExportRequest`.

    Returns: `folder`, `step`, `num_parameters`, `size_bytes`, `num_files`, `is_transformers`.
    Raises: CheckpointError if there is no such checkpoint; ArgumentError if the folder cannot be written;
        RunError if the process failed.
    """
    return _run("forge.serve.export", request=request, what="cannot export the weights")


def _run(module: str, *arguments: str, request: dict[str, Any], what: str) -> dict[str, Any]:
    quiet = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-m", module, *arguments]
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, env=quiet, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RunError(f"{what}: {lines[-1]}") from None
    if "error" in answer:
        raise error_named(answer["error"]["class"], message=answer["error"]["message"])
    found: dict[str, Any] = answer["answer"]
    return found
