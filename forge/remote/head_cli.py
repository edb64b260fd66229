"""The commands that `forge.remote` runs on a cluster's head: `python -m forge.remote.head_cli VERB`.

`check` reports versions and hardware. `receive` stores a corpus, `upload` a run folder and its secrets, `store` any
other folder, `serve` the settings of a server, and `stash` secrets, all from stdin; `fetch` sends results back.
`status`, `stop`, `log`, `more`, `server`, `update`, `discard` and `drain` manage runs, maps, servers and nodes.
Each prints one line of JSON, the result or the error; `fetch` a tar file. `run`, `follow` and `launch` are entry
points of Ray jobs: the first two print every record of a run on its own line, after a prefix, until the run ends.

A submission runs three of these commands one after another, so what takes long to import is imported where it is
used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.errors import ArgumentError, ClusterError, ForgeError
from forge.foreign import file_name, parse_object, typed
from forge.fs import default_cache_dir, make_private
from forge.process import is_alive, open_log
from forge.remote.secrets import stash_secrets, take_secrets
from forge.runs.lock import driver_pid
from forge.runs.logs import last_lines, log_size, read_new
from forge.runtime.driver_process import DRIVER_MODULE, MAP, MAP_DRIVER_MODULE, RESULTS, SERVER_MODULE, LocalRun
from forge.runtime.local_gpus import local_gpu
from forge.serve.http.settings import SETTINGS, settings_from_json

MARK = "\x1e"
"""Precedes every record and occurs in no log. Source: RFC 7464, where it precedes every text of a sequence."""
_HOME = Path("~/.forge")
_RUNS = _HOME / "runs"
_HISTORY = ("events.jsonl", "metrics.jsonl")
_START_TIMEOUT_S = 60.0
_RESTART_TIMEOUT_S = 20.0
"""The supervisor needs a few seconds to notice that the driver was killed, and to start another."""
_POLL_S = 0.05
_FETCH_BYTES = 64 * 2**20


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
    upload.add_argument("--mark", help="name of a file that the client has put into its own folder of the run")
    verbs.add_parser("serve")
    for verb in ("server", "update", "fetch", "discard", "stop", "status"):
        verbs.add_parser(verb).add_argument("folder", type=Path)
    more = verbs.add_parser("more")
    more.add_argument("folder", type=Path)
    more.add_argument("name")
    more.add_argument("offset", type=int)
    for verb in ("run", "follow", "launch"):
        job = verbs.add_parser(verb)
        job.add_argument("folder", type=Path)
        job.add_argument("--events", type=int, default=0)
        job.add_argument("--steps", type=int, default=0)
    store = verbs.add_parser("store")
    store.add_argument("name")
    store.add_argument("--root", type=Path, default=_HOME)
    verbs.add_parser("stored").add_argument("name")
    verbs.add_parser("stash").add_argument("name")
    drain = verbs.add_parser("drain")
    drain.add_argument("node_id")
    drain.add_argument("seconds", type=float)
    drain.add_argument("address")
    log = verbs.add_parser("log")
    log.add_argument("folder", type=Path)
    log.add_argument("name")
    log.add_argument("lines", type=int)
    options = parser.parse_args()
    if options.verb in ("run", "follow", "launch"):
        sys.exit(_run_job(options))
    if options.verb == "fetch":
        _fetch(options.folder)
        return
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
    from forge.data.transfer import receive_corpus

    folder = _corpus(options.corpus)
    receive_corpus(folder, digest=options.digest, stream=sys.stdin.buffer)
    return str(folder)


def _upload(options: argparse.Namespace) -> dict[str, Any]:
    """Unpack a run folder from stdin and stash its secrets; existing records are kept, since they are newer.

    Returns: `folder`, and `has_corpus`: if false, no secrets were stashed, and the client sends the corpus and then
        uploads again.
    """
    from forge.data.transfer import has_corpus

    secrets: dict[str, str] = json.loads(sys.stdin.buffer.readline())
    folder = Path(options.folder or _RUNS / options.run_id).expanduser().absolute()
    if driver_pid(folder) is not None:
        raise ArgumentError(f"{options.run_id} is already running on the cluster; watch it: forge runs watch")
    if (
        options.mark is not None and (folder / options.mark).exists()
    ):  # each record would be written again, for ever
        raise ArgumentError(
            f"{folder} on the cluster is also the run's folder on this machine, and both write events.jsonl: set "
            "storage in the cluster file, or checkpoint.to, to a folder that is not the one of this machine's runs"
        )
    try:
        if options.folder is None:  # otherwise the user has chosen the place, and who may read it
            make_private(_HOME.expanduser())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "logs").mkdir(exist_ok=True, mode=0o700)
        with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as archive:
            members = [file for file in archive if file.name not in _HISTORY or not (folder / file.name).exists()]
            archive.extractall(folder, members=members, filter="data")
        corpus, digest = _use_own_corpus(folder / "plan.json")
    except (OSError, tarfile.TarError) as error:
        raise ClusterError(f"cannot write the run folder {folder} on the cluster: {error}") from error
    is_ready = has_corpus(corpus, digest=digest)
    if is_ready:
        stash_secrets(options.run_id, secrets)
    return {"folder": str(folder), "has_corpus": is_ready}


def _use_own_corpus(plan: Path) -> tuple[Path, str]:
    """Change the folder of the corpus in a plan's file to this machine's. Returns: it, and the corpus's digest.

    The driver checks the whole plan; reading it here as one would take half of the time of an upload.

    Raises: ArgumentError if the file is no plan; OSError.
    """
    try:
        body = parse_object(plan.read_bytes())
        corpus = typed(dict[str, Any], body.get("corpus"), where="corpus")
        folder = _corpus(Path(typed(str, corpus.get("folder"), where="corpus.folder")).name)
        digest = typed(str, corpus.get("digest"), where="corpus.digest")
    except ValueError as error:
        raise ArgumentError(f"{plan} is not a plan of forge: {error}") from error
    text = json.dumps(body | {"corpus": corpus | {"folder": str(folder)}}, sort_keys=True, indent=1)
    plan.write_text(f"{text}\n")
    return folder, digest


def _store(options: argparse.Namespace) -> str:
    """Unpack a folder from stdin beside its final place, then put it there; one that exists is kept.

    Of a map that has ended, the former files are replaced and the results kept.
    """
    from forge.runs.records import EVENTS

    folder: Path = options.root.expanduser().absolute() / options.name
    if ".." in folder.parts:
        raise ArgumentError(f"{options.name!r} leads out of its folder")
    if driver_pid(folder) is not None:
        raise ArgumentError(f"{folder.name} is already running on the cluster")
    try:
        make_private(folder.parent)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as draft:
            with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as archive:
                archive.extractall(draft, filter="data")
            if not folder.exists():
                Path(draft).rename(folder)
                Path(draft).mkdir()  # what TemporaryDirectory removes
            elif (folder / MAP).exists():
                (folder / EVENTS).unlink(missing_ok=True)
                for path in Path(draft).iterdir():
                    path.replace(folder / path.name)
        if (folder / MAP).exists():
            (folder / "logs").mkdir(exist_ok=True, mode=0o700)
    except (OSError, tarfile.TarError) as error:
        raise ClusterError(f"cannot write {folder} on the cluster: {error}") from error
    return str(folder)


def _stored(options: argparse.Namespace) -> str | None:
    """The folder that `store` has made of this name; None if there is none."""
    folder: Path = _HOME.expanduser().absolute() / options.name
    return str(folder) if folder.is_dir() else None


def _stash(options: argparse.Namespace) -> bool:
    stash_secrets(options.name, json.loads(sys.stdin.buffer.read()))
    return True


def _fetch(folder: Path) -> None:
    """Write results of a map as a tar file to stdout, up to about `_FETCH_BYTES`.

    The keys of wanted results are on stdin, as JSON; those without a result are left out.
    """
    size = 0
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as archive:
        for key in json.load(sys.stdin):
            path = folder / RESULTS / file_name(f"{key}.jsonl")
            if path.is_file() and size < _FETCH_BYTES:
                archive.add(path, arcname=path.name)
                size += path.stat().st_size


def _discard(options: argparse.Namespace) -> bool:
    """Delete the folder of a map that does not run any more."""
    folder: Path = options.folder
    if driver_pid(folder) is not None or not (folder / MAP).is_file():
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _serve(options: argparse.Namespace) -> str:
    """Write the folder of a server, from its settings and the files that they name. Returns: the folder."""
    from forge.runtime.servers import prepare_server

    request = json.load(sys.stdin)
    return str(prepare_server(settings_from_json(json.dumps(request["settings"])), files=request["files"]))


def _server(options: argparse.Namespace) -> dict[str, Any]:
    from forge.runtime.servers import server_status

    found = server_status(options.folder)
    return {"record": dict(found.record), "is_alive": found.is_alive}


def _update(options: argparse.Namespace) -> bool:
    from forge.runtime.servers import write_update

    write_update(options.folder, json.load(sys.stdin))
    return True


def _more(options: argparse.Namespace) -> list[Any]:
    """What was appended to a log since an offset, and the new offset; of -1: nothing, and the log's size."""
    if options.offset < 0:
        return ["", log_size(options.folder, name=options.name)]
    return list(read_new(options.folder, name=options.name, offset=options.offset))


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
    from forge.runs.reader import count_records

    # First, so that the records of a driver that ends now are counted.
    is_running = driver_pid(options.folder) is not None
    return {"is_running": is_running, "records": count_records(options.folder)}


def _log(options: argparse.Namespace) -> str:
    """Return the last lines of one of the run's logs on the head."""
    return last_lines(options.folder, name=options.name, lines=options.lines)


_ANSWERS = {
    "check": _check,
    "receive": _receive,
    "upload": _upload,
    "store": _store,
    "stored": _stored,
    "stash": _stash,
    "discard": _discard,
    "serve": _serve,
    "server": _server,
    "update": _update,
    "more": _more,
    "stop": _stop,
    "drain": _drain,
    "status": _status,
    "log": _log,
}


def _run_job(options: argparse.Namespace) -> int:
    """Start a run or only follow it, and print its records. Returns: the exit code; 0 if the run ended."""
    folder: Path = options.folder
    try:
        if options.verb != "follow":
            pid = _launch(folder)
            sys.stdout.write(f"driver: process {pid} of {platform.node()}, the cluster's head\n")
            sys.stdout.flush()
        if options.verb == "launch":  # a server has no records
            return 0
    except ForgeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    from forge.runs.reader import ENDINGS, follow  # after the driver was started, which imports the same meanwhile

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
    is_server = (folder / SETTINGS).is_file()
    module = MAP_DRIVER_MODULE if (folder / MAP).is_file() else SERVER_MODULE if is_server else DRIVER_MODULE
    command = [sys.executable, "-P", "-m", module, str(folder), "--address", environment.pop("RAY_ADDRESS")]
    log = folder / "logs" / ("server.log" if is_server else "driver.log")
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
