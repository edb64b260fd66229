"""The supervisor of vLLM's server: nothing of vLLM outlives its replica, however either of them ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from forge.serve.vllm.process import _SUPERVISE

SERVER = """
import os, signal, subprocess, sys, time
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(300)"
worker = subprocess.Popen([sys.executable, "-c", stubborn])
print(os.getpid(), worker.pid, flush=True)
time.sleep(300)
"""
"""As vLLM's: its worker does not notice that the server is gone."""
REPLICA = """
import os, subprocess, sys, time
script, server = sys.argv[1:]
process = subprocess.Popen([sys.executable, "-c", script, str(os.getpid()), "0.3", "-c", server])
print(process.pid, flush=True)
process.wait()
time.sleep(300)
"""


@pytest.fixture
def processes() -> Iterator[dict[str, psutil.Process]]:
    with subprocess.Popen(
        [sys.executable, "-c", REPLICA, _SUPERVISE, SERVER], stdout=subprocess.PIPE, text=True
    ) as replica:
        assert replica.stdout is not None
        pids = f"{replica.stdout.readline()} {replica.stdout.readline()}".split()
        names = ("supervisor", "server", "worker")
        found = {name: psutil.Process(int(pid)) for name, pid in zip(names, pids, strict=True)}
        try:
            yield {"replica": psutil.Process(replica.pid)} | found
        finally:
            replica.kill()
            for process in found.values():
                if process.is_running():
                    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("supervisor", signal.SIGTERM),
        ("supervisor", signal.SIGKILL),  # as Ray does
        ("server", signal.SIGKILL),
        ("replica", signal.SIGKILL),
    ],
)
def test_end_of_one__all_others_end(processes: dict[str, psutil.Process], name: str, number: int) -> None:
    os.kill(processes[name].pid, number)
    _, alive = psutil.wait_procs([processes[other] for other in ("supervisor", "server", "worker")], timeout=20)
    deadline = time.monotonic() + 20
    while [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def test_server_ends__the_supervisor_ends_alike() -> None:
    for code, server in ((3, "raise SystemExit(3)"), (-9, "import os; os.kill(os.getpid(), 9)")):
        command = [sys.executable, "-c", _SUPERVISE, str(os.getpid()), "0.1", "-c", server]
        assert subprocess.run(command, check=False, timeout=60).returncode == code
