"""Durable and atomic file operations and the cache folder, one copy for the whole package.

A file written by `write_atomic` is either the old or the new one after a crash or a power cut, never a mixture and
never empty. The price is one fsync of the file and one of its folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import xxhash

from forge.environment import expand_home, home_folder

_DIGEST_CHUNK_BYTES = 8 * 2**20


def write_atomic(path: Path, content: str | bytes | Iterable[bytes], *, mode: int = 0o644) -> None:
    """Replace `path` with `content`: write a temporary file beside it, flush it to disk, rename it.

    Args:
        content: pieces are written one after the other.
        mode: permissions of the new file; `0o600` for secrets.

    Raises: OSError if the folder cannot be written; `path` is unchanged then and no temporary file is left.
    """
    data = content.encode() if isinstance(content, str) else content
    pieces = [data] if isinstance(data, bytes) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that files created or renamed in it survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Make a hard link to a file or, on another file system or one without links, a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def leads_to_folder(path: Path) -> bool:
    """Whether a path of any text leads to a folder; False if it is too long for a path, or may not be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False


def leads_to_file(path: Path) -> bool:
    """Whether a path of any text leads to a file; False as for `leads_to_folder`."""
    try:
        return path.is_file()
    except OSError:
        return False


def free_bytes(folder: Path) -> int | None:
    """Return how much this user can still write to a folder's file system; None if that cannot be found out.

    Args:
        folder: it, or a parent of it, exists.
    """
    try:
        existing = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), None)
        found = os.statvfs(existing or "/")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def default_cache_dir() -> Path:
    """`$FORGE_CACHE`, else `$XDG_CACHE_HOME/forge`, else `~/.cache/forge`."""
    if chosen := os.environ.get("FORGE_CACHE"):
        return Path(expand_home(chosen))
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else home_folder() / ".cache") / "forge"


def state_home() -> Path:
    """`$FORGE_STATE`, else `$XDG_STATE_HOME/forge`, else `~/.local/state/forge`."""
    home = os.environ.get("FORGE_STATE") or f"{os.environ.get('XDG_STATE_HOME') or '~/.local/state'}/forge"
    return Path(expand_home(home))


def make_private(folder: Path) -> None:
    """Create a folder of forge's own, with missing parents, so that only this user can enter it.

    One that exists and belongs to this user is closed to others.

    Raises: OSError if it cannot be created.
    """
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        folder.chmod(status.st_mode & 0o700)


def digest_file(path: Path, *, cache: Path | None = None) -> str:
    """Return the xxh3_128 digest of a file's content.

    Args:
        cache: a folder with digests of earlier calls; a file whose size, inode, and times of modification and
            change are the same as then is not read again.
    """
    about = path.stat()
    key = hashlib.blake2b(str(path.resolve()).encode(), digest_size=16).hexdigest()
    known = [about.st_size, about.st_mtime_ns, about.st_ino, about.st_ctime_ns]
    if cache is not None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((cache / f"{key}.json").read_text())
            if record["file"] == known:
                return str(record["digest"])
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_DIGEST_CHUNK_BYTES):
            digest.update(chunk)
    if cache is not None:
        with contextlib.suppress(OSError):  # without the cache, the file is read again next time
            cache.mkdir(parents=True, exist_ok=True)
            write_atomic(cache / f"{key}.json", json.dumps({"file": known, "digest": digest.hexdigest()}))
    return digest.hexdigest()
