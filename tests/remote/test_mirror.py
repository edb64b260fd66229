"""Two clients that follow the same run of a cluster, such as `forge train` and `forge ui`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from forge.events import RunFinished, event_to_record
from forge.remote import mirror
from forge.remote.mirror import MARK, RemoteRun
from forge.runs.reader import read_metrics, read_run
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from tests.support.runs import make_run, metrics

NUM_STEPS = 40


class Jobs:
    """Ray's job client: each reader gets all of a job's output, a line every few milliseconds."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for step in range(1, NUM_STEPS + 1):
            yield f"{MARK}{json.dumps(metrics(step).as_record() | {'time': 1e6 + step})}\n"
            await asyncio.sleep(0.005)
        yield f"{MARK}{json.dumps({'time': 2e6} | event_to_record(RunFinished(step=NUM_STEPS)))}\n"


def test_mirror__two_clients_of_one_run__write_every_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def job_client(cluster: Any) -> Iterator[Jobs]:
        yield Jobs()

    monkeypatch.setattr(mirror, "job_client", job_client)
    monkeypatch.setattr(mirror, "_OTHER_POLL_S", 0.01)
    folder = make_run(tmp_path, steps=0)
    for name in ("events.jsonl", "metrics.jsonl"):
        (folder / name).unlink()
    ref = RemoteRef(cluster="away", folder=f"/there/{folder.name}", job="job-1", events=0, steps=0)
    write_remote_ref(folder, ref)
    cluster: Any = None
    clients = [RemoteRun(folder, ref, cluster=cluster) for _ in range(3)]
    for client in clients:
        client.wait()
    assert [step["step"] for step in read_metrics(folder)] == list(range(1, NUM_STEPS + 1))
    assert [event["event"] for event in read_run(folder).events] == ["RunFinished"]
    assert [client.connection_messages() for client in clients] == [[], [], []]
