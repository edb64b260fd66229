"""The node of an ssh host, without Ray: its folders are private, and other users cannot take their names before."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.local.ray_process import NodeProcess, boot_id
from forge.cluster.ssh import node_cli
from forge.process import free_port, start_ticks

REQUEST = {
    "cluster": "lab",
    "host": "a",
    "address": "127.0.0.1",
    "token": "secret",
    "head": None,
    "session": "1",
    "id": "0" * 16,
    "environment": {},
}


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The arguments of each Ray node that was started; a process that sleeps stands in for Ray."""
    arguments: list[list[str]] = []
    processes: list[subprocess.Popen[bytes]] = []

    def launch(words: Sequence[str], **_: Any) -> tuple[NodeProcess, subprocess.Popen[bytes]]:
        arguments.append(list(words))
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        processes.append(process)
        ticks = start_ticks(process.pid) or 0
        return NodeProcess(pid=process.pid, started_ticks=ticks, boot_id=boot_id()), process

    monkeypatch.setattr(node_cli, "launch", launch)
    monkeypatch.setattr(node_cli, "await_start", lambda *_, **__: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # `up` changes them
    before = os.umask(0o022)
    yield arguments
    os.umask(before)
    for process in processes:
        process.kill()
        process.wait()


def temporary_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--temp-dir") + 1])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_up_and_down__temporary_folder__private_with_a_new_name_each_time(
    tmp_path: Path, started: list[list[str]]
) -> None:
    request = REQUEST | {"port": free_port()}
    folder = tmp_path / ".forge"
    for _ in range(2):
        node_cli._up(folder, request)
        temporary = temporary_of(started[-1])
        assert (mode(temporary), len(str(temporary)) < 30) == (0o700, True)
        assert node_cli._down(folder, request) == {"left": [], "is_other": False}
        assert not temporary.exists()
    assert temporary_of(started[0]) != temporary_of(started[1])


def test_up__again_after_the_node_died__former_temporary_folder_removed(
    tmp_path: Path, started: list[list[str]]
) -> None:
    request = REQUEST | {"port": free_port()}
    node_cli._up(tmp_path / ".forge", request)
    node_cli._up(tmp_path / ".forge", request | {"session": "2"})
    first, second = map(temporary_of, started)
    assert (first.exists(), second.exists()) == (False, True)
    node_cli._down(tmp_path / ".forge", request)


def test_up__folders_of_forge__closed_to_other_users(tmp_path: Path, started: list[list[str]]) -> None:
    request = REQUEST | {"port": free_port()}
    (tmp_path / ".forge").mkdir(mode=0o755)
    shared = tmp_path / "data"
    shared.mkdir(mode=0o755)
    node_cli._up(shared, request)
    assert mode(tmp_path / ".forge") == 0o700, "the logs of runs are there"
    assert mode(shared) == 0o755, "the user's own choice"
    assert [mode(shared / "clusters"), mode(shared / "clusters" / "lab" / "a")] == [0o700] * 2
    node_cli._down(shared, request)
