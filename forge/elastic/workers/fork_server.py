"""The warm process: has imported all that a rank needs, and becomes ranks by forking.

    python -m forge.elastic.workers.fork_server SOCKET_FD PLAN_FD PARENT_PID

It touches neither CUDA nor threads, so a fork of it is as good as a fresh process, seconds earlier. Its
agent sends it orders over a socket, as descriptors: of the order's text, and of what the rank inherits. It
answers with pids, and with how each rank ended. Whoever dies takes its children along: ranks die with it, it
dies with its agent.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

_MOST_FDS = 253
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Import everything, say so, and fork on demand until the agent is gone."""
    sock: socket.socket | None = socket.socket(fileno=int(sys.argv[1]))
    die_with(int(sys.argv[3]))
    # Ctrl-C reaches whole groups of processes; a run is stopped through its supervisor.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = _read_all(int(sys.argv[2]))
    warm_s = _warm_up(plan)
    while sock is not None:  # once for each process: a clone goes on with a socket of its own
        sock, warm_s = _serve(sock, plan, warm_s=warm_s), 0.0


def _serve(sock: socket.socket, plan: str, *, warm_s: float) -> socket.socket | None:
    """Do what an agent says until it is gone. Returns: in a clone of this process, the socket to its agent."""
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    _tell(sock, warm=warm_s, epoch=0, pid=os.getpid())
    while True:
        ready, _, _ = select.select([sock, wake], [], [])
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            _report_ends(sock)
        if sock not in ready:
            continue
        text, fds, _, _ = socket.recv_fds(sock, 16, _MOST_FDS)
        if not text:
            return None  # the agent is gone
        if text == b"fork":
            order, *inherited = fds
            _fork(sock, (wake, woken), json.loads(_read_all(order)), inherited, plan)
        elif text == b"clone":
            if os.fork() == 0:
                signal.set_wakeup_fd(-1)
                for end in (sock, wake, woken):
                    end.close()
                return socket.socket(fileno=fds[0])
            os.close(fds[0])
        else:  # another run's plan, and which this is
            plan = _read_all(fds[0])
            _tell(sock, warm=_warm_up(plan), epoch=int(text))


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; at once, if that has happened already."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _warm_up(plan_json: str) -> float:
    """Import everything that a rank of this plan will. Returns: the seconds it took."""
    began = time.monotonic()
    from forge.elastic.workers import worker_process

    worker_process.import_for(plan_json)
    gc.collect()
    gc.freeze()  # so that ranks do not copy pages by counting references in them
    return round(time.monotonic() - began, 3)


def _fork(
    sock: socket.socket, pair: tuple[socket.socket, socket.socket], order: dict[str, Any], fds: list[int], plan: str
) -> None:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        for fd in fds:
            os.close(fd)
        _tell(sock, forked=order["rank"], generation=order["generation"], pid=pid)
        return
    code = 1
    try:
        die_with(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (sock, *pair):
            end.close()
        gc.unfreeze()
        from forge.elastic.workers.worker_process import run_worker_process

        code = run_worker_process(order, fds, plan)
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
        _tell(sock, ended=pid, code=os.waitstatus_to_exitcode(status))


def _tell(sock: socket.socket, **message: Any) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.send(json.dumps(message).encode())


def _read_all(fd: int) -> str:
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        return file.read().decode()


if __name__ == "__main__":
    main()
