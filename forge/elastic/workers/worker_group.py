"""The workers of one node: starts them from the fork server, reads their messages, signals and kills them.

The module is long (over 400 lines) because every message and signal of a worker is handled here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from forge.elastic.agent_config import AgentConfig
from forge.elastic.background import BackgroundTasks
from forge.elastic.commands import LOOPBACK, WorkerSpec, interface_of
from forge.elastic.record_forwarder import RecordForwarder
from forge.elastic.replicas.replicate import Replicator
from forge.elastic.replicas.store import ReplicaStore
from forge.elastic.rpc import Endpoint, Message
from forge.elastic.source_shards import SourceReader
from forge.elastic.states import EndReason
from forge.elastic.workers.fork_client import ForkServer, ForkServerPool
from forge.elastic.workers.rank_process import RankProcess
from forge.elastic.workers.standby import MAX_MESSAGE_BYTES, StandbyProcesses, connect_rank
from forge.elastic.workers.status_page import StatusField, create_status_page
from forge.events import CheckpointSaved, CompileFailed, GenerationStarted
from forge.limits import free_memory_bytes, out_of_memory_kills, usable_cpus, usable_memory_bytes
from forge.units import format_bytes

_RETRY_S = 0.2
# A process whose socket is closed is reaped within this time.
_REAP_S = 0.2


class WorkerGroup:
    """The ranks on this node, and the fork server that they come from."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        store: ReplicaStore,
        forwarder: RecordForwarder,
        report: Callable[..., Awaitable[None]],
        tasks: BackgroundTasks,
        pool: ForkServerPool | None,
    ) -> None:
        """Args:
        store: receives the snapshot buffers of the ranks.
        forwarder: receives their events and metrics.
        report: sends a report to the supervisor.
        pool: provides the fork server and takes it back, if another run is to use it afterwards.
        """
        self._config, self._store, self._forwarder = config, store, forwarder
        self._report, self._tasks = report, tasks
        self._is_pool_shared = pool is not None
        self._pool = pool or ForkServerPool(log=Path(config.run_folder) / "logs" / "fork-server.log")
        self._secret = bytes.fromhex(config.secret)
        self._workers: dict[int, RankProcess] = {}
        self._fork_server: ForkServer | None = None
        self._standbys = StandbyProcesses()
        self._sources = SourceReader()
        self._gpus = _gpus_of(config.devices)
        self.generation = 0
        """Of the ranks that run, or ran last."""

    @property
    def is_ready(self) -> bool:
        """Whether the fork server has imported everything."""
        return self._fork_server is not None and self._fork_server.is_ready

    @property
    def world_sizes(self) -> dict[int, int]:
        """Rank → world size, of the ranks that run."""
        return {rank: worker.world_size for rank, worker in self._running().items()}

    @property
    def pids(self) -> dict[int, int | None]:
        """Rank → process id, of the ranks that run."""
        return {rank: worker.pid for rank, worker in self._running().items()}

    def set_devices(self, devices: Sequence[str]) -> None:
        """Run the next ranks on these devices: `cpu`, or `cuda:` and the number or UUID of a GPU."""
        if (gpus := _gpus_of(devices)) != self._gpus:
            self._standbys.close()
            self._gpus = gpus
            self._prepare_standbys()

    def progress(self) -> list[list[int]]:
        """Per running rank: rank, ms since its last progress, last step, its duration in ns, is suspended."""
        return [worker.progress() for worker in self._running().values()]

    def own_times(self) -> list[list[int]]:
        """Per running rank that has timed its own work: rank, the median of the last steps in ns, steps timed."""
        times = [worker.own_time() for worker in self._running().values()]
        return [[rank, own_ns, num_steps] for rank, own_ns, num_steps in times if num_steps]

    @property
    def device_name(self) -> str:
        """The GPU or processor of the ranks that run; empty before one has reported it."""
        return next((worker.device_name for worker in self._running().values() if worker.device_name), "")

    def start(self, command: Message, *, rendezvous_fd: int) -> None:
        """Fork this node's ranks of a generation.

        Args:
            rendezvous_fd: the listening socket where ranks meet if rank 0 is among them.
        """
        ranks, asked_at = command["ranks"], time.monotonic()
        self.generation = command["generation"]
        sources = self._sources.shards(command)
        self.kill(self.generation - 1)
        if self._fork_server is None:  # it has just died, which is being reported
            for rank in ranks:
                details = {"step": 0, "reason": "its fork server died", "error": ""}
                ended = {"generation": self.generation, "rank": rank, "end": str(EndReason.BROKEN)} | details
                self._tasks.start(self._report(report="ended", **ended))
            return
        for local_rank in range(len(ranks)):
            self._fork(
                command,
                local_rank=local_rank,
                sources=sources,
                fork_server=self._fork_server,
                asked_at=asked_at,
                rendezvous_fd=rendezvous_fd,
            )

    def learn_endpoints(self, command: Message) -> None:
        """Keep the endpoints that later start commands refer to."""
        self._sources.learn(command)

    def set_flag(self, flag: StatusField, *, generation: int) -> None:
        """Set a control flag of a generation's ranks."""
        for worker in self._workers.values():
            if worker.generation == generation:
                worker.status[flag] = 1

    def set_recorded_step(self, step: int) -> None:
        """Publish to the ranks that the metrics of a step are recorded."""
        for worker in self._workers.values():
            worker.status[StatusField.RECORDED_STEP] = step

    def set_peer(self, peer: Endpoint | None, *, generation: int) -> None:
        """Replicate a generation's snapshots to another node, or keep them here only."""
        for worker in self._running().values():
            if worker.generation == generation and worker.peer != peer:
                worker.peer = peer
                if worker.replicator is not None and worker.is_sent:
                    worker.replicator.set_peer(peer)

    def dump_stacks(self, generation: int) -> None:
        """Have each rank of a generation write its stacks to its log."""
        for worker in self._running().values():
            if worker.generation == generation and worker.pid is not None:
                _kill(worker.pid, signal.SIGUSR1)

    def kill(self, generation: int) -> None:
        """Kill all ranks of this and older generations."""
        for worker in self._workers.values():
            if worker.generation > generation:
                continue
            if worker.replicator is not None:
                worker.replicator.close()
            if not worker.is_gone.is_set():
                worker.must_die = True
                if worker.pid is not None:
                    _kill(worker.pid, signal.SIGKILL)

    async def wait_gone(self, generation: int) -> None:
        """Wait until all ranks of this and older generations are reaped."""
        for worker in list(self._workers.values()):
            if worker.generation <= generation:
                await worker.is_gone.wait()

    # --- the fork server

    async def keep_fork_server(self) -> None:
        """Run a fork server at all times, and restart it if it dies: its ranks have died with it."""
        while True:
            self._fork_server = self._pool.take(self._config.plan_json)
            while (message := await self._fork_server.receive()) is not None:
                self._fork_server_says(message)
            reason = await self._fork_server.wait_ended() + self._pool.log_text
            self._fork_server.kill()
            self._fork_server = None
            self._standbys.close()
            for worker in self._running().values():
                worker.is_gone.set()
            await self._report(report="ready", is_ready=False, reason=reason)
            await asyncio.sleep(_RETRY_S)

    async def release_fork_server(self) -> None:
        """Return the fork server to a shared pool once its killed ranks have ended; otherwise end it with them."""
        self._standbys.close()
        if self._fork_server is None:
            return
        running = self._running().values()
        if not self._is_pool_shared or any(worker.pid is None for worker in running):
            self._fork_server.kill()
            return
        for worker in running:
            await asyncio.to_thread(_wait_ended, worker.pid)
        self._pool.release(self._fork_server)

    def _fork_server_says(self, message: Message) -> None:
        if "ready" in message:
            self._tasks.start(self._report(report="ready", is_ready=True, seconds=message["ready"]))
            self._prepare_standbys()
        elif "forked" in message:
            worker = self._workers.get(message["forked"])
            if worker is not None and worker.generation == message["generation"]:
                self._forked(worker, message["pid"])
        else:
            for worker in self._workers.values():
                if worker.pid == message["ended"]:
                    worker.is_gone.set()

    def _forked(self, worker: RankProcess, pid: int) -> None:
        worker.pid = pid
        forked = {"generation": worker.generation, "rank": worker.rank, "pid": pid}
        self._tasks.start(self._report(report="forked", **forked))
        if worker.must_die:
            _kill(pid, signal.SIGKILL)

    def _prepare_standbys(self) -> None:
        """Have a standby process on every GPU but those where a rank is being started."""
        if self._fork_server is None or not self._fork_server.is_ready:
            return
        starting = {worker.local_rank for worker in self._running().values() if worker.replicator is None}
        for number in set(range(len(self._gpus))) - starting:
            device = self._device(number)
            self._standbys.prepare(number, device=device, gpus=self._gpus, fork_server=self._fork_server)

    def _device(self, local_rank: int) -> str:
        return f"cuda:{local_rank}" if self._gpus else "cpu"

    def _fork(
        self,
        command: Message,
        *,
        local_rank: int,
        sources: Sequence[Message],
        fork_server: ForkServer,
        asked_at: float,
        rendezvous_fd: int,
    ) -> None:
        """Fork one rank, or start it in a standby process, and read its messages."""
        rank = command["ranks"][local_rank]
        standby = self._standbys.take(local_rank, gpus=self._gpus)
        ours, theirs = connect_rank() if standby is None else (standby.socket, None)
        worker = self._workers[rank] = RankProcess(
            generation=command["generation"],
            rank=rank,
            local_rank=local_rank,
            world_size=command["world_size"],
            socket=ours,
            status=create_status_page(),
            peer=tuple(command["peer"]) if command["peer"] else None,
        )
        if command["is_stopping"]:
            worker.status[StatusField.STOP] = 1
        fds = [worker.status.fd, *([rendezvous_fd] if rank == 0 else [])]
        shards, shard_fds = self._shards(sources, step=command["step"], first_fd=1 + len(fds))
        num_cores = min(self._config.num_cores, usable_cpus())
        spec = WorkerSpec(
            generation=command["generation"],
            rank=rank,
            world_size=command["world_size"],
            local_rank=local_rank,
            local_world_size=command["num_on_host"],
            device=self._device(local_rank),
            gpus=self._gpus,
            num_threads=max(1, num_cores // len(command["ranks"])),
            checkpoints=self._config.checkpoints,
            log=str(Path(self._config.run_folder) / "logs" / f"rank-{rank}.log"),
            host=command["host"],
            port=command["port"],
            interface=interface_of(self._config.host) if command["is_spread"] else LOOPBACK,
            step=command["step"],
            shards=shards,
            checkpoint_risk=command["checkpoint_risk"],
            laps=command["laps"],
            asked_at=asked_at,
            secret=self._config.secret,
            num_shard_groups=command["num_shard_groups"],
            parts_per_shard=command["parts_per_shard"],
            has_listener=rank == 0,
        )
        if standby is not None:
            standby.start(asdict(spec), fds=fds + shard_fds)
            self._forked(worker, standby.pid)
        if theirs is not None:
            fork_server.fork(asdict(spec), fds=[theirs.fileno(), *fds, *shard_fds])
            theirs.close()
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._read, worker)

    def _shards(self, sources: Sequence[Message], *, step: int, first_fd: int) -> tuple[list[Message], list[int]]:
        """Locate the shards to continue from: file descriptors of local ones, endpoints of the others."""
        shards: list[Message] = []
        fds: list[int] = []
        for shard in sources:
            name = {"generation": shard["generation"], "rank": shard["rank"]}
            buffer = self._store.find(generation=shard["generation"], rank=shard["rank"])
            if buffer is not None and any(copy.step == step for copy in buffer.snapshots()):
                shards.append(name | {"fd": first_fd + len(fds)})
                fds.append(buffer.fd)
            else:
                shards.append(name | {"endpoint": shard["endpoint"]})
        return shards, fds

    # --- messages of workers

    def _read(self, worker: RankProcess) -> None:
        """Read all messages of a worker, or the end of its socket."""
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(worker.socket, MAX_MESSAGE_BYTES, 4)
            except BlockingIOError:
                return
            except OSError:
                text, fds = b"", []
            if not text:
                asyncio.get_running_loop().remove_reader(worker.socket)
                worker.socket.close()
                self._tasks.start(self._disconnected(worker))
                return
            kind, *values = pickle.loads(text)  # from a process that was forked for this agent
            self._handle(worker, kind, values, fds=list(fds))

    def _handle(self, worker: RankProcess, kind: str, values: Sequence[Any], *, fds: list[int]) -> None:
        match kind, values:
            case "buffer", (piece, num_pieces, is_sent):
                self._register_buffer(worker, fds[0], piece=piece, num_pieces=num_pieces, is_sent=is_sent)
            case "snapshot", (step, slot):
                if worker.replicator is not None:
                    worker.send_began_ns = time.process_time_ns()
                    worker.replicator.send(step=step, slot=slot)
            case "device", (name,):
                worker.device_name = name
            case "event", (GenerationStarted() as started,):
                self._tasks.start(self._report(report="started", started=asdict(started)))
            case "event", (CompileFailed() as failed,):  # of any rank; the supervisor records each cause once
                self._tasks.start(self._report(report="compile_failed", **asdict(failed)))
            case "end", (end, step, reason, error):
                worker.has_reported_end = True
                report = self._report_end(worker, end, step=step, reason=reason, error=error)
                if end in (EndReason.DONE, EndReason.FAILED):  # the run ends: record everything before
                    self._forwarder.after_records(report)
                else:
                    self._tasks.start(report)
            case _, (record,):
                if isinstance(record, CheckpointSaved):
                    self._tasks.start(self._report(report="checkpoint_committed", step=record.step))
                self._forwarder.put(kind, record)

    def _register_buffer(self, worker: RankProcess, fd: int, *, piece: int, num_pieces: int, is_sent: bool) -> None:
        name = {"generation": worker.generation, "rank": piece, "world_size": num_pieces}
        self._store.register_buffer(fd, **name)
        if worker.replicator is not None:  # of its first piece, the only one that may be sent
            return
        buffer = self._store.find(generation=worker.generation, rank=piece)
        assert buffer is not None
        worker.is_sent = is_sent
        worker.replicator = Replicator(
            worker.peer if is_sent else None,
            buffer,
            name=name,
            secret=self._secret,
            on_replicated=lambda step: worker.note_replicated(step),
        )
        self._prepare_standbys()

    async def _disconnected(self, worker: RankProcess) -> None:
        """Handle a worker's closed socket: the worker has ended or is ending. Report its end if it did not.

        The end of one that the supervisor has ordered to be killed is not reported: the answer to that order
        implies it, and a change of 10,000 ranks has 10,000 reports less.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(worker.is_gone.wait(), timeout=_REAP_S)
        if not worker.has_reported_end and not worker.must_die:
            worker.has_reported_end = True
            reason = killed_reason(num_kills_before=worker.num_memory_kills)
            await self._report_end(worker, EndReason.BROKEN, step=0, reason=reason, error="")

    async def _report_end(self, worker: RankProcess, end: str, **details: Any) -> None:
        await self._report(report="ended", generation=worker.generation, rank=worker.rank, end=str(end), **details)

    def _running(self) -> dict[int, RankProcess]:
        return {rank: worker for rank, worker in self._workers.items() if not worker.is_gone.is_set()}


def _gpus_of(devices: Sequence[str]) -> list[str]:
    """Return the GPUs among devices, as of `CUDA_VISIBLE_DEVICES`."""
    return [device.removeprefix("cuda:") for device in devices if device.startswith("cuda:")]


def killed_reason(*, num_kills_before: int) -> str:
    """Why a rank ended without a report, and whether it may be for want of memory."""
    if out_of_memory_kills() <= num_kills_before:
        return "its process was killed"
    free, all_of_it = format_bytes(free_memory_bytes()), format_bytes(usable_memory_bytes())
    return (
        "its process was killed, and the kernel's out-of-memory killer was at work on its machine meanwhile "
        f"({free} of {all_of_it} are free now): use fewer workers there, or a machine with more memory"
    )


def _kill(pid: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal_number)


def _wait_ended(pid: int | None) -> None:
    """Wait until a killed process is a zombie or gone; its parent may not have reaped it yet."""
    with contextlib.suppress(psutil.Error):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
