"""The process of one rank, forked from the fork server: reads its launch spec and trains.

It sends events, metrics and its snapshot buffer to the agent over a socket, and publishes its progress on a status
page. It does not depend on Ray or on the cluster.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.elastic.commands import LOOPBACK, WorkerSpec
from forge.elastic.replicas.restore import PeerStateSource, ShardLocation
from forge.elastic.states import EndReason
from forge.elastic.straggler_detector import WINDOW_STEPS
from forge.elastic.workers.status_page import StatusField, StatusPage
from forge.errors import ForgeError
from forge.events import CompileFailed, Event, NullReporter, Reporter, StepMetrics
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.plan.checkpoint_interval import CheckpointRisk
from forge.plan.plan import plan_from_json
from forge.process import first_line, redirect_output
from forge.train.cuda import abort_collectives, require_unused_cuda, set_up_nccl, set_visible_gpus
from forge.train.engine import DTYPES
from forge.train.peak import measured_peak
from forge.train.process_group import Rendezvous, import_late_modules
from forge.train.worker import ElasticContext, Stopwatch, WorkerContext, enter_working_folder, run_worker
from forge.user_code import error_place, use_code

_POLL_S = 0.0005
# Steps of a generation that are slow whatever the machine: memory and kernels are prepared.
_NUM_FIRST_STEPS = 3
_SOCKET_BYTES = 8 * 2**20


def import_for(plan_json: str) -> None:
    """Import what a rank of this plan will, including the classes of its model, and find a CPU's peak.

    A model that cannot be used here is no error yet: the workers report it, and end the run with its message.
    """
    plan = plan_from_json(plan_json)
    enter_working_folder(plan)
    import_late_modules(device=plan.hardware.device)
    if plan.hardware.device == "cpu":
        measured_peak("cpu", dtype=DTYPES[plan.job.training.precision])
    with contextlib.suppress(ForgeError):
        use_code(plan.code.digest if plan.code is not None else None)
        family_of(plan.job.model).import_classes(plan.job.model, DataShape.of(plan))
    require_unused_cuda("the code of this job")


def run_worker_process(spec_record: Mapping[str, Any], *, fds: list[int], plan_json: str) -> int:
    """Run one rank to its end. Returns: the exit code."""
    spec = WorkerSpec(**spec_record)
    link = AgentLink(socket.socket(fileno=fds[0]), StatusPage(fds[1]))
    redirect_output(Path(spec.log))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    listen_fd = fds[2] if spec.has_listener else None
    try:
        result = _run(spec, link=link, fds=fds, plan_json=plan_json, listen_fd=listen_fd)
    except ForgeError as error:
        link.end(EndReason.FAILED, reason=str(error), error=type(error).__name__)
        return 1
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        place = error_place(error)
        reason = f"{place}: " * bool(place) + f"{type(error).__name__}: {first_line(error)}"
        link.end(EndReason.BROKEN, reason=reason)
        abort_collectives()
        return 1
    link.end(EndReason.DRAINED if result.is_drained else EndReason.DONE, step=result.progress.step)
    return 0


def _set_environment(spec: WorkerSpec) -> None:
    """Set the variables of torch.distributed, the network interface and the GPUs."""
    os.environ |= {
        "RANK": str(spec.rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": str(spec.local_rank),
        "LOCAL_WORLD_SIZE": str(spec.local_world_size),
        "MASTER_ADDR": spec.host,
        "MASTER_PORT": str(spec.port),
    }
    os.environ |= {"GLOO_SOCKET_IFNAME": spec.interface} if spec.interface else {}
    if spec.gpus:
        set_visible_gpus(spec.gpus)
        set_up_nccl(interface=None if spec.interface == LOOPBACK else spec.interface)


def _run(spec: WorkerSpec, *, link: AgentLink, fds: list[int], plan_json: str, listen_fd: int | None) -> Any:
    _set_environment(spec)
    clock = Stopwatch(began=spec.asked_at, laps=spec.laps)
    clock.on_lap = link.tick
    clock.lap("fork")
    state_source = None
    if spec.shards:
        size = spec.world_size // spec.num_shard_groups
        locations = [
            ShardLocation(
                generation=shard["generation"],
                rank=shard["rank"],
                snapshot=SnapshotBuffer(fds[shard["fd"]]) if "fd" in shard else None,
                endpoint=tuple(shard["endpoint"]) if "endpoint" in shard else None,
            )
            for shard in spec.shards
        ]
        state_source = PeerStateSource(
            locations,
            step=spec.step,
            secret=bytes.fromhex(spec.secret),
            position=(spec.rank % size + 0.5) / size,
        )
    reporter: AgentReporter | FailureReporter = FailureReporter(link)
    if spec.rank == 0:
        reporter = AgentReporter(link)
        for metrics in state_source.metrics if state_source else ():
            reporter.resend(StepMetrics(**metrics))
    return run_worker(
        plan_from_json(plan_json),
        WorkerContext(
            rank=spec.rank,
            world_size=spec.world_size,
            local_world_size=spec.local_world_size,
            device=spec.device,
            num_threads=spec.num_threads,
            checkpoints=spec.checkpoints,
            generation=spec.generation,
            rendezvous=Rendezvous(host=spec.host, port=spec.port, listen_fd=listen_fd),
        ),
        reporter,
        elastic=ElasticContext(
            replica_client=AgentReplicaClient(link, reporter, local_world_size=spec.local_world_size),
            state_source=state_source,
            parts_per_shard=spec.parts_per_shard,
            checkpoint_risk=CheckpointRisk(**spec.checkpoint_risk) if spec.checkpoint_risk else None,
            on_progress=link.tick,
            on_own_time=OwnTimes(link).add,
        ),
        clock=clock,
    )


class AgentLink:
    """This rank's connection to its agent: a socket and a status page."""

    def __init__(self, sock: socket.socket, status: StatusPage) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._socket, self.status = sock, status

    def send(self, kind: str, *values: Any, fds: tuple[int, ...] = ()) -> None:
        """Send a message. Errors are ignored: this process dies with its agent."""
        text = pickle.dumps((kind, *values))  # read only by the agent that had this process forked
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._socket, [text], list(fds))

    def end(self, end: EndReason, *, step: int = 0, reason: str = "", error: str = "") -> None:
        """Report how this rank ended."""
        self.send("end", str(end), step, reason, error)

    def tick(self) -> None:
        """Note progress, for hang detection."""
        self.status[StatusField.PROGRESS_NS] = time.monotonic_ns()


class OwnTimes:
    """Publishes the median time of this rank's own work, once every `WINDOW_STEPS` steps."""

    def __init__(self, link: AgentLink) -> None:
        self._link, self._num_skipped, self._num_steps = link, 0, 0
        self._times: list[float] = []

    def add(self, seconds: float, device_name: str) -> None:
        """Note the time of a step; the first ones of a generation, which fill caches, are left out."""
        if self._num_skipped < _NUM_FIRST_STEPS:
            self._num_skipped += 1
            return
        if not self._num_steps:
            self._link.send("device", device_name)
        self._times.append(seconds)
        self._num_steps += 1
        if len(self._times) == WINDOW_STEPS:
            self._link.status[StatusField.OWN_NS] = int(median(self._times) * 1e9)
            self._link.status[StatusField.OWN_STEPS] = self._num_steps
            self._times.clear()


class AgentReporter:
    """Rank 0's reporter: its agent forwards events and metrics to the run's recorder."""

    def __init__(self, link: AgentLink) -> None:
        self._link = link
        self._recent: deque[StepMetrics] = deque(maxlen=256)

    def event(self, event: Event) -> None:
        self._link.send("event", event)

    def step(self, metrics: StepMetrics) -> None:
        self._recent.append(metrics)
        self._link.status[StatusField.STEP_NS] = int(metrics.step_s * 1e9)
        self._link.status[StatusField.STEP] = metrics.step
        self._link.send("step", metrics)

    def resend(self, metrics: StepMetrics) -> None:
        self._recent.append(metrics)
        self._link.send("resend", metrics)

    def unacked(self) -> list[dict[str, Any]]:
        """Metrics that the recorder has not acknowledged."""
        recorded = self._link.status[StatusField.RECORDED_STEP]
        return [asdict(metrics) for metrics in self._recent if metrics.step > recorded]

    def should_stop(self) -> bool:
        return bool(self._link.status[StatusField.STOP])

    def should_drain(self) -> bool:
        return bool(self._link.status[StatusField.DRAIN])


class FailureReporter(NullReporter):
    """Reporter of the ranks but 0: of what they report, only a failed compilation differs from rank 0's."""

    def __init__(self, link: AgentLink) -> None:
        self._link = link

    def event(self, event: Event) -> None:
        if isinstance(event, CompileFailed):
            self._link.send("event", event)


class AgentReplicaClient:
    """Has the agent replicate this rank's snapshots."""

    def __init__(self, link: AgentLink, reporter: Reporter, *, local_world_size: int) -> None:
        self._link, self._reporter, self._local_world_size = link, reporter, local_world_size

    def register(self, snapshot: SnapshotBuffer, *, piece: int, num_pieces: int, is_sent: bool) -> None:
        self._link.send("buffer", piece, num_pieces, is_sent, fds=(snapshot.fd,))

    def metadata(self) -> Mapping[str, Any]:
        return {"metrics": self._reporter.unacked() if isinstance(self._reporter, AgentReporter) else []}

    def publish(self, *, step: int, slot: int) -> None:
        self._link.send("snapshot", step, slot)

    def wait_replicated(self, step: int) -> None:
        while self._link.status[StatusField.REPLICATED_STEP] < step:
            time.sleep(_POLL_S)

    def cpu_s(self) -> float:
        return self._link.status[StatusField.AGENT_CPU_NS] / 1e9 / self._local_world_size
