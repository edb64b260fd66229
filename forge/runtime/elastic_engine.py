"""A run carried out by forge's own supervisor: it goes on with the machines there are.

Here are the shells that make Ray's actors of the supervisor and its agents. Both outlive whoever carries
the run: the supervisor is restarted by Ray wherever it dies, and the agents by the supervisor. The carrier
waits for the outcome, and clears everything away.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from forge.cluster.local.ray_cluster import find_local
from forge.elastic.agent import Agent, AgentConfig, NoSupervisorError
from forge.elastic.rpc import Endpoint
from forge.elastic.states import MembershipState
from forge.elastic.supervisor import Outcome, Supervisor
from forge.errors import ClusterError
from forge.events import Event, NodeLeft, StepMetrics, SupervisorRestarted, SupervisorStarted
from forge.plan.plan import Plan, plan_from_json
from forge.pricing.budget import CostLimits, CostMeter, read_price
from forge.runs.reader import error_named
from forge.runs.secrets import credentials
from forge.runtime.corpus_server import CORPUS_SERVER, ensure_corpus
from forge.runtime.placement import SUPERVISOR, Allocation, PlacementManager
from forge.runtime.recorder_actor import HEAD, write_output_to

NAMESPACE = "forge"
_AGENT = "agent-"
_LONG_POLL_S = 2.0
_RETRY_S = 0.2
_CLOSE_S = 10.0
# Ray needs less to start an actor anew.
_SILENCE_S = 40.0
_REVIVE_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """What a supervisor is told when it is made, and what it knows again after it was restarted."""

    run_id: str
    run_folder: str
    plan_json: str
    secret: str
    environment: Mapping[str, str] = field(repr=False)
    """Secrets of whoever asked for the run; they go into the environment of the run's own processes."""
    carrier: tuple[str, ...]
    """The command that carries the run; empty where the cluster ends with its carrier."""


def train_elastically(
    plan: Plan, *, run_folder: Path, recorder: Any, address: str | None, stop: threading.Event
) -> str:
    """Carry the plan out and return when it is done or stopped; attaches to a supervisor that is there already.

    What was started stays until `clear_run`.

    Args:
        address: of the cluster, if it outlives this process.
        stop: set when the run is to checkpoint and stop.

    Returns: why the supervisor has stopped the run; empty if it has not.
    Raises: ForgeError as a rank or the supervisor reported it; ClusterError if the cluster can never hold the run.
    """
    run_id = run_folder.name
    local = find_local()
    if address is None or (local is not None and local.address == address):
        _require_room(plan)
    carrier = (
        (sys.executable, "-P", "-m", "forge.runtime.driver", str(run_folder), "--address", address)
        if address
        else ()
    )
    commission = SupervisorConfig(
        run_id=run_id,
        run_folder=str(run_folder),
        plan_json=(run_folder / "plan.json").read_text(),
        secret=secrets.token_hex(32),
        environment=credentials(os.environ),
        carrier=carrier,
    )
    supervisor = SupervisorActor.options(  # type: ignore[attr-defined]
        name=f"{SUPERVISOR}{run_id}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, resources=HEAD
    ).remote(commission, recorder)
    outcome = _await_outcome(supervisor, stop)
    if outcome.error is not None:
        raise error_named(outcome.error, message=outcome.reason)
    return outcome.reason


def clear_run(run_id: str) -> None:
    """Have nothing of a run left on the cluster, but for its recorder; after all is written, so that a carrier
    that dies before is replaced.
    """
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it never came to be
        supervisor = ray.get_actor(f"{SUPERVISOR}{run_id}", namespace=NAMESPACE)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(supervisor.close.remote(), timeout=_CLOSE_S)
        ray.kill(supervisor)
    for name in [*_agents_of(run_id), f"{CORPUS_SERVER}{run_id}"]:  # agents of a supervisor that could not close
        with contextlib.suppress(ValueError, ray.exceptions.RayError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


def _await_outcome(supervisor: Any, stop: threading.Event) -> Outcome:
    """Ask again and again: the supervisor may be restarted in between.

    Raises: ClusterError if there is no answer for so long that the cluster must be gone.
    """
    answered_at = time.monotonic()
    while True:
        try:
            if stop.is_set():
                ray.get(supervisor.stop.remote(), timeout=_CLOSE_S)
            outcome: Outcome | None = ray.get(supervisor.outcome.remote(_LONG_POLL_S), timeout=4 * _LONG_POLL_S)
        except ray.exceptions.RayError as error:
            if time.monotonic() - answered_at > _SILENCE_S:
                raise ClusterError(f"the cluster has not answered for {_SILENCE_S:.0f} s: {error}") from error
            time.sleep(_RETRY_S)
            continue
        if outcome is not None:
            return outcome
        answered_at = time.monotonic()


def _require_room(plan: Plan) -> None:
    """Raises: ClusterError if this machine's cluster has fewer places than the job's minimum: nothing adds any."""
    kind, wanted = resource_of(plan), plan.job.resources.workers
    total = int(ray.cluster_resources().get(kind, 0))
    if total < wanted.low:
        raise ClusterError(
            f"the job needs at least {wanted.low} workers, one {kind} each; the cluster has {total} {kind}s. "
            "Lower resources.workers, or start a larger cluster"
        )


def resource_of(plan: Plan) -> str:
    """What a rank takes one of, as Ray calls it."""
    return "GPU" if plan.hardware.device == "cuda" else "CPU"


def _agents_of(run_id: str) -> list[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in named if actor["name"].startswith(f"{_AGENT}{run_id}-")]


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=100)
class SupervisorActor:
    """The supervisor as one of Ray's actors: named, and restarted wherever it dies."""

    def __init__(self, commission: SupervisorConfig, recorder: Any) -> None:
        os.environ.update(commission.environment)
        write_output_to(Path(commission.run_folder) / "logs" / "supervisor.log")
        self._commission, self._recorder = commission, recorder
        self._plan = plan_from_json(commission.plan_json)
        self._starting: asyncio.Task[None] | None = None

    async def endpoint(self) -> Endpoint:
        """Where agents connect."""
        await self._started()
        return self._endpoint

    async def outcome(self, patience_s: float) -> Outcome | None:
        """How the run has ended; None if it has not within a while."""
        await self._started()
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(asyncio.shield(self._supervisor.outcome), timeout=patience_s)
        return None

    async def stop(self) -> None:
        """Checkpoint, then end the run."""
        await self._started()
        self._supervisor.stop()

    async def yield_places(self) -> None:
        """Another run waits for its smallest number of workers."""
        await self._started()
        self._supervisor.yield_slots()

    async def close(self) -> None:
        """Send the agents home and give all places back."""
        await self._started()
        self._reviving.cancel()
        self._claims.end()  # an agent that is just being started must be among those that are sent home
        with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
            await asyncio.wait_for(asyncio.shield(self._tending), timeout=_CLOSE_S / 2)
        self._supervisor.close()
        await asyncio.to_thread(self._claims.close)

    async def _started(self) -> None:
        """Once, by whoever asks first: a constructor of Ray's has no event loop."""
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        await self._starting

    async def _start(self) -> None:
        commission, workers = self._commission, self._plan.job.resources.workers
        self._claims = PlacementManager(
            run_id=commission.run_id,
            low=workers.low,
            high=workers.high,
            resource=resource_of(self._plan),
            start_agent=self._start_agent,
            on_granted=lambda node, grant: self._supervisor.update_slots(
                node,
                num_slots=grant.num_slots,
                num_guaranteed=grant.num_guaranteed,
                devices=devices_of(grant, workers.high),
            ),
            on_notice=lambda node, seconds_left: self._supervisor.announce_preemption(
                node, source="ray", seconds_left=seconds_left
            ),
        )
        is_restarted = ray.get_runtime_context().was_current_actor_reconstructed
        history = Path(commission.run_folder) / "events.jsonl"
        host = ray.util.get_node_ip_address()
        self._supervisor = Supervisor(
            MembershipState(min_workers=workers.low, max_workers=workers.high),
            placement=self._claims,
            record_event=self._tell,
            checkpoints=self._plan.job.checkpoint.url_of(commission.run_folder),
            meter=self._meter(host, spent_usd=newest(history, "CostUpdated", "usd")),
            former_generation=int(newest(history, "GenerationStarting", "generation")),
            stored_step=int(newest(history, "CheckpointSaved", "step")),
            is_restarted=is_restarted,
        )
        self._endpoint = self._supervisor.listen(host=host, secret=bytes.fromhex(commission.secret))
        self._tell(SupervisorRestarted(pid=os.getpid()) if is_restarted else SupervisorStarted(pid=os.getpid()))
        if is_restarted:
            await self._adopt_agents()
        self._tending = asyncio.ensure_future(self._claims.tend())
        self._reviving = asyncio.ensure_future(self._revive_carrier())

    def _meter(self, host: str, *, spent_usd: float) -> CostMeter:
        wanted = self._plan.job.resources
        limits = CostLimits(usd=wanted.max_usd, usd_per_hour=wanted.max_usd_per_hour).capped_by(os.environ)
        return CostMeter(limits, head=host, head_usd_per_hour=read_price(os.environ), spent_usd=spent_usd)

    def _tell(self, event: Event) -> None:
        self._recorder.event.remote(event)

    def _start_agent(self, name: str, grant: Allocation) -> Any:
        """On another thread."""
        commission, job = self._commission, self._plan.job
        setup = AgentConfig(
            node=name,
            host="",
            num_slots=grant.num_slots,
            num_guaranteed=grant.num_guaranteed,
            num_cores=places_of(grant.node_id, resource="CPU"),
            devices=devices_of(grant, job.resources.workers.high),
            run_folder=commission.run_folder,
            plan_json=commission.plan_json,
            checkpoints=job.checkpoint.url_of(commission.run_folder),
            keep=job.checkpoint.keep,
            secret=commission.secret,
        )
        actor = AgentActor.options(  # type: ignore[attr-defined]
            name=f"{_AGENT}{commission.run_id}-{name}",
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy=NodeAffinitySchedulingStrategy(grant.node_id, soft=False),
        ).remote(setup, f"{SUPERVISOR}{commission.run_id}", self._recorder, grant, commission.environment)
        actor.serve.remote()
        return actor

    async def _adopt_agents(self) -> None:
        for name in await asyncio.to_thread(_agents_of, self._commission.run_id):
            with contextlib.suppress(ValueError, TimeoutError, ray.exceptions.RayError):
                actor = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
                grant = await asyncio.wait_for(actor.grant.remote(), timeout=2.0)
                self._claims.adopt(name.removeprefix(f"{_AGENT}{self._commission.run_id}-"), actor, grant)

    async def _revive_carrier(self) -> None:
        """Whoever carries the run holds its lock; if it was killed, start another, which finds this supervisor."""
        lock = Path(self._commission.run_folder) / ".lock"
        free_since: float | None = None
        while self._commission.carrier:
            await asyncio.sleep(_REVIVE_POLL_S)
            if not _is_free(lock):
                free_since = None
                continue
            free_since = free_since or time.monotonic()
            if time.monotonic() - free_since > 2 * _REVIVE_POLL_S:
                free_since = None
                with (lock.parent / "logs" / "run.log").open("ab") as log:
                    # By way of a shell that ends at once: Ray kills the children of an actor that ends.
                    await asyncio.to_thread(
                        subprocess.run,
                        ["/bin/sh", "-c", '"$@" &', "sh", *self._commission.carrier],
                        check=False,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                await asyncio.sleep(10 * _REVIVE_POLL_S)


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=10)
class AgentActor:
    """An agent as one of Ray's actors, on the machine that it is for."""

    def __init__(
        self, setup: AgentConfig, supervisor: str, recorder: Any, grant: Allocation, environment: Mapping[str, str]
    ) -> None:
        os.environ.update(environment)
        write_output_to(Path(setup.run_folder) / "logs" / f"agent-{setup.node}.log")
        self._setup, self._supervisor, self._recorder, self._grant = setup, supervisor, recorder, grant

    async def grant(self) -> Allocation:
        """The places it was started for."""
        return self._grant

    async def serve(self) -> None:
        """Begin; the agent ends by itself when the run does."""
        run_id = self._supervisor.removeprefix(SUPERVISOR)
        try:
            plan_json = await asyncio.to_thread(
                ensure_corpus, self._setup.plan_json, run_id=run_id, namespace=NAMESPACE
            )
        except Exception as error:  # Ray raises many unrelated classes; all mean that this machine is of no use
            traceback.print_exc()
            left = NodeLeft(node=self._setup.node, reason=f"it cannot have the corpus: {error}")
            await self._recorder.take.remote([("event", left)])
            os._exit(1)
        setup = replace(self._setup, host=ray.util.get_node_ip_address(), plan_json=plan_json)
        agent = Agent(setup, find_supervisor=self._locate, recorder=_ActorRecord(self._recorder))
        self._life = asyncio.ensure_future(agent.run())
        self._life.add_done_callback(lambda _: os._exit(0))

    async def _locate(self) -> Endpoint:
        try:
            supervisor = await asyncio.to_thread(ray.get_actor, self._supervisor, namespace=NAMESPACE)
            endpoint: Endpoint = await supervisor.endpoint.remote()
        except ValueError as error:
            raise NoSupervisorError(str(error)) from error
        except ray.exceptions.RayError as error:
            raise ConnectionError(f"the supervisor does not answer: {error}") from error
        return endpoint


class _ActorRecord:
    """The recorder, from an agent."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        await self._recorder.take.remote(records)


def devices_of(grant: Allocation, most: int) -> tuple[str, ...]:
    """One for each rank that a node may get."""
    return tuple(f"cuda:{number}" for number in grant.devices) or ("cpu",) * most


def places_of(node_id: str, *, resource: str) -> int:
    """How much of a resource a node has; one of several nodes on a machine has only some of its cores."""
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    return int(node["Resources"].get(resource, 0)) if node is not None else 0


def newest(history: Path, kind: str, key: str) -> float:
    """The largest value of a field of an event in a run's history; 0 if there is none."""
    newest = 0.0
    with contextlib.suppress(OSError), history.open() as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["event"] == kind:
                    newest = max(newest, float(record[key]))
    return newest


def _is_free(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
