"""What forge needs to know about Linux processes: liveness, start time, parent death, limits, logs, error text."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TextIO

from forge.redact import redact_output

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MAX_ERROR_CHARS = 300
_MAX_DESCRIPTORS = 65_536


def process_state(pid: int) -> str | None:
    """The state letter of `/proc/PID/stat` (`R`, `S`, `T`, `Z`, ...); None if the process does not exist.

    Source: proc_pid_stat(5).
    """
    fields = _stat_fields(pid)
    return fields[0] if fields else None


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; a zombie waiting for its parent does not."""
    return process_state(pid) not in (None, "Z", "X")


def is_suspended(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    return process_state(pid) in ("T", "t")


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it does not run.

    Together with the pid it identifies a process even after the pid was reused.
    """
    fields = _stat_fields(pid)
    return int(fields[19]) if fields and fields[0] not in ("Z", "X") else None


def has_open(pid: int, path: Path) -> bool:
    """Whether a process of this user has a file open: a pid that a file names is believed only then."""
    try:
        wanted = path.stat()
        return any(_is_same(entry, wanted) for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def _is_same(entry: Path, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(entry.stat(), wanted)
    except OSError:  # closed since it was listed
        return False


def die_with_parent(parent: int, *, signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent thread dies; at once if `parent` is gone already.

    Source: prctl(2), PR_SET_PDEATHSIG.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def ending(code: int) -> str:
    """Describe the return code of a `subprocess.Popen`: `SIGKILL`, or `exit status 1`."""
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def free_port(host: str = "") -> int:
    """Return a TCP port that no process listens on now.

    Args:
        host: the address to bind to; empty for all addresses.
    """
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def raise_descriptor_limit() -> None:
    """Raise this process's soft limit of open files: a supervisor has a connection to every agent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def calm_garbage_collector() -> None:
    """Let Python's garbage collector run less often, and never visit again what is loaded now.

    For a process that keeps hundreds of thousands of objects of its own, after it has imported what it needs: a
    full collection with Ray and torch loaded takes 0.2 s. Memory without cycles is freed at once as ever.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def redirect_output(path: Path) -> None:
    """Append this process's stdout and stderr, including those of native libraries, to a log file.

    What Python code prints is redacted.
    """
    handle = open_log(path)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
    redact_output()


def open_log(path: Path) -> int:
    """Open a log for appending; it and its folder are for this user alone, as messages may contain secrets.

    Returns: a file descriptor.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(PermissionError):  # the folder of another user, who chose its mode
        path.parent.chmod(0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with contextlib.suppress(PermissionError):
        os.fchmod(handle, 0o600)
    return handle


def take_stdout() -> TextIO:
    """Return stdout as a file for this process's answer alone; what anything else prints goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(answer, "w")


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not blank; its class's name if there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException) -> str:
    """An exception's whole text on one line, at most `MAX_ERROR_CHARS` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 1] + "…"


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of `/proc/PID/stat` after the command name, which may itself contain spaces and parentheses."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() or None
    except OSError:
        return None
