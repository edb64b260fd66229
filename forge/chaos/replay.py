"""A spot trace against a real run: simulated machines of this one come and go as the trace says.

A cluster of its own is started, with a head that takes no ranks; the run is carried by the ordinary
process. Time begins when the machines of the trace's beginning are there. A machine that goes is killed
with all its processes; with notice, it is drained so many seconds before.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge.chaos.faults import drain_node
from forge.chaos.trace import Trace
from forge.cluster.local.ray_cluster import add_node, kill_node, start_head_alone, stop_local
from forge.cluster.local.ray_process import NodeProcess
from forge.errors import ForgeError
from forge.plan.plan import Plan
from forge.runs.create import create_run
from forge.runs.goodput import goodput_of
from forge.runs.reader import failure_of, follow, read_metrics, read_run
from forge.runtime.driver_process import start_driver
from forge.runtime.placement import nodes_alive


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """One thing that happens to one simulated machine."""

    at_s: float
    what: str
    """`add`, `notice` or `remove`."""
    node: str


def acts_of(trace: Trace, *, notice_s: float | None) -> list[Act]:
    """A trace as a list of what to do, in order; notices come before the removals they announce."""
    acts = []
    for change in trace.changes:
        for node in change.removed:
            if notice_s is not None:
                acts.append(Act(at_s=max(0.0, change.at_s - notice_s), what="notice", node=node))
            acts.append(Act(at_s=change.at_s, what="remove", node=node))
        acts += [Act(at_s=change.at_s, what="add", node=node) for node in change.added]
    return sorted(acts, key=lambda act: act.at_s)


def replay(
    trace: Trace,
    plan: Plan,
    *,
    notice_s: float | None,
    on_news: Callable[[dict[str, Any] | None], None] = lambda record: None,
    on_begin: Callable[[Path, int], None] = lambda folder, pid: None,
) -> dict[str, Any]:
    """Run a plan under a trace until either is over; nothing of the cluster is left afterwards.

    Args:
        trace: already scaled to what this machine can simulate.
        notice_s: seconds between the notice and the end of a machine; None: they vanish unannounced.
        on_news: called with every record of the run, and with None now and then.

    Returns: as JSON: seconds, steps, samples a second, the ledger, and what the run was.
    Raises: ClusterError, ArgumentError; what made the run fail.
    """
    with _machines(notice_s or 0.0) as machines:
        acts = acts_of(trace, notice_s=notice_s)
        for act in [act for act in acts if act.at_s == 0 and act.what == "add"]:
            machines.do(act)
        folder = create_run(plan)
        began = time.monotonic()
        carried = start_driver(folder)
        on_begin(folder, carried.pid)
        is_over = threading.Event()
        stage = threading.Thread(
            target=_play, args=([act for act in acts if act.at_s > 0], machines, began, is_over), daemon=True
        )
        stage.start()
        try:
            is_stopping = False
            for record in follow(folder, goes_on=carried.is_alive):
                on_news(record)
                if time.monotonic() - began >= trace.duration_s and not is_stopping:
                    is_stopping = True
                    carried.request_stop()
            wall_s = time.monotonic() - began
        except BaseException:
            carried.request_stop()
            raise
        finally:
            carried.wait()
            is_over.set()
            stage.join()
    return _result(folder, plan, wall_s=wall_s, machines=machines)


def _play(acts: list[Act], machines: _Machines, began: float, is_over: threading.Event) -> None:
    for act in acts:
        if is_over.wait(timeout=max(0.0, began + act.at_s - time.monotonic())):
            return
        machines.order(act)


def _result(folder: Path, plan: Plan, *, wall_s: float, machines: _Machines) -> dict[str, Any]:
    run = read_run(folder)
    failure = failure_of(run)
    if failure is not None:
        raise failure
    steps = read_metrics(folder)
    ledger = goodput_of(run.events, steps, now=None)
    return {
        "run_id": run.run_id,
        "folder": str(folder),
        "status": run.status,
        "wall_s": wall_s,
        "steps": len(steps),
        "samples_per_s": len(steps) * plan.job.training.global_batch_size / wall_s,
        "num_removed": machines.num_removed,
        "num_added": machines.num_added,
        "problems": machines.problems,
        "ledger": ledger.as_record(),
    }


class _Machines:
    """Simulated machines by the names that the trace gives them; a thread starts them, as it takes seconds."""

    def __init__(self, address: str, *, notice_s: float) -> None:
        self._address, self._notice_s = address, notice_s
        self._nodes: dict[str, tuple[NodeProcess, str]] = {}
        self._orders: queue.Queue[Act | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.num_added = self.num_removed = 0
        self.problems: list[str] = []
        """What could not be done; a machine that was to be added, say."""

    def order(self, act: Act) -> None:
        """Do it, soon and in order; a removal of what is there is done at once."""
        if act.what == "remove" and act.node in self._nodes:
            self.do(act)
        else:
            self._orders.put(act)

    def do(self, act: Act) -> None:
        """Do it now. Raises: ClusterError if a machine cannot be started."""
        if act.what == "add":
            known = nodes_alive(gcs_address=self._address).keys()
            node = add_node()
            (node_id,) = nodes_alive(gcs_address=self._address).keys() - known
            self._nodes[act.node] = (node, node_id)
            self.num_added += 1
        elif act.node in self._nodes and act.what == "remove":
            kill_node(self._nodes.pop(act.node)[0])
            self.num_removed += 1
        elif act.node in self._nodes:
            drain_node(self._nodes[act.node][1], seconds_left=self._notice_s, address=self._address)

    def close(self) -> None:
        """Wait for what is being done."""
        self._orders.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (act := self._orders.get()) is not None:
            try:
                self.do(act)
            except ForgeError as error:
                self.problems.append(str(error))


@contextlib.contextmanager
def _machines(notice_s: float) -> Iterator[_Machines]:
    cluster = start_head_alone()
    machines = _Machines(cluster.address, notice_s=notice_s)
    try:
        yield machines
    finally:
        machines.close()
        stop_local()
