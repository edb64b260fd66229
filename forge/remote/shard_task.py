"""Compute a shard map on a cluster of other machines: send the shards, follow the driver there, fetch the results.

It is carried like a remote run: a driver on the head that is independent of this machine, whose events are mirrored
into a folder here. The same map started again follows the driver that runs, and fetches what it has computed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
import tarfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

from forge.errors import ClusterError, ForgeError, RunError
from forge.fs import make_private, state_home, write_atomic
from forge.remote.mirror import HEAD_CLI, RemoteRun, ask, job_client, job_name, submit_job
from forge.remote.models import PlacedModel
from forge.remote.submit import RemoteTarget, send_stream
from forge.runs.reader import ENDINGS, error_named
from forge.runs.records import RecordReader
from forge.runs.remote_ref import RemoteRef, read_remote_ref, write_remote_ref
from forge.runtime.driver_process import INPUTS, MAP
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_map import MapTotals, StoppedError
from forge.runtime.shard_process import ShardProcess
from forge.runtime.shard_worker import ShardWorkerSpec
from forge.units import counted

_POLL_S = 0.2
_FETCH_TIMEOUT_S = 3600.0
_RESULT = re.compile(r"[0-9a-f]{32}\.jsonl")


class RemoteMap:
    """A `MapElsewhere` on one cluster."""

    def __init__(self, target: RemoteTarget, model: PlacedModel) -> None:
        self._target, self._cluster, self._model = target, target.cluster, model

    def __call__(
        self,
        shards: Iterable[Any],
        *,
        spec: ShardWorkerSpec,
        files: ShardFiles,
        num_workers: int | None,
        stop: threading.Event,
        process: ShardProcess,
    ) -> MapTotals:
        """Compute the shards that have no result here.

        Raises: StoppedError once the driver has stopped, with its finished shards fetched; the error that ended
            it; ClusterError.
        """
        keys, missing, lines = [], [], []
        for inputs in shards:
            keys.append(files.key(inputs))
            if files.read(keys[-1]) is None:
                missing.append(keys[-1])
                lines.append(json.dumps(inputs, ensure_ascii=False) + "\n")
        folder = self._folder(spec, keys)
        reused = len(keys) - len(missing)
        ref = read_remote_ref(folder)
        if ref is None or not self._is_known(folder, ref):
            process.message(f"sending {counted(len(lines), 'shard')} to the cluster '{self._cluster.name}'")
            task = {"function": spec.function, "config": spec.config, "digest": files.digest}
            task |= {"num_shards": len(lines), "num_workers": num_workers}
            ref = self._submit(folder, task, lines)
        else:
            process.message(f"following {folder.name}, which was started on '{self._cluster.name}' before")
        last = self._follow(folder, ref, stop=stop, process=process, reused=reused)
        self._fetch(ref, missing, files=files)
        self._conclude(folder, ref, num_left=sum(files.read(key) is None for key in missing))
        return MapTotals(
            num_shards=len(keys),
            num_reused=reused,
            num_lost=int(last.get("num_lost", 0)),
            most_workers=int(last.get("most_workers", 0)),
        )

    def _folder(self, spec: ShardWorkerSpec, keys: Sequence[str]) -> Path:
        """Where the events are mirrored: the same for the same shards on the same cluster."""
        text = json.dumps([self._cluster.name, spec.function, self._model.folder, *keys])
        return state_home() / "maps" / f"map-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"

    def _is_known(self, folder: Path, ref: RemoteRef) -> bool:
        """Whether the map runs on the cluster, or has finished there."""
        if not ref.job or _ending(folder).get("event") not in (None, "RunFinished"):
            return False
        found = ask(self._cluster, "status", ref.folder)
        if found["is_running"] or found["records"][0]:
            return True
        with job_client(self._cluster) as client, contextlib.suppress(RuntimeError):  # of a job that is not known
            return not client.get_job_status(ref.job).is_terminal()
        return False

    def _submit(self, folder: Path, task: dict[str, Any], lines: Sequence[str]) -> RemoteRef:
        """Send a map and submit the Ray job of its driver. Raises: ClusterError."""
        shutil.rmtree(folder, ignore_errors=True)
        make_private(folder)
        content = {MAP: json.dumps(task).encode(), INPUTS: "".join(lines).encode()}

        def write(stream: IO[bytes]) -> None:
            with tarfile.open(fileobj=stream, mode="w|") as archive:
                for name, data in content.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(data), 0o600
                    archive.addfile(member, io.BytesIO(data))

        there = send_stream(self._cluster, "store", f"maps/{folder.name}", write=write)
        ask(self._cluster, "stash", folder.name, stdin=json.dumps(dict(self._model.environment)).encode())
        ref = RemoteRef(cluster=self._cluster.name, folder=there, job=job_name(folder), events=0, steps=0)
        write_remote_ref(folder, ref)
        with job_client(self._cluster) as client:
            submit_job(client, ref, verb="run", python=self._target.python)
        return ref

    def _follow(
        self, folder: Path, ref: RemoteRef, *, stop: threading.Event, process: ShardProcess, reused: int
    ) -> dict[str, Any]:
        """Pass on what the driver records until it ends. Returns: its last progress."""
        reader, last = RecordReader(folder, kind="event"), dict[str, Any]()
        if _ending(folder):
            return next((event for event in reversed(list(reader.read())) if "num_done" in event), last)
        run = RemoteRun(folder, ref, cluster=self._cluster)
        is_asked = False
        while True:
            is_last = not run.is_alive()  # before reading, so that the last records are read too
            for text in run.connection_messages():
                process.message(text)
            for event in reader.read():
                if event["event"] == "ShardsComputed":
                    last = event
                    process.progress(reused + event["num_done"], reused + event["num_shards"])
                elif event["event"] == "MapMessage":
                    process.message(event["text"])
            if is_last:
                return last
            if stop.is_set() and not process.has_client():
                raise StoppedError("the client has ended, and the cluster goes on")
            if stop.is_set() and not is_asked:
                is_asked = True
                process.message(f"stopping on '{self._cluster.name}'; finished shards are fetched")
                run.request_stop()
            time.sleep(_POLL_S)

    def _fetch(self, ref: RemoteRef, keys: Sequence[str], *, files: ShardFiles) -> None:
        """Fetch the results that are there. Raises: ClusterError."""
        left = list(keys)
        while left:
            command = ["python", "-P", "-m", HEAD_CLI, "fetch", ref.folder]
            done = self._cluster.on_head(command, stdin=json.dumps(left).encode(), timeout_s=_FETCH_TIMEOUT_S)
            if done.returncode:
                lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
                raise ClusterError(f"the results on '{self._cluster.name}' cannot be fetched: {lines[-1]}")
            with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
                found = [member for member in archive if member.isfile() and _RESULT.fullmatch(member.name)]
                for member in found:
                    content = archive.extractfile(member)
                    assert content is not None, "a regular file"
                    write_atomic(files.folder / member.name, content.read())
            arrived = {member.name.removesuffix(".jsonl") for member in found} & set(left)
            left = [key for key in left if key not in arrived]
            if not arrived:
                return

    def _conclude(self, folder: Path, ref: RemoteRef, *, num_left: int) -> None:
        """Remove what is not needed any more. Raises: the error that ended the driver; StoppedError."""
        ending = _ending(folder)
        log = f"its log on the head is {ref.folder}/logs/driver.log"
        is_stopped = ending.get("event") == "RunStopped"
        if is_stopped or (ending.get("event") == "RunFinished" and not num_left):
            with contextlib.suppress(ForgeError):  # a few files stay there
                ask(self._cluster, "discard", ref.folder)
        shutil.rmtree(folder, ignore_errors=True)
        if is_stopped and num_left:
            raise StoppedError(f"{counted(num_left, 'shard')} left")
        if ending.get("event") == "RunFailed":
            raise error_named(str(ending["error"]), message=f"{ending['message']}; {log}")
        if not ending:
            raise RunError(f"the driver on '{self._cluster.name}' died without a reason; {log}")
        if num_left:
            left = counted(num_left, "result")
            raise RunError(f"{left} did not arrive from '{self._cluster.name}'; start it again")


def _ending(folder: Path) -> dict[str, Any]:
    """The event that ended a map; empty if none is known."""
    try:
        events = [event for event in RecordReader(folder, kind="event").read() if event["event"] in ENDINGS]
    except ValueError:
        return {}
    return events[-1] if events else {}
