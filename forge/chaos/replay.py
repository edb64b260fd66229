"""Replay of a spot trace: a real run on simulated nodes of this machine that join and leave as in the trace.

A cluster of its own is started, whose head node takes no ranks; the run has the ordinary driver process. The clock
starts when the trace's initial nodes are up. A node that leaves is killed with all its processes; with notice, it
is drained `notice_s` seconds before.
"""

from __future__ import annotations

import contextlib
import math
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

_LEAST_STARTS = 5.0
"""Below this many starts of workers between two changes of a trace, a replay measures little but starts."""
_LATE_STARTS = 3.0
"""After this many changes without a first step, workers start too slowly for the trace for certain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAction:
    """What happens to one simulated node at one time."""

    at_s: float
    what: str
    """`add`, `notice` or `remove`."""
    node: str


def actions_of(trace: Trace, *, notice_s: float | None) -> list[NodeAction]:
    """A trace as a list of actions in order of time; notices come before the removals they announce."""
    actions = []
    for change in trace.changes:
        for node in change.removed:
            if notice_s is not None:
                actions.append(NodeAction(at_s=max(0.0, change.at_s - notice_s), what="notice", node=node))
            actions.append(NodeAction(at_s=change.at_s, what="remove", node=node))
        actions += [NodeAction(at_s=change.at_s, what="add", node=node) for node in change.added]
    return sorted(actions, key=lambda action: action.at_s)


def replay(
    trace: Trace,
    plan: Plan,
    *,
    notice_s: float | None,
    speed: float = 1.0,
    on_record: Callable[[dict[str, Any] | None], None] = lambda record: None,
    on_warning: Callable[[str], None] = lambda text: None,
    on_start: Callable[[Path, int], None] = lambda folder, pid: None,
) -> dict[str, Any]:
    """Run a plan under a trace until one of them ends, then end the cluster.

    Args:
        trace: scaled to what this machine can simulate.
        notice_s: seconds between the notice and the end of a node; None: nodes are killed without notice.
        speed: how many times faster than recorded the trace is.
        on_record: called with every record of the run, and with None while there are none.
        on_warning: called if the trace changes faster than workers start on this machine.

    Returns: JSON values: seconds, steps, samples per second, goodput, warnings, and the run's id, folder and
        status.
    Raises: ClusterError, ArgumentError; whatever made the run fail.
    """
    with _simulated_nodes(notice_s or 0.0) as nodes:
        actions = actions_of(trace, notice_s=notice_s)
        for action in [action for action in actions if action.at_s == 0 and action.what == "add"]:
            nodes.apply(action)
        folder = create_run(plan)
        began = time.monotonic()
        run = start_driver(folder)
        on_start(folder, run.pid)
        is_over = threading.Event()
        later = [action for action in actions if action.at_s > 0]
        player = threading.Thread(target=_play, args=(later, nodes, began, is_over), daemon=True)
        player.start()
        warnings: list[str] = []
        pace = _Pace(interval_s=change_interval_s(trace), speed=speed)
        try:
            is_stopping = False
            for record in follow(folder, goes_on=run.is_alive):
                on_record(record)
                if (warning := pace.warning(record)) is not None:
                    warnings.append(warning)
                    on_warning(warning)
                if time.monotonic() - began >= trace.duration_s and not is_stopping:
                    is_stopping = True
                    run.request_stop()
            wall_s = time.monotonic() - began
        except BaseException:
            run.request_stop()
            raise
        finally:
            run.wait()
            is_over.set()
            player.join()
    return _result(folder, plan, wall_s=wall_s, nodes=nodes) | {"warnings": warnings}


def change_interval_s(trace: Trace) -> float:
    """Mean seconds between the changes of a trace after its beginning; infinity if there are none."""
    num_changes = sum(change.at_s > 0 for change in trace.changes)
    return trace.duration_s / num_changes if num_changes else math.inf


def pace_warning(*, interval_s: float, start_s: float, speed: float) -> str | None:
    """Compare how often the trace changes with how long workers take to start; None if there is time to train.

    Args:
        interval_s: between two changes of the trace, as it is played.
        start_s: from the start of a node's agent to the first step of its workers, on this machine.
        speed: how many times faster than recorded it is played.
    """
    if interval_s >= _LEAST_STARTS * start_s:
        return None
    slower = float(f"{speed * interval_s / (_LEAST_STARTS * start_s):.1g}")
    return (
        f"the trace changes every {interval_s:.1f} s at --speed {speed:g}, and workers take {start_s:.1f} s to "
        "start on this machine, so most of the time goes into starting them; use about "
        f"--speed {slower:g}, or fewer --nodes"
    )


class _Pace:
    """Measures how long the first workers take to start, and warns once."""

    def __init__(self, *, interval_s: float, speed: float) -> None:
        self._interval_s, self._speed = interval_s, speed
        self._began = time.monotonic()
        self._is_over = False

    def warning(self, record: dict[str, Any] | None) -> str | None:
        """Return the warning when it is due, once: when the first workers have started, or are late."""
        start_s = time.monotonic() - self._began
        has_started = record is not None and record.get("event") == "GenerationStarted"
        is_late = start_s > _LATE_STARTS * self._interval_s
        if self._is_over or not (has_started or is_late):
            return None
        self._is_over = True
        return pace_warning(interval_s=self._interval_s, start_s=start_s, speed=self._speed)


def _play(actions: list[NodeAction], nodes: _SimulatedNodes, began: float, is_over: threading.Event) -> None:
    for action in actions:
        if is_over.wait(timeout=max(0.0, began + action.at_s - time.monotonic())):
            return
        nodes.enqueue(action)


def _result(folder: Path, plan: Plan, *, wall_s: float, nodes: _SimulatedNodes) -> dict[str, Any]:
    run = read_run(folder)
    failure = failure_of(run)
    if failure is not None:
        raise failure
    steps = read_metrics(folder)
    goodput = goodput_of(run.events, steps, now=None)
    return {
        "run_id": run.run_id,
        "folder": str(folder),
        "status": run.status,
        "wall_s": wall_s,
        "steps": len(steps),
        "samples_per_s": len(steps) * plan.job.training.global_batch_size / wall_s,
        "num_removed": nodes.num_removed,
        "num_added": nodes.num_added,
        "problems": nodes.problems,
        "goodput": goodput.as_record(),
    }


class _SimulatedNodes:
    """Simulated nodes by the trace's names; a thread starts them, because that takes seconds."""

    def __init__(self, address: str, *, notice_s: float) -> None:
        self._address, self._notice_s = address, notice_s
        self._nodes: dict[str, tuple[NodeProcess, str]] = {}
        self._queue: queue.Queue[NodeAction | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self.num_added = self.num_removed = 0
        self.problems: list[str] = []
        """Actions that failed, such as nodes that could not be started."""

    def enqueue(self, action: NodeAction) -> None:
        """Queue an action; the removal of a node that is up is done at once."""
        if action.what == "remove" and action.node in self._nodes:
            self.apply(action)
        else:
            self._queue.put(action)

    def apply(self, action: NodeAction) -> None:
        """Carry an action out now. Raises: ClusterError if a node cannot be started."""
        if action.what == "add":
            known = nodes_alive(gcs_address=self._address).keys()
            node = add_node()
            (node_id,) = nodes_alive(gcs_address=self._address).keys() - known
            self._nodes[action.node] = (node, node_id)
            self.num_added += 1
        elif action.node in self._nodes and action.what == "remove":
            kill_node(self._nodes.pop(action.node)[0])
            self.num_removed += 1
        elif action.node in self._nodes:
            drain_node(self._nodes[action.node][1], seconds_left=self._notice_s, address=self._address)

    def close(self) -> None:
        """Wait until all queued actions are done."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (action := self._queue.get()) is not None:
            try:
                self.apply(action)
            except ForgeError as error:
                self.problems.append(str(error))


@contextlib.contextmanager
def _simulated_nodes(notice_s: float) -> Iterator[_SimulatedNodes]:
    cluster = start_head_alone()
    nodes = _SimulatedNodes(cluster.address, notice_s=notice_s)
    try:
        yield nodes
    finally:
        nodes.close()
        stop_local()
