"""Submit a run to a cluster: check the head, upload corpus, run folder and secrets, and submit a Ray job.

`Cluster.on_head` runs the commands of `forge.remote.head_cli`; the Ray job runs the driver. `forge.remote.mirror`
copies the records back.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import secrets
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from forge.cluster.base import Cluster, ClusterStatus
from forge.code_archive import ARCHIVE
from forge.config.cluster import ClusterSpec
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.data.prepare import PrepareProgress
from forge.data.transfer import send_corpus
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.plan.cluster_links import cluster_links
from forge.plan.gpu_kinds import WorkerGpu, planned_gpu
from forge.plan.gpus import find_gpu
from forge.plan.inputs import HardwareInfo
from forge.plan.plan import Plan
from forge.remote.local_credentials import local_credentials_note
from forge.remote.mirror import (
    HEAD_CLI,
    RemoteRun,
    answer_of,
    ask,
    job_client,
    job_name,
    submit_job,
)
from forge.runs.lock import driver_pid
from forge.runs.reader import count_records
from forge.runs.records import EVENTS, METRICS
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.runs.secrets import credentials, variables_for, without_keys
from forge.runs.task_examples import TASK_EXAMPLES
from forge.runtime.driver_process import LocalRun, RunHandle
from forge.runtime.local_links import gpus_of_nodes
from forge.runtime.probe import count_slots, hardware
from forge.runtime.resolve import resolve

_SEND_TIMEOUT_S = 24 * 3600.0
_START_TIMEOUT_S = 90.0
_POLL_S = 0.05
_SMALL_FILES: tuple[str, ...] = ("job.yaml", "plan.json", ARCHIVE, TASK_EXAMPLES, EVENTS, METRICS)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTarget:
    """A cluster that runs can be sent to, as reported by its head."""

    cluster: Cluster
    python: str
    """Path of the interpreter on the head."""
    gpu: WorkerGpu | None
    """Of a worker, by the cluster file or the head; None if neither has one."""
    storage: str
    """Where runs store checkpoints if their job does not say; empty if the cluster file has no `storage`."""


def preflight(cluster: Cluster) -> RemoteTarget:
    """Check that a cluster can take runs from this machine.

    Raises: ClusterError if it cannot be reached, or its versions of Python, forge, Ray or torch differ.
    """
    threading.Thread(target=_import_jobs, daemon=True).start()
    found = ask(cluster, "check")
    ours = {name: version(name) for name in ("forge-train", "ray", "torch")}
    ours["python"] = platform.python_version()
    for name, here in ours.items():
        there = found["versions"].get(name)
        if _release(name, here) != _release(name, str(there)):
            raise ClusterError(
                f"{name} is {there} on the cluster '{cluster.name}' and {here} on this machine, but must be equal; "
                f"recreate the cluster: forge cluster down {cluster.name}, then forge cluster up with its file"
            )
    gpu = _gpu_of(cluster, found["gpu"])
    return RemoteTarget(cluster=cluster, python=found["python"], gpu=gpu, storage=found["storage"])


def _import_jobs() -> None:
    """Import Ray's job client on a thread, while the head is being queried."""
    import ray.job_submission  # noqa: F401


def _gpu_of(cluster: Cluster, on_head: list[Any] | None) -> WorkerGpu | None:
    """Return the GPU of a worker: from the cluster file, because a head often has none, or else the head's."""
    known = find_gpu(cluster.gpu) if cluster.gpu is not None else None
    if known is not None:
        return WorkerGpu(name=known.name, memory_bytes=known.memory_gib * 2**30)
    return WorkerGpu(name=str(on_head[0]), memory_bytes=int(on_head[1])) if on_head else None


def _release(name: str, version: str) -> str:
    """Return the part of a version that must match: major and minor of Python; others without a build tag."""
    return ".".join(version.split(".")[:2]) if name == "python" else version.partition("+")[0]


def adapt_job(target: RemoteTarget, loaded: LoadedJob) -> LoadedJob:
    """Change a job's checkpoint location to one that all nodes of the cluster can reach.

    Raises: ArgumentError if there is none, or if a folder that the job reads is missing on the cluster.
    """
    job, cluster = loaded.job, target.cluster
    if cluster.shares_files:
        return loaded
    for key, weights in job.model.origins_of_weights.items():
        if not Path(weights).is_dir():
            continue
        path = str(Path(weights).absolute())
        if not ask(cluster, "check", "--folder", path)["has_folder"]:
            raise ArgumentError(
                f"model.{key} is the folder {weights}, which does not exist on '{cluster.name}': "
                f"copy it to {path} on every node of the cluster"
            )
    if "://" in job.checkpoint.to:
        _require_rights(cluster, job.checkpoint.to)
        return loaded
    if not target.storage:
        raise ArgumentError(
            f"a run on '{cluster.name}' needs checkpoint storage that all nodes can reach: set checkpoint.to to a "
            "URL such as s3://bucket/runs, or storage in the cluster file"
        )
    _require_rights(cluster, target.storage)
    checkpoint = job.checkpoint.model_copy(update={"to": target.storage})
    return replace(loaded, job=job.model_copy(update={"checkpoint": checkpoint}))


def _require_rights(cluster: Cluster, url: str) -> None:
    """Raises: ArgumentError if the machines' own role does not reach a URL, as no other key is sent to them."""
    role = cluster.role
    if role is None or role.storage is None or not url.startswith(f"{role.scheme}://"):
        return
    place = role.storage.rstrip("/")
    if not f"{url.rstrip('/')}/".startswith(f"{place}/") or not place.startswith(f"{role.scheme}://"):
        raise ArgumentError(
            f"checkpoint.to is {url}, and the machines of '{cluster.name}' may use {place or 'no storage'} alone: "
            "set storage in its cluster file to a place that contains it, and start the cluster again. Your own "
            "keys are not sent to machines that have a role"
        )


def credentials_for(cluster: Cluster) -> dict[str, str]:
    """The environment variables that a run on a cluster gets: no cloud keys if its machines have a role."""
    found = credentials(os.environ, with_files=cluster.shares_files)
    return found if cluster.role is None else without_keys(found, prefixes=cluster.role.prefixes)


def remote_hardware(
    target: RemoteTarget, *, status: ClusterStatus | None = None
) -> Callable[[JobSpec], HardwareInfo]:
    """Return the function from which the plan gets the hardware of a worker on this cluster.

    Args:
        status: of the cluster, whose nodes may have several kinds of GPU.
    """
    kinds: Counter[str] = Counter()
    for node in status.nodes if status is not None else ():
        if node.state == "alive" and node.gpu and node.num_gpus >= 1:
            kinds[node.gpu] += int(node.num_gpus)
    there = planned_gpu(kinds, stated=() if target.gpu is None else (target.gpu,))
    return partial(hardware, gpu_there=there, is_here=target.cluster.shares_files)


def resolve_remote(
    target: RemoteTarget,
    loaded: LoadedJob,
    *,
    spec: ClusterSpec | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
) -> Plan:
    """Plan a job that will run on a cluster, for the GPUs that its nodes have.

    Args:
        spec: the cluster's file, by which the links between its GPUs are known; by default they are assumed.

    Raises: ArgumentError, and what `resolve` raises.
    """
    status = None if loaded.job.resources.gpu == "none" else _status_of(target.cluster)
    links = cluster_links(spec, gpus_of_nodes=() if status is None else gpus_of_nodes(status))
    plan = resolve(
        adapt_job(target, loaded),
        on_progress=on_progress,
        find_hardware=remote_hardware(target, status=status),
        count_slots=lambda found, _: count_slots(target.cluster.status(), found),
        links=links,
    )
    plan = replace(plan, warnings=(*plan.warnings, *links.warnings))
    note = local_credentials_note(target.cluster, url=plan.job.checkpoint.to, environment=os.environ)
    return plan if note is None else replace(plan, warnings=(*plan.warnings, note))


def _status_of(cluster: Cluster) -> ClusterStatus | None:
    """A cluster's status; None if it does not answer, and its nodes are unknown to the plan."""
    with contextlib.suppress(ClusterError):
        return cluster.status()
    return None


def submit(target: RemoteTarget, plan: Plan, *, folder: Path) -> RunHandle:
    """Send a run to a cluster and submit its Ray job; return once the job is accepted.

    Args:
        folder: of the run, on this machine.

    Raises: ClusterError if the cluster cannot be reached, or the job does not start; DataError if the corpus cannot
        be sent.
    """
    cluster = target.cluster
    remote_folder = _upload(cluster, plan, folder)
    num_events, num_steps = count_records(folder)
    ref = RemoteRef(
        cluster=cluster.name,
        folder=remote_folder,
        job=job_name(folder),
        events=num_events,
        steps=num_steps,
    )
    if not cluster.shares_files:
        write_remote_ref(folder, ref)
    with job_client(cluster) as client:
        submit_job(client, ref, verb="run", python=target.python)
        if cluster.shares_files:
            return _await_driver(client, ref, folder)
    kept = sorted({*credentials(os.environ)} - {*credentials_for(cluster)})
    note = f"{', '.join(kept)} stay on this machine: those of '{cluster.name}' have a role of their own"
    return RemoteRun(folder, ref, cluster=cluster, messages=(note,) if kept else ())


def _await_driver(client: Any, ref: RemoteRef, folder: Path) -> LocalRun:
    """Wait for the driver on a cluster of this machine. Raises: ClusterError with the job's last lines."""
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        pid = driver_pid(folder)
        if pid is not None:
            return LocalRun(folder=folder, pid=pid)
        if client.get_job_status(ref.job).is_terminal() or time.monotonic() > deadline:
            last = [line for line in client.get_job_logs(ref.job).splitlines() if line.strip()][-3:]
            raise ClusterError(f"the run did not start: {' / '.join(last) or 'its job printed nothing'}")
        time.sleep(_POLL_S)


def _upload(cluster: Cluster, plan: Plan, folder: Path) -> str:
    """Send the run's small files and secrets, and its corpus if the cluster lacks it.

    The upload is repeated after the corpus, so that the secrets wait on the head only for the driver.

    Returns: the run folder on the head.
    """
    words, names = ["upload", folder.name], _SMALL_FILES
    if cluster.shares_files:
        words, names = [*words, "--folder", str(folder.absolute())], ()
    elif plan.job.checkpoint.to.startswith("/"):  # a folder that all nodes share holds the run folder too
        words += ["--folder", f"{plan.job.checkpoint.to}/{folder.name}"]
    stdin = (
        json.dumps(credentials_for(cluster) | variables_for(plan)).encode() + b"\n" + _packed(folder, names=names)
    )
    with _marked(folder) as mark:
        words += [] if cluster.shares_files else ["--mark", mark]
        uploaded = ask(cluster, *words, stdin=stdin, timeout_s=_SEND_TIMEOUT_S)
    if not uploaded["has_corpus"]:
        _send_corpus(cluster, plan)
        uploaded = ask(cluster, *words, stdin=stdin, timeout_s=_SEND_TIMEOUT_S)
    remote_folder: str = uploaded["folder"]
    return remote_folder


@contextlib.contextmanager
def _marked(folder: Path) -> Iterator[str]:
    """Put an empty file into a folder, by which another machine finds out whether it sees the same folder."""
    path = folder / f".mark-{secrets.token_hex(8)}"
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def _send_corpus(cluster: Cluster, plan: Plan) -> None:
    folder, digest = Path(plan.corpus.folder), plan.corpus.digest
    send_stream(cluster, "receive", folder.name, digest, write=lambda stream: send_corpus(folder, stream=stream))


def send_stream(cluster: Cluster, *words: str, write: Callable[[IO[bytes]], None]) -> Any:
    """Run a command of `head_cli` with what `write` writes as its stdin. Returns: its result.

    Raises: as `ask`, and what `write` raises.
    """
    read_fd, write_fd = os.pipe()
    problems: list[Exception] = []

    def send() -> None:
        try:
            with os.fdopen(write_fd, "wb") as stream:
                write(stream)
        except (OSError, ForgeError) as error:  # the error of the other end is more precise, if there is one
            problems.append(error)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    with os.fdopen(read_fd, "rb") as stream:
        command = ["python", "-P", "-m", HEAD_CLI, *words]
        done = cluster.on_head(command, stdin=stream, timeout_s=_SEND_TIMEOUT_S)
    thread.join()
    if problems and isinstance(problems[0], ForgeError):
        raise problems[0]
    return answer_of(cluster, done.stdout, done.stderr)


def _packed(folder: Path, *, names: tuple[str, ...]) -> bytes:
    """Pack the run's small files and its tokenizer as a tar file; an empty one if the file system is shared."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in [name for name in names if (folder / name).exists()]:
            archive.add(folder / name, arcname=name)
        if names:
            archive.add(folder / "tokenizer", arcname="tokenizer")
    return content.getvalue()
