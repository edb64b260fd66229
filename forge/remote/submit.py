"""A run goes to a cluster: what it needs is sent to the head, and a job of Ray's carries it there.

In go a plan and a cluster that is up; the corpus, if it is not there yet, the run's small files and its secrets
are handed to the head over its own door, and then Ray is given a job. `forge.remote.mirror` brings back what
happens.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tarfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.cluster.base import Cluster
from forge.code_archive import ARCHIVE
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.data.prepare import PrepareProgress
from forge.data.transfer import send_corpus
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.plan.gpus import find_gpu
from forge.plan.inputs import HardwareInfo
from forge.plan.plan import Plan
from forge.remote.mirror import (
    RemoteRef,
    RemoteRun,
    answer_of,
    ask,
    job_client,
    job_name,
    submit_job,
    write_remote_ref,
)
from forge.runs.reader import count_records, driver_pid
from forge.runs.recorder import EVENTS, METRICS
from forge.runs.secrets import credentials
from forge.runtime.driver_process import LocalRun, RunHandle
from forge.runtime.probe import count_slots, hardware
from forge.runtime.resolve import resolve

_SEND_TIMEOUT_S = 24 * 3600.0
_START_TIMEOUT_S = 90.0
_POLL_S = 0.05
_SMALL_FILES: tuple[str, ...] = ("job.yaml", "plan.json", ARCHIVE, EVENTS, METRICS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTarget:
    """A cluster that runs can be sent to, as its head describes it."""

    cluster: Cluster
    python: str
    """forge's, on the head."""
    gpu: tuple[str, int] | None
    """Name and bytes of a worker's GPU."""
    storage: str
    """Where runs keep their checkpoints unless their job says; empty if the cluster's file does not."""


def preflight(cluster: Cluster) -> RemoteTarget:
    """Look whether a cluster can take runs from here.

    Raises: ClusterError if it is not reached, or has other versions of what must be the same on both sides.
    """
    threading.Thread(target=_import_jobs, daemon=True).start()
    found = ask(cluster, "check")
    ours = {name: version(name) for name in ("forge-train", "ray", "torch")}
    ours["python"] = platform.python_version()
    for name, here in ours.items():
        there = found["versions"].get(name)
        if _release(name, here) != _release(name, str(there)):
            raise ClusterError(
                f"{name} is {there} on the cluster '{cluster.name}' and {here} here, and must be the same; set it "
                f"up anew: forge cluster down {cluster.name}, then forge cluster up with its file"
            )
    gpu = _gpu_of(cluster, found["gpu"])
    return RemoteTarget(cluster=cluster, python=found["python"], gpu=gpu, storage=found["storage"])


def _import_jobs() -> None:
    """Import Ray's client for jobs while the head is asked."""
    import ray.job_submission  # noqa: F401


def _gpu_of(cluster: Cluster, on_head: list[Any] | None) -> tuple[str, int] | None:
    """What workers have: as the cluster's file says, since a head is often without; else what the head has."""
    known = find_gpu(cluster.gpu) if cluster.gpu is not None else None
    if known is not None:
        return known.name, known.memory_gib * 2**30
    return (str(on_head[0]), int(on_head[1])) if on_head else None


def _release(name: str, version: str) -> str:
    """What must agree: of Python the minor version; of others not how they were built, as torch's `+cpu` says."""
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def fit_to(site: RemoteTarget, loaded: LoadedJob) -> LoadedJob:
    """The job as it is to run there: its checkpoints in a place that all machines of the cluster reach.

    Raises: ArgumentError if there is none, or if what the job reads is not there.
    """
    job, cluster = loaded.job, site.cluster
    if cluster.shares_files:
        return loaded
    weights = job.model.from_pretrained
    if weights is not None and Path(weights).is_dir():
        place = str(Path(weights).absolute())
        if not ask(cluster, "check", "--folder", place)["has_folder"]:
            raise ArgumentError(
                f"model.from_pretrained is the folder {weights} of this machine, which '{cluster.name}' has not: "
                f"put it at {place} on every machine there"
            )
    if "://" in job.checkpoint.to:
        return loaded
    if not site.storage:
        raise ArgumentError(
            f"a run on '{cluster.name}' keeps its checkpoints where all its machines reach them: set checkpoint.to "
            "to a URL such as s3://bucket/runs, or storage in the cluster's file"
        )
    checkpoint = job.checkpoint.model_copy(update={"to": site.storage})
    return replace(loaded, job=job.model_copy(update={"checkpoint": checkpoint}))


def hardware_there(site: RemoteTarget) -> Callable[[JobSpec], HardwareInfo]:
    """How the plan is told what a worker gets on a cluster."""
    return partial(hardware, gpu_there=site.gpu, is_here=site.cluster.shares_files)


def resolve_there(
    site: RemoteTarget, loaded: LoadedJob, *, on_progress: Callable[[PrepareProgress], None] | None = None
) -> Plan:
    """The plan of a job that is to run on a cluster. Raises: ArgumentError, and what `resolve` raises."""
    return resolve(
        fit_to(site, loaded),
        on_progress=on_progress,
        find_hardware=hardware_there(site),
        count_slots=lambda found, _: count_slots(site.cluster.status(), found),
    )


def submit(site: RemoteTarget, plan: Plan, *, folder: Path) -> RunHandle:
    """Send a run to a cluster and have a job carry it; return once it is accepted.

    Args:
        folder: the run's, on this machine.

    Raises: ClusterError if the cluster is not reached, or the job does not start; DataError if the corpus does
        not arrive.
    """
    cluster = site.cluster
    there = _admit(cluster, plan, folder)
    num_events, num_steps = count_records(folder)
    at = RemoteRef(
        cluster=cluster.name,
        folder=there,
        python=site.python,
        job=job_name(folder),
        events=num_events,
        steps=num_steps,
    )
    if not cluster.shares_files:
        write_remote_ref(folder, at)
    with job_client(cluster) as client:
        submit_job(client, at, verb="carry")
        if cluster.shares_files:
            return _await_carrier(client, at, folder)
    return RemoteRun(folder, at, cluster=cluster)


def _await_carrier(client: Any, at: RemoteRef, folder: Path) -> LocalRun:
    """On this machine: the process that the job has started. Raises: ClusterError with the job's last words."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        pid = driver_pid(folder)
        if pid is not None:
            return LocalRun(folder=folder, pid=pid)
        if client.get_job_status(at.job).is_terminal() or time.monotonic() > deadline:
            last = [line for line in client.get_job_logs(at.job).splitlines() if line.strip()][-3:]
            raise ClusterError(f"the run did not start: {' / '.join(last) or 'its job said nothing'}")
        time.sleep(_POLL_S)


def _admit(cluster: Cluster, plan: Plan, folder: Path) -> str:
    """Hand over the run's small files and its secrets, and its corpus where that is missing.

    Returns: the run's folder on the head.
    """
    words, names = ["admit", folder.name], _SMALL_FILES
    if cluster.shares_files:
        words, names = [*words, "--folder", str(folder.absolute())], ()
    elif plan.job.checkpoint.to.startswith("/"):  # a folder that all machines share: the run's own lies there too
        words += ["--folder", f"{plan.job.checkpoint.to}/{folder.name}"]
    stdin = json.dumps(credentials(os.environ)).encode() + b"\n" + _packed(folder, names=names)
    admitted = ask(cluster, *words, stdin=stdin, timeout_s=_SEND_TIMEOUT_S)
    if not admitted["has_corpus"]:
        _send_corpus(cluster, plan)
        admitted = ask(cluster, *words, stdin=stdin, timeout_s=_SEND_TIMEOUT_S)
    there: str = admitted["folder"]
    return there


def _send_corpus(cluster: Cluster, plan: Plan) -> None:
    folder, digest = Path(plan.corpus.folder), plan.corpus.digest
    read_fd, write_fd = os.pipe()
    problems: list[Exception] = []

    def send() -> None:
        try:
            with os.fdopen(write_fd, "wb") as stream:
                send_corpus(folder, stream=stream)
        except (OSError, ForgeError) as error:  # the other end tells more, if there is one
            problems.append(error)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with os.fdopen(read_fd, "rb") as stream:
        command = ["python", "-P", "-m", "forge.remote.head_cli", "receive", folder.name, digest]
        done = cluster.on_head(command, stdin=stream, timeout_s=_SEND_TIMEOUT_S)
    thread.join()
    if problems and isinstance(problems[0], ForgeError):
        raise problems[0]
    answer_of(cluster, done.stdout, done.stderr)


def _packed(folder: Path, *, names: tuple[str, ...]) -> bytes:
    """The run's small files and its tokenizer, as a tar file; nothing where the files are shared."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in [name for name in names if (folder / name).exists()]:
            archive.add(folder / name, arcname=name)
        if names:
            archive.add(folder / "tokenizer", arcname="tokenizer")
    return content.getvalue()
