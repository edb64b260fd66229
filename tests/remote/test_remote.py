"""Runs on a cluster that shares no files with this machine: every record comes back, once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.cluster.base import Cluster
from forge.config.load import load_job
from forge.errors import ArgumentError, ClusterError, DataError
from forge.plan.plan import Plan
from forge.remote.submit import RemoteTarget, adapt_job, preflight, remote_hardware, resolve_remote, submit
from forge.runs.create import create_run
from forge.runs.reader import read_metrics, read_run
from forge.runs.trials import TrialTable
from forge.runtime.resolve import resolve
from tests.support.command import environment, mentioning, wait_for
from tests.support.remote_client import Elsewhere

JOB = """\
name: far
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {files: "corpus/*.txt", seq_len: 32, tokenizer: {vocab_size: 300}, held_out: 0}
training: {total_steps: 150, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: disabled}}
"""
SEARCH = """\
search:
  space: {training.optimizer.lr: {loguniform: [1.0e-3, 1.0e-1]}}
  max_trials: 3
"""
SECRET = "planted-0123456789abcdef"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("the cat sat on a mat and saw one dog run past. " * 400)
    return tmp_path


def planned(target: RemoteTarget, home: Path, *overrides: str) -> tuple[Plan, Path]:
    """A run folder that is ready to be sent."""
    fitting = adapt_job(target, load_job(home / "job.yaml", overrides=overrides))
    plan = resolve(fitting, find_hardware=remote_hardware(target))
    return plan, create_run(plan, root=str(home / "runs"))


def with_storage(cluster: Cluster, there: Path) -> RemoteTarget:
    """The cluster with a folder that all its nodes share as storage."""
    target = preflight(cluster)
    return RemoteTarget(cluster=cluster, python=target.python, gpu=target.gpu, storage=str(there / "shared"))


def steps_of(folder: Path) -> list[int]:
    return [record["step"] for record in read_metrics(folder)]


@pytest.mark.slow
def test_remote_run__client_and_job_killed__records_arrive_once_until_stopped(
    cluster: Elsewhere, there: Path, home: Path
) -> None:
    """The client is killed; another one follows the run; its Ray job is killed; then the run is stopped."""
    target = with_storage(cluster, there)
    plan, folder = planned(target, home, "training.total_steps=100000")
    command = [sys.executable, "-m", "tests.support.remote_client", str(home), str(there), str(folder)]
    env = environment(home, PYTHONPATH=str(Path(__file__).parents[2]), WANDB_API_KEY=SECRET)
    client = subprocess.Popen(command, env=env)
    wait_for(lambda: len(steps_of(folder)) > 10)
    pid = int((there / "shared" / folder.name / ".lock").read_text())
    assert psutil.Process(pid).environ()["WANDB_API_KEY"] == SECRET  # it got where it is needed
    client.kill()
    client.wait()
    assert read_run(folder).status == "running"

    run_handle = cluster.attach(folder)
    wait_for(lambda: len(steps_of(folder)) > 50)
    kill_job(folder)  # the process on the head that prints the records
    seen = len(steps_of(folder))
    with pytest.raises(ArgumentError, match="already running on the cluster"):
        submit(target, plan, folder=folder)
    wait_for(lambda: len(steps_of(folder)) > seen + 50)
    run_handle.request_stop()
    run_handle.wait()
    run = read_run(folder)
    assert run.status == "stopped"
    assert run.newest("CheckpointSaved", step=run.step) is not None
    assert steps_of(folder) == list(range(1, run.step + 1))
    assert run.newest("CheckpointSaved")["folder"].startswith(str(there / "shared"))  # type: ignore[index]
    assert not (folder / "checkpoints").exists()
    assert list((there / "cache" / "data").glob("corpus-*/index.json"))
    events = [
        (event["time"], event["event"]) for event in run.events if event["event"] != "SnapshotIntervalChanged"
    ]
    assert len(set(events)) == len(events)
    require_no_secret(there, home, Path("/tmp/ray"))


@pytest.mark.slow
def test_submit__stopped_run__resumes_on_the_cluster(cluster: Elsewhere, there: Path, home: Path) -> None:
    target = with_storage(cluster, there)
    plan, folder = planned(target, home, "training.total_steps=100000")
    run_handle = submit(target, plan, folder=folder)
    wait_for(lambda: len(steps_of(folder)) > 5)
    run_handle.request_stop()
    run_handle.wait()
    run = read_run(folder)
    assert run.status == "stopped"
    run_handle = submit(target, plan, folder=folder)
    wait_for(lambda: len(steps_of(folder)) > run.step + 5)
    run_handle.request_stop()
    run_handle.wait()
    assert read_run(folder).step > run.step
    run = read_run(folder)
    assert (run.status, steps_of(folder)) == ("stopped", list(range(1, run.step + 1)))


def require_no_secret(*roots: Path) -> None:
    """Check that the secret is in no file and on no command line."""
    for root in roots:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert SECRET.encode() not in path.read_bytes(), path
    assert mentioning(SECRET) == []


def kill_job(folder: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "forge.remote.head_cli" in line and any(folder.name in word for word in line):
            process.send_signal(signal.SIGKILL)


def test_job_server__request_without_token__is_refused(cluster: Elsewhere) -> None:
    with cluster.job_server() as url:
        assert url.startswith("http://127.0.0.1:")
        body = b'{"entrypoint": "id > /tmp/forge-was-here"}'
        for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
            request = urllib.request.Request(f"{url}/api/jobs/", data=body, headers=headers)
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(request, timeout=10)
            assert refused.value.code in (401, 403)
        for connection in psutil.net_connections("inet"):
            if connection.status == "LISTEN" and connection.laddr.port == int(url.rpartition(":")[2]):
                assert connection.laddr.ip == "127.0.0.1"
    assert not Path("/tmp/forge-was-here").exists()


def test_preflight__other_ray_version__raises(cluster: Elsewhere) -> None:
    class Older(Elsewhere):
        def on_head(self, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[bytes]:
            done = super().on_head(*arguments, **options)
            version = __import__("ray").__version__.encode()
            return subprocess.CompletedProcess((), 0, done.stdout.replace(b'"' + version, b'"2.9.9'), b"")

    with pytest.raises(ClusterError, match=r"ray is 2\.9\.9 on the cluster 'elsewhere'"):
        preflight(Older(cluster._there))


def test_adapt_job__no_shared_storage__raises(cluster: Elsewhere, home: Path) -> None:
    with pytest.raises(ArgumentError, match=r"set checkpoint\.to"):
        planned(preflight(cluster), home)


@pytest.mark.slow
def test_submit__unreadable_corpus__raises_at_once(cluster: Elsewhere, there: Path, home: Path) -> None:
    target = with_storage(cluster, there)
    plan, folder = planned(target, home, "data.seed=7")
    next(Path(plan.corpus.folder).glob("*.tokens")).unlink()
    began = time.monotonic()
    with pytest.raises(DataError, match="cannot be read"):
        submit(target, plan, folder=folder)
    assert time.monotonic() - began < 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_remote_search__trials_arrive_here(
    cluster: Elsewhere, there: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    (home / "job.yaml").write_text(JOB.replace("held_out: 0", "held_out: 10%") + SEARCH)
    target = with_storage(cluster, there)
    plan = resolve_remote(target, load_job(home / "job.yaml", overrides=["training.total_steps=40"]))
    assert plan.search is not None
    assert plan.search.trials_at_once == 2
    folder = create_run(plan, root=str(home / "runs"))
    run_handle = submit(target, plan, folder=folder)
    wait_for(lambda: not run_handle.is_alive(), timeout_s=300, about=lambda: read_run(folder).events[-5:])
    run_handle.wait()
    assert read_run(folder).status == "finished", read_run(folder).events[-1]
    trials = TrialTable(read_run(folder).events).trials
    assert {number: trial.status for number, trial in trials.items()} == dict.fromkeys((1, 2, 3), "finished")
    assert any(trial.is_warm for trial in trials.values())
    assert not any(SECRET.encode() in path.read_bytes() for path in there.rglob("*") if path.is_file())
    assert mentioning(folder.name) == []
