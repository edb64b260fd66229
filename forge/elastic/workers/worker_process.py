"""A rank as its agent sees it: what it is told, what it says, how it ends.

It is a fork of the warm process. To its agent it speaks over a socket (news, the memory of its snapshots)
and through a status (how far it is); of machines and of Ray it knows nothing.
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
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from forge.checkpoint.snapshot_buffer import SnapshotBuffer
from forge.elastic.commands import WorkerSpec
from forge.elastic.replicas.restore import PeerStateSource, ShardLocation
from forge.elastic.states import EndReason
from forge.elastic.workers.status_page import StatusField, StatusPage
from forge.errors import ForgeError
from forge.events import Event, StepMetrics
from forge.model.build import build_config
from forge.plan.plan import plan_from_json
from forge.train.engine import Rendezvous, import_late_modules
from forge.train.worker import ElasticContext, ProbeResults, Stopwatch, WorkerContext, run_worker
from forge.user_code import use_code

_POLL_S = 0.0005
_SOCKET_BYTES = 8 * 2**20


def import_for(plan_json: str) -> None:
    """Import what a rank of this plan will, the classes of its model too."""
    plan = plan_from_json(plan_json)
    use_code(plan.code.digest if plan.code is not None else None)
    import_late_modules(device=plan.hardware.device)
    config = build_config(
        plan.job.model,
        vocab_size=plan.corpus.vocab_size,
        seq_len=plan.job.data.seq_len,
        eot_id=plan.corpus.eot_id,
    )
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)


def run_worker_process(order_record: Mapping[str, Any], fds: list[int], plan_json: str) -> int:
    """Be one rank to the end. Returns: the exit code."""
    order = WorkerSpec(**order_record)
    link = AgentLink(socket.socket(fileno=fds[0]), StatusPage(fds[1]))
    _write_to(Path(order.log))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    listen_fd = fds[2] if order.has_listener else None
    try:
        ending = _run(order, link, fds, plan_json=plan_json, listen_fd=listen_fd)
    except ForgeError as error:
        link.end(EndReason.FAILED, reason=str(error), error=type(error).__name__)
        return 1
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        link.end(EndReason.BROKEN, reason=f"{type(error).__name__}: {_first_line(error)}")
        return 1
    link.end(EndReason.DRAINED if ending.is_drained else EndReason.DONE, step=ending.progress.step)
    return 0


def _run(order: WorkerSpec, link: AgentLink, fds: list[int], *, plan_json: str, listen_fd: int | None) -> Any:
    os.environ |= {
        "RANK": str(order.rank),
        "WORLD_SIZE": str(order.world_size),
        "LOCAL_RANK": str(order.local_rank),
        "LOCAL_WORLD_SIZE": str(order.local_world_size),
        "MASTER_ADDR": order.host,
        "MASTER_PORT": str(order.port),
    }
    os.environ |= {"GLOO_SOCKET_IFNAME": order.interface} if order.interface else {}
    clock = Stopwatch(began=order.asked_at, laps=order.laps)
    clock.on_lap = link.tick
    clock.lap("fork")
    origin = None
    if order.parts:
        parts = [
            ShardLocation(
                generation=part["generation"],
                rank=part["rank"],
                snapshot=SnapshotBuffer(fds[part["fd"]]) if "fd" in part else None,
                endpoint=tuple(part["endpoint"]) if "endpoint" in part else None,
            )
            for part in order.parts
        ]
        origin = PeerStateSource(parts, step=order.step, secret=bytes.fromhex(order.secret))
    reporter: AgentReporter | NullAgentReporter = NullAgentReporter()
    if order.rank == 0:
        reporter = AgentReporter(link)
        for metrics in origin.metrics if origin else ():
            reporter.resend(StepMetrics(**metrics))
    return run_worker(
        plan_from_json(plan_json),
        WorkerContext(
            rank=order.rank,
            world_size=order.world_size,
            local_world_size=order.local_world_size,
            device=order.device,
            num_threads=order.num_threads,
            checkpoints=order.checkpoints,
            generation=order.generation,
            rendezvous=Rendezvous(host=order.host, port=order.port, listen_fd=listen_fd),
        ),
        reporter,
        inheritance=ElasticContext(
            keeper=AgentReplicaClient(link, reporter, local_world_size=order.local_world_size),
            origin=origin,
            findings=ProbeResults(**order.findings) if order.findings else None,
            on_findings=lambda found: link.say("findings", asdict(found)) if order.rank == 0 else None,
            on_progress=link.tick,
        ),
        clock=clock,
    )


class AgentLink:
    """This rank's end of what connects it with its agent."""

    def __init__(self, sock: socket.socket, status: StatusPage) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        self._socket, self.status = sock, status

    def say(self, what: str, *values: Any, fds: tuple[int, ...] = ()) -> None:
        """Send news. An agent that is gone takes this process with it."""
        text = pickle.dumps((what, *values))  # between a process and its own fork
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._socket, [text], list(fds))

    def end(self, end: EndReason, *, step: int = 0, reason: str = "", error: str = "") -> None:
        """The last word."""
        self.say("end", str(end), step, reason, error)

    def tick(self) -> None:
        """Something was done."""
        self.status[StatusField.PROGRESS_NS] = time.monotonic_ns()


class AgentReporter:
    """The first rank's reporter: its agent passes the news on to the run's one writer."""

    def __init__(self, link: AgentLink) -> None:
        self._link = link
        self._recent: deque[StepMetrics] = deque(maxlen=256)

    def event(self, event: Event) -> None:
        """Send an event."""
        self._link.say("event", event)

    def step(self, metrics: StepMetrics) -> None:
        """Send a step, and remember it until it is written."""
        self._recent.append(metrics)
        self._link.status[StatusField.STEP_NS] = int(metrics.step_s * 1e9)
        self._link.status[StatusField.STEP] = metrics.step
        self._link.say("step", metrics)

    def resend(self, metrics: StepMetrics) -> None:
        """Send a step of before, and remember it as well."""
        self._recent.append(metrics)
        self._link.say("resend", metrics)

    def unrecorded(self) -> list[dict[str, Any]]:
        """The steps that may not have been written yet."""
        written = self._link.status[StatusField.RECORDED_STEP]
        return [asdict(metrics) for metrics in self._recent if metrics.step > written]

    def should_stop(self) -> bool:
        """Whether the agent has passed on that wish."""
        return bool(self._link.status[StatusField.STOP])

    def should_drain(self) -> bool:
        """Whether the agent has passed on that wish."""
        return bool(self._link.status[StatusField.DRAIN])


class NullAgentReporter:
    """For every rank but the first."""

    def event(self, event: Event) -> None:
        """Say nothing."""

    def step(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def resend(self, metrics: StepMetrics) -> None:
        """Say nothing."""

    def unrecorded(self) -> list[dict[str, Any]]:
        """The first rank remembers."""
        return []

    def should_stop(self) -> bool:
        """The first rank decides."""
        return False

    def should_drain(self) -> bool:
        """The first rank decides."""
        return False


class AgentReplicaClient:
    """Has the agent keep this rank's snapshots."""

    def __init__(
        self, link: AgentLink, reporter: AgentReporter | NullAgentReporter, *, local_world_size: int
    ) -> None:
        self._link, self._reporter, self._local_world_size = link, reporter, local_world_size

    def register(self, snapshot: SnapshotBuffer) -> None:
        """Give the agent the memory."""
        self._link.say("snapshot", fds=(snapshot.fd,))

    def metadata(self) -> Mapping[str, Any]:
        """Steps that would be lost with the agent if it died now."""
        return {"metrics": self._reporter.unrecorded()}

    def publish(self, *, step: int, slot: int) -> None:
        """Have the agent send it to another machine."""
        self._link.say("copied", step, slot)

    def wait_replicated(self, step: int) -> None:
        """Wait until it is there."""
        while self._link.status[StatusField.REPLICATED_STEP] < step:
            time.sleep(_POLL_S)

    def cpu_s(self) -> float:
        """This rank's share of what the agent has worked."""
        return self._link.status[StatusField.AGENT_CPU_NS] / 1e9 / self._local_world_size


def _write_to(path: Path) -> None:
    """Send this process's output, that of native libraries included, to its log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
