"""Where one trial after the other is carried out: recorder and supervisor of the trial that is on, in one actor.

A stage keeps its places of the cluster from trial to trial, so that the next one begins at once. It is restarted by
Ray if its process dies; whoever uses it then says again which trial is on, and the agents find it by its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from forge.elastic.agent import AgentConfig
from forge.elastic.rpc import Endpoint, Message
from forge.elastic.states import MembershipState
from forge.elastic.supervisor import Outcome, Supervisor
from forge.events import Event, RunFailed, RunFinished, RunStarted, RunStopped, StepMetrics, SupervisorRestarted
from forge.plan.plan import Plan, plan_from_json
from forge.pricing.budget import CostLimits, CostMeter
from forge.runs.reader import read_metrics
from forge.runs.recorder import Recorder, end_tracking
from forge.runs.trials import is_judged
from forge.runtime.elastic_engine import devices_of, newest, places_of, resource_of
from forge.runtime.placement import SUPERVISOR, Allocation, PlacementManager
from forge.runtime.recorder_actor import write_output_to
from forge.search.messages import FirstStep, TrialAssignment, TrialUpdate
from forge.search.node_actor import NodePool

_CLOSE_S = 10.0


@dataclass(slots=True, kw_only=True)
class _ActiveTrial:
    """The trial that is on."""

    part: TrialAssignment
    plan: Plan
    recorder: Recorder
    pen: ThreadPoolExecutor
    """Does the writing: W&B and disks are slow, and who decides must not wait for them."""
    supervisor: Supervisor
    endpoint: Endpoint
    records: list[Mapping[str, Any]]
    first_step: FirstStep | None = None
    is_warm: list[bool] = field(default_factory=list)
    outcome: Outcome | None = None
    watching: asyncio.Task[None] | None = None


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)
class TrialRunnerActor:
    """One place for a trial at a time."""

    def __init__(self, name: str, hosts: NodePool) -> None:
        os.environ.update(hosts.environment)
        write_output_to(Path(hosts.folder) / "logs" / f"{name.removeprefix(SUPERVISOR)}.log")
        self._name, self._hosts = name, hosts
        self._closing: set[Future[None]] = set()
        """Records of trials that were on, of which W&B has not taken all."""
        self._show: _ActiveTrial | None = None
        self._news = asyncio.Event()
        self._dismissing = asyncio.Lock()
        self._is_fresh = True
        self._claims: PlacementManager | None = None
        self._tending: asyncio.Task[None] | None = None
        self._findings: dict[str, Message] = {}
        self._assigned: tuple[int, Mapping[str, Any], float] | None = None

    # --- for the trial

    async def assign(self, number: int, values: Mapping[str, Any], decided_at: float) -> None:
        """The search has chosen a trial's values."""
        self._assigned = (number, values, decided_at)
        self._wake()

    async def assignment(self, number: int, patience_s: float) -> tuple[Mapping[str, Any], float] | None:
        """A trial's values, and when they were chosen; None if they have not been within a while."""
        await self._until(lambda: self._assigned is not None and self._assigned[0] == number, patience_s)
        assigned = self._assigned
        return assigned[1:] if assigned is not None and assigned[0] == number else None

    async def begin(self, part: TrialAssignment) -> None:
        """Have a trial come on, in the place of the one before."""
        await self.leave("")
        plan = plan_from_json(part.plan_json)
        folder = Path(part.run_folder)
        pen = ThreadPoolExecutor(max_workers=1)
        recorder = await _done(pen, lambda: _recorder(plan, part))
        last_step = recorder.last_step
        known = [record for record in read_metrics(folder) if is_judged(record, plan)]
        host = ray.util.get_node_ip_address()
        claims = self._claims_of(plan)
        is_again, self._is_fresh = self._is_fresh and _is_restarted(), False
        history = folder / "events.jsonl"
        workers = plan.job.resources.workers
        supervisor = Supervisor(
            MembershipState(min_workers=workers.low, max_workers=workers.high),
            placement=claims,
            record_event=self._tell,
            checkpoints=plan.job.checkpoint.url_of(part.run_folder),
            meter=CostMeter(CostLimits(), head=host, head_usd_per_hour=None, spent_usd=0.0),  # the search counts
            former_generation=int(newest(history, "GenerationStarting", "generation")),
            stored_step=int(newest(history, "CheckpointSaved", "step")),
            is_restarted=is_again and await self._adopt_agents(claims),
            findings=self._findings.get(_kind_of(plan)),
        )
        self._show = _ActiveTrial(
            part=part,
            plan=plan,
            recorder=recorder,
            pen=pen,
            supervisor=supervisor,
            endpoint=supervisor.listen(host=host, secret=bytes.fromhex(part.secret)),
            records=[record for record in known if record["step"] > part.reported_step],
        )
        if is_again:
            self._tell(SupervisorRestarted(pid=os.getpid()))
        self._tell(RunStarted(run_id=folder.name, total_steps=plan.total_steps, resumed_from_step=last_step))
        self._show.watching = asyncio.ensure_future(self._await_outcome(self._show))
        claims.serve()

    async def report(self, after_step: int, patience_s: float, *, is_started: bool) -> TrialUpdate:
        """What is known beyond a step; empty if nothing comes within a while.

        Args:
            is_started: whether the trial's first step is known already.
        """
        show = self._show
        assert show is not None, "no trial is on"

        def found() -> list[Mapping[str, Any]]:
            return [record for record in show.records if record["step"] > after_step]

        def is_news() -> bool:
            return bool(found()) or show.outcome is not None or (not is_started and show.first_step is not None)

        await self._until(is_news, patience_s)
        return TrialUpdate(records=tuple(found()), first_step=show.first_step, outcome=show.outcome)

    async def stop(self) -> bool:
        """Have the trial that is on write a checkpoint and end. Returns: whether one is on that has not ended."""
        show = self._show
        if show is None or show.outcome is not None:
            return False
        show.supervisor.stop()
        return True

    async def leave(self, reason: str) -> None:
        """End the trial that is on at once; the places stay.

        Args:
            reason: why it is given up; empty if it is over, or goes on another time.
        """
        show, self._show = self._show, None
        if show is None:
            async with self._dismissing:  # another call ends it
                return
        if show.watching is not None and show.outcome is None:
            show.watching.cancel()
        if show.supervisor.findings is not None:
            self._findings[_kind_of(show.plan)] = show.supervisor.findings
        await self._dismiss(show)
        if reason:
            show.pen.submit(show.recorder.event, RunStopped(step=show.recorder.last_step, reason=reason))
        exit_code = 0 if show.outcome is None or not show.outcome.error else 1
        closing = show.pen.submit(show.recorder.close, exit_code=exit_code)
        show.pen.shutdown(wait=False)  # W&B may take a minute, and the next trial does not wait for it
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def grow(self) -> None:
        """No other trial waits: take as many places as the job allows."""
        if self._claims is not None:
            self._claims.claim_slots()

    async def close(self) -> None:
        """Give everything back."""
        await self.leave("")
        if self._claims is not None:
            self._claims.end()
            assert self._tending is not None
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                await asyncio.wait_for(asyncio.shield(self._tending), timeout=_CLOSE_S / 2)
            await asyncio.to_thread(self._claims.close)
        for closing in list(self._closing):
            await asyncio.wrap_future(closing)
        await asyncio.to_thread(end_tracking)

    # --- for agents, and for other runs

    async def endpoint(self) -> Endpoint:
        """Where the supervisor listens. Raises: ConnectionError if no trial is on just now."""
        if self._show is None:
            raise ConnectionError("no trial is on")
        return self._show.endpoint

    async def take(self, news: list[tuple[str, Event | StepMetrics]], run_folder: str) -> None:
        """Write what an agent passes on, in order, as a run's recorder does; if its trial is still on."""
        show = self._show
        if show is None or show.part.run_folder != run_folder:
            return
        for what, item in news:
            if not isinstance(item, StepMetrics):
                show.pen.submit(show.recorder.event, item)
            elif what == "step" or item.step > show.recorder.last_step:
                show.pen.submit(show.recorder.step, item)
        await _done(show.pen, lambda: None)
        for what, item in news:
            if isinstance(item, StepMetrics):
                self._stepped(show, item, is_new=what == "step")
        self._wake()

    async def yield_places(self) -> None:
        """Another run waits for its smallest number of workers."""
        if self._show is not None:
            self._show.supervisor.yield_slots()

    # --- within

    def _stepped(self, show: _ActiveTrial, metrics: StepMetrics, *, is_new: bool) -> None:
        if is_new and show.first_step is None:
            seconds = round(time.time() - show.part.decided_at, 3)
            show.first_step = FirstStep(seconds=seconds, is_warm=bool(show.is_warm) and all(show.is_warm))
        record = metrics.as_record()
        is_known = any(known["step"] >= metrics.step for known in show.records[-1:])
        if is_judged(record, show.plan) and not is_known and metrics.step > show.part.reported_step:
            show.records.append(record)

    async def _await_outcome(self, show: _ActiveTrial) -> None:
        outcome = await show.supervisor.outcome
        if outcome.error is not None:
            self._tell(RunFailed(error=outcome.error, message=outcome.reason))
        elif outcome.step >= show.plan.total_steps:
            self._tell(RunFinished(step=outcome.step))
        else:
            self._tell(RunStopped(step=outcome.step, reason=outcome.reason))
        await _done(show.pen, lambda: None)
        show.outcome = outcome
        self._wake()
        await self._dismiss(show)  # what it leaves is warm when the next one comes

    async def _dismiss(self, show: _ActiveTrial) -> None:
        """End the agents of a trial; the next one's come after that."""
        show.supervisor.close()
        async with self._dismissing:
            if self._claims is not None:
                await self._claims.rest()

    def _claims_of(self, plan: Plan) -> PlacementManager:
        """The places of this stage: the smallest number of workers, until no other trial waits."""
        if self._claims is None:
            workers = plan.job.resources.workers
            self._claims = PlacementManager(
                run_id=self._name.removeprefix(SUPERVISOR),
                low=workers.low,
                high=workers.high,
                resource=resource_of(plan),
                start_agent=self._start_agent,
                end_agent=_end_agent,
                on_granted=self._granted,
                on_notice=self._noticed,
                is_resting=True,  # until it is known which trial is on
            )
            self._claims.release_unused()
            self._tending = asyncio.ensure_future(self._claims.tend())
        return self._claims

    def _start_agent(self, name: str, grant: Allocation) -> Any:
        """On another thread."""
        show = self._show
        if show is None:  # it has just ended, and what is returned here is given back
            return None
        job = show.plan.job
        setup = AgentConfig(
            node=name,
            host="",
            num_slots=grant.num_slots,
            num_guaranteed=grant.num_guaranteed,
            num_cores=self._cores_of(grant, show.plan),
            devices=devices_of(grant, job.resources.workers.high),
            run_folder=show.part.run_folder,
            plan_json=show.part.plan_json,
            checkpoints=job.checkpoint.url_of(show.part.run_folder),
            keep=job.checkpoint.keep,
            secret=show.part.secret,
        )
        host = self._hosts.on(grant.node_id)
        show.is_warm.append(ray.get(host.open.remote(setup, stage=self._name, grant=grant)))
        return host, name

    def _cores_of(self, grant: Allocation, plan: Plan) -> int:
        """This trial's share of a node's cores, where others are at work beside it."""
        num_places = places_of(grant.node_id, resource=resource_of(plan))
        num_ranks = max(grant.num_slots, min(num_places, self._hosts.num_ranks))
        return places_of(grant.node_id, resource="CPU") * grant.num_slots // num_ranks

    async def _adopt_agents(self, claims: PlacementManager) -> bool:
        """Those of the process before this one, which have states in memory. Returns: whether there are any."""
        found = False
        for host in (await asyncio.to_thread(self._hosts.all)).values():
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                for name, grant in (await asyncio.wait_for(host.grants.remote(self._name), timeout=2.0)).items():
                    claims.adopt(name, (host, name), grant)
                    found = True
        return found

    def _granted(self, node: str, grant: Allocation) -> None:
        if self._show is not None:
            high = self._show.plan.job.resources.workers.high
            self._show.supervisor.update_slots(
                node,
                num_slots=grant.num_slots,
                num_guaranteed=grant.num_guaranteed,
                devices=devices_of(grant, high),
            )

    def _noticed(self, node: str, seconds_left: float | None) -> None:
        if self._show is not None:
            self._show.supervisor.announce_preemption(node, source="ray", seconds_left=seconds_left)

    def _tell(self, event: Event) -> None:
        if self._show is not None:
            self._show.pen.submit(self._show.recorder.event, event)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _until(self, is_true: Callable[[], bool], patience_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not is_true():
                    await self._news.wait()


def _recorder(plan: Plan, part: TrialAssignment) -> Recorder:
    folder = Path(part.run_folder)
    return Recorder(
        folder,
        run_id=folder.name,
        group=part.group,
        wandb=plan.job.tracking.wandb,
        config=plan.job.model_dump(mode="json"),
    )


async def _done(pen: ThreadPoolExecutor, action: Callable[[], Any]) -> Any:
    """What an action gives, after all that was to be written before."""
    return await asyncio.get_running_loop().run_in_executor(pen, action)


def _is_restarted() -> bool:
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _kind_of(plan: Plan) -> str:
    """Names what findings depend on: model, precision, hardware."""
    job = plan.job
    return json.dumps([job.model.model_dump(mode="json"), job.training.precision, plan.hardware.name])


def _end_agent(agent: Any) -> None:
    if agent is not None:
        host, name = agent
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(host.close.remote(name), timeout=_CLOSE_S)
