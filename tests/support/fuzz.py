"""Fuzzing: mutated inputs of one kind, each processed under a watch that fails on anything but a clear error.

    run_cases("run folder", make=..., check=..., root=tmp_path)

`make` writes one mutated input into a new folder, from a random generator that only the seed and the number of the
case determine; `check` processes it in this process. A case passes if `check` returns or raises a ForgeError with a
message, within 5 s and 1 GB, if nothing outside the case's folder is written, and if no process is started or
signalled.

    FORGE_FUZZ_SEED=...     repeat the session with this seed; printed with each failure and at the end
    FORGE_FUZZ_CASES=...    number of cases per kind; by default as many as fit in `FORGE_FUZZ_SECONDS`
    FORGE_FUZZ_SECONDS=...  5 by default
    FORGE_FUZZ_FIRST=...    number of the first case

A failure is kept under `tests/fuzz/cases/<kind>/`; the cases there run first, each time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ForgeError
from tests.support.seeds import FUZZ_SEED

CASES = Path(__file__).parents[1] / "fuzz" / "cases"
MAX_S = 5.0
_STARVED_S = 60.0
"""A case that waits is stopped after this: on a busy machine a short one may wait for a CPU."""
MAX_BYTES = 2**30
_MAX_MESSAGE = 12_000
_MAX_KEPT_BYTES = 2**20

_WRITES = {
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
    "os.chown", "os.utime", "os.setxattr", "shutil.rmtree",
}  # fmt: skip
"""Audit events of writes, whose first argument is a path; `os.rename`, `os.link` and `os.symlink` have two."""
_NEVER = {
    "os.kill", "os.killpg", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.startfile",
    "subprocess.Popen", "signal.pthread_kill", "socket.connect", "socket.bind", "socket.sendto",
}  # fmt: skip
"""Audit events of what no file may cause, unless a kind allows it."""


class Violation(Exception):
    """A case did what no input may cause."""


@dataclass(slots=True)
class _Watch:
    """What is watched now; Python calls the hook for ever, as hooks cannot be removed."""

    inside: str = ""
    allowed: frozenset[str] = frozenset()
    is_on: bool = False
    found: str | None = None

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        problem = self._problem(event, arguments)
        if problem is not None:
            self.found = self.found or problem
            raise Violation(problem)

    def _problem(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event in _NEVER and event not in self.allowed:
            return f"{event} {arguments!r:.300}"
        paths: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = arguments
            is_write = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if isinstance(flags, int) else 0
            paths = (path,) if is_write or (mode and set(mode) & set("wax+")) else ()
        elif event in _WRITES:
            paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            if event == "os.symlink":
                paths = arguments[1:2]
            if event in ("os.remove", "os.rmdir", "os.mkdir") and arguments[-1] not in (-1, None):
                paths = (Path(f"/proc/self/fd/{arguments[-1]}") / os.fsdecode(arguments[0]),)
        elif event == "import":
            paths = (arguments[1],) if arguments[1] and self.inside in str(arguments[1]) else ()
            return f"import from the case: {arguments[:2]!r}" if paths else None
        elif event == "exec" and self.inside in str(getattr(arguments[0], "co_filename", "")):
            return f"code of the case was run: {arguments[0].co_filename}"
        outside = [
            path for path in paths if isinstance(path, (str, bytes, os.PathLike)) and not self._is_inside(path)
        ]
        return f"{event} outside of the case: {os.fsdecode(outside[0])}" if outside else None

    def _is_inside(self, path: str | bytes | os.PathLike[Any]) -> bool:
        named = Path(os.fsdecode(path))
        # The last component is not followed: removing or renaming a link touches the link.
        real = f"{os.path.realpath(named.parent)}/{named.name}"
        # A command notes the path of the run that it opened, in the state folder.
        is_index = bool(_INDEX.fullmatch(named.name)) and str(named.parent) == os.environ.get("FORGE_STATE")
        is_state = str(named) == os.environ.get("FORGE_STATE")
        if is_index or is_state:
            return True
        return real == "/dev/null" or "__pycache__" in real or f"{real}/".startswith(f"{self.inside}/")


_INDEX = re.compile(r"runs\.(json|lock)|\.runs\.json\.[a-z0-9_]+\.tmp")
_WATCH = _Watch()


@cache
def _install_hook() -> None:
    sys.addaudithook(_WATCH.hook)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """How the cases of one kind went."""

    num_cases: int
    num_refused: int
    """Cases that ended with a ForgeError."""
    seconds: float


def run_cases(
    kind: str,
    *,
    make: Callable[[Path, random.Random], None],
    check: Callable[[Path], None],
    root: Path,
    allowed: frozenset[str] = frozenset(),
    first: Callable[[Path, Path], None] | None = None,
) -> CaseResult:
    """Run the kept cases of a kind, then new ones until the number or the time is reached.

    Args:
        make: writes the input into the given folder, which is empty.
        check: processes the input in that folder. A ForgeError is fine.
        root: an empty folder for the cases.
        allowed: audit events that this kind may cause, such as `socket.connect`.
        first: copies a kept case (first argument) into a folder (second); a plain copy if None.

    Raises: pytest's failure with the case, the problem and how to repeat it.
    """
    began, refused, count = time.monotonic(), 0, 0
    kept = sorted((CASES / kind.replace(" ", "_")).glob("[!.]*"))
    for path in kept:
        folder = _new_folder(root)
        (first or _copy)(path, folder)
        refused += _run_one(kind, check, folder, allowed=allowed, name=f"the kept case {path.name}", keep=False)
    for number in _numbers(began):
        folder = _new_folder(root)
        make(folder, random.Random(f"{FUZZ_SEED}/{kind}/{number}"))
        repeat = f"FORGE_FUZZ_SEED={FUZZ_SEED} FORGE_FUZZ_FIRST={number} FORGE_FUZZ_CASES=1"
        refused += _run_one(kind, check, folder, allowed=allowed, name=repeat, keep=True)
        count += 1
    result = CaseResult(
        num_cases=count + len(kept), num_refused=refused, seconds=round(time.monotonic() - began, 1)
    )
    print(f"{kind}: {result}, seed {FUZZ_SEED}")  # noqa: T201
    return result


@contextlib.contextmanager
def watched(inside: Path, *, allowed: frozenset[str] = frozenset()) -> Iterator[None]:
    """Fail on writes outside of a folder, processes, signals and connections, in this process.

    Raises: Violation, also where the code under test has caught the one raised at the deed.
    """
    _install_hook()
    _WATCH.inside, _WATCH.allowed, _WATCH.found = str(inside.resolve()), allowed, None
    _WATCH.is_on = True
    try:
        yield
    finally:
        _WATCH.is_on = False
    if _WATCH.found:
        raise Violation(_WATCH.found)


@contextlib.contextmanager
def limited(*, seconds: float, memory_bytes: int = MAX_BYTES) -> Iterator[None]:
    """Limit the time of a block, and the memory that it takes in addition to what the process has.

    Raises: TimeoutError, MemoryError.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wall, cpu = time.monotonic(), time.process_time()

    def tick(*_: object) -> None:
        if time.process_time() - cpu >= seconds or time.monotonic() - wall >= _STARVED_S:
            raise TimeoutError(f"it took longer than {seconds} s")

    handler = signal.signal(signal.SIGALRM, tick)
    rest, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, max(0.1, rest - (time.monotonic() - wall)) if rest else 0.0, interval)
        signal.signal(signal.SIGALRM, handler)


def _run_one(
    kind: str, check: Callable[[Path], None], folder: Path, *, allowed: frozenset[str], name: str, keep: bool
) -> bool:
    """Returns: whether the case was refused with a ForgeError."""
    refused = False
    try:
        with watched(folder, allowed=allowed), limited(seconds=MAX_S):
            try:
                check(folder)
            except ForgeError as error:
                refused = True
                message = str(error)
                assert message.strip(), f"a {type(error).__name__} without a message"
                assert len(message) <= _MAX_MESSAGE, f"a message of {len(message)} characters: {message[:200]}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = _keep(kind, folder) if keep else folder
        pytest.fail(
            f"{kind}: {type(error).__name__}: {error!s:.500}\nrepeat: {name}\ninput: {where}\n{_trace(error)}"
        )
    shutil.rmtree(folder, ignore_errors=True)
    return refused


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-14:])[-6000:]


def _keep(kind: str, folder: Path) -> Path:
    """Copy a failing case to the kept ones; a large one stays where it is."""
    try:
        size = sum(path.lstat().st_size for path in folder.rglob("*"))
        if size <= _MAX_KEPT_BYTES:
            target = CASES / kind.replace(" ", "_") / folder.name
            shutil.copytree(folder, target, symlinks=True)
            return target
    except OSError:
        pass
    return folder


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _numbers(began: float) -> Iterator[int]:
    first = int(os.environ.get("FORGE_FUZZ_FIRST") or 0)
    if os.environ.get("FORGE_FUZZ_CASES"):
        yield from range(first, first + int(os.environ["FORGE_FUZZ_CASES"]))
        return
    number = first
    while time.monotonic() - began < float(os.environ.get("FORGE_FUZZ_SECONDS") or 5):
        yield number
        number += 1


def _new_folder(root: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix="case-", dir=root))


# Mutations

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, -1e308, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400,
    float("nan"), float("inf"), "", " ", "a", "..", "/", "../../x", "/etc/passwd", "a/b", "\0", "\n", "\x1b[2J",
    "\x1b]52;c;aGk=\a", "\u202e", "\u2028", "\ud800", "é😀", "a" * 300, "x" * 70_000, "nan", "1", "-1", "step",
    "http://127.0.0.1:9/", "s3://bucket/key", "file:///etc", "memory://x", "forge", "__class__", "{}", "%s", "{0}",
    [], [[]], {}, {"": {}}, {"a": 1}, [1, 2, 3], [None], [0] * 1000, {"time": -1}, "00000000-0000-0000",
]  # fmt: skip
"""JSON values that break careless readers."""


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Change one to three places of a JSON value: replace, remove, duplicate, rename, or nest deeper."""
    holder = [json.loads(json.dumps(value))]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice(list(_positions(holder)))
        old = container[key]
        match rng.randrange(8):
            case 0 if container is not holder:
                del container[key]
            case 1 if isinstance(container, dict):
                container[rng.choice(["", "x", "../x", "a" * 300, "\ud800", f"{key}2"])] = container.pop(key)
            case 2 if isinstance(container, list) and container is not holder:
                container.extend([old] * rng.choice([1, 3, 1000]))
            case 3:
                for _ in range(rng.choice([2, 63, 70, 200])):
                    old = [old] if rng.random() < 0.5 else {"a": old}
                container[key] = old
            case 4 if isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old) < 10**300:
                container[key] = rng.choice(
                    [-old, old + 1, old - 1, old * 10**9, str(old), [old], float(old), 0, 10**18]
                )
            case _:
                container[key] = copy.copy(rng.choice(NASTY))
    return holder[0]


def _positions(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key below a value; not deeper than ten levels."""
    stack = [(value, 0)]
    while stack:
        at, depth = stack.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at))
        for key in keys:
            yield at, key
            if isinstance(at[key], (dict, list)) and depth < 10:
                stack.append((at[key], depth + 1))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or replace bytes."""
    body = bytearray(data or b"x")
    at = rng.randrange(len(body))
    match rng.randrange(7):
        case 0:
            for _ in range(rng.randint(1, 8)):
                body[rng.randrange(len(body))] = rng.randrange(256)
        case 1:
            del body[at:]
        case 2:
            del body[at : at + rng.choice([1, 10, 1000])]
        case 3:
            body[at:at] = rng.choice(
                [b"\0" * 100, b"\xff\xfe", b"[" * 70, b"{" * 100_000, b"9" * 5000, b"\n", b"NaN"]
            )
        case 4:
            body[at:at] = rng.randbytes(rng.choice([1, 16, 4096]))
        case 5:
            body = bytearray(rng.choice([b"", b"\n", b"null", b"[]", b"{}", b"\xff", b"0", b"\x00" * 10_000]))
        case _:
            lines = bytes(body).split(b"\n")
            first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[first], lines[second] = lines[second], lines[first]
            lines[first:first] = [lines[second]] * rng.choice([0, 1, 50])
            body = bytearray(b"\n".join(lines))
    return bytes(body)


def mutate_json_text(text: bytes, rng: random.Random) -> bytes:
    """Mutate the value of a JSON text, or the bytes if it is none."""
    try:
        return json.dumps(mutate_json(json.loads(text), rng)).encode()
    except (ValueError, RecursionError):
        return mutate_bytes(text, rng)


def mutate_file(path: Path, rng: random.Random, *, outside: Path) -> None:
    """Replace a file by something else: nothing, a folder, a link, a pipe, a file too large or unreadable.

    Args:
        outside: an existing file outside of the input, for links.
    """
    path.unlink()
    match rng.randrange(8):
        case 0:
            pass
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(rng.choice([outside, Path("/dev/zero"), Path("/nowhere"), Path(path.name), Path("..")]))
        case 3:
            os.mkfifo(path)
        case 4:
            with path.open("wb") as file:
                file.truncate(rng.choice([2**20, 2**33, 2**40]))
        case 5:
            path.write_bytes(b"")
        case 6:
            path.write_bytes(b'{"a": ' + b"[" * 200_000)
        case _:
            path.write_bytes(b"{}\n" * rng.choice([1, 100_000]))
