"""The second part of `benchmarks.gpu`: `forge train` as a user runs it; needs Ray."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.ranks import Setting
from benchmarks.program import FORGE, records_of, running, wait
from tests.support.elastic import write_job

_START_LIMIT_S = 240.0
_STEPS = 200


def with_ray(setting: Setting) -> Iterator[dict[str, Any]]:
    """Kill every process of a run after its first checkpoint, resume it, and hold its steps together."""
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=_short_folder(), ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_job(folder, steps=_STEPS, workers="1")
        changes = {
            "data.files": folder / "corpus/*.txt",
            "checkpoint.every": "20 steps",
            "checkpoint.to": folder / "runs",
            "resources.gpu": "none" if setting.device == "cpu" else "auto",
        }
        settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        command = [FORGE, "train", str(folder / "job.yaml"), "--yes", "-o", "json", *settings]
        began = time.monotonic()
        with running(command, folder=folder, device=setting.device) as program:
            deadline = time.monotonic() + _START_LIMIT_S
            if not wait(lambda: _has_checkpoint(folder), program.process, deadline=deadline):
                raise RuntimeError(f"no checkpoint was written:\n{program.last_words()}")
        run_folder = next(path for path in (folder / "runs").iterdir() if (path / "checkpoints").is_dir())
        num_before = len(records_of(run_folder / "metrics.jsonl"))
        yield {"seconds_to_kill": time.monotonic() - began, "steps_before_kill": num_before}
        began = time.monotonic()
        command = [FORGE, "train", "--resume", str(run_folder), "--yes", "-o", "json"]
        with running(command, folder=folder, device=setting.device) as program:
            code = program.process.wait()
            if code:
                raise RuntimeError(f"forge train --resume ended with exit code {code}:\n{program.last_words()}")
        yield {"seconds_to_resume_and_end": time.monotonic() - began} | _outcome(run_folder)


def _short_folder() -> str | None:
    """Ray's sockets need a short path, and a benchmark's own temporary folder may be long."""
    return "/tmp" if os.access("/tmp", os.W_OK) else None


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("runs/*/checkpoints/step-*"))


def _outcome(run_folder: Path) -> dict[str, Any]:
    """Return whether every step was recorded once, and which generations trained on which device."""
    steps = [record["step"] for record in records_of(run_folder / "metrics.jsonl")]
    events = records_of(run_folder / "events.jsonl")
    return {
        "every step once": {"passed": steps == list(range(1, _STEPS + 1)), "steps": len(steps)},
        "generations": [
            (event["generation"], event["device"]) for event in events if event["event"] == "GenerationStarted"
        ],
    }
