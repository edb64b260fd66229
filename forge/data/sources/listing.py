"""The files of `data.files`: what each pattern matches, and what it skips and why.

Local patterns are matched here, because a corpus is often a folder of symbolic links (the hub's cache is one), and
fsspec's glob leaves out links. A folder is visited once, however many links lead to it, so loops end. Names in
brackets are taken literally where such an entry exists. Patterns of remote stores are matched by fsspec.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from forge.errors import DataError, printable
from forge.foreign import require_direct_url
from forge.process import one_line

_SIDE_FOLDERS = {
    ".ipynb_checkpoints": "copies that Jupyter keeps",
    "__MACOSX": "side files of macOS",
    "__pycache__": "compiled Python",
}
_SIDE_FILES = {
    ".DS_Store": "a side file of macOS",
    "Thumbs.db": "a side file of Windows",
    "desktop.ini": "a side file of Windows",
}
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the corpus. `name` is the path below the fixed part of its pattern."""

    fs: Any
    path: str
    name: str
    size_bytes: int = 0
    """On the disk or in the store, compressed or not; 0 if unknown."""

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def shown(self) -> str:
        """The path for messages: on one line, whatever its name contains."""
        return printable(self.path, limit=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """A path that a pattern reaches but that is not read. `reason` is a noun phrase: `an empty file`."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """What one pattern gives. A file that an earlier pattern gave already is skipped."""

    pattern: str
    files: tuple[SourceFile, ...]
    skipped: tuple[Skipped, ...]


def list_files(patterns: Sequence[str], *, within: Sequence[str] | None = None) -> list[Matched]:
    """Match patterns in order; the files of each are sorted by path, and every file is listed once.

    Args:
        within: folders, without links in their paths, that local links may lead into; others are skipped.

    Raises: DataError for a pattern that matches no file to read, a folder, a link to nothing, or a store that
        cannot be listed.
    """
    listed: list[Matched] = []
    taken: dict[tuple[int, str], str] = {}  # fsspec keeps one instance per file system
    for pattern in patterns:
        found = _match(pattern, within=within)
        files, skipped = [], list(found.skipped)
        for file in found.files:
            key = id(file.fs), os.path.realpath(file.path) if file.is_local else file.path
            if key in taken:
                skipped.append(Skipped(path=file.path, reason=_second_name(taken[key], file.path)))
                continue
            taken[key] = file.path
            files.append(file)
        listed.append(Matched(pattern=pattern, files=tuple(files), skipped=tuple(skipped)))
    return listed


def _second_name(first: str, path: str) -> str:
    return "a file that an earlier pattern names" if first == path else "a second name of a file that is read"


def _match(pattern: str, *, within: Sequence[str] | None) -> Matched:
    try:
        require_direct_url(pattern)
        fs, path = fsspec.core.url_to_fs(pattern)
    except (ImportError, ValueError) as error:  # the package of this protocol is missing, or no such protocol
        raise DataError(f"data.files: {pattern} cannot be opened: {error}") from None
    is_local = isinstance(fs, LocalFileSystem)
    if is_local:
        found = _match_local(fs, path, pattern=pattern, within=within)
    else:
        found = _match_remote(fs, path, pattern=pattern)
    if not found.files:
        place = f" (looked in {Path.cwd()})" if is_local else ""
        problem = f"no file to read; skipped: {_listed(found.skipped)}" if found.skipped else f"no file{place}"
        raise DataError(f"data.files: {printable(pattern, limit=1000)} matches {problem}")
    return found


def _listed(skipped: Sequence[Skipped]) -> str:
    listed = [f"{printable(one.path, limit=200)} is {one.reason}" for one in skipped[:3]]
    return "; ".join(listed) + (f"; and {len(skipped) - 3} more" if len(skipped) > 3 else "")


def _match_local(fs: Any, path: str, *, pattern: str, within: Sequence[str] | None) -> Matched:
    if os.path.lexists(path) or not _MAGIC.search(path):
        return _one_local(fs, path, pattern=pattern)
    walk = _LocalGlob(path, pattern=pattern, within=within)
    paths = sorted(walk.files)
    root = _fixed_part(path)
    files = [
        SourceFile(fs=fs, path=one, name=one.removeprefix(root), size_bytes=walk.files[one])
        for one in paths
        if walk.files[one]
    ]
    empty = [Skipped(path=one, reason="an empty file") for one in paths if not walk.files[one]]
    skipped = sorted([*walk.skipped, *empty], key=lambda one: one.path)
    return Matched(pattern=pattern, files=tuple(files), skipped=tuple(skipped))


def _one_local(fs: Any, path: str, *, pattern: str) -> Matched:
    """The file of a pattern without wildcards, or whose own name looks like a pattern."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        if Path(path).is_symlink():
            raise _dangling(path) from None
        return Matched(pattern=pattern, files=(), skipped=())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data.files: {printable(path, limit=1000)} cannot be listed: {reason}") from None
    if stat.S_ISDIR(found.st_mode):
        raise DataError(f"data.files: {pattern} is a folder; name the files in it, like {pattern}/**/*.txt")
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"data.files: {pattern} is {_special(found.st_mode)}, not a file")
    if not found.st_size:
        return Matched(pattern=pattern, files=(), skipped=(Skipped(path=path, reason="an empty file"),))
    file = SourceFile(fs=fs, path=path, name=path.rpartition("/")[2], size_bytes=found.st_size)
    return Matched(pattern=pattern, files=(file,), skipped=())


def _match_remote(fs: Any, path: str, *, pattern: str) -> Matched:
    is_http = path.startswith(("http://", "https://"))
    is_glob = "*" in path if is_http else bool(_MAGIC.search(path))  # a question mark begins a query
    try:
        infos = _remote_infos(fs, path, is_glob=is_glob)
        if not is_glob and not infos and fs.isdir(path):
            raise DataError(f"data.files: {pattern} is a folder; name the files in it, like {pattern}/**/*.txt")
    except DataError:
        raise
    except Exception as error:  # every store has error classes of its own
        raise DataError(
            f"data.files: {pattern} cannot be listed: {one_line(error) or type(error).__name__}"
        ) from None
    root = _fixed_part(path) if is_glob else path.rpartition("/")[0] + "/"
    files, skipped = [], []
    for one in sorted(infos):
        name, size_bytes = one.removeprefix(root), infos[one]
        reason = "an empty file" if size_bytes == 0 else _remote_skip(name, pattern=path) if is_glob else None
        if reason:
            skipped.append(Skipped(path=one, reason=reason))
        else:
            files.append(SourceFile(fs=fs, path=one, name=name, size_bytes=size_bytes or 0))
    return Matched(pattern=pattern, files=tuple(files), skipped=tuple(skipped))


def _remote_infos(fs: Any, path: str, *, is_glob: bool) -> dict[str, int | None]:
    """The size of every matching file, by path; None if the store does not say."""
    if not is_glob:
        if not fs.exists(path):
            return {}
        try:
            info = fs.info(path)
        except OSError:  # of a web server that refuses to tell the size
            info = {}
        return {path: info.get("size")} if info.get("type") != "directory" else {}
    found = fs.glob(path, detail=True)
    if not found and "[" in path:
        found = fs.glob(path.replace("[", "[[]"), detail=True)
    return {name: info.get("size") for name, info in found.items() if info["type"] == "file"}


def _remote_skip(name: str, *, pattern: str) -> str | None:
    asks_for_hidden = any(part.startswith(".") for part in pattern.split("/") if part not in (".", ".."))
    for part in name.split("/"):
        reason = _side_reason(part, pattern_part="." if asks_for_hidden else "", is_folder=part in _SIDE_FOLDERS)
        if reason:
            return reason
    return None


def _fixed_part(path: str) -> str:
    """The folder above the first wildcard, with a slash at its end."""
    return _MAGIC.split(path, maxsplit=1)[0].rpartition("/")[0] + "/"


class _LocalGlob:
    """Walks the folders of a local pattern. `files` has the size of every match, `skipped` the rest of them."""

    def __init__(self, path: str, *, pattern: str, within: Sequence[str] | None) -> None:
        self.files: dict[str, int] = {}
        self.skipped: list[Skipped] = []
        self._pattern, self._within = pattern, within
        parts = tuple(part for part in path.split("/") if part)
        if any("**" in part and part != "**" for part in parts):
            raise DataError(f"data.files: {pattern} is not a valid pattern: '**' must stand alone between slashes")
        self._parts = (*parts, "*") if parts[-1] == "**" else parts
        self._walk()

    def _walk(self) -> None:
        visited: dict[tuple[str, int], str] = {}
        waiting = [("/", "/", 0)]  # a folder, its real path, the number of the part that its entries must match
        while waiting:
            folder, real, index = waiting.pop()
            first = visited.setdefault((real, index), folder)
            if first is folder:
                waiting += reversed(list(self._below(folder, real, index)))
            elif first != folder:
                self._skip(folder + "/", "a second name of a folder that is read")

    def _below(self, folder: str, real: str, index: int) -> Iterator[tuple[str, str, int]]:
        """Take the files in a folder that match the last part. Returns: the folders to visit next."""
        part = self._parts[index]
        is_last = index == len(self._parts) - 1
        if part == "**":
            yield folder, real, index + 1
        for name in self._names(folder, part):
            path = f"{folder.rstrip('/')}/{name}"
            if _MAGIC.search(part) and self._leads_out(path):
                if part != "**":  # whose entries are visited once more
                    self._skip(path, "a link that leads out of the folder")
                continue
            mode, size_bytes = self._stat(path, is_exact=is_last)
            is_folder = stat.S_ISDIR(mode)
            reason = None if part == name else _side_reason(name, pattern_part=part, is_folder=is_folder)
            if is_folder and not is_last:
                if reason:
                    self._skip(path + "/", reason)
                else:
                    is_link = os.path.islink(path)  # noqa: PTH114
                    below = os.path.realpath(path) if is_link else f"{real.rstrip('/')}/{name}"
                    yield path, below, index + (part != "**")
            elif is_last and mode:
                self._take(path, mode=mode, size_bytes=size_bytes, reason=reason)

    def _take(self, path: str, *, mode: int, size_bytes: int, reason: str | None) -> None:
        if stat.S_ISDIR(mode) and "**" in self._parts:
            return  # visited, or skipped as a folder
        if reason is None and stat.S_ISDIR(mode):
            reason = "a folder (the pattern matches files; ** reaches below folders)"
        elif reason is None and not stat.S_ISREG(mode):
            reason = _special(mode)
        if reason:
            self._skip(path + "/" * stat.S_ISDIR(mode), reason)
        else:
            self.files[path] = size_bytes

    def _skip(self, path: str, reason: str) -> None:
        self.skipped.append(Skipped(path=path, reason=reason))

    def _leads_out(self, path: str) -> bool:
        """Whether a path is a link to a place where links may not lead."""
        if self._within is None or not os.path.islink(path):  # noqa: PTH114
            return False
        target = os.path.realpath(path)
        return not any(target == place or target.startswith(place.rstrip("/") + "/") for place in self._within)

    def _names(self, folder: str, part: str) -> list[str]:
        if not _MAGIC.search(part):
            return [part]
        try:
            with os.scandir(folder) as entries:
                # Links last, so that a folder that is reached twice is read under its own name.
                names = [name for _, name in sorted((entry.is_symlink(), entry.name) for entry in entries)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            shown = printable(folder, limit=1000)
            raise DataError(f"data.files: {self._pattern}: {shown} cannot be listed: {error.strerror}") from None
        return names if part == "**" else _matching(part, names)

    def _stat(self, path: str, *, is_exact: bool) -> tuple[int, int]:
        """Mode and size of what a path leads to; zeros if nothing is there."""
        try:
            found = os.stat(path)  # noqa: PTH116 — of every file; building a Path takes longer than the call
        except OSError:
            if is_exact and Path(path).is_symlink():
                raise _dangling(path) from None
            return 0, 0
        return found.st_mode, found.st_size


def _matching(part: str, names: list[str]) -> list[str]:
    """The names that match one part of a pattern; brackets are literal if any name has them so."""
    if "[" in part:
        literal = re.compile(fnmatch.translate(part.replace("[", "[[]")))
        found = [name for name in names if literal.match(name)]
        if found:
            return found
    pattern = re.compile(fnmatch.translate(part))
    return [name for name in names if pattern.match(name)]


def _side_reason(name: str, *, pattern_part: str, is_folder: bool) -> str | None:
    """Why a name that matches by a wildcard is no data; None if it is."""
    if is_folder and name in _SIDE_FOLDERS:
        return f"a folder of {_SIDE_FOLDERS[name]}"
    if name in _SIDE_FILES:
        return _SIDE_FILES[name]
    if name.startswith(".") and not pattern_part.startswith("."):
        if name.startswith("._"):
            return "a side file of macOS"
        return "a hidden folder" if is_folder else "a hidden file"
    if not is_folder and (name.endswith("~") or (name.startswith("#") and name.endswith("#"))):
        return "a backup of an editor"
    return None


def _special(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _dangling(path: str) -> DataError:
    shown = printable(path, limit=1000)
    try:
        target = printable(str(Path(path).readlink()), limit=300)
    except OSError:
        target = "another place"
    return DataError(
        f"data.files: {shown} is a link to {target}, which does not exist (or leads back to itself); restore it, "
        "or delete the link"
    )
