"""Run the command `forge` as a user does: in a process, with its own cache and state folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from tests.support.peaks import share_peaks

_FORGE = [sys.executable, "-m", "forge.cli.app"]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    """Return this process's environment with forge's cache and state under `folder` and no W&B key.

    The state has the session's peaks of the CPU.
    """
    share_peaks(folder / "state")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "FORGE_"))}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        kept.pop(name, None)
    return kept | {"FORGE_CACHE": str(folder / "cache"), "FORGE_STATE": str(folder / "state")} | changes


def forge(
    *arguments: str | Path, cwd: Path, env: dict[str, str] | None = None, timeout_s: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run `forge ARGUMENTS` on pipes until it ends."""
    return subprocess.run(
        [*_FORGE, *map(str, arguments)],
        cwd=cwd,
        env=env or environment(cwd),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start_forge(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `forge ARGUMENTS` on pipes."""
    return subprocess.Popen(
        [*_FORGE, *map(str, arguments)],
        cwd=cwd,
        env=env or environment(cwd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(what: Callable[[], Any], *, timeout_s: float = 90.0, about: Callable[[], object] = str) -> Any:
    """Call `what` until it returns something true. Returns: that. Raises: TimeoutError with the text of `about`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := what()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} stayed false for {timeout_s} s; {about()}")
        time.sleep(0.02)
    return answer


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def survivors(processes: Iterable[psutil.Process], *, timeout_s: float = 15.0) -> list[str]:
    """Return descriptions of the processes that still run after `timeout_s`."""
    _, alive = psutil.wait_procs(list(processes), timeout=timeout_s)
    return [str(process.as_dict(["pid", "cmdline"])) for process in alive if process.status() != "zombie"]


def mentioning(*words: str) -> list[str]:
    """Return the command lines of other processes on this machine that contain one of these words."""
    lines = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if process.info["pid"] != os.getpid() and any(word in line for word in words):
            lines.append(line)
    return lines
