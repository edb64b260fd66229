"""Keeps a run going: hears the agents, lets `membership.decide` decide, and carries it out.

One per run. It believes what it sees itself: connections that close, heartbeats that stay away, ranks that
make no progress; never Ray's table of nodes, which is up to a minute old. It keeps nothing that the agents
do not know as well, so it may be killed and started again while the ranks go on.

It is long because here, and nowhere else, what agents say becomes events, and decisions become messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from forge.checkpoint.manifest import step_name
from forge.checkpoint.writer_process import MEMBERSHIP_DIGITS
from forge.elastic.commands import AgentConnection, find_spare, flush_commands, start_commands
from forge.elastic.hang_detector import HangDetector, StepTimes
from forge.elastic.membership import RECOVERY_S, decide, newest_complete_step
from forge.elastic.replicas.store import locations_from_record
from forge.elastic.rpc import Channel, Endpoint, Listener, Message
from forge.elastic.states import (
    Action,
    AgentAttached,
    AgentStopped,
    ChangeMembership,
    CheckpointCommitted,
    ClaimSlots,
    DrainGeneration,
    DropReplicas,
    EndReason,
    Event,
    FailRun,
    FinishRun,
    FlushToStorage,
    GenerationReady,
    HangDetected,
    MembershipState,
    NodeLost,
    NodeReady,
    Phase,
    PreemptionNotice,
    RankEnded,
    ReleaseSlots,
    ReplaceNode,
    ReplicasHeld,
    SlotsChanged,
    StartGeneration,
    StopGeneration,
    StopRequested,
    Tick,
    WaitForNodes,
    YieldRequested,
)
from forge.events import (
    CheckpointFailed,
    CheckpointSaved,
    CostUpdated,
    GenerationStarted,
    GenerationStarting,
    MembershipChangeStarted,
    NodeJoined,
    NodeLeft,
    PreemptionNoticeReceived,
    RankHung,
    RankLocation,
    WaitingForMachines,
)
from forge.events import Event as News
from forge.pricing.budget import CostMeter

_TICK_S = 0.1
# Heartbeats of all agents together, a second.
_MOST_BEATS_PER_S = 10_000
_BEAT_S = 0.25
# A machine that has not been heard of for so long is lost; in a large cluster, after so many beats.
_SILENCE_S = 3.0
_SILENCE_BEATS = 8
# A rank makes progress within this time and this multiple of a long step.
_HANG_S = 5.0
_HANG_STEPS = 4
# While a generation forms, nothing may be seen of it for so long; the first one has the model to initialise.
_FORMING_S = 20.0
_FIRST_FORMING_S = 300.0
# Ranks need a moment to write their stacks down before they are killed.
_DUMP_S = 0.3
# What a planned change needs beyond two steps: to be heard of, and to copy the state.
_LEAVE_S = 1.5
_PERSIST_AGAIN_S = 5.0
# Two notices of a machine count as one if the second deadline is later, or earlier by less than this.
_SAME_S = 1.0


class Placement(Protocol):
    """The assignment that the cluster gives a run, and the agents on them."""

    def slots_of(self, node: str) -> tuple[int, int] | None:
        """An agent's slots now, and how many of them are guaranteed; None if the node is not known."""

    def claim_slots(self) -> None:
        """Ask for as many assignment as the job allows."""

    def set_used(self, used: Mapping[str, int]) -> None:
        """So many assignment of each node have ranks at work now."""

    def release_unused(self) -> None:
        """Keep no more assignment than are used, and do not ask for more than the smallest number."""

    def replace_node(self, node: str, *, seconds_left: float | None) -> None:
        """A node will go: have the cluster give it nothing new, and ask for another."""

    def agent_lost(self, node: str) -> None:
        """An agent is gone; if its place is still ours, another is to be started there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    step: int
    error: str | None = None
    """The class's name in `forge.errors`."""
    reason: str = ""
    """Of the error; or why the supervisor itself has stopped the run."""


@dataclass(slots=True, kw_only=True)
class _Generation:
    """What is known of the generation beyond its assignment."""

    pids: dict[int, int] = field(default_factory=dict)
    hang_detector: HangDetector = field(default_factory=HangDetector)
    is_accused: bool = False
    """A rank of it was found to hang; its stacks are being written."""


class Supervisor:
    """The one that decides for a run."""

    def __init__(
        self,
        state: MembershipState,
        *,
        placement: Placement,
        record_event: Callable[[News], None],
        checkpoints: str,
        meter: CostMeter,
        former_generation: int = 0,
        stored_step: int = 0,
        is_restarted: bool = False,
        findings: Message | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        state: before anything has happened: the smallest and the largest number of workers.
        record_event: writes an event down.
        checkpoints: where the run's checkpoints go.
        meter: counts what the machines cost.
        former_generation: the last of the run so far; its number is not given twice.
        stored_step: the newest step in storage.
        is_restarted: agents of a supervisor before this one are there, perhaps with ranks at work.
        findings: what another run of the same model has found out on these machines.
        """
        self.state = replace(
            state,
            former_generation=former_generation,
            stored_step=stored_step,
            recovery_deadline=clock() + RECOVERY_S if is_restarted else None,
        )
        self._claims, self._tell, self._checkpoints, self._clock = placement, record_event, checkpoints, clock
        self._meter, self._stop_reason = meter, ""
        self._connections: dict[str, AgentConnection] = {}
        self._generation = _Generation()
        self._findings, self._has_formed = findings, is_restarted
        self._holdings: dict[str, list[list[int]]] = {}
        self._joined: set[str] = set()
        self._steps = StepTimes()
        self._changed_at: float | None = None
        self._leave_s = _LEAVE_S
        self._ticked_at = clock()
        self._heartbeat_s = _BEAT_S
        self._persists: dict[int, float] = {}
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def findings(self) -> Message | None:
        """What is known of model and machines; see `forge.train.worker.Findings`."""
        return self._findings

    def listen(self, *, host: str, secret: bytes) -> Endpoint:
        """Let agents connect. Returns: where."""
        self._listener = Listener(host=host, secret=secret, serve=self._serve)
        self._keep(self._tick_forever())
        return self._listener.endpoint

    def stop(self) -> None:
        """Checkpoint, then end the run."""
        self.apply(StopRequested())
        self._wish("STOP")

    def yield_slots(self) -> None:
        """Another run waits for its smallest number of workers."""
        self.apply(YieldRequested())

    def update_slots(self, node: str, *, num_slots: int, num_guaranteed: int, devices: Sequence[str]) -> None:
        """The cluster has changed its mind about how many ranks fit on a node, and on which devices."""
        self._send(node, {"command": "set_devices", "devices": list(devices)})
        self.apply(SlotsChanged(node=node, num_slots=num_slots, num_guaranteed=num_guaranteed))

    def announce_preemption(self, node: str, *, source: str, seconds_left: float | None) -> None:
        """A machine will be taken away; may be said again and again."""
        preempted_at = self._clock() + (seconds_left or 0.0)
        known = self.state.nodes.get(node)
        if known is None or (known.preempted_at is not None and preempted_at > known.preempted_at - _SAME_S):
            return
        self._tell(PreemptionNoticeReceived(node=node, source=source, seconds_left=seconds_left))
        self.apply(PreemptionNotice(node=node, preempted_at=preempted_at))

    def close(self) -> None:
        """Send all agents home."""
        for connection in self._connections.values():
            connection.send({"command": "shut_down"})
        for task in list(self._tasks):
            task.cancel()

    # --- what comes in

    def attach(self, connection: AgentConnection, hello: Message) -> None:
        """An agent has connected."""
        former = self._connections.pop(connection.node, None)
        if former is not None:
            former.close()
        self._connections[connection.node] = connection
        self._pace()
        connection.send({"command": "set_heartbeat", "heartbeat_s": self._heartbeat_s})
        for rank, pid in hello["pids"].items():
            if hello["generation"] == self.state.generation or self.state.generation == 0:
                self._generation.pids[int(rank)] = pid
        self._meter.add_agent(connection.node, host=connection.host, usd_per_hour=hello["usd_per_hour"])
        self._holdings[connection.node] = hello["replicas"]
        self._findings = self._findings or hello["findings"]
        num_slots, num_guaranteed = self._claims.slots_of(connection.node) or (
            hello["num_slots"],
            hello["num_guaranteed"],
        )
        self.apply(
            AgentAttached(
                node=connection.node,
                num_slots=num_slots,
                num_guaranteed=num_guaranteed,
                is_ready=hello["is_ready"],
                replicas=locations_from_record(hello["replicas"]),
                generation=hello["generation"],
                running_ranks={int(rank): size for rank, size in hello["running_ranks"].items()},
            )
        )
        if hello["running_ranks"]:  # of a supervisor before this one
            self._claims.set_used(Counter(self.state.assignment))
        if hello["is_ready"]:
            self._tell_joined(connection.node)
        if self.state.phase is Phase.DRAINING:  # it may not have heard the wish
            self._wish("DRAIN")
        if self.state.is_stopping:
            self._wish("STOP")

    def detach(self, connection: AgentConnection, reason: str) -> None:
        """An agent's connection is closed."""
        if self._connections.get(connection.node) is not connection:
            return
        del self._connections[connection.node]
        self._holdings.pop(connection.node, None)
        self._meter.remove_agent(connection.node)
        self._pace()
        if connection.node in self._joined:
            self._joined.discard(connection.node)
            self._tell(NodeLeft(node=connection.node, reason=reason))
        self._claims.agent_lost(connection.node)
        self.apply(NodeLost(node=connection.node, reason=reason))
        assignment = set(self.state.assignment)
        if len(assignment) == 1 and self.state.phase in (Phase.STARTING, Phase.TRAINING, Phase.DRAINING):
            self._replace_spare(*assignment)

    def receive(self, connection: AgentConnection, message: Message) -> None:
        """An agent has said something."""
        node, now = connection.node, self._clock()
        connection.heard_at = now
        match message["report"]:
            case "heartbeat":
                self._beat(connection, message, now)
            case "ready":
                self.apply(NodeReady(node=node, is_ready=message["is_ready"]))
                if message["is_ready"]:
                    self._tell_joined(node)
            case "forked":
                if message["generation"] == self.state.generation:
                    self._generation.pids[message["rank"]] = message["pid"]
            case "started":
                self._formed(message["started"])
            case "findings":
                self._findings = message["findings"]
            case "ended":
                self.apply(
                    RankEnded(
                        generation=message["generation"],
                        rank=message["rank"],
                        end=EndReason(message["end"]),
                        step=message["step"],
                        reason=message["reason"],
                        error=message["error"] or "RunError",
                    )
                )
            case "stopped":
                self._holdings[node] = message["replicas"]
                replicas = locations_from_record(message["replicas"])
                self.apply(AgentStopped(node=node, generation=message["generation"], replicas=replicas))
            case "preemption":
                self._notice(connection, message)
            case "rendezvous":
                connection.rendezvous_port = message["port"]
            case "checkpoint_committed":
                self.apply(CheckpointCommitted(step=message["step"]))
            case "flushed":
                self._persisted(message)

    def apply(self, event: Event) -> None:
        """Decide what follows from an event, and carry it out."""
        began = time.monotonic()
        self.state, actions = decide(self.state, event, now=self._clock())
        for action in actions:
            self._perform(action, decided_in_s=time.monotonic() - began)

    async def _serve(self, channel: Channel) -> None:
        """One agent's connection, from its hello to its end."""
        hello = await channel.receive()
        if hello.get("report") != "register":
            return
        connection = AgentConnection(
            node=hello["node"],
            host=hello["host"],
            endpoint=tuple(hello["endpoint"]),
            rendezvous_port=hello["rendezvous_port"],
            agent_pid=hello["pid"],
            send=lambda message: self._keep(_send(channel, message)),
            close=channel.close,
            heard_at=self._clock(),
        )
        self.attach(connection, hello)
        try:
            while True:
                self.receive(connection, await channel.receive())
        finally:
            self.detach(connection, "its connection closed")

    def _beat(self, connection: AgentConnection, message: Message, now: float) -> None:
        if message["generation"] == self.state.generation:
            for rank, silent_ms, step, step_ns, is_halted in message["ranks"]:
                silent_s = silent_ms / 1000
                self._generation.hang_detector.update(rank, silent_s=silent_s, is_halted=bool(is_halted), now=now)
                self._steps.add(step, step_ns / 1e9)
        if "replicas" in message:
            self._holdings[connection.node] = message["replicas"]
            self.apply(ReplicasHeld(node=connection.node, replicas=locations_from_record(message["replicas"])))

    def _notice(self, connection: AgentConnection, message: Message) -> None:
        left_s = message["seconds_left"]
        if message["is_certain"]:
            self.announce_preemption(connection.node, source=message["source"], seconds_left=left_s)
        else:  # only a risk: have another machine ready
            source = message["source"]
            self._tell(
                PreemptionNoticeReceived(node=connection.node, source=source, seconds_left=left_s, is_certain=False)
            )
            self._claims.replace_node(connection.node, seconds_left=None)

    def _formed(self, formed: Message) -> None:
        if formed["generation"] != self.state.generation:
            return
        ranks = tuple(
            RankLocation(rank=rank, node=node, pid=self._generation.pids.get(rank, 0))
            for rank, node in enumerate(self.state.assignment)
        )
        self._tell(GenerationStarted(**formed | {"ranks": ranks}))
        self._has_formed = True
        self.apply(GenerationReady(generation=formed["generation"]))

    def _persisted(self, message: Message) -> None:
        began = self._persists.pop(message["step"], self._clock())
        if not message["size_bytes"]:
            self._tell(
                CheckpointFailed(step=message["step"], reason="the snapshots could not be written to storage")
            )
            self._keep(self._persist_again())
            return
        self._tell(
            CheckpointSaved(
                step=message["step"],
                folder=f"{self._checkpoints}/{step_name(message['step'])}",
                size_bytes=message["size_bytes"],
                seconds=self._clock() - began,
                stall_s=0.0,
            )
        )
        self.apply(CheckpointCommitted(step=message["step"]))

    async def _persist_again(self) -> None:
        """Storage that fails may be back soon; nothing is lost meanwhile."""
        await asyncio.sleep(_PERSIST_AGAIN_S)
        found = newest_complete_step(self.state)
        if self.state.phase is Phase.WAITING and found is not None and found[0] > self.state.stored_step:
            self._persist(FlushToStorage(step=found[0], generation=found[1], world_size=found[2]))

    def _tell_joined(self, node: str) -> None:
        if node not in self._joined and node in self._connections:
            self._joined.add(node)
            connection, known = self._connections[node], self.state.nodes.get(node)
            num_slots = known.num_slots if known else 0
            self._tell(
                NodeJoined(node=node, host=connection.host, num_slots=num_slots, agent_pid=connection.agent_pid)
            )

    # --- time

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()

    def tick(self) -> None:
        """Look at what has not happened."""
        now = self._clock()
        late_s, self._ticked_at = now - self._ticked_at - _TICK_S, now
        if late_s > 1.0:  # it was this process that was not listening
            for connection in self._connections.values():
                connection.heard_at += late_s
        silence_s = max(_SILENCE_S, _SILENCE_BEATS * self._heartbeat_s)
        for connection in [
            connection for connection in self._connections.values() if now - connection.heard_at > silence_s
        ]:
            connection.close()
            self.detach(connection, f"not heard of for {now - connection.heard_at:.1f} s")
        self._look_for_hang(now)
        self._look_at_cost(now)
        self.apply(Tick(margin_s=2 * self._steps.p99_s + self._leave_s))

    def _look_for_hang(self, now: float) -> None:
        generation = self._generation
        if self.state.phase not in (Phase.STARTING, Phase.TRAINING, Phase.DRAINING) or generation.is_accused:
            return
        if self.state.phase is Phase.STARTING:
            limit_s = _FORMING_S if self._findings and self._has_formed else _FIRST_FORMING_S
        else:
            limit_s = max(_HANG_S, _HANG_STEPS * self._steps.p99_s)
        silence = generation.hang_detector.find_stalled_rank(limit_s=limit_s, now=now)
        if silence is not None:
            generation.is_accused = True
            self._broadcast({"command": "dump_stacks", "generation": self.state.generation})
            self._keep(self._accuse(self.state.generation, silence.rank, silent_s=silence.seconds))

    def _look_at_cost(self, now: float) -> None:
        """Stop, with a checkpoint, when the run costs more than it may."""
        self._meter.count(now)
        if self._meter.take_report(now):
            self._tell(CostUpdated(usd=self._meter.spent_usd, usd_per_hour=self._meter.usd_per_hour))
        if not self.state.is_stopping and (violation := self._meter.violation()):
            self._stop_reason = violation
            self.stop()

    async def _accuse(self, generation: int, rank: int, *, silent_s: float) -> None:
        await asyncio.sleep(_DUMP_S)
        if generation == self.state.generation and rank < len(self.state.assignment):
            place = self.state.assignment[rank]
            self._tell(RankHung(generation=generation, rank=rank, node=place, silent_s=silent_s))
        self.apply(HangDetected(generation=generation, rank=rank, silent_s=silent_s))

    def _pace(self) -> None:
        """Many agents speak less often."""
        heartbeat_s = max(_BEAT_S, len(self._connections) / _MOST_BEATS_PER_S)
        if abs(heartbeat_s - self._heartbeat_s) > 0.1 * self._heartbeat_s:
            self._heartbeat_s = heartbeat_s
            self._broadcast({"command": "set_heartbeat", "heartbeat_s": heartbeat_s})

    # --- what goes out

    def _perform(self, action: Action, *, decided_in_s: float) -> None:
        now = self._clock()
        match action:
            case StartGeneration():
                self._start(action, decided_in_s=decided_in_s)
            case StopGeneration():
                stop = {"command": "stop", "generation": action.generation, "keep_replicas": action.keep_replicas}
                self._send(action.node, stop)
            case DrainGeneration():
                self._wish("DRAIN")
            case DropReplicas():
                self._broadcast({"command": "drop_replicas", "generation": action.generation})
            case FlushToStorage():
                self._persist(action)
            case WaitForNodes():
                self._tell(WaitingForMachines(have=action.have, need=action.need))
            case ChangeMembership():
                self._changed_at = now
                self._tell(
                    MembershipChangeStarted(
                        generation=action.generation,
                        cause=action.cause,
                        reason=action.reason,
                        seconds_since_cause=action.silent_s,
                    )
                )
            case ReplaceNode():
                preempted_at = self.state.nodes[action.node].preempted_at
                self._claims.replace_node(
                    action.node, seconds_left=None if preempted_at is None else preempted_at - now
                )
            case ReleaseSlots():
                self._claims.set_used(Counter(self.state.assignment))
                self._claims.release_unused()
            case ClaimSlots():
                self._claims.claim_slots()
            case FinishRun():
                self._end(Outcome(step=action.step, reason=self._stop_reason))
            case FailRun():
                self._end(Outcome(step=0, error=action.error, reason=action.reason))

    def _start(self, start: StartGeneration, *, decided_in_s: float) -> None:
        now = self._clock()
        source = "memory" if start.source else "storage"
        self._tell(
            GenerationStarting(
                generation=start.generation, world_size=len(start.assignment), from_step=start.step, source=source
            )
        )
        laps = {"decide": round(decided_in_s, 4)}
        if self._changed_at is not None:
            laps = {"stop": round(now - self._changed_at, 3)} | laps
        self._changed_at = None
        self._generation = _Generation()
        self._claims.set_used(Counter(start.assignment))
        orders = start_commands(start, self.state, self._connections, findings=self._findings, laps=laps)
        for node, order in orders.items():
            self._send(node, order)

    def _replace_spare(self, node: str) -> None:
        """A machine at work alone keeps its copies on one without ranks; that may be the one that was lost."""
        spare = find_spare(node, self.state, self._connections)
        endpoint = None if spare is None else list(self._connections[spare].endpoint)
        self._send(node, {"command": "set_peer", "generation": self.state.generation, "peer": endpoint})

    def _persist(self, action: FlushToStorage) -> None:
        self._persists[action.step] = self._clock()
        token = secrets.token_hex(MEMBERSHIP_DIGITS // 2) + "0001"
        for node, order in flush_commands(action, self.state, token=token).items():
            self._send(node, order)

    def _wish(self, word: str) -> None:
        """Tell the first rank's agent what is wished of the generation."""
        if self.state.assignment:
            wish = {"command": "set_flag", "generation": self.state.generation, "flag": word}
            self._send(self.state.assignment[0], wish)

    def _end(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            if self._meter.spent_usd:
                self._tell(CostUpdated(usd=self._meter.spent_usd, usd_per_hour=self._meter.usd_per_hour))
            self.outcome.set_result(outcome)

    def _send(self, node: str, message: Message) -> None:
        if node in self._connections:
            self._connections[node].send(message)

    def _broadcast(self, message: Message) -> None:
        for connection in self._connections.values():
            connection.send(message)

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _send(channel: Channel, message: Message) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever reads from it sees that it is closed
        await channel.send(message)
