"""A cluster's head without Ray: jobs are processes, drivers and servers are scripted.

`python -m tests.support.scripted_head VERB ...` is `forge.remote.head_cli` with these drivers; with a folder it is
one of them: of a map, whose results are its inputs, or of a server, which answers requests with its keys.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from forge.cluster.base import ClusterNode, ClusterStatus, stdin_arguments
from forge.events import MapMessage, RunFinished, RunStopped, ShardsComputed
from forge.fs import write_atomic
from forge.remote import head_cli
from forge.runs.lock import LOCK
from forge.runs.recorder import append_event
from forge.runtime.driver_lock import acquire_lock
from forge.runtime.driver_process import INPUTS, MAP, RESULTS
from forge.runtime.shard_files import ShardFiles
from forge.serve.http.settings import SETTINGS, STATUS, UPDATE, settings_from_json
from tests.support.remote_client import Elsewhere, home_of

ROOT = Path(__file__).parents[2]
SHARD_S = 0.05


class ScriptedHead(Elsewhere):
    """A cluster of one machine that runs no Ray."""

    def status(self) -> ClusterStatus:
        node = ClusterNode(name="10.0.0.1", kind="head", state="alive")
        return ClusterStatus(name=self.name, provider="ssh", address="none", nodes=(node,))

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        words, options = [sys.executable, *command[1:]], stdin_arguments(stdin)
        return subprocess.run(
            words, **options, env=home_of(self._there), capture_output=True, timeout=timeout_s, check=False
        )

    @contextlib.contextmanager
    def jobs(self, cluster: Any) -> Iterator[ScriptedJobs]:
        """Stands for `forge.remote.mirror.job_client`."""
        yield ScriptedJobs(self._there)


class ScriptedJobs:
    """Ray's job client, as far as forge uses it."""

    def __init__(self, there: Path) -> None:
        self._there = there

    def submit_job(self, *, entrypoint: str, submission_id: str, metadata: object) -> None:
        words = [word.replace(head_cli.__name__, "tests.support.scripted_head") for word in shlex.split(entrypoint)]
        script = f"{shlex.join(words)} >{submission_id}.out 2>&1; echo $? >{submission_id}.code"
        env = home_of(self._there) | {"RAY_ADDRESS": "none", "PYTHONPATH": str(ROOT)}
        subprocess.Popen(["sh", "-c", script], cwd=self._there, env=env, start_new_session=True)

    def get_job_status(self, job: str) -> Any:
        code = self._there / f"{job}.code"
        return _State("SUCCEEDED" if code.exists() and code.read_text().strip() == "0" else str(code.exists()))

    def get_job_logs(self, job: str) -> str:
        return (self._there / f"{job}.out").read_text()

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        sent = 0
        while True:
            is_last = self.get_job_status(job).is_terminal()
            output = self._there / f"{job}.out"
            text = output.read_text() if output.exists() else ""
            if len(text) > sent:
                yield text[sent:]
                sent = len(text)
            if is_last:
                return
            await asyncio.sleep(0.02)


class _State(str):
    __slots__ = ()

    def is_terminal(self) -> bool:
        return self != "False"


def _drive_map(folder: Path) -> None:
    task = json.loads((folder / MAP).read_text())
    files = ShardFiles(folder=folder / RESULTS, digest=task["digest"])
    files.prepare()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    append_event(folder, MapMessage(text=f"key {os.environ.get('AWS_SECRET_ACCESS_KEY')}"))
    lines = (folder / INPUTS).read_text().splitlines()
    for number, inputs in enumerate(map(json.loads, lines)):
        if stop.is_set():
            append_event(folder, RunStopped(step=0))
            return
        files.write(files.key(inputs), inputs)
        append_event(folder, ShardsComputed(num_done=number + 1, num_shards=len(lines)))
        time.sleep(SHARD_S)
    append_event(folder, RunFinished(step=0))


def _drive_server(folder: Path) -> None:
    settings = settings_from_json((folder / SETTINGS).read_text())
    answer = json.dumps(
        [os.environ.get("FORGE_SERVE_API_KEYS"), Path(settings.keys_file or "/dev/null").read_text()]
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

    server = ThreadingHTTPServer((settings.host, settings.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    status: dict[str, Any] = {"state": "ready", "message": "", "url": settings.url, "source": settings.source}
    status["pid"] = os.getpid()
    while not stop.wait(0.02):
        if (folder / UPDATE).exists():
            request = json.loads((folder / UPDATE).read_text())
            status["update"] = {"id": request["id"], "state": "done", "message": f"{request['source']} serves"}
        write_atomic(folder / STATUS, json.dumps(status))
    print("running requests are finished", file=sys.stderr, flush=True)  # noqa: T201
    write_atomic(folder / STATUS, json.dumps(status | {"state": "stopped", "message": "stopped by a signal"}))


def _main(arguments: Sequence[str]) -> None:
    if "/" not in arguments[0]:
        head_cli.MAP_DRIVER_MODULE = head_cli.SERVER_MODULE = "tests.support.scripted_head"
        head_cli.main()
        return
    folder = Path(arguments[0])
    lock = acquire_lock(folder / LOCK)
    (_drive_map if (folder / MAP).exists() else _drive_server)(folder)
    lock.close()


if __name__ == "__main__":
    _main(sys.argv[1:])
