"""How a benchmark finds the processes of its programs."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil

from benchmarks.program import running

TITLED = """
import ctypes, os, sys, time
if len(sys.argv) < 2:
    os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, __file__, "worker"])
else:  # as setproctitle does: the title covers arguments and environment
    start, end = (int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[at]) for at in (47, 48))
    ctypes.memset(start, 0, end - start)
    os.setsid()
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
print("ready", flush=True)
time.sleep(300)
"""


def test_running__child_that_hides_its_environment__is_counted_and_ended(tmp_path: Path) -> None:
    script = tmp_path / "titled.py"
    script.write_text(TITLED)
    with running([sys.executable, str(script)], folder=tmp_path) as program:
        deadline = time.monotonic() + 60
        while (tmp_path / "answer").read_text().count("ready") < 2:
            assert time.monotonic() < deadline, program.last_words()
            time.sleep(0.05)
        [child] = psutil.Process(program.process.pid).children()
        assert "FORGE_BENCHMARK_RUN" not in child.environ()
        assert program.cpu_s() >= 0.5
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
