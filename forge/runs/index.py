"""The runs that were created or opened on this machine, so that a command finds them from any folder.

`runs.json` in the state folder has the path of each run folder and when it was last used. It is a convenience: it
names folders and nothing else, holds at most `MAX_RUNS` of them, and a run works without it. What a folder contains
is read from the folder itself, as data (`forge.foreign`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from forge.errors import ArgumentError
from forge.foreign import from_record, parse_object, read_file
from forge.fs import make_private, state_home, write_atomic
from forge.runs.trials import TRIALS

MAX_RUNS = 2000
"""The runs that were not used for longest are left out beyond this."""
_MAX_BYTES = 16 * 2**20
_FRESH_S = 60.0
"""A run that was used this recently is not written again."""
_PATIENCE_S = 1.0
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownRun:
    """A run folder that was used on this machine."""

    folder: str
    """Absolute path."""
    used: float
    """Seconds since the epoch."""

    @property
    def path(self) -> Path:
        return Path(self.folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIndex:
    """The known runs, the last used first."""

    runs: tuple[KnownRun, ...] = ()
    problem: str | None = None
    """Why the file cannot be read; it is written again when the next run is used."""

    def existing(self) -> list[Path]:
        """Return the folders that hold a run now."""
        return [run.path for run in self.runs if _is_run(run.path)]

    def vanished(self) -> list[Path]:
        """Return the folders that hold no run any more."""
        return [run.path for run in self.runs if not _is_run(run.path)]


def find_known(name: str) -> list[Path]:
    """Return the existing run folders with this id, or else those whose id begins with it; trials by their id."""
    existing = read_index().existing()
    search, _, _ = name.rpartition("-")
    is_plain = bool(name) and len(Path(name).parts) == 1
    trials = [folder / TRIALS / name for folder in existing if is_plain and search == folder.name]
    exact = [folder for folder in existing if folder.name == name] or [path for path in trials if _is_run(path)]
    return exact or [folder for folder in existing if is_plain and folder.name.startswith(name)]


def known_ids(root: Path) -> list[str]:
    """Return the ids of the runs under a folder, then those of the known runs, for a shell's completion.

    Names with other characters than forge gives to runs are left out: a shell would interpret them.
    """
    with contextlib.suppress(OSError):
        here = sorted((path for path in root.iterdir() if _is_run(path)), reverse=True)
        return _plain([*here, *read_index().existing()])
    return _plain(read_index().existing())


def read_index() -> RunIndex:
    """Read the known runs; none if the file does not exist or cannot be read."""
    try:
        body = parse_object(read_file(_index_file(), max_bytes=_MAX_BYTES))
        runs = [from_record(KnownRun, record) for record in _list_of(body.get("runs"))]
    except FileNotFoundError:
        return RunIndex()
    except (OSError, ArgumentError, ValueError) as error:
        return RunIndex(problem=str(error))
    absolute = [run for run in runs if run.path.is_absolute()]
    return RunIndex(runs=tuple(sorted(absolute, key=lambda run: run.used, reverse=True)[:MAX_RUNS]))


def remember_run(folder: Path) -> None:
    """Add a run folder to the known runs, or note that it was used now.

    A state folder that cannot be written, or is locked for a second, is no reason to end a command: the run is then
    found by its path alone.
    """
    added = KnownRun(folder=str(folder.absolute()), used=time.time())
    known = {run.folder: run for run in read_index().runs}
    if added.folder in known and 0 <= added.used - known[added.folder].used < _FRESH_S:
        return
    _update(lambda runs: [added, *(run for run in runs if run.folder != added.folder)])


def forget_runs(folders: list[Path]) -> None:
    """Remove run folders from the known runs."""
    gone = {str(folder.absolute()) for folder in folders}
    if gone:
        _update(lambda runs: [run for run in runs if run.folder not in gone])


def _update(change: Callable[[list[KnownRun]], list[KnownRun]]) -> None:
    with contextlib.suppress(OSError, ArgumentError), _locked():
        runs = change(list(read_index().runs))[:MAX_RUNS]
        write_atomic(
            _index_file(), json.dumps({"runs": [asdict(run) for run in runs]}, indent=1) + "\n", mode=0o600
        )


@contextlib.contextmanager
def _locked() -> Iterator[None]:
    """Raises: OSError if the state folder cannot be written, or another process holds the lock for a second."""
    make_private(state_home())
    with (state_home() / "runs.lock").open("a") as lock:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield


def _plain(folders: list[Path]) -> list[str]:
    return list(dict.fromkeys(folder.name for folder in folders if _ID.fullmatch(folder.name)))


def _index_file() -> Path:
    return state_home() / "runs.json"


def _list_of(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError("'runs' is not a list")
    return value


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "plan.json").is_file()
    except (OSError, ValueError):
        return False
