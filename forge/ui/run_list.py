"""The runs of a folder, kept up to date by looking at the sizes and times of their files.

A run that is running, or was a minute ago, is looked at every time; the others one in ten. So a list of a thousand
runs at rest costs a few milliseconds a second, and only while a browser shows it. What the folders contain is data:
links are not followed, and a folder that cannot be read is listed as broken, with the reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from forge.cluster.registry import find_known
from forge.errors import ForgeError, harmless, printable
from forge.report.run_rows import COLUMNS, list_cells
from forge.runs.annotations import read_annotations
from forge.runs.glance import GlanceReader, RunGlance
from forge.runs.index import read_index
from forge.runs.remote_ref import read_remote_ref
from forge.runs.trials import TRIALS, trial_folder

_HOT_S = 60.0
_SHARE = 10
_FIND_EVERY_S = 5.0
_MAX_PROBLEM_CHARS = 300
_MAX_GONE = 10_000
_MAX_RUNS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """A row of the list."""

    key: str
    """Names the run in addresses: its folder's name may have any characters."""
    folder: Path
    status: str
    """That of the run, or `broken`."""
    updated: float
    """Seconds since the epoch."""
    cells: tuple[str, ...] = ("-",) * len(COLUMNS)
    is_search: bool = False
    tags: tuple[str, ...] = ()
    problem: str = ""
    """Why a broken one cannot be read."""

    def as_row(self) -> list[str]:
        """Return its texts: name, status, time, tags, problem, and the cells."""
        about = " ".join(["search"] * self.is_search + list(self.tags))
        texts = [self.folder.name, self.status, f"{self.updated:.0f}", about, self.problem, *self.cells]
        return [harmless(text) for text in texts]


class RunList:
    """The runs of a folder, or those on a cluster.

    Args:
        root: the folder.
        cluster: list only the runs on this cluster, also those in other folders of this machine.
    """

    def __init__(self, root: Path, *, cluster: str | None = None) -> None:
        self.root, self.cluster = root, cluster
        self.problem = ""
        """Why the folder cannot be read."""
        self.version = time.time_ns() // 1_000_000
        """Grows with every change; those of another process of this server are smaller."""
        self._first_version = self.version
        self._shares_files = cluster is not None and find_known(cluster).shares_files
        self._rows: dict[str, ListedRun] = {}
        self._versions: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        self._readers: dict[str, GlanceReader | None] = {}
        self._folders: dict[str, Path] = {}
        self._found_at, self._turn = -_FIND_EVERY_S, 0
        self._refreshing = threading.Lock()
        self._lock = threading.Lock()
        """Held for the moment of a change, so that readers do not wait for files."""

    def refresh(self, *, whole: bool = False) -> None:
        """Look for changes; nothing while another thread does.

        Args:
            whole: at every run.
        """
        if not self._refreshing.acquire(blocking=whole):
            return
        try:
            if whole or time.monotonic() - self._found_at >= _FIND_EVERY_S:
                self._find_folders()
                self._found_at = time.monotonic()
            self._turn += 1
            now = time.time()
            for number, (key, folder) in enumerate(list(self._folders.items())):
                row, reader = self._rows.get(key), self._readers.get(key)
                is_hot = row is None or row.status == "running" or now - row.updated < _HOT_S
                is_hot = is_hot or (reader is not None and reader.has_more)
                if whole or is_hot or number % _SHARE == self._turn % _SHARE:
                    self._look_at(key, folder)
        finally:
            self._refreshing.release()

    def rows(self) -> list[ListedRun]:
        """Return the runs that were read so far, the last updated first."""
        return sorted(self._rows.copy().values(), key=lambda row: row.updated, reverse=True)

    @property
    def num_unread(self) -> int:
        """Folders that were found and not read yet."""
        return sum(key not in self._rows for key in list(self._folders))

    def changes(self, *, since: int) -> dict[str, list[str] | None] | None:
        """Return the rows that changed after a version, None for a run that is gone.

        Returns: None if the version is of another process, whose changes are unknown.
        """
        if not self._first_version <= since <= self.version:
            return None
        with self._lock:
            found: dict[str, list[str] | None] = {
                key: None for key, version in self._gone.items() if version > since
            }
            return found | {key: self._rows[key].as_row() for key, at in self._versions.items() if at > since}

    def folder_of(self, key: str, *, trial: int | None = None) -> Path | None:
        """Return the folder of a run, or of a trial of a search, that this list has; None if there is none."""
        folder = self._folders.get(key)
        if folder is None or folder.is_symlink():
            return None
        if trial is None:
            return folder
        found = Path(trial_folder(str(folder), trial))
        has_link = (folder / TRIALS).is_symlink() or found.is_symlink()
        return None if has_link or not found.is_dir() else found

    def _find_folders(self) -> None:
        found = {_key(folder): folder for folder in self._candidates()}
        for key in [key for key in self._folders if key not in found]:
            self._forget(key)
        self._folders |= found

    def _candidates(self) -> list[Path]:
        """The folders that hold a plan, and links that lead elsewhere, which are listed and not followed."""
        self.problem = ""
        folders: list[Path] = []
        try:
            with os.scandir(self.root) as entries:
                for entry in entries:
                    path = self.root / entry.name
                    if _key(path) in self._folders or _is_candidate(entry, root=self.root):
                        folders.append(path)
        except OSError as error:
            self.problem = f"{self.root} cannot be read: {error.strerror}"
        if len(folders) > _MAX_RUNS:
            self.problem = f"{self.root} has {len(folders):,} runs, of which {_MAX_RUNS:,} are listed"
        if self.cluster is None:
            return folders[:_MAX_RUNS]
        known = {folder.absolute() for folder in folders}
        folders += [path for path in read_index().existing() if path not in known and not path.is_symlink()]
        return [folder for folder in folders[:_MAX_RUNS] if self._is_on_cluster(folder)]

    def _is_on_cluster(self, folder: Path) -> bool:
        ref = read_remote_ref(folder)
        return self._shares_files if ref is None else ref.cluster == self.cluster

    def _look_at(self, key: str, folder: Path) -> None:
        """Read what is new of a run, and change its row."""
        reader, row = self._readers.get(key), self._rows.get(key)
        try:
            if folder.is_symlink():
                raise OSError("a link that leads out of this folder; it is not followed")
            if reader is None:
                reader = self._readers[key] = GlanceReader(folder)
                reader.refresh()
            elif not reader.refresh():
                return
            new = _row(key, reader.glance)
        except (ForgeError, OSError) as error:
            self._readers[key] = None
            if not os.path.lexists(folder / "plan.json") and not folder.is_symlink():
                self._forget(key)
                return
            reason = str(error).replace(str(folder), folder.name)
            new = _broken(key, folder, problem=printable(reason, limit=_MAX_PROBLEM_CHARS))
        if new != row:
            with self._lock:
                self.version += 1
                self._rows[key], self._versions[key] = new, self.version
                self._gone.pop(key, None)

    def _forget(self, key: str) -> None:
        with self._lock:
            self.version += 1
            for known in (self._folders, self._rows, self._versions, self._readers):
                known.pop(key, None)
            self._gone[key] = self.version
            if len(self._gone) > _MAX_GONE:
                self._gone.pop(next(iter(self._gone)))


def _key(folder: Path) -> str:
    return hashlib.blake2b(os.fsencode(folder.absolute()), digest_size=8).hexdigest()


def _is_candidate(entry: os.DirEntry[str], *, root: Path) -> bool:
    if entry.is_symlink():
        with contextlib.suppress(OSError, RuntimeError):
            target = Path(entry.path).resolve()
            return (target / "plan.json").is_file() and target.parent != root.resolve()
        return False
    return entry.is_dir(follow_symlinks=False) and os.path.lexists(f"{entry.path}/plan.json")


def _row(key: str, run: RunGlance) -> ListedRun:
    return ListedRun(
        key=key,
        folder=run.folder,
        status=run.status,
        updated=run.updated,
        cells=tuple(list_cells(run)),
        is_search=run.search is not None,
        tags=read_annotations(run.folder).tags,
    )


def _broken(key: str, folder: Path, *, problem: str) -> ListedRun:
    updated = 0.0
    with contextlib.suppress(OSError):
        updated = folder.lstat().st_mtime
    return ListedRun(key=key, folder=folder, status="broken", updated=updated, problem=problem)
