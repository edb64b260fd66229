"""The commands that `forge.remote` runs on a cluster's head: `python -m forge.remote.head_cli VERB`.

`check` reports versions and hardware; `receive` stores a corpus and `upload` a run folder and its secrets, both
from stdin; `status`, `stop`, `log` and `drain` manage runs and nodes. Each prints one line of JSON: the result or
the error. `run` and `follow` are the entry points of Ray jobs: they print every record of the run on its own line,
after a prefix, until the run ends.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.data.transfer import has_corpus, receive_corpus
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.fs import default_cache_dir, make_private
from forge.plan.plan import plan_from_json, plan_to_json
from forge.process import is_alive, open_log
from forge.remote.secrets import stash_secrets, take_secrets
from forge.runs.logs import last_lines
from forge.runs.reader import ENDINGS, count_records, driver_pid, follow
from forge.runtime.driver_process import LocalRun
from forge.runtime.probe import local_gpu

MARK = "\x1e"
"""Precedes every record and occurs in no log. Source: RFC 7464, where it precedes every text of a sequence."""
_HOME = Path("~/.forge")
_RUNS = _HOME / "runs"
_HISTORY = ("events.jsonl", "metrics.jsonl")
_START_TIMEOUT_S = 60.0
_RESTART_TIMEOUT_S = 20.0
"""The supervisor needs a few seconds to notice that the driver was killed, and to start another."""
_POLL_S = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m forge.remote.head_cli")
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check")
    check.add_argument("--folder", type=Path)
    receive = verbs.add_parser("receive")
    receive.add_argument("corpus")
    receive.add_argument("digest")
    upload = verbs.add_parser("upload")
    upload.add_argument("run_id")
    upload.add_argument("--folder", type=Path)
    for verb in ("run", "follow"):
        job = verbs.add_parser(verb)
        job.add_argument("folder", type=Path)
        job.add_argument("--events", type=int, default=0)
        job.add_argument("--steps", type=int, default=0)
    drain = verbs.add_parser("drain")
    drain.add_argument("node_id")
    drain.add_argument("seconds", type=float)
    drain.add_argument("address")
    verbs.add_parser("stop").add_argument("folder", type=Path)
    verbs.add_parser("status").add_argument("folder", type=Path)
    log = verbs.add_parser("log")
    log.add_argument("folder", type=Path)
    log.add_argument("name")
    log.add_argument("lines", type=int)
    options = parser.parse_args()
    if options.verb in ("run", "follow"):
        sys.exit(_run_job(options))
    try:
        answer = {"answer": _ANSWERS[options.verb](options)}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    sys.stdout.write(json.dumps(answer) + "\n")


def _check(options: argparse.Namespace) -> dict[str, Any]:
    """Return the versions that must match, and the facts about the cluster that planning needs."""
    gpu = local_gpu()
    return {
        "versions": {name: version(name) for name in ("forge-train", "ray", "torch")}
        | {"python": platform.python_version()},
        "python": sys.executable,
        "gpu": gpu and list(gpu),
        "has_folder": options.folder is not None and options.folder.is_dir(),
        "storage": os.environ.get("FORGE_STORAGE", ""),
    }


def _receive(options: argparse.Namespace) -> str:
    folder = _corpus(options.corpus)
    receive_corpus(folder, digest=options.digest, stream=sys.stdin.buffer)
    return str(folder)


def _upload(options: argparse.Namespace) -> dict[str, Any]:
    """Unpack a run folder from stdin and stash its secrets; existing records are kept, since they are newer.

    Returns: `folder`, and `has_corpus`: if false, no secrets were stashed, and the client sends the corpus and then
        uploads again.
    """
    secrets: dict[str, str] = json.loads(sys.stdin.buffer.readline())
    folder = Path(options.folder or _RUNS / options.run_id).expanduser().absolute()
    if driver_pid(folder) is not None:
        raise ArgumentError(f"{options.run_id} is already running on the cluster; watch it: forge runs watch")
    try:
        if options.folder is None:  # otherwise the user has chosen the place, and who may read it
            make_private(_HOME.expanduser())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True, mode=0o700)
        with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as archive:
            members = [file for file in archive if file.name not in _HISTORY or not (folder / file.name).exists()]
            archive.extractall(folder, members=members, filter="data")
        path = folder / "plan.json"
        plan = plan_from_json(path.read_text())
        corpus = replace(plan.corpus, folder=str(_corpus(Path(plan.corpus.folder).name)))
        path.write_text(plan_to_json(replace(plan, corpus=corpus), is_file=True))
    except (OSError, tarfile.TarError) as error:
        raise ClusterError(f"cannot write the run folder {folder} on the cluster: {error}") from error
    is_ready = has_corpus(Path(corpus.folder), digest=corpus.digest)
    if is_ready:
        stash_secrets(options.run_id, secrets)
    return {"folder": str(folder), "has_corpus": is_ready}


def _stop(options: argparse.Namespace) -> bool:
    pid = driver_pid(options.folder)
    if pid is not None:
        LocalRun(folder=options.folder, pid=pid).request_stop()
    return pid is not None


def _drain(options: argparse.Namespace) -> bool:
    """Ask Ray to drain a node."""
    from forge.chaos.faults import drain_node

    drain_node(options.node_id, seconds_left=options.seconds, address=options.address)
    return True


def _status(options: argparse.Namespace) -> dict[str, Any]:
    """Return whether a run has a driver, and how many events and steps it has recorded."""
    is_running = (
        driver_pid(options.folder) is not None
    )  # first, so that the records of a driver that ends now are counted
    return {"is_running": is_running, "records": count_records(options.folder)}


def _log(options: argparse.Namespace) -> str:
    """Return the last lines of one of the run's logs on the head."""
    return last_lines(options.folder, name=options.name, lines=options.lines)


_ANSWERS = {
    "check": _check,
    "receive": _receive,
    "upload": _upload,
    "stop": _stop,
    "drain": _drain,
    "status": _status,
    "log": _log,
}


def _run_job(options: argparse.Namespace) -> int:
    """Start a run or only follow it, and print its records. Returns: the exit code; 0 if the run ended."""
    folder: Path = options.folder
    try:
        if options.verb == "run":
            pid = _launch(folder)
            sys.stdout.write(f"driver: process {pid} of {platform.node()}, the cluster's head\n")
            sys.stdout.flush()
    except ForgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    watch = _DriverWatch(folder)
    for record in follow(folder, goes_on=watch.is_running, past_events=options.events, past_steps=options.steps):
        if record is not None:
            sys.stdout.write(f"{MARK}{json.dumps(record)}\n")
            sys.stdout.flush()
            if record.get("event") in ENDINGS:
                return 0
    return 1


class _DriverWatch:
    """Checks whether a run has a driver, or lost it so recently that it may be restarted."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seen_at = folder, time.monotonic()
        self._restart_s = 0.0

    def is_running(self) -> bool:
        now = time.monotonic()
        if driver_pid(self._folder) is not None:
            self._seen_at, self._restart_s = now, _RESTART_TIMEOUT_S
        return now - self._seen_at <= self._restart_s


def _launch(folder: Path) -> int:
    """Start the driver in its own session, because Ray may kill this process with all its children.

    Returns: the pid of the driver.
    Raises: ClusterError if it does not take the run's lock; its log has the reason.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_JOB_")}
    command = [
        sys.executable,
        "-P",
        "-m",
        "forge.runtime.driver",
        str(folder),
        "--address",
        environment.pop("RAY_ADDRESS"),
    ]
    log = folder / "logs" / "driver.log"
    with os.fdopen(open_log(log), "ab") as output:
        started = subprocess.run(
            ["/bin/sh", "-c", 'setsid "$@" 1>&2 & echo $!', "sh", *command],
            env=environment | take_secrets(folder.name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            check=True,
        )
    pid = int(started.stdout)
    deadline = time.monotonic() + _START_TIMEOUT_S
    while driver_pid(folder) is None:
        if not is_alive(pid) or time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                sys.stderr.write(log.read_text(errors="replace")[-2000:])
            raise ClusterError(f"the driver of the run did not start; its log on the head is {log}")
        time.sleep(_POLL_S)
    return pid


def _corpus(name: str) -> Path:
    if "/" in name or name.startswith("."):
        raise ArgumentError(f"{name!r} is not the name of a corpus")
    return default_cache_dir() / "data" / name


if __name__ == "__main__":
    main()
