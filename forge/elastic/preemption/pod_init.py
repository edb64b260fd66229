"""The first process of a Kubernetes pod: turns SIGTERM into a notice, while the training goes on.

    python -m forge.elastic.preemption.pod_init ray start --block ...

Kubernetes ends a pod by sending SIGTERM to its first process, and kills what is left after the pod's
`terminationGracePeriodSeconds`. Passed on at once, the signal would end Ray, and the training with it. So
the guard writes a notice to `FORGE_NOTICE_FILE`, which `forge.elastic.preemption.watch` reads, and passes the
signal
on only shortly before the end. `FORGE_GRACE_S` (default 30, as Kubernetes') is the pod's grace period, less
what a preStop hook takes of it. As the first process it also reaps orphans.

Signals are blocked and waited for, not handled: the kernel queues a blocked signal even for process 1, and
none can come between two lines.
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

_MARGIN_S = 3.0
"""Left to the child for ending by itself, out of the grace."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def notice_file(environment: Mapping[str, str]) -> Path:
    """Where the guard writes and the watcher reads."""
    return Path(environment.get("FORGE_NOTICE_FILE") or "/tmp/forge-notice.json")


def main() -> None:
    """Guard the command of the command line."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    if not sys.argv[1:]:
        _refuse("usage: python -m forge.elastic.preemption.pod_init COMMAND...", status=2)
    try:
        grace_s = float(os.environ.get("FORGE_GRACE_S") or 30)
    except ValueError:
        _refuse(f"FORGE_GRACE_S is a number of seconds, not {os.environ['FORGE_GRACE_S']!r}", status=2)
    try:
        sys.exit(guard(sys.argv[1:], file=notice_file(os.environ), grace_s=grace_s))
    except OSError as error:
        # 127, as a shell says that there is no such command.
        _refuse(f"{sys.argv[1]} could not be guarded: {error}", status=127)


def guard(command: list[str], *, file: Path, grace_s: float) -> int:
    """Run a command until it ends; a second SIGTERM is passed on at once.

    The caller has blocked `SIGTERM`, `SIGINT` and `SIGCHLD`.

    Returns: its exit status as a shell tells it: 128 + n if signal n ended it.
    Raises: OSError if the notice has no place, or the command cannot be started.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    # An ignored SIGCHLD, which is inherited, would let the kernel throw the exit status away.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Python ignores these two, and a command would inherit that.
    python_ignores = (signal.SIGPIPE, signal.SIGXFSZ)
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=(), setsigdef=python_ignores)
    has_noticed, pass_on_at = False, math.inf
    while True:
        match _next_signal(until=pass_on_at):
            case signal.SIGCHLD:
                if (status := _reap(child)) is not None:
                    return status
            case signal.SIGINT:
                os.kill(child, signal.SIGINT)
            case signal.SIGTERM if not has_noticed:
                has_noticed, pass_on_at = True, time.monotonic() + grace_s - _MARGIN_S
                _write_notice(file, deadline=time.time() + grace_s)
            case _:  # the time is over, or asked for a second time
                os.kill(child, signal.SIGTERM)
                pass_on_at = math.inf


def _next_signal(*, until: float) -> int | None:
    """The next signal; None when `until`, by the monotonic clock, has passed."""
    while (left_s := until - time.monotonic()) > 0:
        # The kernel knows no infinite timeout.
        if received := signal.sigtimedwait(_SIGNALS, min(left_s, 3600.0)):
            return received.si_signo
    return None


def _reap(child: int) -> int | None:
    """Take the exit statuses of all that ended. Returns: the child's, if it was among them."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid == 0:
            return None


def _write_notice(file: Path, *, deadline: float) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"source": "kubernetes", "deadline": deadline}), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        # The training may still use the grace it does not know of.
        sys.stderr.write(f"forge: the notice could not be written: {error}\n")


def _refuse(message: str, *, status: int) -> None:
    sys.stderr.write(f"forge: {message}\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
