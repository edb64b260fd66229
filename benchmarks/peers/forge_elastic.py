"""Run `forge train` on simulated machines, which are added and removed by commands on stdin.

    python -m benchmarks.peers.forge_elastic REQUEST

REQUEST is that of `torchrun_elastic`, max_nodes where more may come, slots for the ranks of a node if not
one, and snapshot_every where it is not to be forge's default; there is no use for checkpoint_every. A model
without `model_type` is the section of a job file, whose tokenizer comes with it, and `files` names the
corpus. The cluster is forge's own: a head that takes no ranks, and nodes of one rank each by default. With
`"model": null` there are machines and no run. `steps.jsonl` has a line for every step as the run recorded it, done
again or not, one when the machines are there, and one for all that is done to a machine:

    add N           start node N
    remove N        kill node N, all its processes at once
    notice N S      announce that node N will be taken away in S seconds; it is not taken away
    hang N          SIGSTOP to the rank on node N
    kill R          SIGKILL to rank R
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is imported

from benchmarks.program import FORGE
from forge.chaos.faults import give_notice
from forge.chaos.processes import RunProcesses, processes_of, suspend
from forge.cluster.local.ray_cluster import add_node, kill_node, start_head_alone, stop_local
from forge.process import is_alive
from forge.runs.lock import driver_pid
from forge.runs.reader import follow

_CORPUS_WORDS = 200_000
_LEXICON_WORDS = 2_000
_POLL_S = 0.1


def main() -> None:
    request = json.loads(sys.argv[1])
    with machines(request["nodes"], num_cpus=request.get("slots", 1)) as nodes:
        run = Run(request) if request["model"] is not None else None
        record(request, ready=request["nodes"])
        try:
            for line in sys.stdin:
                obey(line, request, nodes, run)
        finally:
            if run is not None:
                run.end()


class Run:
    """`forge train` as a user calls it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        num_nodes = request.get("max_nodes", request["nodes"])
        job = write_job(request, workers=num_nodes * request.get("slots", 1))
        self._process = subprocess.Popen([FORGE, "train", str(job)], stdin=subprocess.DEVNULL)
        while (folder := run_folder(request)) is None or (pid := driver_pid(folder)) is None:
            if self._process.poll() is not None:
                raise RuntimeError("forge train has ended")
            time.sleep(_POLL_S)
        self.folder, self._carrier = folder, pid
        threading.Thread(target=self._write_steps_down, daemon=True).start()

    def members(self) -> RunProcesses:
        """Where it is at work."""
        return processes_of(self.folder)

    def end(self) -> None:
        """Kill it; its ranks end with their machines."""
        for process in (psutil.Process(self._carrier), psutil.Process(self._process.pid)):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _write_steps_down(self) -> None:
        for found in follow(self.folder, goes_on=lambda: is_alive(self._carrier)):
            if found is not None and found.get("event") in (None, "StepRepeated"):
                world_size = found.get("world_size") or found["elastic/world_size"]
                record(self._request, time=found["time"], step=found["step"], world_size=world_size)


def run_folder(request: dict[str, Any]) -> Path | None:
    """The folder of the run that a request's job has begun."""
    return next((path.parent for path in (Path(request["folder"]) / "runs").glob("*/plan.json")), None)


def write_job(request: dict[str, Any], *, workers: int) -> Path:
    """The job of a request, by default with a corpus of random words. Returns: the job file.

    Nothing is held out, as the peers evaluate nothing either; whatever is not named has its default.
    """
    folder = Path(request["folder"])
    model, data = dict(request["model"]), {"seq_len": request["seq_len"], "held_out": 0}
    if "model_type" in model:
        (folder / "corpus.txt").write_text(random_text())
        model["architecture"] = model.pop("model_type")
        data |= {"files": str(folder / "corpus.txt"), "tokenizer": {"vocab_size": request["vocab_size"]}}
    else:
        data["files"] = request["files"]
    job = {
        "name": "elastic",
        "model": model,
        "data": data,
        "training": {
            "total_steps": 10**6,
            "global_batch_size": request["global_batch_size"],
            "optimizer": {"lr": request["lr"]},
            "zero": {"stage": 1},
        },
        "checkpoint": {"to": str(folder / "runs"), "snapshot_every": request.get("snapshot_every", "auto")},
        "resources": {"workers": f"1..{workers}", "gpu": "none"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def random_text() -> str:
    """Always the same, of enough different words for a vocabulary of some thousand tokens."""
    chance = random.Random(0)
    words = ["".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 9))) for _ in range(_LEXICON_WORDS)]
    return " ".join(chance.choices(words, k=_CORPUS_WORDS))


@contextlib.contextmanager
def machines(num_nodes: int, *, num_cpus: int = 1) -> Iterator[dict[int, Any]]:
    """The nodes of a cluster by number; it ends with them."""
    start_head_alone()
    try:
        yield {node: add_node(num_cpus=num_cpus) for node in range(num_nodes)}
    finally:
        stop_local()


def obey(line: str, request: dict[str, Any], nodes: dict[int, Any], run: Run | None) -> None:
    """Do what a line says, and note when it was done."""
    what, number, *rest = line.split()
    node = int(number)
    if what == "add":
        nodes[node] = add_node(num_cpus=request.get("slots", 1))
        record(request, added=node)
    elif what == "remove":
        record(request, removed=node)
        kill_node(nodes.pop(node))
    elif run is not None and what == "notice":
        members = run.members()
        name = next(name for name, pid in members.agents.items() if os.getsid(pid) == nodes[node].pid)
        record(request, noticed=node)
        give_notice(name, seconds_left=float(rest[0]))
    elif run is not None and what == "kill":
        pid = run.members().rank(node)
        record(request, killed=node)
        os.kill(pid, signal.SIGKILL)
    elif run is not None and what == "hang":
        members = run.members()
        rank = next(pid for pid in members.ranks.values() if pid and os.getsid(pid) == nodes[node].pid)
        record(request, halted=node)
        suspend(rank, members=members)


def record(request: dict[str, Any], **what: float) -> None:
    """Append a line to `steps.jsonl`, with the time unless it is given."""
    with (Path(request["folder"]) / "steps.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **what}) + "\n")


if __name__ == "__main__":
    main()
