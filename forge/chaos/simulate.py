"""Simulation of a training run on a spot trace: what would have been trained, lost and paid, under a policy.

Three policies, which differ in what a change of the machines costs:

    elastic   forge: the remaining machines go on from the state in memory after a pause. A machine that is
              announced to leave is not used any more, and nothing is repeated; after a loss without notice, at most
              the steps since the last snapshot are. If a machine and the next one, which holds its copy, are lost
              at once, the run goes back to its last checkpoint. Machines that join make it pause
    restart   every change restarts all processes, which continue from the last checkpoint
    rigid     a fixed number of machines: fewer wait, others are spare; a loss restarts from the last checkpoint

The simulation is exact for its model: between two changes the run makes progress at a constant rate, so it computes
from change to change, without random numbers and without time steps. Equal inputs give equal results. A trace made
at random depends on its seed alone (`forge.chaos.trace.poisson`).

The constants are those of `forge.plan.recovery`, from benchmarks/RESULTS.md; all can be replaced.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from forge.chaos.simulation import Policy, SimulatedRun, SimulationSettings
from forge.chaos.trace import NodeChange, Trace
from forge.errors import ArgumentError
from forge.units import counted


def simulate(trace: Trace, policy: Policy, *, settings: SimulationSettings | None = None) -> SimulatedRun:
    """Simulate a run from the beginning of a trace until its last step or the end of the trace."""
    run = _Run(trace, policy, settings or SimulationSettings())
    for at_s, change, is_notice in _in_order(
        trace, notice_s=run.settings.notice_s if policy == "elastic" else None
    ):
        run.advance(at_s)
        if run.finished_at_s is not None:
            break
        if is_notice:
            run.announce(change.removed)
        else:
            run.change(change)
    run.advance(trace.duration_s)
    return run.result()


def require_trainable(trace: Trace, settings: SimulationSettings) -> None:
    """Raises: ArgumentError if no run could train on the trace: it has no length, or never enough machines."""
    if not trace.duration_s:
        raise ArgumentError("the trace has a single time, so it lasts 0 s; a later line says how long it lasts")
    for name, count in (("min_nodes", settings.min_nodes), ("num_nodes", settings.num_nodes or 1)):
        if count > trace.max_nodes:
            most = counted(trace.max_nodes, "machine")
            raise ArgumentError(f"{name} of a simulation is {count:,}, but the trace has at most {most}")


def _in_order(trace: Trace, *, notice_s: float | None) -> Iterator[tuple[float, NodeChange, bool]]:
    """Changes and the notices of their losses in order: the time, the change, and whether it is its notice."""
    changes = ((change.at_s, change, False) for change in trace.changes)
    if notice_s is None:
        return changes
    notices = ((max(0.0, change.at_s - notice_s), change, True) for change in trace.changes if change.removed)
    return heapq.merge(notices, changes, key=lambda item: item[0])


@dataclass(slots=True, kw_only=True)
class _Work:
    """Training since some point: time and node-seconds, which a return to that point loses."""

    seconds: float = 0.0
    node_s: float = 0.0

    def add(self, seconds: float, *, num_nodes: int) -> None:
        self.seconds += seconds
        self.node_s += seconds * num_nodes


@dataclass(slots=True)
class _Run:
    """State of a simulated run at one time."""

    trace: Trace
    policy: Policy
    settings: SimulationSettings
    now_s: float = 0.0
    members: dict[str, None] = field(default_factory=dict)
    """Nodes that train, or will after the pause."""
    ready: dict[str, None] = field(default_factory=dict)
    """Nodes whose workers have started and that do not train."""
    starting: deque[tuple[float, str]] = field(default_factory=deque)
    """Nodes whose workers are starting: when they will have, and their names."""
    present: set[str] = field(default_factory=set)
    noticed: set[str] = field(default_factory=set)
    """Present nodes that will leave soon."""
    paused_until_s: float = 0.0
    has_state: bool = False
    """Whether the state of the run is in the memory of the members."""
    progress: float = 0.0
    saved: float = 0.0
    """Steps in the newest checkpoint."""
    next_checkpoint_s: float = 0.0
    since_saved: _Work = field(default_factory=_Work)
    since_snapshot: _Work = field(default_factory=_Work)
    kept: _Work = field(default_factory=_Work)
    """All training that has not been lost."""
    lost_s: float = 0.0
    pausing_s: float = 0.0
    waiting_s: float = 0.0
    available_node_s: float = 0.0
    num_changes: int = 0
    num_from_checkpoint: int = 0
    finished_at_s: float | None = None

    def advance(self, until_s: float) -> None:
        """Let time pass; nodes whose workers have started in between join."""
        while self.finished_at_s is None and self.starting and self.starting[0][0] <= until_s:
            at_s = self.starting[0][0]
            self._pass(at_s)
            while self.starting and self.starting[0][0] <= at_s:
                node = self.starting.popleft()[1]
                if node not in self.noticed:
                    self.ready[node] = None
            if self.finished_at_s is None:
                self._grow()
        self._pass(until_s)

    def announce(self, nodes: tuple[str, ...]) -> None:
        """Stop using nodes that will leave soon, without a loss."""
        self.noticed.update(node for node in nodes if node in self.present)
        leaving = [node for node in nodes if node in self.members]
        if leaving and len(leaving) == len(self.members) and self.has_state:
            self._save()  # the notice is long enough to write a checkpoint
        for node in nodes:
            self.members.pop(node, None)
            self.ready.pop(node, None)
        if not leaving:
            return
        if not self.members:
            self._lose(survives=False)
        else:
            self._take_spares()
            self._pause(self.settings.planned_pause_s)

    def change(self, change: NodeChange) -> None:
        """Nodes leave, then others arrive."""
        lost = [node for node in change.removed if node in self.members]
        survives = not lost or self._survives(lost)
        for node in change.removed:
            self.present.discard(node)
            self.noticed.discard(node)
            self.members.pop(node, None)
            self.ready.pop(node, None)
        if change.removed and self.starting:
            gone = set(change.removed)
            self.starting = deque(item for item in self.starting if item[1] not in gone)
        if lost:
            self._lose(survives=survives)
        for node in change.added:
            self.present.add(node)
            self.starting.append((self.now_s + self.settings.node_start_s, node))

    def result(self) -> SimulatedRun:
        """What was trained, lost and paid until now."""
        ended_s = self.trace.duration_s if self.finished_at_s is None else self.finished_at_s
        hours = self.available_node_s / 3600
        price = self.settings.usd_per_node_hour
        return SimulatedRun(
            policy=self.policy,
            steps=self.progress,
            finished_at_s=self.finished_at_s,
            duration_s=ended_s,
            node_hours=hours,
            node_goodput=self.kept.node_s / self.available_node_s if self.available_node_s else math.nan,
            seconds={
                "training": self.kept.seconds,
                "repeated": self.lost_s,
                "pausing": self.pausing_s,
                "waiting": self.waiting_s,
            },
            num_changes=self.num_changes,
            num_from_checkpoint=self.num_from_checkpoint,
            usd=None if price is None else hours * price + ended_s / 3600 * self.settings.usd_per_hour,
        )

    # Changes of the members

    def _grow(self) -> None:
        num_joining = min(len(self.ready), self._num_wanted() - len(self.members))
        if num_joining <= 0 or len(self.members) + num_joining < self._least():
            return
        self._take_spares()
        if not self.has_state:
            self._begin()
        elif self.policy == "elastic":
            self._pause(self.settings.planned_pause_s)
        else:
            self._restart()

    def _lose(self, *, survives: bool) -> None:
        self._take_spares()
        has_enough = len(self.members) >= self._least()
        if self.policy == "elastic" and survives:
            self._roll_back(self.since_snapshot, to=self._last_snapshot())
            if has_enough:
                self._pause(self.settings.loss_pause_s)
            return
        if has_enough:
            self._restart()
        else:
            self._roll_back(self.since_saved, to=self.saved)
            self.has_state = False
            self.ready = self.members | self.ready
            self.members = {}

    def _take_spares(self) -> None:
        for node in list(islice(self.ready, max(0, self._num_wanted() - len(self.members)))):
            del self.ready[node]
            self.members[node] = None

    def _begin(self) -> None:
        """The first start, or one after nothing was left in memory."""
        self.has_state = True
        if self.saved:
            self._restart()
        else:
            self._pause(0.0)
            self.next_checkpoint_s = self.now_s + self.settings.checkpoint_every_s

    def _restart(self) -> None:
        self._roll_back(self.since_saved, to=self.saved)
        self._pause(self.settings.restart_s)
        self.num_from_checkpoint += 1
        self.next_checkpoint_s = self.paused_until_s + self.settings.checkpoint_every_s

    def _pause(self, seconds: float) -> None:
        self.num_changes += 1
        self.paused_until_s = max(self.paused_until_s, self.now_s + seconds)

    def _roll_back(self, since: _Work, *, to: float) -> None:
        self.progress = to
        self.kept.seconds -= since.seconds
        self.kept.node_s -= since.node_s
        self.lost_s += since.seconds
        if since is self.since_saved:
            self.since_snapshot = _Work()
        else:
            self.since_saved.seconds -= since.seconds
            self.since_saved.node_s -= since.node_s
        since.seconds = since.node_s = 0.0

    def _survives(self, lost: Sequence[str]) -> bool:
        """Whether the state of every lost member is in the memory of another: the next one holds its copy."""
        if len(lost) >= len(self.members):
            return False
        if len(lost) == 1:
            return True
        order, gone = list(self.members), set(lost)
        return not any(a in gone and b in gone for a, b in pairwise([*order, order[0]]))

    def _num_wanted(self) -> int:
        if self.policy != "rigid":
            return self.trace.max_nodes
        return self.settings.num_nodes or max(self.settings.min_nodes, self.trace.max_nodes // 2)

    def _least(self) -> int:
        return self._num_wanted() if self.policy == "rigid" else self.settings.min_nodes

    def _last_snapshot(self) -> float:
        every = self.settings.snapshot_every
        return max(self.saved, math.floor(self.progress / every + 1e-9) * every)

    # Passing time

    def _pass(self, until_s: float) -> None:
        """Pause, wait or train until a time, with the nodes of now."""
        if self.finished_at_s is not None or until_s <= self.now_s:
            return
        is_running = self.has_state and len(self.members) >= self._least()
        if not is_running:
            self.waiting_s += until_s - self.now_s
            self._count(until_s)
            return
        pause_end_s = min(until_s, max(self.now_s, self.paused_until_s))
        self.pausing_s += pause_end_s - self.now_s
        self._count(pause_end_s)
        for end_s in self._intervals(until_s):
            self._train(end_s)

    def _intervals(self, until_s: float) -> Iterator[float]:
        """Ends of the intervals between checkpoints."""
        while self.now_s < until_s and self.finished_at_s is None:
            yield min(until_s, max(self.now_s, self.next_checkpoint_s))
            if self.now_s >= self.next_checkpoint_s:
                self._save()

    def _train(self, until_s: float) -> None:
        step_s = self._step_s()
        done_s = self.now_s + (self.settings.total_steps - self.progress) * step_s
        end_s = min(until_s, done_s)
        elapsed_s, num_nodes = end_s - self.now_s, len(self.members)
        before, self.progress = self.progress, self.progress + elapsed_s / step_s
        every = self.settings.snapshot_every
        passed = math.floor(self.progress / every + 1e-9) * every
        if passed > before:  # a snapshot was taken: only what follows it can be lost
            self.since_snapshot = _Work()
            self.since_snapshot.add((self.progress - passed) * step_s, num_nodes=num_nodes)
        else:
            self.since_snapshot.add(elapsed_s, num_nodes=num_nodes)
        self.kept.add(elapsed_s, num_nodes=num_nodes)
        self.since_saved.add(elapsed_s, num_nodes=num_nodes)
        self._count(end_s)
        if done_s <= until_s:
            self.progress, self.finished_at_s = self.settings.total_steps, done_s

    def _save(self) -> None:
        """A checkpoint of the last whole step."""
        whole = math.floor(self.progress + 1e-9)
        fraction_s = (self.progress - whole) * self._step_s()
        if whole > self.saved:
            self.saved = float(whole)
            self.since_saved = _Work()
            self.since_saved.add(max(0.0, fraction_s), num_nodes=len(self.members))
        self.next_checkpoint_s = self.now_s + self.settings.checkpoint_every_s

    def _step_s(self) -> float:
        largest = self.trace.max_nodes if self.policy != "rigid" else self._num_wanted()
        return self.settings.step_s * math.pow(largest / len(self.members), self.settings.scaling)

    def _count(self, until_s: float) -> None:
        self.available_node_s += len(self.present) * (until_s - self.now_s)
        self.now_s = until_s
