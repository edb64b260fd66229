"""Names the run's stragglers, and decides whether a node is replaced because it is one.

With `resources.replace_stragglers` a straggler is treated as a node with a preemption notice: its ranks leave it
after a step, and no step is lost. This is done only where it helps: where another node can take its place, or where
the run is faster without it. Where neither is so, another node is requested, and the straggler works until that
one is ready. Each node is replaced once, and a run replaces at most a quarter of its nodes (at least one), so that
a wrong signal cannot move the whole run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from forge.elastic.agent_connections import AgentConnection
from forge.elastic.placement import Placement
from forge.elastic.rpc import Message
from forge.elastic.states import MembershipState, Phase
from forge.elastic.straggler_detector import Straggler, StragglerDetector
from forge.events import Event, MixedDevices, StragglerDetected

NOTICE_S = 30.0
"""Between the decision to replace a node and its end, as for an on-demand machine that is returned."""
MAX_SHARE = 0.25
"""Of the run's nodes: how many may be replaced in the whole run, but at least one."""
MIN_GAIN = 1.1
"""A run goes on with fewer workers only if its steps take this many times less: a membership change costs a few."""

REPLACING = ("replaced", "left out")
"""The actions after which no rank is on the straggler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerTerms:
    """What a run does about stragglers."""

    replaces: bool
    """`resources.replace_stragglers`."""
    global_batch_size: int
    """In sequences."""
    replaced: tuple[str, ...] = ()
    """Nodes that were replaced before this supervisor started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StragglerDecision:
    """What is done about one straggler."""

    action: str
    """`kept`, `requested` (another node; this one works until then), `replaced` or `left out`."""
    reason: str


class StragglerWatch:
    """The stragglers of one run."""

    def __init__(
        self, terms: StragglerTerms, *, placement: Placement, record_event: Callable[[Event], None]
    ) -> None:
        self._terms, self._placement, self._record_event = terms, placement, record_event
        self._detector = StragglerDetector()
        self._generation = 0
        self._devices: dict[str, str] = {}
        self._mixture: Counter[str] = Counter()
        self._mixture_generation = 0
        """The last generation in which the devices of all ranks were known."""
        self._recorded: dict[str, str] = {}
        """Machine → the action that was recorded last."""
        self._replaced = {machine_of(node) for node in terms.replaced}

    def note_device(self, node: str, device: str) -> None:
        """Note a node's GPU by its driver, known before its ranks have timed a step."""
        self._devices.setdefault(node, device)

    def note(self, node: str, heartbeat: Message, *, state: MembershipState) -> None:
        """Note the times that a node's heartbeat reports."""
        if heartbeat["generation"] != state.generation or "own_times" not in heartbeat:
            return
        if state.generation != self._generation:
            self._generation = state.generation
            self._detector.begin_generation()
        self._devices[node] = heartbeat["device"]
        for rank, own_ns, num_steps in heartbeat["own_times"]:
            self._detector.update(rank, own_s=own_ns / 1e9, num_steps=num_steps)

    def check(self, state: MembershipState, connections: Mapping[str, AgentConnection], *, now: float) -> list[str]:
        """Record new stragglers. Returns: the nodes to be replaced, as if a notice had come for them."""
        if state.phase is not Phase.TRAINING or state.is_stopping:
            return []
        self._record_mixed(state)
        if state.generation != self._generation:
            return []
        leaving = []
        for straggler in self._detector.find(state.assignment, devices=self._devices, now=now):
            node = straggler.node
            if node not in state.nodes or state.nodes[node].preempted_at is not None:
                continue
            decision = decide_straggler(straggler, state=state, terms=self._terms, replaced=self._replaced, now=now)
            self._record(straggler, decision, host=connections[node].host if node in connections else "")
            if decision.action in REPLACING:
                self._replaced.add(machine_of(node))
                leaving.append(node)
        return leaving

    def _record_mixed(self, state: MembershipState) -> None:
        """Record, once per mixture, that the ranks run on several kinds of device."""
        if self._mixture_generation == state.generation:
            return
        kinds = Counter(self._devices.get(node, "") for node in state.assignment)
        if "" not in kinds:
            self._mixture_generation = state.generation
        if len(kinds) < 2 or "" in kinds or kinds == self._mixture:
            return
        self._mixture = kinds
        self._record_event(MixedDevices(generation=state.generation, num_ranks=dict(kinds)))

    def _record(self, straggler: Straggler, decision: StragglerDecision, *, host: str) -> None:
        """Record a straggler when it is found, and when something else is done about it; ask for another node."""
        machine = machine_of(straggler.node)
        if self._recorded.get(machine) == decision.action:
            return
        self._recorded[machine] = decision.action
        self._record_event(
            StragglerDetected(
                generation=self._generation,
                node=straggler.node,
                host=host,
                rank=straggler.rank,
                device=self._devices.get(straggler.node, ""),
                ratio=straggler.ratio,
                own_s=straggler.own_s,
                usual_s=straggler.usual_s,
                action=decision.action,
                reason=decision.reason,
            )
        )
        if decision.action == "requested":
            self._placement.replace_node(straggler.node, seconds_left=None)


def decide_straggler(
    straggler: Straggler,
    *,
    state: MembershipState,
    terms: StragglerTerms,
    replaced: Iterable[str],
    now: float,
) -> StragglerDecision:
    """Decide what to do about a straggler; pure.

    Going on without it is faster if the larger share of each remaining worker takes less time than the straggler
    takes for its own: `ratio · ceil(B/W) > MIN_GAIN · ceil(B/W')`.

    Args:
        replaced: machines that the run has replaced as stragglers.
    """
    if not terms.replaces:
        return StragglerDecision(action="kept", reason="resources.replace_stragglers is false")
    replaced = set(replaced)
    if machine_of(straggler.node) in replaced:
        return StragglerDecision(action="kept", reason="it was replaced once and is slow again")
    num_nodes = len(set(state.assignment))
    most = max(1, int(MAX_SHARE * num_nodes))
    if len(replaced) >= most:
        reason = f"the run has replaced {len(replaced)} already, the most of {num_nodes} nodes"
        return StragglerDecision(action="kept", reason=reason)
    num_workers = len(state.assignment)
    others = [node for name, node in state.nodes.items() if name != straggler.node and node.preempted_at is None]
    num_left = min(num_workers, sum(node.usable_slots(now, margin_s=state.margin_s) for node in others))
    if num_left >= num_workers:
        return StragglerDecision(action="replaced", reason="another node takes its place")
    if num_left >= max(1, state.min_workers):
        share, larger_share = (-(-terms.global_batch_size // count) for count in (num_workers, num_left))
        if straggler.ratio * share >= MIN_GAIN * larger_share:
            faster = straggler.ratio * share / larger_share
            reason = f"steps take {faster:.2f} times less without it, with {num_left} of {num_workers} workers"
            return StragglerDecision(action="left out", reason=reason)
    return StragglerDecision(action="requested", reason="no other node is ready, and the run is slower without it")


def machine_of(node: str) -> str:
    """Return the part of a node's name that its next agent has too: the digits of Ray's node id."""
    return node.partition("-")[0]
