"""Mirror the records of a run on another machine's cluster; find and stop such a run.

The local run folder mirrors the one on the cluster's head: every record that the Ray job prints is appended to
`events.jsonl` or `metrics.jsonl`, once. Everything that reads a run folder works on it, and a client that was
disconnected counts its records and continues from there. `remote.json` locates the run; it is written before
anything is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forge.cluster.base import Cluster
from forge.cluster.registry import find_known
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.foreign import parse_object
from forge.fs import write_atomic
from forge.process import first_line
from forge.remote.head_cli import MARK
from forge.runs.create import require_plain_folder
from forge.runs.patient_file import open_whole_lines
from forge.runs.reader import ENDINGS, count_records, error_named, read_plan, read_run, search_folder
from forge.runs.records import EVENTS, METRICS, event_record, step_record
from forge.runs.remote_ref import RemoteRef, read_remote_ref, write_remote_ref
from forge.runtime.driver_process import RunHandle, find_local_run

HEAD_CLI = "forge.remote.head_cli"
_RETRY_S = (0.5, 1.0, 2.0, 5.0)
_POLL_S = 0.05
_OTHER_POLL_S = 0.5


def find_run_handle(folder: Path) -> RunHandle | None:
    """Return a handle to a running run, on this machine or on a cluster; None if it is not running.

    Raises: ArgumentError if its cluster is no longer known on this machine; the run counts as dead from then on.
    """
    local = find_local_run(folder)
    if local is not None:
        return local
    ref = read_remote_ref(folder)
    if ref is None or read_run(folder).status != "running":
        return None
    try:
        cluster = find_known(ref.cluster)
    except ArgumentError as error:
        _forget_job(folder, ref)
        raise ArgumentError(f"{folder.name} was on the cluster '{ref.cluster}': {error}") from error
    require_plain_folder(folder)
    return RemoteRun(folder, ref, cluster=cluster)


def find_stoppable(folder: Path) -> RunHandle | None:
    """Return a handle to a running run or search that can be asked to stop; None if it is not running.

    Raises: ArgumentError for a trial, which its search decides about; and as `find_run_handle`.
    """
    search = search_folder(folder)
    if search is not None:
        name = shlex.quote(search.name if search.parent == Path("runs") else str(search))
        raise ArgumentError(
            f"{folder.name} is a trial, not a search; stop the whole search: forge runs stop {name}"
        )
    return find_run_handle(folder)


def stop_text(folder: Path) -> str:
    """Say what a run or search does once it was asked to stop."""
    if read_plan(folder).search is not None:
        return f"the trials of {folder.name} stop after their current steps, with checkpoints"
    return f"{folder.name} stops after its current step, with a checkpoint"


def remote_log(folder: Path, *, name: str, lines: int) -> str:
    """Return the last lines of a remote run's log. Raises: ArgumentError if it does not exist, ClusterError."""
    ref = read_remote_ref(folder)
    assert ref is not None, "called for remote runs only"
    text: str = ask(find_known(ref.cluster), "log", ref.folder, name, str(lines))
    return text


class RemoteRun:
    """A run on a remote cluster, mirrored into a local folder by a thread."""

    def __init__(self, folder: Path, ref: RemoteRef, *, cluster: Cluster, messages: Sequence[str] = ()) -> None:
        """Args:
        messages: shown before those about the connection.
        """
        self._folder, self._ref, self._cluster = folder, ref, cluster
        self._messages: deque[str] = deque(messages)
        self._is_over = False
        self._job_output: deque[str] = deque(maxlen=20)
        """The last lines of the job that are not records."""
        self._thread = threading.Thread(target=self._mirror, name="mirror", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> Path:
        return self._folder

    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._folder.exists()

    def request_stop(self) -> None:
        """Ask the head to stop the run; on another thread, since reaching it may take a while."""
        threading.Thread(target=self._request_stop, daemon=True).start()

    def wait(self) -> None:
        """Return once the run is over, as far as can be seen from here."""
        while self.is_alive():
            time.sleep(_POLL_S)

    def connection_messages(self) -> list[str]:
        """What happened to the connection since the last time."""
        messages = []
        while self._messages:
            messages.append(self._messages.popleft())
        return messages

    def _request_stop(self) -> None:
        try:
            ask(self._cluster, "stop", self._ref.folder)
        except ForgeError as error:
            self._messages.append(f"could not ask the run to stop: {error}")

    def _mirror(self) -> None:
        """Mirror records until the run has ended, reconnecting after every failure."""
        num_failures = 0
        while not self._is_over and self._folder.exists():
            began = time.monotonic()
            try:
                self._follow_once()
            except BlockingIOError:  # another process copies these records
                time.sleep(_OTHER_POLL_S)
            except Exception as error:  # aiohttp, requests and Ray raise many unrelated classes here
                if time.monotonic() - began > _RETRY_S[-1]:
                    num_failures = 0
                if num_failures == 1:
                    self._messages.append(
                        f"cannot reach the cluster '{self._cluster.name}', retrying: {first_line(error)}"
                    )
                time.sleep(_RETRY_S[min(num_failures, len(_RETRY_S) - 1)])
                num_failures += 1

    def _follow_once(self) -> None:
        """Raises: BlockingIOError while another process or thread mirrors the run."""
        with _only_mirror(self._folder):
            self._ref = read_remote_ref(self._folder) or self._ref  # another mirror may have submitted another job
            self._is_over = not self._ref.job
            if self._is_over:
                return
            with job_client(self._cluster) as client, _Mirror(self._folder, self._ref) as mirror:
                self._is_over = asyncio.run(_tail(client, self._ref.job, mirror, self._take_output))
                if self._is_over or not client.get_job_status(self._ref.job).is_terminal():
                    return
            self._follow_again()

    def _take_output(self, line: str) -> None:
        """Show a line of the job's output that is not a record."""
        self._job_output.append(line)
        if line.strip():
            self._messages.append(line)

    def _follow_again(self) -> None:
        """After the end of the job, submit another one if the run is still running or has more records."""
        found = ask(self._cluster, "status", self._ref.folder)
        num_events, num_steps = count_records(self._folder)
        has_all = found["records"] == [num_events, num_steps]
        if not found["is_running"] and has_all:
            (self._folder / "logs").mkdir(exist_ok=True, mode=0o700)
            write_atomic(self._folder / "logs" / "driver.log", "\n".join([*self._job_output, ""]), mode=0o600)
            _forget_job(self._folder, self._ref)
            self._is_over = True
            return
        ref = replace(self._ref, job=job_name(self._folder), events=num_events, steps=num_steps)
        write_remote_ref(self._folder, ref)
        self._ref = ref
        python: str = ask(self._cluster, "check")["python"]
        with job_client(self._cluster) as client:
            submit_job(client, ref, verb="follow", python=python)


@contextlib.contextmanager
def _only_mirror(folder: Path) -> Iterator[None]:
    """Be the only one that copies records into a folder, so that none is written twice.

    Raises: BlockingIOError if another one is.
    """
    handle = os.open(folder / EVENTS, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


class _Mirror:
    """Appends the records that the local run folder does not have yet."""

    def __init__(self, folder: Path, ref: RemoteRef) -> None:
        self._folder = folder
        num_events, num_steps = count_records(folder)
        self._known = {"event": num_events - ref.events, "step": num_steps - ref.steps}

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
        """Write one record, unless it is not one. Returns: whether it is the run's last."""
        event = event_record(text.encode())
        record, kind = event or step_record(text.encode()), "step" if event is None else "event"
        if record is None:
            return False
        self._known[kind] -= 1
        if self._known[kind] < 0:
            self._files[kind].write(text + "\n")
            self._files[kind].flush()
        return record.get("event") in ENDINGS


async def _tail(client: Any, job: str, mirror: _Mirror, on_output: Callable[[str], None]) -> bool:
    """Read a job's output to its end. Returns: whether it contained the run's last record."""
    rest = ""
    async for chunk in client.tail_job_logs(job):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if not line.startswith(MARK):
                on_output(line)
            elif mirror.take(line[len(MARK) :]):
                return True
    return False


@contextlib.contextmanager
def job_client(cluster: Cluster) -> Iterator[Any]:
    """Connect Ray's job client. Raises: ClusterError if the job server cannot be reached or refuses."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", cluster.token())
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
    with cluster.job_server() as url:
        try:
            client = JobSubmissionClient(url, headers={"Authorization": f"Bearer {cluster.token()}"})
        except Exception as error:  # of requests and Ray
            raise ClusterError(
                f"the job server of '{cluster.name}' does not answer: {first_line(error)}"
            ) from error
        yield client


def submit_job(client: Any, ref: RemoteRef, *, verb: str, python: str) -> None:
    """Submit the Ray job that runs or follows a run.

    Args:
        verb: `run` or `follow`.
        python: path of the interpreter on the head.

    Raises: ClusterError if it is not accepted.
    """
    command = [python, "-P", "-m", HEAD_CLI, verb, ref.folder]
    command += ["--events", str(ref.events), "--steps", str(ref.steps)]
    try:
        client.submit_job(
            entrypoint=shlex.join(command), submission_id=ref.job, metadata={"run": Path(ref.folder).name}
        )
    except Exception as error:  # Ray raises RuntimeError for every answer of the server
        raise ClusterError(f"'{ref.cluster}' did not accept the job: {first_line(error)}") from error


def ask(cluster: Cluster, *words: str, stdin: bytes = b"", timeout_s: float = 60.0, module: str = HEAD_CLI) -> Any:
    """Run a command of `head_cli` on the head and return its result.

    Args:
        module: another one that answers in the same way.

    Raises: the error that the command reports; ClusterError if the head cannot be reached.
    """
    done = cluster.on_head(["python", "-P", "-m", module, *words], stdin=stdin, timeout_s=timeout_s)
    return answer_of(cluster, done.stdout, done.stderr)


def answer_of(cluster: Cluster, stdout: bytes, stderr: bytes) -> Any:
    try:
        answer = parse_object(stdout.splitlines()[-1])
    except (ValueError, IndexError):
        lines = stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise ClusterError(f"the command on the head of '{cluster.name}' failed: {lines[-1]}") from None
    if "error" in answer:
        raise error_named(answer["error"]["class"], message=answer["error"]["message"])
    return answer["answer"]


def job_name(folder: Path) -> str:
    return f"{folder.name}-{secrets.token_hex(2)}"


def _forget_job(folder: Path, ref: RemoteRef) -> None:
    """Record that the run has no job any more; its cluster and folder are kept."""
    write_remote_ref(folder, replace(ref, job=""))
