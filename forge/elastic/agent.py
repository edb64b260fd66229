"""One node's agent: connects to the supervisor, carries out its commands, and reports what happens to the node's
ranks.

The agent decides nothing. The metrics and events of its ranks go to the run's recorder directly, so that recording
continues while the supervisor is being restarted. After a minute without a supervisor the agent ends, and its
processes end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from forge.elastic.agent_config import AgentConfig
from forge.elastic.background import BackgroundTasks
from forge.elastic.handshake import AuthenticationError
from forge.elastic.preemption.notice import Notice
from forge.elastic.preemption.watch import watch
from forge.elastic.record_forwarder import RecorderClient, RecordForwarder
from forge.elastic.replicas.flush import flush_shard
from forge.elastic.replicas.store import ReplicaStore, locations_record
from forge.elastic.rpc import Channel, Endpoint, Listener, Message, connect
from forge.elastic.states import EndReason
from forge.elastic.workers.fork_client import ForkServerPool
from forge.elastic.workers.status_page import StatusField
from forge.elastic.workers.worker_group import WorkerGroup
from forge.errors import RunError
from forge.pricing.budget import read_mtbf_s, read_price, read_saving
from forge.process import first_line

# How long an agent lives without a supervisor: longer than Ray needs to restart one.
_MAX_ALONE_S = 60.0
# The same, if Ray answers that the supervisor does not exist instead of that it is being restarted.
_MAX_ALONE_NO_SUPERVISOR_S = 5.0
_RETRY_S = 0.2
_RECORDS_RETRY_S = 1.0
_FIRST_HEARTBEAT_S = 0.25


class NoSupervisorError(ConnectionError):
    """The run's supervisor does not exist any more: the run is over."""


class Agent:
    """The agent of one run on one node."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        find_supervisor: Callable[[], Awaitable[Endpoint]],
        recorder: RecorderClient,
        pool: ForkServerPool | None = None,
        find_gpu: Callable[[], tuple[str, int] | None] = lambda: None,
    ) -> None:
        """Args:
        find_supervisor: returns the supervisor's current endpoint; it changes when the supervisor is restarted.
        recorder: the run's recorder.
        pool: provides the fork server and takes it back, if another run is to use it afterwards.
        find_gpu: returns name and memory in bytes of the smallest GPU of the run here; called on a thread.
        """
        self._config, self._find_supervisor = config, find_supervisor
        self._secret = bytes.fromhex(config.secret)
        self._store = ReplicaStore(secret=self._secret)
        self._tasks = BackgroundTasks()
        self._forwarder = RecordForwarder(recorder, on_recorded=self._recorded)
        self._workers = WorkerGroup(
            config,
            store=self._store,
            forwarder=self._forwarder,
            report=self._report,
            tasks=self._tasks,
            pool=pool,
        )
        self._supervisor: Channel | None = None
        self._find_gpu = find_gpu
        self._gpu: tuple[str, int] | None = None
        self._heartbeat_s = _FIRST_HEARTBEAT_S
        self._notices: list[Notice] = []
        self._logged: set[str] = set()
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Work for the run until it is over, or the supervisor is gone for good."""
        self._listener = Listener(host=self._config.host, secret=self._secret, serve=self._store.serve)
        self._rendezvous = _listen(self._config.host)
        self._tasks.start(self._workers.keep_fork_server())
        self._tasks.start(self._forward_records())
        self._tasks.start(self._follow_supervisor())
        self._tasks.start(self._report_gpu())
        self._tasks.start(watch(os.environ, self._preemption_noticed))
        try:
            await self._is_over.wait()
        finally:
            self._tasks.cancel()
            self._workers.kill(self._workers.generation)
            await self._workers.release_fork_server()
            self._listener.close()
            self._rendezvous.close()
            self._store.close()

    def shut_down(self) -> None:
        """End the agent: `run` returns."""
        self._is_over.set()

    # --- the supervisor

    async def _follow_supervisor(self) -> None:
        """Stay connected to the supervisor and carry out its commands; the agent ends if one cannot be."""
        alone_since = time.monotonic()
        max_alone_s = _MAX_ALONE_S
        while time.monotonic() - alone_since < max_alone_s:
            heartbeats: asyncio.Task[None] | None = None
            try:
                endpoint = await asyncio.wait_for(self._find_supervisor(), timeout=_MAX_ALONE_S / 4)
                self._supervisor = await connect(endpoint, secret=self._secret)
                await self._supervisor.send(self._registration())
                for notice in self._notices:
                    await self._report_preemption(notice)
                heartbeats = asyncio.ensure_future(self._send_heartbeats(self._supervisor))
                while True:
                    command = await self._supervisor.receive()
                    alone_since = time.monotonic()
                    await self._execute(command)
            except NoSupervisorError:
                max_alone_s = _MAX_ALONE_NO_SUPERVISOR_S
                await asyncio.sleep(_RETRY_S)
            except (OSError, EOFError, ValueError, TimeoutError) as error:
                self._log_refusal(error)
                max_alone_s = _MAX_ALONE_S
                await asyncio.sleep(_RETRY_S)
            except Exception as error:  # of a command: what it should have done is unknown, and the ranks must end
                text = f"{type(error).__name__}: {first_line(error)}"
                sys.stderr.write(f"a command of the supervisor cannot be carried out ({text}); the agent ends\n")
                break
            finally:
                if heartbeats is not None:
                    heartbeats.cancel()
                if self._supervisor is not None:
                    self._supervisor.close()
                    self._supervisor = None
        self._is_over.set()

    def _log_refusal(self, error: Exception) -> None:
        """Log a failed authentication, once per reason: unlike a lost connection it does not heal."""
        if isinstance(error, AuthenticationError) and str(error) not in self._logged:
            self._logged.add(str(error))
            sys.stderr.write(f"cannot connect to the supervisor: {error}\n")

    async def _report(self, **report: Any) -> None:
        """Send a report if the supervisor is connected; the next registration includes its content otherwise."""
        if self._supervisor is not None:
            with contextlib.suppress(OSError):
                await self._supervisor.send(report)

    async def _report_gpu(self) -> None:
        """Report the smallest GPU, by itself: the registration does not wait a second for its driver."""
        self._gpu = await asyncio.to_thread(self._find_gpu)
        if self._gpu is not None:
            await self._report(report="gpu", gpu=list(self._gpu))

    def _registration(self) -> Message:
        workers = self._workers
        return {
            "report": "register",
            "node": self._config.node,
            "host": self._config.host,
            "endpoint": list(self._listener.endpoint),
            "rendezvous_port": self._rendezvous.getsockname()[1],
            "num_slots": self._config.num_slots,
            "num_guaranteed": self._config.num_guaranteed,
            "is_ready": workers.is_ready,
            "pid": os.getpid(),
            "usd_per_hour": read_price(os.environ),
            "saving_usd_per_hour": read_saving(os.environ),
            "mtbf_s": read_mtbf_s(os.environ),
            "generation": workers.generation,
            "running_ranks": {str(rank): world_size for rank, world_size in workers.world_sizes.items()},
            "pids": {str(rank): pid for rank, pid in workers.pids.items()},
            "replicas": locations_record(self._store.locations()),
            "gpu": None if self._gpu is None else list(self._gpu),
        }

    async def _send_heartbeats(self, channel: Channel) -> None:
        """Report the progress of the ranks regularly; their replicas and own times whenever they have changed."""
        reported: list[list[int]] = []
        own_times: list[list[int]] = []
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(self._heartbeat_s)
                heartbeat: Message = {"report": "heartbeat", "generation": self._workers.generation}
                heartbeat["ranks"] = self._workers.progress()
                replicas = locations_record(self._store.locations())
                if replicas != reported:
                    heartbeat["replicas"] = reported = replicas
                if (times := self._workers.own_times()) != own_times:
                    own_times = times
                    heartbeat |= {"own_times": times, "device": self._workers.device_name}
                await channel.send(heartbeat)

    async def _execute(self, command: Message) -> None:
        match command["command"]:
            case "start":
                self._start(command)
            case "stop":
                self._tasks.start(self._stop(command["generation"], keep_replicas=command["keep_replicas"]))
            case "set_flag":
                self._workers.set_flag(StatusField[command["flag"]], generation=command["generation"])
            case "drop_replicas":
                self._store.drop_before(command["generation"])
            case "dump_stacks":
                self._workers.dump_stacks(command["generation"])
            case "flush":
                self._tasks.start(self._flush(command))
            case "endpoints":
                self._workers.learn_endpoints(command)
            case "set_peer":
                peer = tuple(command["peer"]) if command["peer"] else None
                self._workers.set_peer(peer, generation=command["generation"])
            case "set_devices":
                self._workers.set_devices(command["devices"])
            case "set_heartbeat":
                self._heartbeat_s = command["heartbeat_s"]
            case "shut_down":
                self._is_over.set()

    # --- commands

    def _start(self, command: Message) -> None:
        self._workers.start(command, rendezvous_fd=self._rendezvous.fileno())
        if 0 in command["ranks"]:  # rank 0 has inherited the socket; the next generation meets at another
            self._rendezvous.close()
            self._rendezvous = _listen(self._config.host)
            self._tasks.start(self._report(report="rendezvous", port=self._rendezvous.getsockname()[1]))

    async def _stop(self, generation: int, *, keep_replicas: bool) -> None:
        """Kill all ranks up to this generation and report the replicas.

        Args:
            keep_replicas: continue to accept replicas of this generation, whose ranks run on other nodes.
        """
        self._store.reject_up_to(generation - keep_replicas)
        self._workers.kill(generation)
        await self._workers.wait_gone(generation)
        replicas = locations_record(self._store.locations())
        await self._report(report="stopped", generation=generation, replicas=replicas)

    async def _flush(self, command: Message) -> None:
        """Write this node's shards of a durable checkpoint from its replicas."""

        async def flush(rank: int) -> dict[int, int]:
            buffer = self._store.find(generation=command["generation"], rank=rank)
            if buffer is None:
                return {}
            return await flush_shard(
                buffer,
                step=command["step"],
                rank=rank,
                world_size=command["world_size"],
                url=self._config.checkpoints,
                keep=self._config.keep,
                keep_best=self._config.keep_best,
                token=command["token"],
            )

        written = await asyncio.gather(*(flush(rank) for rank in command["ranks"]))
        if 0 in command["ranks"]:
            stored = next(filter(None, written), {})
            await self._report(report="flushed", step=command["step"], stored=sorted(stored.items()))

    # --- records and notices

    async def _forward_records(self) -> None:
        """Forward records; if the recorder cannot write them, the run must end: training would go on unrecorded."""
        while True:
            try:
                await self._forwarder.run()
            except RunError as error:
                sys.stderr.write(f"{error}\n")
                failed = {"step": 0, "reason": str(error), "error": "RunError"}
                for rank in self._workers.world_sizes:
                    generation = self._workers.generation
                    await self._report(
                        report="ended", generation=generation, rank=rank, end=str(EndReason.FAILED), **failed
                    )
                await asyncio.sleep(_RECORDS_RETRY_S)

    def _recorded(self, step: int) -> None:
        self._workers.set_recorded_step(step)

    def _preemption_noticed(self, notice: Notice) -> None:
        self._notices.append(notice)
        self._tasks.start(self._report_preemption(notice))

    async def _report_preemption(self, notice: Notice) -> None:
        left_s = None if notice.deadline is None else notice.deadline - time.time()
        details = {"source": notice.source, "seconds_left": left_s, "is_certain": notice.is_certain}
        await self._report(report="preemption", **details)


def _listen(host: str) -> socket.socket:
    """Open a listening socket for the rendezvous of a generation, used if its rank 0 is on this node."""
    sock = socket.socket()
    sock.bind((host, 0))
    sock.listen(1024)
    return sock
