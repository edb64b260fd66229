"""Elastic runs on a local Ray cluster with simulated machines, and the faults that tests cause."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from forge.cluster.local.ray_cluster import (
    add_node,
    find_local,
    kill_node,
    start_head_alone,
    stop_local,
)
from forge.cluster.local.ray_process import NodeProcess
from forge.runs.reader import read_metrics, read_run
from tests.support.command import environment, wait_for
from tests.support.command import forge as run_forge

TEXT = "the cat sat on a mat and saw one dog run past his old red barn while rain fell down hard"
PACED = """\
import os
import time

from forge.objective.causal_lm import CausalLm


class PacedLm(CausalLm):
    def loss(self, model, batch):
        if int(os.environ["WORLD_SIZE"]) > 1:
            time.sleep(0.15)
        return super().loss(model, batch)
"""
JOB = """\
name: elastic
model: {{architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}}
data: {{files: "corpus/*.txt", seq_len: 32, tokenizer: {{vocab_size: 300}}, held_out: 0}}
training:
  total_steps: {steps}
  global_batch_size: 6
  precision: fp32
  optimizer: {{lr: {lr}}}
  schedule: {{kind: constant, warmup: 5}}
  zero: {{stage: {stage}}}
checkpoint: {{every: 100000 steps, snapshot_every: 1}}
resources: {{workers: "{workers}", gpu: none}}
tracking: {{wandb: {{mode: disabled}}}}
"""


def write_job(
    folder: Path, *, steps: int, workers: str = "1..3", stage: int = 1, lr: float = 1e-4, paced: bool = False
) -> None:
    """Write a tiny job in fp32, so that losses can be compared closely, with its corpus.

    Args:
        paced: several ranks wait 150 ms in each step, which leaves the cores to what the test starts meanwhile, and
            fewer steps to repeat in one process.
    """
    job = JOB.format(steps=steps, workers=workers, stage=stage, lr=lr)
    if paced:
        (folder / "src").mkdir(exist_ok=True)
        (folder / "src" / "paced.py").write_text(PACED)
        job = f"code: ./src\n{job}".replace("training:\n", "training:\n  objective: paced:PacedLm\n")
    (folder / "job.yaml").write_text(job)
    (folder / "corpus").mkdir(exist_ok=True)
    chance = random.Random(0)
    for number in range(40):
        (folder / "corpus" / f"{number}.txt").write_text(" ".join(chance.choices(TEXT.split(), k=400)))


class Machines:
    """A cluster whose head takes no ranks, and its simulated machines."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.nodes: list[NodeProcess] = []
        head = find_local()
        self.leaders = {node.pid for node in (head.nodes if head else ())}
        """Session leaders of all machines, including former ones."""

    def add(self) -> NodeProcess:
        self.nodes.append(add_node())
        self.leaders.add(self.nodes[-1].pid)
        return self.nodes[-1]

    def kill(self, node: NodeProcess) -> None:
        self.nodes.remove(node)
        kill_node(node)

    def of(self, pid: int) -> NodeProcess:
        """The machine that a process belongs to."""
        leader = os.getsid(pid)
        return next(node for node in self.nodes if node.pid == leader)


@contextlib.contextmanager
def machines(home: Path, *, count: int) -> Iterator[Machines]:
    """Start a cluster with its own state folder, and stop it afterwards."""
    before = {name: os.environ.get(name) for name in ("FORGE_STATE", "FORGE_CACHE")}
    kept = environment(home)
    os.environ |= {name: kept[name] for name in before}
    cluster: Machines | None = None
    try:
        start_head_alone()
        cluster = Machines(home)
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        for node in cluster.nodes if cluster else ():  # faster than stopping each of them
            kill_node(node)
        stop_local()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass
class Run:
    """A run in progress."""

    folder: Path
    cluster: Machines

    @property
    def events(self) -> tuple[dict[str, Any], ...]:
        return read_run(self.folder).events

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def newest_events(self) -> str:
        return f"step {self.step}, newest events: {self.events[-5:]}"

    @property
    def step(self) -> int:
        return len(read_metrics(self.folder))

    @property
    def formed(self) -> dict[str, Any]:
        """The generation that started last."""
        found = self.of("GenerationStarted")
        return found[-1] if found else {"generation": 0, "world_size": 0, "ranks": []}

    def agent(self, node: str) -> int:
        return next(e["agent_pid"] for e in reversed(self.of("NodeJoined")) if e["node"] == node)

    def machine_of(self, rank: dict[str, Any]) -> NodeProcess:
        """The machine of a rank's location, an element of `formed["ranks"]`."""
        return self.cluster.of(self.agent(rank["node"]))

    def await_world(self, size: int, *, timeout_s: float = 60.0) -> None:
        """Wait until a generation of this size has taken three steps."""
        wait_for(lambda: self.formed["world_size"] == size, timeout_s=timeout_s, about=self.newest_events)
        self.await_steps(3)

    def await_steps(self, count: int, *, timeout_s: float = 60.0) -> None:
        """Wait until `count` more steps are recorded."""
        goal = self.step + count
        wait_for(lambda: self.step >= goal, timeout_s=timeout_s, about=self.newest_events)

    def repeated(self, *, since: float = 0.0) -> list[int]:
        return [event["step"] for event in self.of("StepRepeated") if event["time"] >= since]

    def recovers_from(self, fault: Callable[[], object], *, timeout_s: float = 60.0) -> float:
        """Cause a fault, and wait until another generation trains. Returns: seconds to its first step."""
        before, began = self.formed["generation"], time.time()
        fault()
        wait_for(lambda: self.formed["generation"] > before, timeout_s=timeout_s, about=self.newest_events)
        first = next(e["time"] for e in self.of("GenerationStarted") if e["generation"] > before)
        self.await_steps(3, timeout_s=timeout_s)
        return float(first - began)


def start_run(cluster: Machines, *arguments: str) -> Run:
    """Run `forge train job.yaml --detach`."""
    done = run_forge(
        "train", "job.yaml", "--detach", *arguments, cwd=cluster.home, env=dict(os.environ), timeout_s=400
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("run ")]
    folder = cluster.home / line.rpartition(" in ")[2]
    return Run(folder=folder, cluster=cluster)


def stop_run(run: Run) -> None:
    """Run `forge runs stop`."""
    done = run_forge("runs", "stop", str(run.folder), cwd=run.cluster.home, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def leftovers(run: Run, *, but: Run | None = None, timeout_s: float = 20.0) -> list[str]:
    """Processes that have outlived a run: their command line names it, or they hold its memory or files.

    Args:
        but: another run in progress on the cluster, to which anonymous memory may belong.
    """

    def found() -> list[str]:
        lines = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            with contextlib.suppress(psutil.Error, OSError):
                line = " ".join(process.info["cmdline"] or [])
                names_run = run.folder.name in line
                holds = [str(path.readlink()) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
                is_of_cluster = os.getsid(process.pid) in run.cluster.leaders and but is None
                signs = (str(run.folder), *(("memfd:forge",) if is_of_cluster else ()))
                if names_run or any(sign in target for sign in signs for target in holds):
                    lines.append(f"{process.pid} {line}")
        return lines

    deadline = time.monotonic() + timeout_s
    while (lines := found()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return lines
