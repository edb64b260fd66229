"""Which processes of a run are signalled, and which never are."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.chaos import processes
from forge.chaos.faults import kill_node_of
from forge.chaos.processes import kill, processes_of, slow_down, suspend
from forge.errors import ArgumentError
from forge.events import Event, GenerationStarted, NodeJoined, RankLocation, RunStarted, SupervisorStarted
from forge.runs.recorder import append_event
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from tests.support.runs import make_run

STARTED = RunStarted(run_id="r", total_steps=6, resumed_from_step=0)


def _events(pid: int | None) -> Sequence[Event]:
    ranks = (RankLocation(rank=0, node="a", pid=pid),)
    body: dict[str, Any] = {"world_size": 1, "device": "cpu", "peak_flops": 1.0, "peak_source": "", "seconds": {}}
    return [
        STARTED,
        SupervisorStarted(pid=pid or 0),
        NodeJoined(node="a", host="h", num_slots=1, agent_pid=pid or 0),
        GenerationStarted(generation=1, ranks=ranks, **body),
    ]


@contextmanager
def _child(
    *, code: str = "import time; time.sleep(60)", new_session: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code], start_new_session=new_session, stdout=subprocess.PIPE
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


@contextmanager
def _driver(folder: Path) -> Iterator[int]:
    """A process that holds the run's lock and has a child, as a driver has. Yields: the pid of the child."""
    code = f"""
import fcntl, os, subprocess, sys
lock = open({str(folder / ".lock")!r}, "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
child = subprocess.Popen([sys.executable, "-P", "-c", "import time; time.sleep(60)"])
lock.write(str(os.getpid())); lock.flush()
print(child.pid, flush=True)
child.wait()
"""
    with _child(code=code) as driver:
        assert driver.stdout is not None
        yield int(driver.stdout.readline())


@pytest.fixture(autouse=True)
def _no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))


def test_kill__child_of_the_driver__is_killed(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with _driver(folder) as pid:
        _record(folder, _events(pid))
        members = processes_of(folder)
        kill(members.rank(0), members=members)
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not Path(f"/proc/{pid}").exists()


def test_kill__process_of_no_part_of_the_run__is_refused_and_lives(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with _driver(folder), _child() as stranger:
        _record(folder, _events(stranger.pid))
        members = processes_of(folder)
        for signal_it in (kill, suspend):
            with pytest.raises(ArgumentError, match="does not belong to the run"):
                signal_it(members.rank(0), members=members)
        with pytest.raises(ArgumentError, match="does not belong to the run"):
            kill(members.supervisor, members=members)
        with pytest.raises(ArgumentError, match="only nodes that"):
            kill_node_of(members.agents["a"])
        assert Path(f"/proc/{stranger.pid}/stat").read_text().rpartition(")")[2].split()[0] in "SR"


@pytest.mark.parametrize("pid", [0, 1, 2**22 + 1, 2**40])
def test_kill__group_init_or_no_process__is_refused(tmp_path: Path, pid: int) -> None:
    folder = make_run(tmp_path)
    with _driver(folder):
        _record(folder, _events(pid))
        members = processes_of(folder)
        with pytest.raises(ArgumentError, match=r"none of its own|no process"):
            kill(members.supervisor, members=members)
        with pytest.raises(ArgumentError, match=r"no process|only nodes"):
            kill_node_of(members.agents["a"])


def test_rank__pid_not_reported_yet__is_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with _driver(folder):
        _record(folder, _events(None))
        with pytest.raises(ArgumentError, match="the process of rank 0 is not known yet"):
            processes_of(folder).rank(0)


def test_processes_of__run_of_another_cluster__is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    write_remote_ref(folder, RemoteRef(cluster="lab", folder=f"/r/{folder.name}", job="j", events=0, steps=0))
    with _driver(folder), _child() as stranger:
        _record(folder, _events(stranger.pid))
        with pytest.raises(ArgumentError, match="is on the cluster 'lab': its processes are on other machines"):
            processes_of(folder)


def test_processes_of__lock_held_by_another_process_than_it_names__its_pid_is_no_root(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    with _child() as stranger, (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(stranger.pid))
        lock.flush()
        _record(folder, _events(stranger.pid))
        members = processes_of(folder)
        assert stranger.pid not in members.roots
        with pytest.raises(ArgumentError, match="does not belong to the run"):
            kill(members.rank(0), members=members)
        assert os.getpid() != stranger.pid
        assert stranger.poll() is None


def _record(folder: Path, events: Sequence[Event]) -> None:
    for event in events:
        append_event(folder, event)


def test_slow_down__busy_process__gets_a_share_of_the_time_and_continues(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    code = f"""
import fcntl, os, subprocess, sys
lock = open({str(folder / ".lock")!r}, "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
child = subprocess.Popen([sys.executable, "-P", "-c", "while True: pass"])
lock.write(str(os.getpid())); lock.flush()
print(child.pid, flush=True)
child.wait()
"""
    with _child(code=code) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        _record(folder, _events(pid))
        busy, members = psutil.Process(pid), processes_of(folder)
        try:
            before = busy.cpu_times().user
            assert slow_down(pid, members=members, factor=10.0, seconds=0.5)
            assert busy.cpu_times().user - before < 0.25
            assert busy.status() != psutil.STATUS_STOPPED
        finally:
            busy.kill()
        driver.wait()
        with pytest.raises(ArgumentError, match="no process"):
            slow_down(pid, members=members, factor=2.0, seconds=0.1)


def test_slow_down__woken_late__stops_the_process_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent_s = {signal.SIGSTOP: 0.0, signal.SIGCONT: 0.0}

    class LateClock:
        now, state = 0.0, signal.SIGCONT

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:  # a busy machine: 5 ms too long
            self.now += seconds + 0.005
            spent_s[self.state] += seconds + 0.005

    clock = LateClock()
    folder = make_run(tmp_path)
    with _driver(folder) as pid:
        _record(folder, _events(pid))
        members = processes_of(folder)
        monkeypatch.setattr(processes, "time", clock)
        monkeypatch.setattr(signal, "pidfd_send_signal", lambda _, number: setattr(clock, "state", number))
        assert slow_down(pid, members=members, factor=5.0, seconds=10.0)
    assert spent_s[signal.SIGSTOP] >= (5.0 - 1) * spent_s[signal.SIGCONT] * 0.99
