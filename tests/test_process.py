"""forge.process: liveness, parent death, error text, checked on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge import process


def wait_for_state(pid: int, states: tuple[str | None, ...]) -> str | None:
    deadline = time.monotonic() + 10
    while (state := process.process_state(pid)) not in states:
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    return state


def test_is_alive__running_suspended_zombie_gone__are_told_apart() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        assert process.is_alive(child.pid)
        assert process.start_ticks(child.pid)
        child.send_signal(signal.SIGSTOP)
        wait_for_state(child.pid, ("T",))
        assert process.is_suspended(child.pid)
        assert process.is_alive(child.pid)
        child.kill()
        wait_for_state(child.pid, ("Z",))
        assert not process.is_alive(child.pid)
        assert process.start_ticks(child.pid) is None
    assert process.process_state(child.pid) is None


def test_die_with_parent__parent_is_killed__child_dies(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = (
        "import os, sys, time; from pathlib import Path; from forge.process import die_with_parent;"
        "die_with_parent(int(sys.argv[1])); Path(sys.argv[2]).write_text(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys;"
        "subprocess.run([sys.executable, '-P', '-c', sys.argv[1], str(os.getpid()), sys.argv[2]])"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", parent, child, str(pid_file)]) as started:
        deadline = time.monotonic() + 30
        while not pid_file.exists() or not pid_file.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pid = int(pid_file.read_text())
        assert process.is_alive(pid)
        started.kill()
    wait_for_state(pid, (None, "Z"))


def test_redirect_output__native_writes__reach_the_log(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    code = (
        "import os; from pathlib import Path; from forge.process import redirect_output;"
        f"redirect_output(Path({str(log)!r})); print('python', flush=True); os.write(2, b'native')"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    assert log.read_text() == "python\nnative"


@pytest.mark.parametrize(
    ("text", "first", "whole"),
    [("\n a\nb", " a", "a b"), ("", "ValueError", "ValueError"), ("x" * 400, "x" * 400, "x" * 299 + "…")],
)
def test_error_text__blank_and_long_lines__are_bounded(text: str, first: str, whole: str) -> None:
    assert process.first_line(ValueError(text)) == first
    assert process.one_line(ValueError(text)) == whole


def test_process_state__own_process__is_running() -> None:
    assert process.process_state(os.getpid()) == "R"


def test_raise_descriptor_limit__low_soft_limit__raised_to_the_hard_limit() -> None:
    code = (
        "import resource; from forge.process import raise_descriptor_limit as go\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200)); go()\n"
        "print(*resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200", "200"]
