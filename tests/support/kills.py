"""Kill checkpoint writers at random moments of saving, and check each time which checkpoint remains.

    python -m tests.support.kills FOLDER NUM_KILLS SEED > report.json

A membership is two or three processes that do what `forge.train.async_checkpoint` does, without torch and without
training: each has a snapshot, filled with bytes computed from the step, and a real
`forge.checkpoint.writer_process`, for one step after another. One process, or all, receive SIGKILL; the next
membership continues from what `find_checkpoint` returns. All are forked from this one light process, which also
becomes the parent of orphaned writers, so that it can wait until no process is left. It is longer than 400 lines
because the harness, the simulated ranks and the checks belong together.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import mmap
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from forge.checkpoint import storage_fs, writer_process
from forge.checkpoint.intervals import ITEM_BYTES, Interval, Layout, pack
from forge.checkpoint.manifest import ModelShape, Parameter, Progress, state_bytes
from forge.checkpoint.reader import list_checkpoints
from forge.checkpoint.snapshot_buffer import NUM_SLOTS, create_snapshot_buffer
from forge.checkpoint.storage_fs import FolderStorage
from forge.checkpoint.verify import find_checkpoint, verify_checkpoint
from forge.checkpoint.writer_process import WriteCommand
from forge.errors import CheckpointError

KEEP = 2
VICTIMS = ("a rank", "a writer", "rank 0's writer", "all")
PHASES = ("stage", "part", "marker", "await", "state", "unmark", "manifest", "rename", "sweep", "prune", "remove")
"""Phases of a writer in order; `rename` follows the manifest, `prune` chooses what to remove."""
STAGES = {
    "writing": {"stage", "part"},
    "markers": {"marker"},
    "committing": {"await", "state", "unmark", "manifest"},
    "renaming": {"rename"},
    "sweeping": {"sweep"},
    "pruning": {"prune", "remove"},
}
"""Groups of phases."""
# Short phases are listed repeatedly, so that they are hit as often.
_AIMS = (*PHASES, "stage", "rename", "prune", "sweep", "sweep")
_MARKS = ("idle", "save", "discard", *PHASES)
_ROOT = Path(__file__).parents[2]
_MAX_WORLD_SIZE = 3
_DEADLINE_S = 20.0
# Short, to keep the harness fast: how long a writer waits for missing parts, and sleeps between polls.
_PATIENCE_S = 0.05
_POLL_S = 0.002
_ABANDONED_AFTER_S = 0.5
# A shard is written in several chunks, as one of a real model is.
_CHUNK_BYTES = 2**16
_EXECUTED = f"""
from forge.checkpoint import storage_fs as folder
from forge.checkpoint import writer_process as writer
writer._ORPHAN_TIMEOUT_S, writer._POLL_S, folder._LOCK_GRACE_S = {_PATIENCE_S}, {_POLL_S}, {_ABANDONED_AFTER_S}
writer.main()
"""

_TRAINED = {"embed.weight": 60_000, "layers.0.weight": 30_000, "norm.weight": 257}
_KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
_STATE = [
    *(("F32", kind, name, n) for kind in _KINDS for name, n in _TRAINED.items()),
    ("BF16", "frozen", "old.weight", 5_001),
    ("F32", "buffer", "inv_freq", 33),
]
_NOISE = memoryview(random.Random(0).randbytes(2**20))
_SHAPE = ModelShape(
    parameters={
        name: Parameter(shape=(n,), dtype=dtype, kind=kind)
        for dtype, kind, name, n in _STATE
        if kind in ("master", "frozen", "buffer")
    },
    tied={},
    config={},
)


@dataclass(kw_only=True)
class KillReport:
    """What was killed, and the state of the checkpoints afterwards."""

    num_kills: int = 0
    num_committed: int = 0
    """Saves reported as complete."""
    seconds: float = 0.0
    save_ms: float = 0.0
    """From the start of one save to that of the next, without kills."""
    victims: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    """Phases of the killed writers."""
    broken: list[str] = field(default_factory=list)
    """Kills after which a checkpoint did not verify, or held other bytes than were saved."""
    lost: list[str] = field(default_factory=list)
    """Kills after which the newest checkpoint was older than a reported one."""
    left: list[str] = field(default_factory=list)
    """Processes that did not end, memberships that did not continue to save."""
    crashed: list[str] = field(default_factory=list)
    """Writers that failed without being killed."""
    most_staging: int = 0
    """Most staging folders found after a kill."""
    names: list[str] = field(default_factory=list)
    """Content of the folder after a last, undisturbed save."""


def kill_forge(folder: Path, *, num_kills: int, seed: int) -> KillReport:
    """Run the harness in a light process of its own. Raises: CalledProcessError, TimeoutExpired."""
    command = [sys.executable, "-m", "tests.support.kills", str(folder), str(num_kills), str(seed)]
    harness = subprocess.Popen(
        command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        text = harness.communicate(timeout=60 + num_kills)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(harness.pid, signal.SIGKILL)  # including any processes it has left
        harness.wait()
    if harness.returncode != 0:
        raise subprocess.CalledProcessError(harness.returncode, command)
    figures = json.loads(text)
    counts = {key: Counter(figures[key]) for key in ("victims", "phases")}
    return KillReport(**figures | counts)


def main() -> None:
    """Entry point of the process that `kill_forge` starts."""
    folder, num_kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    _inherit_orphans()
    report = _Campaign(folder, seed=seed).run(num_kills)
    sys.stdout.write(json.dumps(vars(report)))


class _Campaign:
    """One membership after the other in one folder."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self._storage = FolderStorage(folder)
        self._folder = folder
        self._random = random.Random(seed)
        self._report = KillReport()
        self._newest = 0
        """Step of the newest checkpoint that was reported or found."""
        self._period_s = 0.0
        self._before: list[_Membership] = []
        """Memberships that may still have living processes."""

    def run(self, num_kills: int) -> KillReport:
        began = time.monotonic()
        self._measure()
        while self._report.num_kills < num_kills and not self._report.left:
            self._kill_once()
        self._check(is_quiet=self._await_quiet())
        self._save_a_last_time()
        self._report.seconds = time.monotonic() - began
        return self._report

    def _measure(self) -> None:
        """The duration of a save, from a few undisturbed ones."""
        membership = self._start()
        membership.await_report(lambda seen: len(seen.begun) > 20)
        times = membership.seen.begun
        self._period_s = statistics.median(b - a for a, b in itertools.pairwise(times))
        self._report.save_ms = self._period_s * 1e3
        self._end(membership)
        self._check(is_quiet=self._await_quiet())

    def _kill_once(self) -> None:
        draw = self._random
        membership = self._start(is_executed=draw.random() < 0.05)
        wanted = draw.randint(1, 2)
        if not membership.await_report(lambda seen: len(seen.begun) >= wanted):
            self._report.left.append(f"{membership.token} has not saved")
        victim = draw.choice(VICTIMS)
        rank = 0 if victim in ("rank 0's writer", "all") else draw.randrange(membership.world_size)
        if draw.random() < 0.5:  # to hit the short phases too
            membership.await_mark(draw.choice(_AIMS if rank == 0 else PHASES[:3]), rank=rank)
            _pause(draw.choice((0.0, draw.uniform(0, 3e-4))))
        else:
            _pause(draw.uniform(0, self._period_s * (1.2 if not membership.is_executed else 3)))
        killed = membership.kill(victim, rank=rank)
        self._report.num_kills += 1
        self._report.victims[victim] += 1
        self._report.phases.update(killed)
        if "writer" in victim and draw.random() < 0.5:  # a writer's death does not end a membership
            num_committed = len(membership.seen.committed)
            if not membership.await_report(lambda seen: len(seen.committed) > num_committed + 1):
                self._report.left.append(f"{membership.token} did not save on without its writer")
        self._end(membership)
        # Sometimes the next membership begins while writers of this one still finish.
        self._check(is_quiet=draw.random() < 0.75 and self._await_quiet())

    def _start(self, *, is_executed: bool = False, num_saves: int | None = None) -> _Membership:
        membership = _Membership(
            self._folder,
            token=f"{self._random.getrandbits(32):08x}",
            world_size=self._random.choice((2, 2, _MAX_WORLD_SIZE)),
            first_step=self._newest + 1,
            is_executed=is_executed,
            num_saves=num_saves,
        )
        self._before.append(membership)
        return membership

    def _end(self, membership: _Membership) -> None:
        membership.end()
        self._report.num_committed += len(membership.seen.committed)
        self._newest = max([self._newest, *membership.seen.committed])

    def _await_quiet(self) -> bool:
        """Wait until every process of every membership has ended."""
        codes = _reap()
        writers = {pid for membership in self._before for pid in membership.seen.writers}
        if codes is None:
            self._report.left.append(f"processes after kill {self._report.num_kills}")
            for pid in writers:
                _kill(pid)
            return False
        bad = [code for pid, code in codes.items() if pid in writers and code not in (0, -signal.SIGKILL)]
        bad += [code for m in self._before for code in m.seen.deaths if code != -signal.SIGKILL]
        if bad:
            self._report.crashed.append(f"exit {bad} after kill {self._report.num_kills}")
        self._before.clear()
        return True

    def _check(self, *, is_quiet: bool) -> None:
        """Check the checkpoints in the folder."""
        after = f"after kill {self._report.num_kills}"
        if is_quiet:
            for name in list_checkpoints(self._storage):
                problem = verify_checkpoint(self._storage, name)
                if problem is not None:
                    self._report.broken.append(f"{name} {after}: {problem}")
        found = find_checkpoint(self._storage, on_skip=lambda *_: None)
        step = found.progress.step if found is not None else 0
        if step < self._newest:
            self._report.lost.append(f"step {step}, not {self._newest}, {after}")
        if found is None:
            return
        for dtype, kind, name, numel in _STATE:
            whole = Interval(kind=kind, name=name, start=0, stop=numel, dtype=dtype)
            buffer = bytearray(whole.size_bytes)
            try:
                found.read([(whole, memoryview(buffer))])
            except CheckpointError as error:
                self._report.broken.append(f"{error} {after}")
            if buffer != _values(step, whole):
                self._report.broken.append(f"{kind} of {name} in step {step} {after}")
        self._newest = step
        self._report.most_staging = max(self._report.most_staging, len(list(self._folder.glob(".staging-*"))))

    def _save_a_last_time(self) -> None:
        """Save once undisturbed, when every abandoned staging folder is old enough to be removed."""
        time.sleep(_ABANDONED_AFTER_S)
        membership = self._start(num_saves=KEEP)
        membership.await_end()
        self._end(membership)
        self._check(is_quiet=self._await_quiet())
        self._report.names = sorted(path.name for path in self._folder.iterdir())


@dataclass(kw_only=True)
class _Seen:
    """What a membership has reported."""

    begun: list[float] = field(default_factory=list)
    """Start of a save, by the monotonic clock."""
    committed: list[int] = field(default_factory=list)
    writers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Process → its rank, and the index of its phase mark."""
    deaths: list[int] = field(default_factory=list)
    """Exit codes of writers that died while their rank was alive."""


class _Membership:
    """Simulated ranks that save step after step, seen from the harness."""

    def __init__(
        self,
        folder: Path,
        *,
        token: str,
        world_size: int,
        first_step: int,
        is_executed: bool,
        num_saves: int | None,
    ) -> None:
        """Args:
        token: how the tokens of its checkpoints begin.
        is_executed: its writers are started with `python`, as those of a run are, and say nothing of their phases.
        num_saves: after how many it ends by itself.
        """
        self.token, self.world_size, self.is_executed = token, world_size, is_executed
        self.seen = _Seen()
        self._marks = mmap.mmap(-1, mmap.PAGESIZE)
        down = [os.pipe() for _ in range(world_size)]  # from the first rank to each
        up = [os.pipe() for _ in range(world_size)]
        reports, telling = os.pipe()
        self._reports = _Lines(reports)
        self._ranks = []
        for number in range(world_size):
            rank = _Rank(
                rank=number,
                world_size=world_size,
                folder=folder,
                token=token,
                is_executed=is_executed,
                marks=self._marks,
                telling=telling,
                inward=[pipe[0] for pipe in (up[1:] if number == 0 else [down[number]])],
                outward=[pipe[1] for pipe in (down[1:] if number == 0 else [up[number]])],
            )
            self._ranks.append(_fork(lambda rank=rank: rank.run(first_step, num_saves=num_saves)))
        for fd in [telling, *itertools.chain(*down, *up)]:
            os.close(fd)

    def await_report(self, is_so: Callable[[_Seen], bool]) -> bool:
        """Read reports until a condition holds; False on timeout or if all ranks have ended."""
        deadline = time.monotonic() + _DEADLINE_S
        while not is_so(self.seen) or len(self.seen.writers) < self.world_size:
            if not select.select([self._reports.fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            if not self._listen():
                return False
        return True

    def await_end(self) -> None:
        """Read reports until all ranks have ended."""
        self.await_report(lambda seen: False)

    def await_mark(self, phase: str, *, rank: int) -> None:
        """Wait until a rank's writer is in a phase."""
        mark = self._writer_of(rank)[1]
        deadline = time.monotonic() + 0.2
        while not self.is_executed and time.monotonic() < deadline:
            if self._marks[mark] == _MARKS.index(phase):
                return
            os.sched_yield()

    def kill(self, victim: str, *, rank: int) -> list[str]:
        """Returns: the phases of the killed writers, as far as they are known."""
        killed: list[tuple[int, int]] = []
        if victim == "a rank":
            _kill(self._ranks[rank])
        elif victim == "all":
            killed = [self._writer_of(each) for each in range(self.world_size)]
        else:
            killed = [self._writer_of(rank)]
        for pid, _ in killed:
            _kill(pid)
        if victim == "all":
            for pid in self._ranks:
                _kill(pid)
        time.sleep(2e-4)  # until the last mark is written
        return [] if self.is_executed else [_MARKS[self._marks[mark]] for _, mark in killed]

    def end(self) -> None:
        """Kill the living ranks, whose writers notice it, and read all remaining reports."""
        for pid in self._ranks:
            _kill(pid)
        while self._listen():
            pass
        os.close(self._reports.fd)

    def _listen(self) -> bool:
        lines = self._reports.read()
        for line in map(json.loads, lines or ()):
            match line:
                case {"begun": at}:
                    self.seen.begun.append(at)
                case {"committed": step}:
                    self.seen.committed.append(step)
                case {"writer": pid, "rank": rank, "mark": mark}:
                    self.seen.writers[pid] = rank, mark
                case {"died": code}:
                    self.seen.deaths.append(code)
        return lines is not None

    def _writer_of(self, rank: int) -> tuple[int, int]:
        """The newest process, and the index of its phase mark."""
        return [(pid, mark) for pid, (of, mark) in self.seen.writers.items() if of == rank][-1]


@dataclass(kw_only=True)
class _Rank:
    """A simulated training rank; rank 0 decides when all of them save."""

    rank: int
    world_size: int
    folder: Path
    token: str
    is_executed: bool
    marks: mmap.mmap
    telling: int
    inward: list[int]
    outward: list[int]
    num_writers: int = 0
    num_begun: int = 0
    asked: str = ""
    """Token of the last requested save; a writer may be killed before the first one."""
    has_part: bool = False

    def run(self, first_step: int, *, num_saves: int | None) -> None:
        """Save step after step, until done, killed, or without peers."""
        _close_all_but({0, 1, 2, self.telling, *self.inward, *self.outward})
        self._snapshot = create_snapshot_buffer(_layout(self.rank, world_size=self.world_size))
        self._peers = [_Lines(fd) for fd in self.inward]
        self._start_writer()
        if self.rank == 0:
            for step in itertools.islice(itertools.count(first_step), num_saves):
                self._lead(step)
            return
        while True:
            self._follow()

    def _lead(self, step: int) -> None:
        self._tell(begun=time.monotonic())
        for fd in self.outward:
            os.write(fd, f"{step}\n".encode())
        token = self._save(step)
        while True:
            for source, line in self._read_lines():
                if source is not self._outcomes and line == token:  # a peer's shard has failed
                    self._send({"abort": token})
                    return
                if source is self._outcomes and line is None:
                    self._start_writer()
                    return
                outcome = json.loads(line) if source is self._outcomes else {}
                if outcome.get("token") == token and "committed" in outcome:
                    self._tell(committed=step)
                    return
                if outcome.get("token") == token and "failed" in outcome:
                    return

    def _follow(self) -> None:
        for source, line in self._read_lines():
            if source is not self._outcomes:
                self.asked, self.has_part = self._save(int(line)), False
            elif line is None:
                self._start_writer()
                if self.asked and not self.has_part:
                    self._say_failed()
            elif (outcome := json.loads(line))["token"] == self.asked:
                self.has_part = self.has_part or "part" in outcome
                if "failed" in outcome:
                    self._say_failed()

    def _say_failed(self) -> None:
        os.write(self.outward[0], f"{self.asked}\n".encode())

    def _save(self, step: int) -> str:
        slot = self.num_begun % NUM_SLOTS
        self.num_begun += 1
        with self._snapshot.begin(slot) as data:
            for interval, offset in self._snapshot.layout.with_offsets():
                data[offset : offset + interval.size_bytes] = _values(step, interval)
        self._snapshot.commit(slot, step=step, state={"step": step})
        progress = Progress(step=step, num_tokens=step * 100, config_digest="one", corpus="one")
        command = WriteCommand(
            url=str(self.folder),
            step=step,
            slot=slot,
            rank=self.rank,
            world_size=self.world_size,
            token=f"{self.token}{self.num_begun:04x}",
            keep=KEEP,
            state=state_bytes(progress, _SHAPE).decode() if self.rank == 0 else "",
        )
        self._send(asdict(command))
        return command.token

    def _read_lines(self) -> Iterator[tuple[_Lines, Any]]:
        """Read messages of peers and of the writer; None if the writer is dead. Without peers this rank ends."""
        by_fd = {lines.fd: lines for lines in (*self._peers, self._outcomes)}
        for fd in select.select(list(by_fd), [], [])[0]:
            source = by_fd[fd]
            lines = source.read()
            if lines is None and source is not self._outcomes:
                os._exit(0)
            for line in [None] if lines is None else lines:
                yield source, line

    def _start_writer(self) -> None:
        if self.num_writers:
            os.close(self._commands)
            os.close(self._outcomes.fd)
            self._tell(died=os.waitstatus_to_exitcode(os.waitpid(self._writer, 0)[1]))
        mark = self.rank + _MAX_WORLD_SIZE * self.num_writers
        self.num_writers += 1
        commands, self._commands = os.pipe()
        answered, answering = os.pipe()
        self._outcomes = _Lines(answered)
        if self.is_executed:
            command = [sys.executable, "-c", _EXECUTED, str(self._snapshot.fd)]
            process = subprocess.Popen(command, stdin=commands, stdout=answering, pass_fds=[self._snapshot.fd])
            self._writer = process.pid
        else:
            serve = _Writer(snapshot=self._snapshot.fd, commands=commands, answering=answering)
            self._writer = _fork(lambda: serve.run(self.marks, mark))
        os.close(commands)
        os.close(answering)
        self._tell(writer=self._writer, rank=self.rank, mark=mark)

    def _send(self, command: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._commands, json.dumps(command).encode() + b"\n")

    def _tell(self, **what: Any) -> None:
        os.write(self.telling, json.dumps(what).encode() + b"\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Writer:
    """`forge.checkpoint.writer_process` in a forked process: the same, without the time for imports."""

    snapshot: int
    commands: int
    answering: int

    def run(self, marks: mmap.mmap, mark: int) -> None:
        """Returns when there are no more commands."""
        snapshot = 3
        for old, new in ((self.commands, 0), (self.answering, 1), (self.snapshot, snapshot)):
            os.dup2(old, new)
        _close_all_but({0, 1, 2, snapshot})
        writer_process._CHUNK_BYTES, writer_process._POLL_S = _CHUNK_BYTES, _POLL_S
        writer_process._ORPHAN_TIMEOUT_S, storage_fs._LOCK_GRACE_S = _PATIENCE_S, _ABANDONED_AFTER_S
        _mark_phases(marks, mark)
        sys.argv = ["forge.checkpoint.writer_process", str(snapshot)]
        writer_process.main()


def _mark_phases(marks: mmap.mmap, mark: int) -> None:
    """Have this process write its phase to shared memory, which is readable after its death."""

    def marked(function: Callable[..., Any], phase: str | None) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            before = marks[mark]
            marks[mark] = _MARKS.index(phase or _phase_of(arguments[1]))
            try:
                return function(*arguments, **named)
            finally:
                marks[mark] = _MARKS.index("rename") if phase is None and marks[mark] == manifest else before

        return call

    manifest = _MARKS.index("manifest")

    writer_phases = {"save": "save", "_wait_for_parts": "await", "prune": "prune"}
    storage_phases = {
        "open_staging": "stage",
        "write": None,
        "remove_files": "unmark",
        "publish": "manifest",
    }
    storage_phases |= {name: name for name in ("discard", "remove", "sweep")}
    for owner, phases in ((writer_process, writer_phases), (FolderStorage, storage_phases)):
        for name, phase in phases.items():
            setattr(owner, name, marked(getattr(owner, name), phase))


def _phase_of(path: str) -> str:
    file = path.rpartition("/")[2]
    begins = {"state": "state", "manifest": "manifest", "part": "marker" if file.endswith(".json") else "part"}
    return begins[file.partition(".")[0].partition("-")[0]]


def _values(step: int, interval: Interval) -> memoryview:
    """The elements of an interval at a step: noise, from an offset that depends on interval and step."""
    name = f"{step}/{interval.kind}/{interval.name}".encode()
    begin = int.from_bytes(hashlib.sha256(name).digest()[:8]) % (len(_NOISE) // 2)
    begin += interval.start * ITEM_BYTES[interval.dtype]
    return _NOISE[begin : begin + interval.size_bytes]


def _layout(rank: int, *, world_size: int) -> Layout:
    """A rank's shard, as contiguous intervals."""
    total = sum(entry[3] for entry in _STATE)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    intervals, at = [], 0
    for dtype, kind, name, numel in _STATE:
        start, stop = max(first - at, 0), min(last - at, numel)
        at += numel
        if start < stop:
            intervals.append(Interval(kind=kind, name=name, start=start, stop=stop, dtype=dtype))
    return pack(intervals)


class _Lines:
    """Reads lines from a pipe."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._text = b""

    def read(self) -> list[str] | None:
        """Read once and return the complete lines; None at the end of the pipe."""
        piece = os.read(self.fd, 2**16)
        if not piece:
            return None
        *lines, self._text = (self._text + piece).split(b"\n")
        return [line.decode() for line in lines]


def _fork(run: Callable[[], Any]) -> int:
    """Run a function in a forked child."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        run()
        code = 0
    except BrokenPipeError:
        code = 0  # the reader is gone
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _close_all_but(kept: set[int]) -> None:
    for fd in (int(path.name) for path in list(Path("/proc/self/fd").iterdir())):
        if fd not in kept:
            with contextlib.suppress(OSError):
                os.close(fd)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _pause(seconds: float) -> None:
    """Sleep with microsecond precision."""
    end = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - 5e-4))
    while time.perf_counter() < end:
        pass


def _inherit_orphans() -> None:
    """Become the parent of orphaned descendants. Source: prctl(2), PR_SET_CHILD_SUBREAPER."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _reap() -> dict[int, int] | None:
    """Wait until no descendant is left. Returns: their exit codes; None on timeout."""
    codes = {}
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return codes
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.001)
    return None


if __name__ == "__main__":
    main()
