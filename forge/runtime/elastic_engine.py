"""The elastic engine, from the driver's side: start a run's supervisor actor, wait for the outcome, clean up.

The supervisor and its agents outlive the driver. A driver that is started for a run that has a supervisor attaches
to it.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray

from forge.cluster.local.ray_cluster import find_local
from forge.elastic.supervisor import Outcome
from forge.errors import ClusterError
from forge.plan.plan import Plan, plan_to_json
from forge.runs.reader import error_named
from forge.runs.secrets import environment_of
from forge.runtime.actor_names import HEAD, NAMESPACE, SUPERVISOR
from forge.runtime.corpus_server import end_corpus_server
from forge.runtime.local_cluster import is_local_cluster
from forge.runtime.start_agent import agent_actors_of
from forge.runtime.supervised_run import RunConfig, resource_of
from forge.runtime.supervisor_actor import CLOSE_TIMEOUT_S, SupervisorActor, SupervisorConfig

_LONG_POLL_S = 2.0
_RETRY_S = 0.2
# Ray restarts a supervisor sooner.
_MAX_SILENCE_S = 40.0
# Ray starts the actor's process, which imports forge; on a crowded machine that takes most of a minute.
_MAX_START_S = 180.0


def train_elastically(
    plan: Plan, *, run_folder: Path, recorder: Any, address: str | None, stop: threading.Event
) -> str:
    """Run the plan and return when it is finished or stopped; the actors stay until `clear_run`.

    Args:
        recorder: handle of the run's recorder actor.
        address: of the Ray cluster if it outlives this process.
        stop: set when the run is to checkpoint and stop.

    Returns: why the supervisor stopped the run; empty if it did not.
    Raises: ForgeError as a rank or the supervisor reported it; ClusterError if the cluster is too small.
    """
    run_id = run_folder.name
    local = find_local()
    if address is None or (local is not None and local.address == address):
        _require_enough_slots(plan)
    command = (sys.executable, "-P", "-m", "forge.runtime.driver", str(run_folder), "--address", address or "")
    config = SupervisorConfig(
        run_id=run_id,
        run=RunConfig(
            run_folder=str(run_folder),
            plan_json=plan_to_json(plan),
            secret=secrets.token_hex(32),
        ),
        environment=environment_of(plan, with_files=is_local_cluster()),
        driver_command=command if address else (),
    )
    supervisor = SupervisorActor.options(  # type: ignore[attr-defined]
        name=f"{SUPERVISOR}{run_id}", namespace=NAMESPACE, lifetime="detached", get_if_exists=True, resources=HEAD
    ).remote(config, recorder)
    outcome = _await_outcome(supervisor, stop)
    if outcome.error is not None:
        raise error_named(outcome.error, message=outcome.reason)
    return outcome.reason


def clear_run(run_id: str) -> None:
    """End all actors of a run except its recorder. Call it last: until then a driver that dies is replaced."""
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # there is no supervisor
        supervisor = ray.get_actor(f"{SUPERVISOR}{run_id}", namespace=NAMESPACE)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(supervisor.close.remote(), timeout=CLOSE_TIMEOUT_S)
        ray.kill(supervisor)
    for agent in agent_actors_of(run_id).values():  # left by a supervisor that could not close
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(agent)
    end_corpus_server(run_id)


def _await_outcome(supervisor: Any, stop: threading.Event) -> Outcome:
    """Ask the supervisor repeatedly, because Ray may restart it in between.

    Raises: ClusterError if it did not start in time, or has been unreachable for too long, so the cluster must be
        lost.
    """
    answered_at, limit_s, problem = time.monotonic(), _MAX_START_S, "has not started the run's supervisor within"
    while True:
        try:
            if stop.is_set():
                ray.get(supervisor.stop.remote(), timeout=CLOSE_TIMEOUT_S)
            outcome: Outcome | None = ray.get(supervisor.outcome.remote(_LONG_POLL_S), timeout=4 * _LONG_POLL_S)
        except ray.exceptions.RayError as error:
            if time.monotonic() - answered_at > limit_s:
                raise ClusterError(f"the cluster {problem} {limit_s:.0f} s: {error}") from error
            time.sleep(_RETRY_S)
            continue
        if outcome is not None:
            return outcome
        answered_at, limit_s, problem = time.monotonic(), _MAX_SILENCE_S, "has not answered for"


def _require_enough_slots(plan: Plan) -> None:
    """Raises: ClusterError if this machine's cluster has fewer slots than the job's minimum; nothing adds nodes."""
    kind, minimum = resource_of(plan), plan.job.resources.workers.low
    total = int(ray.cluster_resources().get(kind, 0))
    if total < minimum:
        raise ClusterError(
            f"the job needs at least {minimum} workers, one {kind} each; the cluster has {total} {kind}s. "
            "Lower resources.workers, or start a larger cluster"
        )
