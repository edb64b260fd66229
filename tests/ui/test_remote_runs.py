"""Runs on clusters in `forge ui`: their records are copied here, their logs read and they are stopped there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import ClusterStatus
from forge.errors import ClusterError
from forge.events import RunStopped, event_to_record
from forge.remote import mirror
from forge.remote.mirror import MARK
from forge.runs.index import remember_run
from forge.runs.reader import read_metrics
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.ui import remote_runs, run_list
from forge.ui.remote_runs import RemoteRuns, RemoteTail, stop_run
from forge.ui.run_list import RunList
from tests.support.command import wait_for
from tests.support.runs import make_run, metrics


class Away:
    """A cluster on which a run prints three steps, and ends once it is asked to stop."""

    name, shares_files = "away", False

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def status(self) -> ClusterStatus:
        return ClusterStatus(
            name=self.name, provider="ssh", address="a", nodes=(), runs=("on-away", "of-a-colleague")
        )

    @property
    def is_stopped(self) -> bool:
        return any(words[0] == "stop" for words in self.asked)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        import asyncio

        for step in (1, 2, 3):
            yield f"{MARK}{json.dumps(metrics(step).as_record() | {'time': time.time()})}\n"
        while not self.is_stopped:
            await asyncio.sleep(0.01)
        yield f"{MARK}{json.dumps({'time': time.time()} | event_to_record(RunStopped(step=3)))}\n"

    def answer(self, cluster: Any, *words: str, **options: Any) -> Any:
        assert cluster is self
        self.asked.append(words)
        match words:
            case ("more", _, "rank-0", "-1"):
                return ["", 100]
            case ("log", _, "rank-0", _):
                return "the end\n"
            case ("more", _, "rank-0", "100"):
                return ["and more\n", 109]
            case ("stop", _):
                return True
        raise ClusterError("no such log")


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Away:
    cluster = Away()

    @contextlib.contextmanager
    def job_client(_: Any) -> Iterator[Away]:
        yield cluster

    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(mirror, "job_client", job_client)
    for module in (mirror, remote_runs):
        monkeypatch.setattr(module, "ask", cluster.answer)
    for module in (mirror, remote_runs, run_list):
        monkeypatch.setattr(module, "find_known", lambda name: cluster)
    monkeypatch.setattr(remote_runs, "_ASK_EVERY_S", 0.0)
    return cluster


def remote_run(root: Path, *, cluster: str = "away") -> Path:
    folder = make_run(root, f"on-{cluster}", steps=0)
    for name in ("events.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    write_remote_ref(
        folder, RemoteRef(cluster=cluster, folder=f"/there/{folder.name}", job="job-1", events=0, steps=0)
    )
    return folder


def test_list_of_a_cluster__running_run_of_any_folder__is_copied_and_stopped_there(
    tmp_path: Path, away: Away
) -> None:
    folder = remote_run(tmp_path / "elsewhere")
    remember_run(folder)
    make_run(tmp_path / "runs", "here")
    remote_run(tmp_path / "runs", cluster="other")
    runs, remote = RunList(tmp_path / "runs", cluster="away"), RemoteRuns()
    runs.refresh(whole=True)
    assert [(row.folder, row.status) for row in runs.rows()] == [(folder, "running")]
    remote.follow_running(runs)
    wait_for(lambda: len(read_metrics(folder)) == 3)
    assert "stops after its current step" in stop_run(folder, remote=remote)
    wait_for(lambda: away.is_stopped)
    runs.refresh(whole=True)
    wait_for(lambda: (runs.refresh(whole=True), runs.rows()[0].status)[1] == "stopped")
    assert [words for words in away.asked if words[0] == "stop"] == [("stop", "/there/on-away")]
    assert wait_for(lambda: remote.handle_of(folder) is None)  # the thread that copies ends a moment later
    assert stop_run(folder, remote=remote) == "on-away is not running"


def test_note__runs_of_other_machines__are_named(tmp_path: Path, away: Away) -> None:
    remote_run(tmp_path)
    runs, remote = RunList(tmp_path, cluster="away"), RemoteRuns()
    runs.refresh(whole=True)
    assert wait_for(lambda: remote.note_on(runs)).endswith("shown there alone: of-a-colleague")


def test_remote_log__is_read_from_its_end_and_continued(tmp_path: Path, away: Away) -> None:
    folder, remote = remote_run(tmp_path), RemoteRuns()
    assert remote.log_names(folder) == ["rank-0", "driver", "recorder"]
    tail = remote.log_of(folder, name="rank-0")
    assert isinstance(tail, RemoteTail)
    found = ""

    def has_all() -> bool:
        nonlocal found
        found += tail.read()
        return found.startswith("the end\nand more\n")

    wait_for(has_all)
    missing = remote.log_of(folder, name="rank-7")
    assert wait_for(missing.read) == "[no such log]\n"


def test_follow__cluster_unknown__says_so_and_the_page_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    folder, remote = remote_run(tmp_path), RemoteRuns()
    remote.follow(folder)
    assert "on the cluster 'away'" in remote.messages(folder)
