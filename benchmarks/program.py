"""Run a benchmark's programs, and end all of their processes however the benchmark ends.

All descendants of a program, in any session, inherit a mark in their environment, by which they are found. A
program writes its results to its folder, and may read commands from its stdin.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

FORGE = str(Path(sys.executable).with_name("forge"))
_MARK = "FORGE_BENCHMARK_RUN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A running program."""

    process: subprocess.Popen[str]
    folder: Path
    environment: Mapping[str, str]
    """Whatever is started with it belongs to the program."""

    def say(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def cpu_s(self) -> float:
        """CPU time that it and what it started, and is running, have used."""
        total = 0.0
        for process in _processes_of(self.environment[_MARK]):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def last_words(self) -> str:
        """Return the last lines of its stderr."""
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-40:])


def train_to_end(job: Path, *arguments: str, environment: Mapping[str, str]) -> Path:
    """Run `forge train`; however this ends, so does the run. Returns: the folder of the finished run.

    Args:
        environment: added to that of this process.

    Raises: RuntimeError with the end of its stderr.
    """
    mark = secrets.token_hex(8)
    end_on_sigterm()
    try:
        done = subprocess.run(
            [FORGE, "train", str(job), "--yes", *arguments, "-o", "json"],
            env=os.environ | {_MARK: mark, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        with uninterrupted():
            _kill_marked(mark)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return Path(json.loads(done.stdout)["folder"])


@contextlib.contextmanager
def running(
    command: Sequence[str], *, folder: Path, threads: int | None = 1, device: str = "cpu"
) -> Iterator[Program]:
    """Run a program in its own session; at the end kill all processes that it started.

    Args:
        folder: for its temporary files, forge's state and cache, its `answer` (stdout) and `log` (stderr).
        threads: of torch; None: one for each core.
        device: that DeepSpeed uses, `cpu` or `cuda`.
    """
    mark = secrets.token_hex(8)
    environment = os.environ | {
        _MARK: mark,
        "DS_ACCELERATOR": device,
        "FORGE_CACHE": str(folder / "cache"),
        "FORGE_STATE": str(folder / "state"),
        "GLOO_SOCKET_IFNAME": "lo",
        **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TMPDIR": str(folder),
    }
    end_on_sigterm()
    with (folder / "answer").open("w") as answer, (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=log,
            env=environment,
            text=True,
            start_new_session=True,
        )
    try:
        yield Program(process=process, folder=folder, environment=environment)
    finally:
        with uninterrupted():
            _kill_marked(mark)
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def end_on_sigterm() -> None:
    """Make SIGTERM end this process with cleanup, as Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore SIGINT and SIGTERM, so that the cleanup completes."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait(
    is_done: Callable[[], bool], process: subprocess.Popen[Any], *, deadline: float, poll_s: float = 0.1
) -> bool:
    """Wait until `is_done`, the end of the process, or the deadline. Returns: the last value of `is_done`.

    Args:
        deadline: a time of `time.monotonic()`.
    """
    while not (answer := is_done()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(poll_s)
    return answer


def module(name: str, request: Mapping[str, Any], *arguments: str) -> list[str]:
    """Return the command that runs a module of `benchmarks.peers`."""
    return [sys.executable, "-m", f"benchmarks.peers.{name}", json.dumps(request), *arguments]


def records_of(path: Path) -> list[dict[str, Any]]:
    """Read the complete JSON lines of a growing file; empty if it does not exist yet."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _kill_marked(mark: str) -> None:
    """SIGKILL all processes that inherited the mark, until no new ones appear."""
    while processes := _processes_of(mark):
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=5)


def _processes_of(mark: str) -> list[psutil.Process]:
    """The processes with a mark and their descendants: some write a title over their environment, as vLLM's do."""
    parents: dict[psutil.Process, int] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            parents[process] = process.ppid()
    found = {process.pid for process in parents if _is_marked(process, mark)}
    size = 0
    while size < len(found):
        size = len(found)
        found |= {process.pid for process, parent in parents.items() if parent in found}
    return [process for process in parents if process.pid in found]


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return bool(process.environ().get(_MARK) == mark)
    except psutil.Error:
        return False
