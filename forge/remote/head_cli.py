"""What is done for a run on its cluster's head: `python -m forge.remote.head_cli VERB`, asked for by
`forge.remote.submit`.

`check` says what is there, `receive` takes a corpus and `admit` a run's folder and secrets, both on stdin; `stop`
and `log` are for a run that is carried. Each answers with one line of JSON, an error too. `carry` and `follow` are
jobs of Ray's: they print the run's records, each on a line of its own after a mark, until the run is over.
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
from collections import deque
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.data.transfer import has_corpus, receive_corpus
from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.fs import default_cache_dir
from forge.plan.plan import plan_from_json, plan_to_json
from forge.remote.secrets import stash_secrets, take_secrets
from forge.runs.reader import ENDINGS, count_records, driver_pid, follow, is_alive
from forge.runtime.driver_process import LocalRun
from forge.runtime.probe import local_gpu

MARK = "\x1e"
"""Before every record; no log has it. Source: RFC 7464, which puts it before every JSON text of a sequence."""
_RUNS = Path("~/.forge/runs")
_HISTORY = ("events.jsonl", "metrics.jsonl")
_TAKE_OVER_S = 60.0
_REVIVAL_S = 20.0
"""The supervisor needs a few seconds to see that a carrier was killed, and to start another."""
_POLL_S = 0.05


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m forge.remote.head_cli")
    verbs = parser.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check")
    check.add_argument("--folder", type=Path)
    receive = verbs.add_parser("receive")
    receive.add_argument("corpus")
    receive.add_argument("digest")
    admit = verbs.add_parser("admit")
    admit.add_argument("run_id")
    admit.add_argument("--folder", type=Path)
    for verb in ("carry", "follow"):
        job = verbs.add_parser(verb)
        job.add_argument("folder", type=Path)
        job.add_argument("--events", type=int, default=0)
        job.add_argument("--steps", type=int, default=0)
    drain = verbs.add_parser("drain")
    drain.add_argument("node_id")
    drain.add_argument("seconds", type=float)
    drain.add_argument("address")
    verbs.add_parser("stop").add_argument("folder", type=Path)
    verbs.add_parser("look").add_argument("folder", type=Path)
    log = verbs.add_parser("log")
    log.add_argument("folder", type=Path)
    log.add_argument("name")
    log.add_argument("lines", type=int)
    options = parser.parse_args()
    if options.verb in ("carry", "follow"):
        sys.exit(_run_job(options))
    try:
        answer = {"answer": _ANSWERS[options.verb](options)}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    sys.stdout.write(json.dumps(answer) + "\n")


def _check(options: argparse.Namespace) -> dict[str, Any]:
    """Versions that must agree, and what the plan wants to know."""
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


def _admit(options: argparse.Namespace) -> dict[str, Any]:
    """Take a run's folder in, and lend its secrets; what stands there already of its history is newer.

    Returns: `folder`, and `has_corpus`: where it has not, nothing is lent, and the run is to be admitted again.
    """
    secrets: dict[str, str] = json.loads(sys.stdin.buffer.readline())
    folder = Path(options.folder or _RUNS / options.run_id).expanduser().absolute()
    if driver_pid(folder) is not None:
        raise ArgumentError(f"{options.run_id} is being carried there already; watch it: forge runs watch")
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as archive:
            members = [one for one in archive if one.name not in _HISTORY or not (folder / one.name).exists()]
            archive.extractall(folder, members=members, filter="data")
        path = folder / "plan.json"
        plan = plan_from_json(path.read_text())
        here = replace(plan.corpus, folder=str(_corpus(Path(plan.corpus.folder).name)))
        path.write_text(plan_to_json(replace(plan, corpus=here)))
    except (OSError, tarfile.TarError) as error:
        raise ClusterError(f"the run's folder {folder} on the cluster cannot be written: {error}") from error
    is_here = has_corpus(Path(here.folder), digest=here.digest)
    if is_here:
        stash_secrets(options.run_id, secrets)
    return {"folder": str(folder), "has_corpus": is_here}


def _stop(options: argparse.Namespace) -> bool:
    pid = driver_pid(options.folder)
    if pid is not None:
        LocalRun(folder=options.folder, pid=pid).request_stop()
    return pid is not None


def _drain(options: argparse.Namespace) -> bool:
    """Have Ray announce that a node goes away."""
    from forge.chaos.faults import drain_node

    drain_node(options.node_id, seconds_left=options.seconds, address=options.address)
    return True


def _look(options: argparse.Namespace) -> dict[str, Any]:
    """Whether a run is carried, and how many records there are of it."""
    is_carried = driver_pid(options.folder) is not None  # asked first: what comes later is counted then
    return {"is_carried": is_carried, "records": count_records(options.folder)}


def _log(options: argparse.Namespace) -> str:
    """The end of one of the run's logs on the head."""
    folder = options.folder / "logs"
    path = folder / f"{options.name}.log"
    if path.parent != folder or not path.is_file():
        there = ", ".join(sorted(log.stem for log in folder.glob("*.log"))) or "none yet"
        raise ArgumentError(f"{path} does not exist on the cluster's head; the logs there are: {there}")
    with path.open(errors="replace") as file:
        return "".join(deque(file, maxlen=options.lines))


_ANSWERS = {
    "check": _check,
    "receive": _receive,
    "admit": _admit,
    "stop": _stop,
    "drain": _drain,
    "look": _look,
    "log": _log,
}


def _run_job(options: argparse.Namespace) -> int:
    """Carry or follow a run, and print its records. Returns: an exit code, 0 if it came to an end."""
    folder: Path = options.folder
    try:
        if options.verb == "carry":
            pid = _launch(folder)
            sys.stdout.write(f"carried by process {pid} of {platform.node()}, the cluster's head\n")
            sys.stdout.flush()
    except ForgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    alive = _Carriers(folder)
    for record in follow(folder, goes_on=alive.look, past_events=options.events, past_steps=options.steps):
        if record is not None:
            sys.stdout.write(f"{MARK}{json.dumps(record)}\n")
            sys.stdout.flush()
            if record.get("event") in ENDINGS:
                return 0
    return 1


class _Carriers:
    """Whether somebody carries a run, or will soon do so again."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seen_at = folder, time.monotonic()
        self._patience_s = 0.0

    def look(self) -> bool:
        now = time.monotonic()
        if driver_pid(self._folder) is not None:
            self._seen_at, self._patience_s = now, _REVIVAL_S
        return now - self._seen_at <= self._patience_s


def _launch(folder: Path) -> int:
    """Start the process that carries the run, apart from this one, which Ray may kill with all its children.

    Returns: its pid.
    Raises: ClusterError if it does not take the run over; its log has the reason.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_JOB_")}
    command = [sys.executable, "-P", "-m", "forge.runtime.driver", str(folder), "--address", own.pop("RAY_ADDRESS")]
    log = folder / "logs" / "run.log"
    with log.open("ab") as output:
        started = subprocess.run(
            ["/bin/sh", "-c", 'setsid "$@" 1>&2 & echo $!', "sh", *command],
            env=own | take_secrets(folder.name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            check=True,
        )
    pid = int(started.stdout)
    deadline = time.monotonic() + _TAKE_OVER_S
    while driver_pid(folder) is None:
        if not is_alive(pid) or time.monotonic() > deadline:
            with contextlib.suppress(OSError):
                sys.stderr.write(log.read_text(errors="replace")[-2000:])
            raise ClusterError(f"the run was not taken over by its carrier; its log on the head is {log}")
        time.sleep(_POLL_S)
    return pid


def _corpus(name: str) -> Path:
    if "/" in name or name.startswith("."):
        raise ArgumentError(f"{name!r} is no corpus's name")
    return default_cache_dir() / "data" / name


if __name__ == "__main__":
    main()
