"""Runs a training job's membership: agents' reports become events, decisions become commands to agents.

One supervisor per run. It relies only on its own observations (closed connections, missing heartbeats, ranks
without progress), never on Ray's table of nodes, which is up to a minute old. The agents know everything that it
stores, so it can be killed and restarted while the ranks continue.

The module is long (over 400 lines) because every report, timer and action works on the same state.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from forge import events
from forge.elastic import states
from forge.elastic.agent_channel import AgentChannel
from forge.elastic.agent_connections import AgentConnection, AgentConnections, accept_agent
from forge.elastic.background import BackgroundTasks
from forge.elastic.commands import find_spare, start_commands
from forge.elastic.deadline_watch import DeadlineWatch
from forge.elastic.flush_coordinator import FlushCoordinator
from forge.elastic.gpu_watch import GpuWatch
from forge.elastic.hang_detector import HangDetector, StepTimes
from forge.elastic.loss_history import LossHistory
from forge.elastic.membership import RECOVERY_S, decide
from forge.elastic.messages import SharedMessage
from forge.elastic.placement import Placement
from forge.elastic.reports import attached_from, event_from, failure_cause
from forge.elastic.rpc import Channel, Endpoint, Listener, Message
from forge.elastic.source_shards import SourceWriter
from forge.elastic.states import Action, Event, MembershipState, Phase
from forge.elastic.straggler_watch import NOTICE_S, StragglerWatch
from forge.pricing.budget import CostMeter

_TICK_S = 0.1
# A tick that is later than this was delayed by this process, not by the agents.
_LATE_TICK_S = 1.0
# Ranks need a moment to write their stacks to their logs before they are killed.
_STACK_DUMP_S = 0.3
# What a planned change takes beyond two steps: delivering the request and copying the state.
_DRAIN_S = 1.5
_FLUSH_RETRY_S = 5.0
# Two notices of a node count as one if the second deadline is later, or earlier by less than this.
_SAME_DEADLINE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended."""

    step: int
    error: str | None = None
    """The name of the class in `forge.errors`."""
    reason: str = ""
    """Of the error, or why the supervisor itself stopped the run."""


class Supervisor:
    """Decides the membership of one run and executes the decisions."""

    def __init__(
        self,
        state: MembershipState,
        *,
        placement: Placement,
        record_event: Callable[[events.Event], None],
        checkpoints: str,
        meter: CostMeter,
        former_generation: int = 0,
        stored_step: int = 0,
        is_restarted: bool = False,
        losses: LossHistory | None = None,
        deadlines: Sequence[DeadlineWatch] = (),
        stragglers: StragglerWatch | None = None,
        gpus: GpuWatch | None = None,
        compile_failures: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        state: the initial state: the minimum and maximum number of workers.
        record_event: writes an event to the run's record.
        checkpoints: folder or URL of the run's checkpoints.
        meter: measures what the nodes cost.
        former_generation: the run's last generation so far; its number is not used again.
        stored_step: the newest step in durable storage.
        is_restarted: a supervisor ran before this one, and its agents may have running ranks.
        losses: with `checkpoint.every: auto`, what the run has lost so far.
        deadlines: of `resources.deadline` and `resources.max_hours`.
        stragglers: names nodes that slow the others down; None: nothing does.
        gpus: names nodes whose GPUs are too small; None: nothing does.
        compile_failures: reasons of those that the run has recorded before.
        """
        self.state = replace(
            state,
            former_generation=former_generation,
            stored_step=stored_step,
            recovery_deadline=clock() + RECOVERY_S if is_restarted else None,
        )
        self._placement, self._record_event, self._meter, self._clock = placement, record_event, meter, clock
        self._losses, self._deadlines, self._stragglers, self._gpus = losses, deadlines, stragglers, gpus
        self._compile_causes = {failure_cause(reason) for reason in compile_failures}
        self._sources = SourceWriter()
        self._stop_reason = ""
        self._connections = AgentConnections()
        self._has_started = is_restarted
        self._pids: dict[int, int] = {}
        """Of the current generation's ranks."""
        self._steps = StepTimes()
        self._hang_detector = HangDetector()
        self._joined: set[str] = set()
        self._changed_at: float | None = None
        self._ticked_at = clock()
        self._tasks = BackgroundTasks()
        self._flushes = FlushCoordinator(
            self._connections, checkpoints=checkpoints, record_event=record_event, clock=clock
        )
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def listen(self, *, host: str, secret: bytes) -> Endpoint:
        """Accept agents. Returns: the endpoint they connect to."""
        self._listener = Listener(host=host, secret=secret, serve=self._serve)
        self._tasks.start(self._tick_forever())
        return self._listener.endpoint

    def stop(self) -> None:
        """Write a checkpoint, then end the run."""
        self.apply(states.StopRequested())
        self._set_flag("STOP")

    def yield_slots(self) -> None:
        """Release workers above the minimum, because another run is waiting for its minimum."""
        self.apply(states.YieldRequested())

    def update_slots(self, node: str, *, num_slots: int, num_guaranteed: int, devices: Sequence[str]) -> None:
        """The cluster has changed how many ranks fit on a node, or on which devices."""
        self._connections.send(node, {"command": "set_devices", "devices": list(devices)})
        self.apply(states.SlotsChanged(node=node, num_slots=num_slots, num_guaranteed=num_guaranteed))

    def announce_preemption(self, node: str, *, source: str, seconds_left: float | None) -> None:
        """A node will be taken away; repetitions of a notice are ignored."""
        preempted_at = self._clock() + (seconds_left or 0.0)
        known = self.state.nodes.get(node)
        if known is None or (
            known.preempted_at is not None and preempted_at > known.preempted_at - _SAME_DEADLINE_S
        ):
            return
        if not any(watch.has_returned(node) for watch in self._deadlines):  # a machine that forge itself gives up
            self._record_event(events.PreemptionNoticeReceived(node=node, source=source, seconds_left=seconds_left))
        self.apply(states.PreemptionNotice(node=node, preempted_at=preempted_at))

    def close(self) -> None:
        """Shut down all agents."""
        self._connections.broadcast({"command": "shut_down"})
        for watch in self._deadlines:
            watch.close()
        self._tasks.cancel()

    # --- connections

    def attach(self, connection: AgentConnection, *, registration: Message) -> None:
        """An agent has connected and registered."""
        node = connection.node
        self._connections.add(connection)
        for rank, pid in registration["pids"].items():
            if registration["generation"] == self.state.generation or self.state.generation == 0:
                self._pids[int(rank)] = pid
        self._meter.add_agent(
            node,
            host=connection.host,
            usd_per_hour=registration["usd_per_hour"],
            saving_usd_per_hour=registration.get("saving_usd_per_hour", 0.0),
        )
        self._note_gpu(connection, registration.get("gpu"))
        attached = attached_from(registration, slots=self._placement.slots_of(node))
        if registration["is_ready"]:
            self._record_joined(node, num_slots=attached.num_slots)
        self.apply(attached)
        if registration["running_ranks"]:  # started by a supervisor before this one
            self._placement.set_used(Counter(self.state.assignment))
        if self.state.phase is Phase.DRAINING:  # the flag may have been lost with the connection
            self._set_flag("DRAIN")
        if self.state.is_stopping:
            self._set_flag("STOP")

    def detach(self, connection: AgentConnection, *, reason: str) -> None:
        """Handle the end of an agent's connection."""
        node = connection.node
        if not self._connections.remove(connection):
            return
        self._meter.remove_agent(node)
        if node in self._joined:
            self._joined.discard(node)
            self._record_event(events.NodeLeft(node=node, reason=reason))
        self._placement.agent_lost(node)
        self.apply(states.NodeLost(node=node, reason=reason))
        if self.state.phase in (Phase.STARTING, Phase.TRAINING, Phase.DRAINING):
            assigned = set(self.state.assignment)
            if len(assigned) == 1:
                self._replace_spare(*assigned)

    async def _serve(self, channel: Channel) -> None:
        """Serve one agent's connection from its registration to its end."""
        registration = await channel.receive()
        if registration.get("report") != "register":
            return
        agent = AgentChannel(channel)
        connection = accept_agent(registration, agent, now=self._clock())
        self.attach(connection, registration=registration)
        try:
            await agent.receive_all(lambda report: self.receive(connection, report))
        finally:
            self.detach(connection, reason="its connection closed")

    # --- reports of agents

    def receive(self, connection: AgentConnection, report: Message) -> None:
        """Handle one report of an agent."""
        node, now = connection.node, self._clock()
        connection.heard_at = now
        match report["report"]:
            case "heartbeat":  # thousands per second
                self._note_progress(report, now)
                if self._stragglers is not None:
                    self._stragglers.note(node, report, state=self.state)
                if (event := event_from(report, node=node)) is not None:
                    self.apply(event)
                return
            case "forked" if report["generation"] == self.state.generation:
                self._pids[report["rank"]] = report["pid"]
            case "compile_failed":
                self._note_compile_failure(node, reason=report["reason"], seconds=report["seconds"])
            case "gpu":
                self._note_gpu(connection, report["gpu"])
            case "started":
                self._generation_started(report["started"])
            case "preemption":
                self._preemption_reported(node, report)
            case "rendezvous":
                connection.rendezvous_port = report["port"]
            case "flushed":
                self._flush_ended(report)
        event = event_from(report, node=node)
        known = self.state.nodes.get(node)
        if isinstance(event, states.NodeReady) and event.is_ready:
            self._record_joined(node, num_slots=known.num_slots if known else 0)
        if event is not None:
            self.apply(event)
        if isinstance(event, states.NodeReady) and not event.is_ready:
            self._note_failed_start(node, event)

    def _note_gpu(self, connection: AgentConnection, gpu: Sequence[Any] | None) -> None:
        """Note name and memory of the smallest GPU of a node; None: it has none, or does not know yet."""
        if gpu is None:
            return
        name, memory_bytes = str(gpu[0]), int(gpu[1])
        if self._stragglers is not None:
            self._stragglers.note_device(connection.node, name)
        if self._gpus is not None:
            host, state = connection.host, self.state
            self._gpus.note(connection.node, name=name, memory_bytes=memory_bytes, host=host, state=state)

    def _note_compile_failure(self, node: str, *, reason: str, seconds: float) -> None:
        """Record why layers run uncompiled, once for each cause, whatever rank of whatever generation it is."""
        if (cause := failure_cause(reason)) not in self._compile_causes:
            self._compile_causes.add(cause)
            self._record_event(events.CompileFailed(reason=reason, seconds=seconds, node=node))

    def _note_failed_start(self, node: str, failed: states.NodeReady) -> None:
        member = self.state.nodes.get(node)
        if member is not None and member.num_failed_starts == 1:  # the next ones are not listed
            self._record_event(events.ForkServerFailed(node=node, reason=failed.reason))

    def apply(self, event: Event) -> None:
        """Decide on an event and execute the actions."""
        began = time.monotonic()
        self.state, actions = decide(self.state, event, now=self._clock())
        for action in actions:
            self._perform(action, decided_in_s=time.monotonic() - began)

    def _note_progress(self, heartbeat: Message, now: float) -> None:
        if heartbeat["generation"] == self.state.generation:
            for rank, silent_ms, step, step_ns, is_suspended in heartbeat["ranks"]:
                self._hang_detector.update(
                    rank, silent_s=silent_ms / 1000, is_suspended=bool(is_suspended), now=now
                )
                self._steps.add(step, seconds=step_ns / 1e9, num_workers=len(self.state.assignment))

    def _preemption_reported(self, node: str, report: Message) -> None:
        source, left_s = report["source"], report["seconds_left"]
        if report["is_certain"]:
            self.announce_preemption(node, source=source, seconds_left=left_s)
            return
        # Only a risk: ask for another node, and continue on this one.
        self._record_event(
            events.PreemptionNoticeReceived(node=node, source=source, seconds_left=left_s, is_certain=False)
        )
        self._placement.replace_node(node, seconds_left=None)

    def _generation_started(self, started: Message) -> None:
        if started["generation"] != self.state.generation:
            return
        ranks = tuple(
            events.RankLocation(rank=rank, node=node, pid=self._pids.get(rank))
            for rank, node in enumerate(self.state.assignment)
        )
        self._record_event(events.GenerationStarted(**started | {"ranks": ranks}))
        self._has_started = True
        self.apply(states.GenerationReady(generation=started["generation"]))

    def _flush_ended(self, report: Message) -> None:
        if self._flushes.finish(report):
            self.apply(states.CheckpointCommitted(step=report["step"]))
        else:
            self._tasks.start(self._flushes.retry(lambda: self.state))

    def _record_joined(self, node: str, *, num_slots: int) -> None:
        """Record that a node is available, before the generation that it makes possible."""
        if node not in self._joined and node in self._connections:
            self._joined.add(node)
            connection = self._connections[node]
            joined = events.NodeJoined(
                node=node, host=connection.host, num_slots=num_slots, agent_pid=connection.agent_pid
            )
            self._record_event(joined)

    # --- checks that time triggers

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()

    def tick(self) -> None:
        """Check for silent agents, stalled ranks and the budget, and let time pass in the membership state."""
        now = self._clock()
        late_s, self._ticked_at = now - self._ticked_at - _TICK_S, now
        if late_s > _LATE_TICK_S:
            self._connections.excuse_silence(late_s)
        for connection in self._connections.silent(now):
            connection.close()
            self.detach(connection, reason=f"no heartbeat for {now - connection.heard_at:.1f} s")
        self._check_progress(now)
        self._check_cost(now)
        for watch in self._deadlines:
            watch.check(
                state=self.state,
                connections=self._connections,
                step=self._steps.last_step or self.state.stored_step,
                step_worker_s=self._steps.worker_s,
            )
        if self._stragglers is not None:
            for node in self._stragglers.check(self.state, self._connections, now=now):
                self.announce_preemption(node, source="straggler", seconds_left=NOTICE_S)
        if self.state.phase is Phase.TRAINING:
            for node, command in self._sources.announcements(self.state, connections=self._connections).items():
                self._connections.send(node, command)
        self.apply(states.Tick(margin_s=2 * self._steps.p99_s + _DRAIN_S))

    def _check_progress(self, now: float) -> None:
        is_first = not self._has_started
        limit_s = self._steps.stall_limit_s(self.state.phase, is_first=is_first)
        stalled = self._hang_detector.find_stalled_rank(limit_s=limit_s, now=now)
        if stalled is not None:
            self._steps.note_hang(stalled)
            generation = self.state.generation
            self._connections.broadcast({"command": "dump_stacks", "generation": generation})
            self._tasks.start(self._report_hang(generation, stalled.rank, silent_s=stalled.seconds))

    async def _report_hang(self, generation: int, rank: int, *, silent_s: float) -> None:
        await asyncio.sleep(_STACK_DUMP_S)
        if generation == self.state.generation and rank < len(self.state.assignment):
            node = self.state.assignment[rank]
            self._record_event(events.RankHung(generation=generation, rank=rank, node=node, silent_s=silent_s))
        self.apply(states.HangDetected(generation=generation, rank=rank, silent_s=silent_s))

    def _check_cost(self, now: float) -> None:
        """Stop with a checkpoint if the run exceeds its budget."""
        self._meter.count(now)
        if self._meter.take_report(now):
            self._record_event(self._meter.cost())
        if not self.state.is_stopping and (violation := self._meter.violation()):
            self._stop_reason = violation
            self._record_event(self._meter.cost())
            self.stop()

    # --- actions

    def _perform(self, action: Action, *, decided_in_s: float) -> None:
        match action:
            case states.StartGeneration():
                self._start(action, decided_in_s=decided_in_s)
            case states.StopGeneration(node=node, generation=generation, keep_replicas=keep_replicas):
                self._connections.send(node, _stop_command(generation, keep_replicas=keep_replicas))
            case states.DrainGeneration():
                self._set_flag("DRAIN")
            case states.DropReplicas(generation=generation):
                self._connections.broadcast({"command": "drop_replicas", "generation": generation})
            case states.FlushToStorage():
                self._flushes.start(action, state=self.state)
            case states.WaitForNodes(have=have, need=need):
                self._record_event(events.WaitingForMachines(have=have, need=need))
            case states.ChangeMembership():
                self._changed_at = self._clock()
                self._record_event(
                    events.MembershipChangeStarted(
                        generation=action.generation,
                        cause=action.cause,
                        reason=action.reason,
                        seconds_since_cause=action.silent_s,
                    )
                )
            case states.ReplaceNode(node=node):
                preempted_at = self.state.nodes[node].preempted_at
                left_s = None if preempted_at is None else preempted_at - self._clock()
                self._placement.replace_node(node, seconds_left=left_s)
            case states.ReleaseSlots():
                self._placement.set_used(Counter(self.state.assignment))
                self._placement.release_unused()
            case states.ClaimSlots():
                self._placement.claim_slots()
            case states.FinishRun(step=step):
                self._end(Outcome(step=step, reason=self._stop_reason))
            case states.FailRun(error=error, reason=reason):
                self._end(Outcome(step=0, error=error, reason=reason))

    def _start(self, start: states.StartGeneration, *, decided_in_s: float) -> None:
        self._record_event(
            events.GenerationStarting(
                generation=start.generation,
                world_size=len(start.assignment),
                from_step=start.step,
                source="memory" if start.source else "storage",
                num_spare=start.num_spare,
                num_split_groups=start.num_split_groups,
                num_shard_groups=start.num_shard_groups,
                parts_per_shard=start.parts_per_shard,
            )
        )
        if self._gpus is not None:
            self._gpus.check(self.state)
        laps = {"decide": round(decided_in_s, 4)}
        if self._changed_at is not None:
            laps = {"stop": round(self._clock() - self._changed_at, 3)} | laps
        self._changed_at = None
        self._pids, self._hang_detector = {}, HangDetector()
        self._placement.set_used(Counter(start.assignment))
        nodes_mtbf_s = [self._connections[node].mtbf_s for node in set(start.assignment)]
        risk = self._losses.risk(nodes_mtbf_s=nodes_mtbf_s) if self._losses else None
        commands = start_commands(
            start,
            state=self.state,
            connections=self._connections,
            laps=laps,
            sources=self._sources,
            checkpoint_risk=risk,
        )
        for node, command in commands.items():
            self._connections.send(node, command)

    def _replace_spare(self, node: str) -> None:
        """Choose another node to keep replicas if only one node has ranks; the former one may be lost."""
        spare = find_spare(node, state=self.state, connections=self._connections)
        endpoint = None if spare is None else list(self._connections[spare].endpoint)
        generation = self.state.generation
        self._connections.send(node, {"command": "set_peer", "generation": generation, "peer": endpoint})

    def _set_flag(self, flag: str) -> None:
        """Set a control flag of rank 0: `STOP` or `DRAIN`."""
        if self.state.assignment:
            set_flag = {"command": "set_flag", "generation": self.state.generation, "flag": flag}
            self._connections.send(self.state.assignment[0], set_flag)

    def _end(self, outcome: Outcome) -> None:
        if not self.outcome.done():
            if self._meter.spent_usd:
                self._record_event(self._meter.cost())
            self.outcome.set_result(outcome)


@functools.lru_cache(maxsize=2)
def _stop_command(generation: int, *, keep_replicas: bool) -> SharedMessage:
    """Return the command to stop a generation's ranks: one object for all agents, encoded once."""
    return SharedMessage({"command": "stop", "generation": generation, "keep_replicas": keep_replicas})
