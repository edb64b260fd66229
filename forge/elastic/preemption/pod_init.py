"""Init process of a Kubernetes pod: turns SIGTERM into a preemption notice while training continues.

    python -m forge.elastic.preemption.pod_init ray start --block ...

Kubernetes ends a pod by sending SIGTERM to its first process and kills what is left after the pod's
`terminationGracePeriodSeconds`. Forwarding the signal at once would end Ray and the training with it. This process
writes a notice to `FORGE_NOTICE_FILE`, which `forge.elastic.preemption.watch` reads, and forwards the signal
shortly before the end. `FORGE_GRACE_S` (default 30, as in Kubernetes) is the pod's grace period minus the time of
its preStop hook. As process 1 it also reaps orphans.

Signals are blocked and waited for instead of handled: the kernel queues a blocked signal even for process 1, and
no signal can arrive between two statements.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from forge.fs import write_atomic

_MARGIN_S = 3.0
"""The part of the grace period in which the child can end by itself."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def notice_file(environment: Mapping[str, str]) -> Path:
    """The file that passes the notice from this process to the watcher."""
    return Path(environment.get("FORGE_NOTICE_FILE") or "/tmp/forge-notice.json")


def main() -> None:
    """Run the command given on the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if not sys.argv[1:]:
        _exit_with("usage: python -m forge.elastic.preemption.pod_init COMMAND...", status=2)
    try:
        grace_s = float(os.environ.get("FORGE_GRACE_S") or 30)
    except ValueError:
        _exit_with(f"FORGE_GRACE_S must be a number of seconds, not {os.environ['FORGE_GRACE_S']!r}", status=2)
    try:
        sys.exit(run_command(sys.argv[1:], file=notice_file(os.environ), grace_s=grace_s))
    except OSError as error:
        # 127, as a shell reports a command that was not found.
        _exit_with(f"cannot run {sys.argv[1]}: {error}", status=127)


def run_command(command: list[str], *, file: Path, grace_s: float) -> int:
    """Run a command until it ends; a second SIGTERM is forwarded at once.

    The caller has blocked `SIGTERM`, `SIGINT` and `SIGCHLD`.

    Returns: its exit status as a shell reports it: 128 + n if signal n ended it.
    Raises: OSError if the notice file cannot be written or the command cannot be started.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    # If SIGCHLD were ignored, which is inherited, the kernel would discard the exit status.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Python ignores these two, which the command would inherit.
    ignored_by_python = (signal.SIGPIPE, signal.SIGXFSZ)
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=(), setsigdef=ignored_by_python)
    has_notice, forward_at = False, math.inf
    while True:
        match _next_signal(until=forward_at):
            case signal.SIGCHLD:
                if (status := _reap(child)) is not None:
                    return status
            case signal.SIGINT:
                os.kill(child, signal.SIGINT)
            case signal.SIGTERM if not has_notice:
                has_notice, forward_at = True, time.monotonic() + grace_s - _MARGIN_S
                _write_notice(file, deadline=time.time() + grace_s)
            case _:  # the time is over, or this is the second SIGTERM
                os.kill(child, signal.SIGTERM)
                forward_at = math.inf


def _next_signal(*, until: float) -> int | None:
    """Wait for a signal; None when `until`, by the monotonic clock, has passed."""
    while (left_s := until - time.monotonic()) > 0:
        # sigtimedwait accepts no infinite timeout.
        if received := signal.sigtimedwait(_SIGNALS, min(left_s, 3600.0)):
            return received.si_signo
    return None


def _reap(child: int) -> int | None:
    """Collect the exit statuses of all ended processes. Returns: the child's, if it was among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid == 0:
            return None


def _write_notice(file: Path, *, deadline: float) -> None:
    try:
        write_atomic(file, json.dumps({"source": "kubernetes", "deadline": deadline}))
    except OSError as error:
        # The grace period is kept all the same: training may reach a checkpoint in it.
        sys.stderr.write(f"forge: the preemption notice could not be written: {error}\n")


def _exit_with(message: str, *, status: int) -> None:
    sys.stderr.write(f"forge: {message}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
