"""What one machine does for a run: its warm process, its ranks, its store, its watch for notices.

The agent decides nothing. It connects to the supervisor, says what it has, does what it is told, and tells
what happens to its ranks. What ranks report goes from here to the run's recorder, so that the record goes
on while the supervisor is away. Without a supervisor for a minute, it ends and takes everything along.

It is long because all that happens on a machine meets here; what each part is made of stands elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

import psutil

from forge.elastic.commands import WorkerSpec, source_shards
from forge.elastic.preemption.notice import Notice
from forge.elastic.preemption.watch import watch
from forge.elastic.replicas.flush import flush_shard
from forge.elastic.replicas.store import ReplicaStore, Replicator, locations_record
from forge.elastic.rpc import Channel, Endpoint, Listener, Message, connect
from forge.elastic.states import EndReason
from forge.elastic.workers.fork_client import ForkServer, ForkServerPool
from forge.elastic.workers.status_page import StatusField, StatusPage, create_status_page
from forge.events import Event, GenerationStarted, StepMetrics
from forge.pricing.budget import read_price

# How long an agent lives without a supervisor: longer than Ray needs to start one anew.
_ORPHAN_S = 60.0
# And how long where Ray says that it does not exist, and not only that it is being restarted.
_BEREFT_S = 5.0
_RETRY_S = 0.2
_FIRST_BEAT_S = 0.25
_MOST_BYTES = 8 * 2**20
_SOCKET_BYTES = 8 * 2**20


class NoSupervisorError(ConnectionError):
    """There is no supervisor of this run any more: it is over."""


class RecorderClient(Protocol):
    """The run's one writer."""

    async def write(self, records: list[tuple[str, Event | StepMetrics]]) -> None:
        """Write them; returns when they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """What an agent is told when it is started."""

    node: str
    """Names this agent, and no agent before it on the same machine."""
    host: str
    """The machine's address."""
    num_slots: int
    num_guaranteed: int
    num_cores: int
    """Which its ranks share."""
    devices: Sequence[str]
    """One for each slot at first: `cpu`, or `cuda:` and a number."""
    run_folder: str
    plan_json: str
    checkpoints: str
    keep: int
    secret: str


@dataclass(slots=True, kw_only=True)
class _Worker:
    """A rank of this machine."""

    generation: int
    rank: int
    world_size: int
    socket: socket.socket
    status: StatusPage
    peer_endpoint: Endpoint | None
    born_ns: int = field(default_factory=time.monotonic_ns)
    sent_at_ns: int = 0
    """The agent's processor time when it began to send the last copy on."""
    pid: int | None = None
    peer: Replicator | None = None
    has_said_end: bool = False
    is_condemned: bool = False
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)


class Agent:
    """One machine's part in a run; `run` is all of its life."""

    def __init__(
        self,
        setup: AgentConfig,
        *,
        find_supervisor: Callable[[], Awaitable[Endpoint]],
        recorder: RecorderClient,
        pool: ForkServerPool | None = None,
    ) -> None:
        """Args:
        find_supervisor: where the supervisor listens; it may have moved since it was asked last.
        recorder: the run's one writer.
        pool: where its warm process comes from and goes to, if another run is to have it afterwards.
        """
        self._pool = pool
        self._setup, self._find_supervisor, self._recorder = setup, find_supervisor, recorder
        self._secret = bytes.fromhex(setup.secret)
        self._store = ReplicaStore(secret=self._secret)
        self._devices = setup.devices
        self._members: dict[int, _Worker] = {}
        self._generation = 0
        self._findings: Message | None = None
        self._warm: ForkServer | None = None
        self._supervisor: Channel | None = None
        self._heartbeat_s = _FIRST_BEAT_S
        self._news: deque[tuple[str, Any]] = deque()
        self._has_news = asyncio.Event()
        self._notices: list[Notice] = []
        self._is_retired = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve the run until it is over, or the supervisor is gone for good."""
        self._listener = Listener(host=self._setup.host, secret=self._secret, serve=self._store.serve)
        self._rendezvous = _listen(self._setup.host)
        self._keep(self._keep_warm())
        self._keep(self._pass_news_on())
        self._keep(self._obey())
        self._keep(watch(os.environ, self._noticed))
        try:
            await self._is_retired.wait()
        finally:
            for task in list(self._tasks):
                task.cancel()
            self._kill(self._generation)
            await self._leave_warm()
            self._listener.close()
            self._rendezvous.close()
            self._store.close()

    def shut_down(self) -> None:
        """The run needs it no more: `run` returns."""
        self._is_retired.set()

    def _keep(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the supervisor

    async def _obey(self) -> None:
        """Stay connected with the supervisor, and do what it says."""
        alone_since = time.monotonic()
        patience_s = _ORPHAN_S
        while time.monotonic() - alone_since < patience_s:
            beats: asyncio.Task[None] | None = None
            try:
                endpoint = await asyncio.wait_for(self._find_supervisor(), timeout=_ORPHAN_S / 4)
                self._supervisor = await connect(endpoint, secret=self._secret)
                await self._supervisor.send(self._hello())
                for notice in self._notices:
                    await self._tell_notice(notice)
                beats = asyncio.ensure_future(self._beat(self._supervisor))
                while True:
                    message = await self._supervisor.receive()
                    alone_since = time.monotonic()
                    await self._do(message)
            except NoSupervisorError:
                patience_s = _BEREFT_S
                await asyncio.sleep(_RETRY_S)
            except (OSError, EOFError, ValueError, TimeoutError):
                patience_s = _ORPHAN_S
                await asyncio.sleep(_RETRY_S)
            finally:
                if beats is not None:
                    beats.cancel()
                if self._supervisor is not None:
                    self._supervisor.close()
                    self._supervisor = None
        self._is_retired.set()

    async def _tell(self, **message: Any) -> None:
        """Tell the supervisor, if there is one; one that comes back asks for everything anew."""
        if self._supervisor is not None:
            with contextlib.suppress(OSError):
                await self._supervisor.send(message)

    def _hello(self) -> Message:
        return {
            "report": "register",
            "node": self._setup.node,
            "host": self._setup.host,
            "endpoint": list(self._listener.endpoint),
            "rendezvous_port": self._rendezvous.getsockname()[1],
            "num_slots": self._setup.num_slots,
            "num_guaranteed": self._setup.num_guaranteed,
            "is_ready": self._warm is not None and self._warm.is_ready,
            "pid": os.getpid(),
            "usd_per_hour": read_price(os.environ),
            "generation": self._generation,
            "running_ranks": {str(rank): member.world_size for rank, member in self._living().items()},
            "pids": {str(rank): member.pid for rank, member in self._living().items()},
            "replicas": locations_record(self._store.locations()),
            "findings": self._findings,
        }

    async def _beat(self, channel: Channel) -> None:
        """Say regularly how far the ranks are, and what is held."""
        told: list[list[int]] = []
        with contextlib.suppress(OSError):
            while True:
                await asyncio.sleep(self._heartbeat_s)
                beat: Message = {"report": "heartbeat", "generation": self._generation}
                beat["ranks"] = [_pulse(rank, member) for rank, member in self._living().items()]
                replicas = locations_record(self._store.locations())
                if replicas != told:
                    beat["replicas"] = told = replicas
                await channel.send(beat)

    async def _do(self, message: Message) -> None:
        match message["command"]:
            case "start":
                self._start(message)
            case "stop":
                self._keep(self._stop(message["generation"], keep_replicas=message["keep_replicas"]))
            case "set_flag":
                for member in self._members.values():
                    if member.generation == message["generation"]:
                        member.status[StatusField[message["flag"]]] = 1
            case "drop_replicas":
                self._store.drop_before(message["generation"])
            case "dump_stacks":
                self._dump_stacks(message["generation"])
            case "flush":
                self._keep(self._persist(message))
            case "set_peer":
                self._move(message)
            case "set_devices":
                self._devices = message["devices"]
            case "set_heartbeat":
                self._heartbeat_s = message["heartbeat_s"]
            case "shut_down":
                self._is_retired.set()

    # --- ranks

    def _start(self, order: Message) -> None:
        """Fork this machine's ranks of a generation."""
        generation, ranks = order["generation"], order["ranks"]
        asked_at = time.monotonic()
        self._generation, self._findings = generation, order["findings"]
        self._kill(generation - 1)
        if self._warm is None:  # it died just now, which the supervisor is being told
            for rank in ranks:
                told = {"step": 0, "reason": "its warm process died", "error": ""}
                self._keep(self._tell(report="ended", generation=generation, rank=rank, end="broken", **told))
            return
        for local_rank in range(len(ranks)):
            self._fork(self._warm, order, local_rank, asked_at=asked_at)
        if 0 in ranks:  # the first rank has it now; the next generation meets at another
            self._rendezvous.close()
            self._rendezvous = _listen(self._setup.host)
            self._keep(self._tell(report="rendezvous", port=self._rendezvous.getsockname()[1]))

    def _fork(self, warm: ForkServer, order: Message, local_rank: int, *, asked_at: float) -> None:
        """Have one rank forked, and listen to it."""
        rank = order["ranks"][local_rank]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
        member = self._members[rank] = _Worker(
            generation=order["generation"],
            rank=rank,
            world_size=order["world_size"],
            socket=ours,
            status=create_status_page(),
            peer_endpoint=tuple(order["peer"]) if order["peer"] else None,
        )
        if order["is_stopping"]:
            member.status[StatusField.STOP] = 1
        fds = [theirs.fileno(), member.status.fd, *([self._rendezvous.fileno()] if rank == 0 else [])]
        parts, snapshots = self._parts(order, first_fd=len(fds))
        told = WorkerSpec(
            generation=order["generation"],
            rank=rank,
            world_size=order["world_size"],
            local_rank=local_rank,
            local_world_size=order["num_on_host"],
            device=self._devices[local_rank],
            num_threads=max(1, min(self._setup.num_cores, os.cpu_count() or 1) // len(order["ranks"])),
            checkpoints=self._setup.checkpoints,
            log=str(Path(self._setup.run_folder) / "logs" / f"rank-{rank}.log"),
            host=order["host"],
            port=order["port"],
            interface=_interface_of(self._setup.host) if order["is_spread"] else "lo",
            step=order["step"],
            parts=parts,
            findings=order["findings"],
            laps=order["laps"],
            asked_at=asked_at,
            secret=self._setup.secret,
            has_listener=rank == 0,
        )
        warm.send(asdict(told), fds + snapshots)
        theirs.close()
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours, self._hear, member)

    def _move(self, order: Message) -> None:
        """Keep the copies of a generation on another machine, or here alone."""
        endpoint = tuple(order["peer"]) if order["peer"] else None
        for member in self._living().values():
            if member.generation == order["generation"] and member.peer_endpoint != endpoint:
                member.peer_endpoint = endpoint
                if member.peer is not None:
                    member.peer.set_peer(endpoint)

    def _parts(self, order: Message, *, first_fd: int) -> tuple[list[Message], list[int]]:
        """Where the state to go on from lies: descriptors of what is here, endpoints of the rest."""
        parts: list[Message] = []
        fds: list[int] = []
        for part in source_shards(order):
            name = {"generation": part["generation"], "rank": part["rank"]}
            snapshot = self._store.find(part["generation"], part["rank"])
            if snapshot is not None and any(copy.step == order["step"] for copy in snapshot.copies()):
                parts.append(name | {"fd": first_fd + len(fds)})
                fds.append(snapshot.fd)
            else:
                parts.append(name | {"endpoint": part["endpoint"]})
        return parts, fds

    def _hear(self, member: _Worker) -> None:
        """News from a rank, or its end."""
        while True:
            try:
                text, fds, _, _ = socket.recv_fds(member.socket, _MOST_BYTES, 4)
            except BlockingIOError:
                return
            except OSError:
                text, fds = b"", []
            if not text:
                asyncio.get_running_loop().remove_reader(member.socket)
                member.socket.close()
                self._keep(self._bury(member))
                return
            self._heed(member, *pickle.loads(text), fds=list(fds))

    def _heed(self, member: _Worker, what: str, *values: Any, fds: list[int]) -> None:
        match what, values:
            case "snapshot", _:
                self._store.register_buffer(member.generation, member.rank, fds[0], world_size=member.world_size)
                snapshot = self._store.find(member.generation, member.rank)
                assert snapshot is not None
                member.peer = Replicator(
                    member.peer_endpoint,
                    snapshot,
                    name={
                        "generation": member.generation,
                        "rank": member.rank,
                        "world_size": member.world_size,
                    },
                    secret=self._secret,
                    on_replicated=lambda step: self._kept(member, step),
                )
            case "copied", (step, slot):
                if member.peer is not None:
                    member.sent_at_ns = time.process_time_ns()
                    member.peer.send(step=step, slot=slot)
            case "event", (GenerationStarted() as formed,):
                self._keep(self._tell(report="started", started=asdict(formed)))
            case "findings", (found,):
                self._findings = found
                self._keep(self._tell(report="findings", findings=found))
            case "end", (end, step, reason, error):
                member.has_said_end = True
                telling = self._tell_end(member, end, step=step, reason=reason, error=error)
                if end in (
                    EndReason.DONE,
                    EndReason.FAILED,
                ):  # the run is over: what it has reported must be written by then
                    self._news.append(("end", telling))
                    self._has_news.set()
                else:
                    self._keep(telling)
            case _, (news,):
                if type(news).__name__ == "CheckpointSaved":
                    self._keep(self._tell(report="checkpoint_committed", step=news.step))
                self._news.append((what, news))
                self._has_news.set()

    def _kept(self, member: _Worker, step: int) -> None:
        member.status[StatusField.AGENT_CPU_NS] += time.process_time_ns() - member.sent_at_ns
        member.status[StatusField.REPLICATED_STEP] = step

    async def _bury(self, member: _Worker) -> None:
        """Its socket is closed: it is gone, or about to be. Say so, if it could not."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(member.is_gone.wait(), timeout=0.2)
        if not member.has_said_end:
            member.has_said_end = True
            await self._tell_end(member, EndReason.BROKEN, step=0, reason="its process was killed", error="")

    async def _tell_end(self, member: _Worker, end: str, **details: Any) -> None:
        await self._tell(report="ended", generation=member.generation, rank=member.rank, end=str(end), **details)

    async def _stop(self, generation: int, *, keep_replicas: bool) -> None:
        """Have no rank of this generation or of one before it; if it is over, no copy that is not told of."""
        self._store.reject_up_to(generation - keep_replicas)
        self._kill(generation)
        for member in list(self._members.values()):
            if member.generation <= generation:
                await member.is_gone.wait()
        await self._tell(
            report="stopped", generation=generation, replicas=locations_record(self._store.locations())
        )

    def _kill(self, generation: int) -> None:
        for member in self._members.values():
            if member.generation > generation:
                continue
            if member.peer is not None:
                member.peer.close()
            if not member.is_gone.is_set():
                member.is_condemned = True
                if member.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(member.pid, signal.SIGKILL)

    def _living(self) -> dict[int, _Worker]:
        return {rank: member for rank, member in self._members.items() if not member.is_gone.is_set()}

    def _dump_stacks(self, generation: int) -> None:
        """Each rank writes its stacks into its log."""
        for member in self._living().values():
            if member.generation == generation and member.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, signal.SIGUSR1)

    # --- the warm process

    async def _keep_warm(self) -> None:
        """Have a warm process at all times: where one dies, its ranks have died with it."""
        pool = self._pool or ForkServerPool(log=Path(self._setup.run_folder) / "logs" / "fork-server.log")
        while True:
            self._warm = pool.take(self._setup.plan_json)
            while (message := await self._warm.receive()) is not None:
                self._hear_warm(message)
            self._warm.kill()
            self._warm = None
            for member in self._living().values():
                member.is_gone.set()
            await self._tell(report="ready", is_ready=False)
            await asyncio.sleep(_RETRY_S)

    async def _leave_warm(self) -> None:
        """Leave the warm process to the next run, if it has no rank of this one; else end it, and them with it."""
        if self._warm is None:
            return
        if self._pool is None or any(member.pid is None for member in self._living().values()):
            self._warm.kill()
            return
        for member in self._living().values():
            await asyncio.to_thread(_await_end, member.pid)
        self._pool.release(self._warm)

    def _hear_warm(self, message: Message) -> None:
        if "warm" in message:
            self._keep(self._tell(report="ready", is_ready=True, seconds=message["warm"]))
        elif "forked" in message:
            member = self._members.get(message["forked"])
            if member is not None and member.generation == message["generation"]:
                member.pid = message["pid"]
                self._keep(
                    self._tell(report="forked", generation=member.generation, rank=member.rank, pid=member.pid)
                )
                if member.is_condemned:
                    os.kill(member.pid, signal.SIGKILL)
        else:
            for member in self._members.values():
                if member.pid == message["ended"]:
                    member.is_gone.set()

    # --- news, notices, storage

    async def _pass_news_on(self) -> None:
        """Give the recorder what ranks report, in order, and tell the first rank what is written."""
        while True:
            await self._has_news.wait()
            self._has_news.clear()
            while self._news:
                some = list(takewhile(lambda item: item[0] != "end", self._news))
                if not some:
                    await self._news.popleft()[1]
                    continue
                await self._recorder.write(some)
                for _ in some:
                    self._news.popleft()
                steps = [news.step for _, news in some if isinstance(news, StepMetrics)]
                for member in self._members.values() if steps else ():
                    member.status[StatusField.RECORDED_STEP] = max(steps)

    def _noticed(self, notice: Notice) -> None:
        self._notices.append(notice)
        self._keep(self._tell_notice(notice))

    async def _tell_notice(self, notice: Notice) -> None:
        left_s = None if notice.deadline is None else notice.deadline - time.time()
        await self._tell(
            report="preemption", source=notice.source, seconds_left=left_s, is_certain=notice.is_certain
        )

    async def _persist(self, order: Message) -> None:
        """Make parts of a durable checkpoint out of the store."""

        async def one(rank: int) -> int | None:
            snapshot = self._store.find(order["generation"], rank)
            if snapshot is None:
                return None
            return await flush_shard(
                snapshot,
                step=order["step"],
                rank=rank,
                world_size=order["world_size"],
                url=self._setup.checkpoints,
                keep=self._setup.keep,
                token=order["token"],
            )

        sealed = await asyncio.gather(*(one(rank) for rank in order["ranks"]))
        if 0 in order["ranks"]:
            await self._tell(
                report="flushed", step=order["step"], size_bytes=max(map(int, filter(None, sealed)), default=0)
            )


def _listen(host: str) -> socket.socket:
    """Where the ranks of a generation would meet, if its first rank is here."""
    sock = socket.socket()
    sock.bind((host, 0))
    sock.listen(1024)
    return sock


def _await_end(pid: int | None) -> None:
    """Return once a killed process runs no more; its parent may not have asked yet how it ended."""
    with contextlib.suppress(psutil.Error):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


def _interface_of(host: str) -> str | None:
    """The name of the network interface that has this address."""
    found = psutil.net_if_addrs()
    return next((str(name) for name in found if any(entry.address == host for entry in found[name])), None)


def _pulse(rank: int, member: _Worker) -> list[int]:
    """Rank, milliseconds since it did something, its last step and how long that took, whether it is halted."""
    status = member.status
    silent_ms = (time.monotonic_ns() - max(status[StatusField.PROGRESS_NS], member.born_ns)) // 10**6
    return [rank, silent_ms, status[StatusField.STEP], status[StatusField.STEP_NS], int(_is_halted(member.pid))]


def _is_halted(pid: int | None) -> bool:
    """Whether a process is stopped by a signal."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state in ("T", "t")
