"""The trial runner: a Ray actor that runs one trial after another, as the supervisor and recorder of each.

It keeps its placement groups between trials, so that the next one starts at once. If its process dies, Ray restarts
it; the trial's Tune actor then starts the active trial again, and agents find the new supervisor by the actor's
name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from forge.elastic.rpc import Endpoint
from forge.elastic.supervisor import Outcome
from forge.events import (
    EarlyStopped,
    Event,
    RunFailed,
    RunFinished,
    RunStarted,
    RunStopped,
    StepMetrics,
    SupervisorRestarted,
)
from forge.plan.plan import Plan, plan_from_json, written_job
from forge.pricing.budget import CostLimits, CostMeter
from forge.process import redirect_output
from forge.runs.reader import read_metrics
from forge.runs.recorder import Recorder, end_tracking
from forge.runs.trials import is_judged
from forge.runtime.actor_names import SUPERVISOR
from forge.runtime.placement import Allocation, PlacementManager
from forge.runtime.recorder_actor import write_record
from forge.runtime.start_agent import AgentHandle, reattach_agents, start_agent
from forge.runtime.supervised_run import (
    SupervisedRun,
    build_placement,
    is_restarted_actor,
    resource_of,
    resource_on,
)
from forge.search.messages import FirstStep, TrialAssignment, TrialUpdate
from forge.search.node_pool import NodePool

_CLOSE_S = 10.0


@dataclass(slots=True, kw_only=True)
class _ActiveTrial:
    """The trial that the runner is running."""

    assignment: TrialAssignment
    run: SupervisedRun
    recorder: Recorder
    writer: ThreadPoolExecutor
    """The one thread that writes: disks are slow, and the supervisor must not wait for them."""
    records: list[Mapping[str, Any]]
    first_step: FirstStep | None = None
    is_warm: list[bool] = field(default_factory=list)
    outcome: Outcome | None = None
    is_stopped_early: bool = False
    watching: asyncio.Task[None] | None = None

    @property
    def plan(self) -> Plan:
        return self.run.plan


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)
class TrialRunnerActor:
    """Carries out one trial at a time."""

    def __init__(self, name: str, nodes: NodePool) -> None:
        os.environ.update(nodes.environment)
        redirect_output(Path(nodes.folder) / "logs" / f"{name.removeprefix(SUPERVISOR)}.log")
        self._name, self._nodes = name, nodes
        self._closing: set[Future[None]] = set()
        """Recorders of earlier trials whose trackers are still being finished."""
        self._active: _ActiveTrial | None = None
        self._changed = asyncio.Event()
        self._ending = asyncio.Lock()
        self._is_fresh = True
        self._placement: PlacementManager | None = None
        self._values: tuple[int, Mapping[str, Any], float] | None = None

    # --- called by the trial's Tune actor and the search coordinator

    async def set_values(self, number: int, values: Mapping[str, Any], decided_at: float) -> None:
        """Take over the values that the search has chosen for a trial."""
        self._values = (number, values, decided_at)
        self._notify()

    async def values_of(self, number: int, timeout_s: float) -> tuple[Mapping[str, Any], float] | None:
        """A trial's values and when they were chosen; None if they have not been within `timeout_s`."""
        await self._until(lambda: self._values is not None and self._values[0] == number, timeout_s)
        return self._values[1:] if self._values is not None and self._values[0] == number else None

    async def start_trial(self, assignment: TrialAssignment) -> None:
        """End the active trial and start this one on the same slots."""
        await self.end_trial("")
        plan = plan_from_json(assignment.run.plan_json)
        folder = Path(assignment.run.run_folder)
        writer = ThreadPoolExecutor(max_workers=1)
        recorder = await _run_in(writer, lambda: _open_recorder(plan, assignment))
        last_step = recorder.last_step
        known = [record for record in read_metrics(folder) if is_judged(record, plan)]
        placement = self._placement_for(plan)
        is_restarted, self._is_fresh = self._is_fresh and is_restarted_actor(), False
        has_agents = is_restarted and await self._reattach_agents(placement)
        no_limits = CostMeter(
            CostLimits(), head=ray.util.get_node_ip_address(), head_usd_per_hour=None, spent_usd=0.0
        )
        run = SupervisedRun(
            assignment.run,
            placement=placement,
            record_event=self._record,
            meter=no_limits,  # the coordinator counts what the whole search costs
            is_restarted=has_agents,
        )
        self._active = _ActiveTrial(
            assignment=assignment,
            run=run,
            recorder=recorder,
            writer=writer,
            records=[record for record in known if record["step"] > assignment.reported_step],
        )
        if is_restarted:
            self._record(SupervisorRestarted(pid=os.getpid()))
        self._record(RunStarted(run_id=folder.name, total_steps=plan.total_steps, resumed_from_step=last_step))
        self._active.watching = asyncio.ensure_future(self._await_outcome(self._active))
        placement.resume()

    async def update(self, after_step: int, timeout_s: float, *, is_started: bool) -> TrialUpdate:
        """What is new about the active trial beyond a step; empty if nothing comes within `timeout_s`.

        Args:
            is_started: whether the caller knows the trial's first step already.
        """
        active = self._active
        assert active is not None, "start_trial comes first"

        def found() -> list[Mapping[str, Any]]:
            return [record for record in active.records if record["step"] > after_step]

        def is_new() -> bool:
            return bool(found()) or active.outcome is not None or (not is_started and active.first_step is not None)

        await self._until(is_new, timeout_s)
        return TrialUpdate(
            records=tuple(found()),
            first_step=active.first_step,
            outcome=active.outcome,
            is_stopped_early=active.is_stopped_early,
        )

    async def stop(self) -> bool:
        """Have the active trial write a checkpoint and end. Returns: whether one is active that has not ended."""
        if self._active is None or self._active.outcome is not None:
            return False
        self._active.run.supervisor.stop()
        return True

    async def end_trial(self, reason: str) -> None:
        """End the active trial at once and keep its slots.

        Args:
            reason: why it is stopped early; empty if it is over, or will be resumed.
        """
        active, self._active = self._active, None
        if active is None:
            async with self._ending:  # another call is ending it
                return
        if active.watching is not None and active.outcome is None:
            active.watching.cancel()
        await self._end_agents(active)
        if reason:
            active.writer.submit(active.recorder.event, RunStopped(step=active.recorder.last_step, reason=reason))
        exit_code = 0 if active.outcome is None or not active.outcome.error else 1
        closing = active.writer.submit(active.recorder.close, exit_code=exit_code)
        active.writer.shutdown(wait=False)  # the trackers may take a minute; the next trial does not wait for it
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def claim_slots(self) -> None:
        """Take as many slots as the job allows: no other trial is waiting."""
        if self._placement is not None:
            self._placement.claim_slots()

    async def close(self) -> None:
        """End the active trial, release all slots and finish all trackers."""
        await self.end_trial("")
        if self._placement is not None:
            await self._placement.stop(timeout_s=_CLOSE_S / 2)
            await asyncio.to_thread(self._placement.close)
        for closing in list(self._closing):
            await asyncio.wrap_future(closing)
        await asyncio.to_thread(end_tracking)

    # --- called by agents and by other runs

    async def endpoint(self) -> Endpoint:
        """Where the supervisor listens. Raises: ConnectionError if no trial is active."""
        if self._active is None:
            raise ConnectionError("no trial is active")
        return self._active.run.endpoint

    async def write(self, records: list[tuple[str, Event | StepMetrics]], run_folder: str) -> None:
        """Write an agent's records in order; those of a trial that is no longer active are dropped."""
        active = self._active
        if active is None or active.assignment.run.run_folder != run_folder:
            return
        for kind, record in records:
            active.writer.submit(write_record, active.recorder, kind, record)
        await _run_in(active.writer, lambda: None)
        for kind, record in records:
            active.is_stopped_early |= isinstance(record, EarlyStopped)
            if isinstance(record, StepMetrics):
                self._note_step(active, record, is_new=kind == "step")
        self._notify()

    async def yield_slots(self) -> None:
        """Release slots beyond the minimum: another run is waiting for its own minimum."""
        if self._active is not None:
            self._active.run.supervisor.yield_slots()

    # --- the active trial

    def _note_step(self, active: _ActiveTrial, metrics: StepMetrics, *, is_new: bool) -> None:
        if is_new and active.first_step is None:
            seconds = round(time.time() - active.assignment.decided_at, 3)
            active.first_step = FirstStep(seconds=seconds, is_warm=bool(active.is_warm) and all(active.is_warm))
        record = metrics.as_record()
        is_known = any(known["step"] >= metrics.step for known in active.records[-1:])
        if is_judged(record, active.plan) and not is_known and metrics.step > active.assignment.reported_step:
            active.records.append(record)

    async def _await_outcome(self, active: _ActiveTrial) -> None:
        outcome = await active.run.supervisor.outcome
        if outcome.error is not None:
            self._record(RunFailed(error=outcome.error, message=outcome.reason))
        elif outcome.step >= active.plan.total_steps or active.is_stopped_early:
            self._record(RunFinished(step=outcome.step))
        else:
            self._record(RunStopped(step=outcome.step, reason=outcome.reason))
        await _run_in(active.writer, lambda: None)
        active.outcome = outcome
        self._notify()
        await self._end_agents(active)  # now, so that its fork servers are ready when the next trial starts

    async def _end_agents(self, active: _ActiveTrial) -> None:
        active.run.supervisor.close()
        async with self._ending:
            if self._placement is not None:
                await self._placement.pause()

    def _placement_for(self, plan: Plan) -> PlacementManager:
        """Return the runner's placement, created for its first trial; limited to the minimum while trials wait."""
        if self._placement is None:
            self._placement = build_placement(
                plan,
                run_id=self._name.removeprefix(SUPERVISOR),
                active_run=lambda: None if self._active is None else self._active.run,
                start_agent=self._start_agent,
                end_agent=_close_agent,
                is_paused=True,
            )
            self._placement.release_unused()
            self._placement.start()
        return self._placement

    def _start_agent(self, name: str, allocation: Allocation) -> AgentHandle | None:
        """Start an agent in the node's shared actor; called on another thread."""
        active = self._active
        if active is None:  # the trial has just ended; `PlacementManager.pause` discards the result
            return None
        actor = self._nodes.on(allocation.node_id)
        starting = start_agent(
            active.run.agent_config(name, allocation, num_cores=self._num_cores(allocation, active.plan)),
            actor=actor,
            supervisor=self._name,
            recorder=ray.get_runtime_context().current_actor,
            allocation=allocation,
        )
        active.is_warm.append(ray.get(starting))
        return AgentHandle(actor=actor, name=name)

    def _num_cores(self, allocation: Allocation, plan: Plan) -> int:
        """Return this trial's share of a node's cores."""
        num_slots = resource_on(allocation.node_id, resource=resource_of(plan))
        num_ranks = max(allocation.num_slots, min(num_slots, self._nodes.num_ranks))
        return resource_on(allocation.node_id, resource="CPU") * allocation.num_slots // num_ranks

    async def _reattach_agents(self, placement: PlacementManager) -> bool:
        """Reattach agents that were started before a restart of this actor; they hold the state in memory."""
        actors = await asyncio.to_thread(self._nodes.all)
        return await reattach_agents(placement, actors.values(), supervisor=self._name)

    def _record(self, event: Event) -> None:
        if self._active is not None:
            self._active.writer.submit(self._active.recorder.event, event)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, is_true: Callable[[], bool], timeout_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not is_true():
                    await self._changed.wait()


def _open_recorder(plan: Plan, assignment: TrialAssignment) -> Recorder:
    folder = Path(assignment.run.run_folder)
    return Recorder(
        folder,
        run_id=folder.name,
        group=assignment.group,
        tracking=plan.job.tracking,
        config=written_job(plan),
    )


async def _run_in(writer: ThreadPoolExecutor, action: Callable[[], Any]) -> Any:
    """Run an action on the writer thread, after everything submitted before it, and return its result."""
    return await asyncio.get_running_loop().run_in_executor(writer, action)


def _close_agent(agent: AgentHandle | None) -> None:
    if agent is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(agent.actor.close.remote(agent.name), timeout=_CLOSE_S)
