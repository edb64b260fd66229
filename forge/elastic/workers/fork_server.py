"""The fork server: imports everything that a rank needs, and forks ranks on request.

    python -m forge.elastic.workers.fork_server SOCKET_FD PLAN_FD PARENT_PID

It uses neither CUDA nor threads, so a fork of it equals a new process, but starts seconds earlier. Its agent sends
requests over a socket, as file descriptors of the worker's spec and of what the rank inherits. It answers with pids
and with the exit status of each rank. On GPUs it also forks standby processes, which create a CUDA context and wait
to become ranks (`forge.elastic.workers.standby`). Ranks die with the fork server, and the fork server with its
agent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from forge.process import die_with_parent
from forge.redact import redact_output

_MAX_FDS = 253


def main() -> None:
    """Import everything, report readiness, and fork on request until the agent is gone."""
    sock: socket.socket | None = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[3]))
    redact_output()
    # Ctrl-C is sent to whole process groups; a run is stopped through its supervisor instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = _read_all(int(sys.argv[2]))
    ready_s = _import_for(plan)
    while sock is not None:  # a clone continues with a socket of its own
        sock, ready_s = _serve(sock, plan, ready_s=ready_s), 0.0


def _serve(sock: socket.socket, plan: str, *, ready_s: float) -> socket.socket | None:
    """Serve an agent until it ends. Returns: in a clone of this process, the socket to its agent."""
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _send(sock, ready=ready_s, epoch=0, pid=os.getpid())
    while True:
        ready, _, _ = select.select([sock, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            _report_ends(sock)
        if sock not in ready:
            continue
        text, fds, _, _ = socket.recv_fds(sock, 16, _MAX_FDS)
        if not text:
            return None  # the agent is gone
        if text == b"fork":
            spec_fd, *inherited = fds
            _fork(json.loads(_read_all(spec_fd)), fds=inherited, plan=plan, close=(sock, wake, woken))
        elif text == b"standby":
            spec_fd, own = fds
            _fork_standby(json.loads(_read_all(spec_fd)), own, plan=plan, close=(sock, wake, woken))
        elif text == b"clone":
            if os.fork() == 0:
                signal.set_wakeup_fd(-1)
                for end in (sock, wake, woken):
                    end.close()
                return socket.socket(fileno=fds[0])
            os.close(fds[0])
        else:  # the plan of another run, and its number
            plan = _read_all(fds[0])
            _send(sock, ready=_import_for(plan), epoch=int(text))


def _import_for(plan_json: str) -> float:
    """Import everything that a rank of this plan needs. Returns: the seconds it took."""
    began = time.monotonic()
    # Otherwise DeepSpeed asks for GPUs when it is imported, and without NVML that uses CUDA.
    os.environ["DS_ACCELERATOR"] = str(json.loads(plan_json)["hardware"]["device"])
    from forge.elastic.workers import worker_process

    worker_process.import_for(plan_json)
    gc.collect()
    gc.freeze()  # otherwise garbage collection in the ranks would copy the shared pages
    return round(time.monotonic() - began, 3)


def _fork(spec: dict[str, Any], *, fds: list[int], plan: str, close: tuple[socket.socket, ...]) -> None:
    """Fork a rank, which closes the sockets `close` of this process; the first is the agent's."""

    def run() -> int:
        from forge.elastic.workers.worker_process import run_worker_process

        return run_worker_process(spec, fds=fds, plan_json=plan)

    pid = _child(run, fds=fds, close=close)
    _send(close[0], forked=spec["rank"], generation=spec["generation"], pid=pid)


def _fork_standby(spec: dict[str, Any], own: int, *, plan: str, close: tuple[socket.socket, ...]) -> None:
    """Fork a process that prepares the device of `spec`, and becomes a rank when its agent says so on a socket.

    Args:
        own: the descriptor of its socket.
    """

    def run() -> int:
        from forge.elastic.workers.standby_process import run_standby

        return run_standby(socket.socket(fileno=own), plan_json=plan, **spec)

    _child(run, fds=[own], close=close)


def _child(run: Callable[[], int], *, fds: list[int], close: tuple[socket.socket, ...]) -> int:
    """Fork a process that ends with the code that `run` returns, and with this process. Returns: its pid.

    Args:
        fds: that the child alone keeps.
    """
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        return pid
    code = 1
    try:
        die_with_parent(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in close:
            end.close()
        gc.unfreeze()
        code = run()
    finally:
        os._exit(code)


def _report_ends(sock: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        _send(sock, ended=pid, code=os.waitstatus_to_exitcode(status))


def _send(sock: socket.socket, **message: Any) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.send(json.dumps(message).encode())


def _read_all(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read().decode()


if __name__ == "__main__":
    main()
