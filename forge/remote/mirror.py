"""A run that a cluster carries, from this machine: its records come back, it is found again, it can be stopped.

The run's folder here becomes a mirror of the one on the cluster's head: every record that the job prints is
written into `events.jsonl` or `metrics.jsonl` as it came, once. So all that reads a run's folder works on it, and
whoever was cut off counts what it has and goes on from there. `remote.json` says where the run is; it is written
before anything is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forge.cluster.base import Cluster
from forge.cluster.registry import find_cluster
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.remote.head_cli import MARK
from forge.runs.reader import ENDINGS, REMOTE, count_records, driver_pid, error_named, read_run
from forge.runs.recorder import EVENTS, METRICS, open_whole_lines
from forge.runtime.driver_process import LocalRun, RunHandle

_RETRY_S = (0.5, 1.0, 2.0, 5.0)
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteRef:
    """`remote.json`: which job of which cluster carries a run."""

    cluster: str
    folder: str
    """The run's, on the cluster's head."""
    python: str
    job: str
    events: int
    """How many events were known here when the job was submitted; it prints those that come after."""
    steps: int


def find_run_handle(folder: Path) -> RunHandle | None:
    """Whoever carries a run now, here or on a cluster; None if nobody does.

    Raises: ArgumentError if its cluster is not known here any more; the run is then taken for dead.
    """
    pid = driver_pid(folder)
    if pid is not None:
        return LocalRun(folder=folder, pid=pid)
    at = remote_ref_of(folder)
    if at is None or read_run(folder).status != "running":
        return None
    try:
        cluster = find_cluster(at.cluster)
    except ArgumentError as error:
        _forget_job(folder, at)
        raise ArgumentError(f"{folder.name} was on the cluster '{at.cluster}': {error}") from error
    return RemoteRun(folder, at, cluster=cluster)


def remote_ref_of(folder: Path) -> RemoteRef | None:
    """Where a run is; None if it is, or was, on this machine."""
    try:
        return RemoteRef(**json.loads((folder / REMOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def remote_log(folder: Path, *, name: str, lines: int) -> str:
    """The end of a log of a run that is elsewhere. Raises: ArgumentError if there is none, ClusterError."""
    at = remote_ref_of(folder)
    assert at is not None, "asked of a run that is elsewhere"
    text: str = ask(find_cluster(at.cluster), "log", at.folder, name, str(lines))
    return text


class RemoteRun:
    """A run that a cluster carries, mirrored into its folder here by a thread."""

    def __init__(self, folder: Path, at: RemoteRef, *, cluster: Cluster) -> None:
        self._folder, self._at, self._cluster = folder, at, cluster
        self._news: deque[str] = deque()
        self._is_over = False
        self._said: deque[str] = deque(maxlen=20)
        """The last lines of the job that are no records."""
        self._thread = threading.Thread(target=self._mirror, name="mirror", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        """The run's, on this machine."""
        return self._folder

    def is_alive(self) -> bool:
        """Whether records may still come."""
        return self._thread.is_alive()

    def request_stop(self) -> None:
        """Ask the head; on another thread, as it may take a while to reach."""
        threading.Thread(target=self._request_stop, daemon=True).start()

    def wait(self) -> None:
        """Return once the run is over, as far as can be seen from here."""
        while self._thread.is_alive():
            time.sleep(_POLL_S)

    def connection_messages(self) -> list[str]:
        """What happened to the connection since the last time."""
        told = []
        while self._news:
            told.append(self._news.popleft())
        return told

    def _request_stop(self) -> None:
        try:
            ask(self._cluster, "stop", self._at.folder)
        except ForgeError as error:
            self._news.append(f"the run could not be asked to stop: {error}")

    def _mirror(self) -> None:
        """Write down what comes, again and again from where it broke off, until the run has ended."""
        num_failures = 0
        while not self._is_over:
            began = time.monotonic()
            try:
                self._follow_once()
            except Exception as error:  # aiohttp, requests and Ray raise many unrelated classes here
                if time.monotonic() - began > _RETRY_S[-1]:
                    num_failures = 0
                if num_failures == 1:
                    self._news.append(
                        f"the cluster '{self._cluster.name}' is not reached, trying on: {first_line(error)}"
                    )
                time.sleep(_RETRY_S[min(num_failures, len(_RETRY_S) - 1)])
                num_failures += 1

    def _follow_once(self) -> None:
        with job_client(self._cluster) as client, _Mirror(self._folder, self._at) as mirror:
            self._is_over = asyncio.run(_tail(client, self._at.job, mirror, self._hear))
            if self._is_over or not client.get_job_status(self._at.job).is_terminal():
                return
        self._look_again()

    def _hear(self, line: str) -> None:
        """What the job says besides records is for people."""
        self._said.append(line)
        if line.strip():
            self._news.append(line)

    def _look_again(self) -> None:
        """The job is over and the run may not be: whoever printed its records was killed, say."""
        found = ask(self._cluster, "look", self._at.folder)
        num_events, num_steps = count_records(self._folder)
        has_all = found["records"] == [num_events, num_steps]
        if not found["is_carried"] and has_all:
            (self._folder / "logs").mkdir(exist_ok=True)
            (self._folder / "logs" / "run.log").write_text("\n".join([*self._said, ""]))
            _forget_job(self._folder, self._at)
            self._is_over = True
            return
        at = replace(self._at, job=job_name(self._folder), events=num_events, steps=num_steps)
        write_remote_ref(self._folder, at)
        self._at = at
        with job_client(self._cluster) as client:
            submit_job(client, at, verb="follow")


class _Mirror:
    """Writes records down that are not known yet."""

    def __init__(self, folder: Path, at: RemoteRef) -> None:
        self._folder = folder
        num_events, num_steps = count_records(folder)
        self._known = {"event": num_events - at.events, "step": num_steps - at.steps}

    def __enter__(self) -> _Mirror:
        self._files = {
            "event": open_whole_lines(self._folder / EVENTS),
            "step": open_whole_lines(self._folder / METRICS),
        }
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def take(self, text: str) -> bool:
        """Write one record. Returns: whether it is the run's last."""
        record = json.loads(text)
        kind = "event" if "event" in record else "step"
        self._known[kind] -= 1
        if self._known[kind] < 0:
            self._files[kind].write(text + "\n")
            self._files[kind].flush()
        return record.get("event") in ENDINGS


async def _tail(client: Any, job: str, mirror: _Mirror, hear: Callable[[str], None]) -> bool:
    """Read a job's output to its end. Returns: whether the run's last record was there."""
    rest = ""
    async for chunk in client.tail_job_logs(job):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if not line.startswith(MARK):
                hear(line)
            elif mirror.take(line[len(MARK) :]):
                return True
    return False


@contextlib.contextmanager
def job_client(cluster: Cluster) -> Iterator[Any]:
    """Ray's client for jobs, connected. Raises: ClusterError if the job server is not reached, or refuses."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", cluster.token())
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    with cluster.job_server() as url:
        try:
            client = JobSubmissionClient(url, headers={"Authorization": f"Bearer {cluster.token()}"})
        except Exception as error:  # requests' and Ray's own
            raise ClusterError(
                f"the job server of '{cluster.name}' does not answer: {first_line(error)}"
            ) from error
        yield client


def submit_job(client: Any, at: RemoteRef, *, verb: str) -> None:
    command = [at.python, "-P", "-m", "forge.remote.head_cli", verb, at.folder]
    command += ["--events", str(at.events), "--steps", str(at.steps)]
    try:
        client.submit_job(
            entrypoint=shlex.join(command), submission_id=at.job, metadata={"run": Path(at.folder).name}
        )
    except Exception as error:  # Ray raises RuntimeError for all that the server says
        raise ClusterError(f"'{at.cluster}' did not accept the job: {first_line(error)}") from error


def ask(cluster: Cluster, *words: str, stdin: bytes = b"", timeout_s: float = 60.0) -> Any:
    """What the head answers. Raises: the error that it met; ClusterError if it is not reached."""
    done = cluster.on_head(
        ["python", "-P", "-m", "forge.remote.head_cli", *words], stdin=stdin, timeout_s=timeout_s
    )
    return answer_of(cluster, done.stdout, done.stderr)


def answer_of(cluster: Cluster, stdout: bytes, stderr: bytes) -> Any:
    try:
        answer = json.loads(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ClusterError(f"the head of '{cluster.name}' could not answer: {lines[-1]}") from None
    if "error" in answer:
        raise error_named(answer["error"]["class"], message=answer["error"]["message"])
    return answer["answer"]


def job_name(folder: Path) -> str:
    return f"{folder.name}-{secrets.token_hex(2)}"


def write_remote_ref(folder: Path, at: RemoteRef) -> None:
    draft = folder / f"{REMOTE}.draft"
    draft.write_text(json.dumps(asdict(at), indent=1) + "\n")
    draft.replace(folder / REMOTE)


def _forget_job(folder: Path, at: RemoteRef) -> None:
    """Remember where the run was, and that it is there no more."""
    write_remote_ref(folder, replace(at, job=""))


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
