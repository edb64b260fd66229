"""Ray Train's elastic mode on simulated nodes, running the loop of `torchrun_elastic`.

    python -m benchmarks.peers.ray_train_elastic REQUEST
    python -m benchmarks.peers.ray_train_elastic REQUEST --schedule FILE --seconds S [--notice S]

REQUEST is that of `torchrun_elastic`, and is_tuned, and max_nodes where more nodes may come. The cluster is
`ray.cluster_utils.Cluster`: a head without CPUs, where Ray Train's controller runs, and nodes of one CPU,
one worker each. Without a schedule the line `remove N` on stdin kills node N with all its processes, and
`add N` starts it again. A schedule has them as JSON lines, `[seconds, "add" or "remove", N]`, counted from
when the nodes of the beginning are there and the training is asked for, which is a line of `steps.jsonl` too,
until `--seconds` are over; with a notice a node is drained (as by `ray drain-node`, for preemption, with that
deadline) so long before it is killed.

Defaults of Ray Train but for `num_workers` and `max_failures`; tuned, each because it shortens the recovery:

    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2         the controller asks its workers more often than every 2 s
    RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=2      its view of the cluster is up to 20 s old, so after a death
                                                  it waits for the former number of workers, else 60 s
    TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S=1      it waits for the dead worker to leave its group, else 30 s
    RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S=1        notices are seen sooner than every 5 s
    elastic_resize_monitor_interval_s=1           it looks for new nodes more often than every 60 s
    health_check_* (Ray's own)                    a silent node is dead after some 2 s, else 15 s or more
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import torch
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from benchmarks.peers.torchrun_elastic import kill_all, kill_node, record, train

_TUNED_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "2",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
}
_TUNED_SCALING = {"elastic_resize_monitor_interval_s": 1.0}
_TUNED_SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
_ASK_EVERY = 10
"""Steps; to ask for a notice is a barrier, which costs a tenth of a step."""
_OBJECT_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Something that happens to a node."""

    at_s: float
    """Since the training was asked for."""
    action: str
    """`add`, `notice`, `remove`."""
    node: int
    seconds_left: float = 0.0
    """With a notice: until the node is removed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("request", type=json.loads)
    parser.add_argument("--schedule", type=Path, metavar="FILE")
    parser.add_argument("--seconds", type=float, metavar="S", help="how long to train under the schedule")
    parser.add_argument("--notice", type=float, default=0.0, metavar="S", help="by default none is given")
    options = parser.parse_args()
    request = options.request | {"has_notice": options.notice > 0}
    nodes = Nodes(request)
    try:
        began_s = time.time()
        record(request, began=1)
        threading.Thread(target=fit, args=(request,), daemon=True).start()
        if options.schedule is None:
            obey_stdin(nodes)
        else:
            for change in read_schedule(options.schedule, notice_s=options.notice):
                time.sleep(max(0.0, began_s + change.at_s - time.time()))
                nodes.apply(change)
            time.sleep(max(0.0, began_s + options.seconds - time.time()))
    finally:
        nodes.end()
    os._exit(0)  # the other thread still waits for Ray Train


class Nodes:
    """The cluster, whose nodes come and go."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        if request["is_tuned"]:
            os.environ.update(_TUNED_ENVIRONMENT)  # inherited by all processes of the cluster
        head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": _OBJECT_STORE_BYTES}
        head["include_dashboard"] = False  # it would take from the cores that train
        head["_system_config"] = _TUNED_SYSTEM_CONFIG if request["is_tuned"] else {}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = {node: self._start() for node in range(request["nodes"])}
        ray.init(address=self._cluster.address)

    def apply(self, change: Change) -> None:
        """Add a node, remove one with all its processes at once, or announce that it will be removed."""
        if change.action == "add":
            self._nodes[change.node] = self._start()
        elif change.action == "notice":
            self._drain(self._nodes[change.node].node_id, seconds_left=change.seconds_left)
        else:
            node = self._nodes.pop(change.node)
            (raylet,) = node.all_processes["raylet"]
            kill_node(self._request, node=change.node, pid=raylet.process.pid)
            self._cluster.remove_node(node, allow_graceful=False)

    def end(self) -> None:
        """Kill what is left."""
        kill_all(psutil.Process().children(recursive=True))

    def _start(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES)

    def _drain(self, node_id: str, *, seconds_left: float) -> None:
        """What `ray drain-node` does, without the seconds of a core that starting it costs."""
        is_accepted, reason = ray._raylet.GcsClient(address=self._cluster.address).drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
            "preemption",
            int((time.time() + seconds_left) * 1000),
        )
        if not is_accepted:
            raise RuntimeError(reason)


def obey_stdin(nodes: Nodes) -> None:
    """Execute commands from stdin."""
    for line in sys.stdin:
        action, node = line.split()
        nodes.apply(Change(at_s=0.0, action=action, node=int(node)))


def read_schedule(path: Path, *, notice_s: float) -> list[Change]:
    """All changes, in order, with a notice before every removal where there is to be one.

    Who leaves at an instant leaves before anyone joins.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    changes = [Change(at_s=at_s, action=action, node=node) for at_s, action, node in lines]
    notices = [
        Change(at_s=max(0.0, at_s - notice_s), action="notice", node=node, seconds_left=min(at_s, notice_s))
        for at_s, action, node in lines
        if action == "remove" and notice_s > 0
    ]
    return sorted(changes + notices, key=lambda change: (change.at_s, change.action == "add"))


def fit(request: dict[str, Any]) -> None:
    """Run Ray Train as usual; if its controller fails, start it again from the newest checkpoint."""
    tuned = _TUNED_SCALING if request["is_tuned"] else {}
    while True:
        with contextlib.suppress(ray.train.ControllerError):
            TorchTrainer(
                train_worker,
                train_loop_config=request,
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ScalingConfig(num_workers=(1, request.get("max_nodes", request["nodes"])), **tuned),
                run_config=RunConfig(
                    name="elastic",
                    storage_path=str(Path(request["folder"]) / "ray_train"),
                    failure_config=FailureConfig(max_failures=-1),
                    checkpoint_config=CheckpointConfig(num_to_keep=2),
                ),
            ).fit()
        record(request, gave_up=1)


def train_worker(request: dict[str, Any]) -> None:
    """One rank."""
    is_noticed = False

    def is_due(step: int) -> bool:
        nonlocal is_noticed
        is_regular: bool = step % request["checkpoint_every"] == 0
        if is_noticed or not request["has_notice"] or step % _ASK_EVERY:
            return is_regular
        is_noticed = ray.train.get_preemption_info() is not None
        return is_regular or is_noticed

    def save(state: dict[str, Any] | None) -> None:
        if state is None:
            ray.train.report({})
            return
        with tempfile.TemporaryDirectory(dir=request["folder"]) as folder:
            torch.save(state, Path(folder) / "state.pt")
            ray.train.report({"step": state["step"]}, checkpoint=Checkpoint.from_directory(folder))

    newest = ray.train.get_checkpoint()
    resume_from = None if newest is None else Path(newest.path) / "state.pt"
    train(request, resume_from=resume_from, is_due=is_due, save=save)


if __name__ == "__main__":
    main()
