"""Pack the folder that a job names with `code:`, and unpack it on every machine that runs the job.

An archive is an uncompressed tar file with sorted names and no times or owners, so that equal files give equal
bytes. Its digest covers names and contents. It is unpacked into `<cache>/code/<digest>`, a folder that only its
owner can write, and is used from there only if its files still have that digest. Nothing is imported here.

Whenever code is unpacked, what no process has used for `UNUSED_DAYS` is removed from the cache, and logged. Each
use sets the time of the folder, and a process that imports from it holds a shared lock on it until it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import logging
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forge.errors import UserCodeError
from forge.foreign import read_file
from forge.fs import default_cache_dir, leads_to_folder, make_private, state_home, sync_folder, write_atomic
from forge.units import format_bytes

ARCHIVE = "code.tar"
"""The archive's name in a run folder."""
TRUST = "FORGE_TRUST_CODE"
"""Environment variable with the digest of code that may be taken from a run folder and executed."""
MAX_CODE_BYTES = 16 * 2**20
"""The archive travels to every machine, and Ray keeps it in memory on the way."""
MAX_CODE_FILES = 1000
UNUSED_DAYS = 30
"""Unpacked code that was not used for longer is removed; a run that is resumed later unpacks its archive again."""
_MAX_LISTED = 5
_DIGEST = re.compile("[0-9a-f]{32}")
_held: dict[Path, int] = {}
"""The folders that this process keeps from being removed, each with a handle that has a shared lock."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedCode:
    """The files of a code folder: name → content, sorted by name."""

    files: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """blake2b-128 over every name and content, each preceded by its length; hexadecimal."""
        state = hashlib.blake2b(digest_size=16)
        for name, content in self.files.items():
            for part in (name.encode(), content):
                state.update(len(part).to_bytes(8, "big"))
                state.update(part)
        return state.hexdigest()

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.files.values()))

    def to_tar(self) -> bytes:
        """Return the archive; equal files give equal bytes."""
        output = io.BytesIO()
        with tarfile.open(fileobj=output, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in self.files.items():
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(content), 0o600
                archive.addfile(member, io.BytesIO(content))
        return output.getvalue()


def pack_code(folder: Path) -> PackedCode:
    """Read all files of a folder and its subfolders.

    Hidden files and folders, `__pycache__` and `*.pyc` are left out. Permissions are not kept.

    Raises: UserCodeError if it is no folder, has no Python file, exceeds `MAX_CODE_BYTES` or `MAX_CODE_FILES`,
        cannot be read, or contains something other than files and folders, such as a link that leads out of it.
    """
    if not leads_to_folder(folder):
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"  # noqa: PTH110 — of any length
        raise UserCodeError(f"{folder.absolute()} {problem}")
    root = folder.resolve()
    try:
        paths = {path.relative_to(root).as_posix(): path for path in _files(root, root=root)}
        _check_size({name: path.stat().st_size for name, path in paths.items()}, folder=folder)
        files = {name: paths[name].read_bytes() for name in sorted(paths)}
    except OSError as error:
        raise UserCodeError(f"cannot read {error.filename or folder}: {error.strerror or error}") from error
    if not any(name.endswith(".py") for name in files):
        raise UserCodeError(f"{folder.absolute()} has no Python file")
    return PackedCode(files=files)


def read_archive(archive: bytes, *, digest: str) -> PackedCode:
    """Read an archive, without writing anything.

    Raises: UserCodeError if it is no archive of `pack_code`, has names that lead out of its folder, exceeds the
        limits, or has another digest.
    """
    if len(archive) > 2 * MAX_CODE_BYTES:
        raise UserCodeError(f"the code archive has {format_bytes(len(archive))}, more than any that forge writes")
    files: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for member in tar:
                # The size first: a sparse member of a small archive may expand to any size.
                is_file = member.isreg() and not member.issparse() and 0 <= member.size <= len(archive)
                content = tar.extractfile(member) if is_file else None
                is_known = _is_plain(member.name) and not any(map(_is_left_out, member.name.split("/")))
                if content is None or not is_known or member.name in files:
                    raise UserCodeError(f"the code archive has an entry that forge never writes: {member.name!r}")
                sizes[member.name] = member.size
                _check_size(sizes, folder=Path(ARCHIVE))
                files[member.name] = content.read()
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserCodeError(f"the code archive cannot be read: {error}") from error
    code = PackedCode(files=files)
    if code.digest != digest:
        raise UserCodeError(f"the code archive has the digest {code.digest}, the plan says {digest}")
    return code


def unpack_code(code: PackedCode) -> Path:
    """Write the files into the cache, all or none; return their folder. Code that is no longer used is removed.

    Raises: UserCodeError if the cache cannot be written, or the folder belongs to another user.
    """
    digest, folder = code.digest, code_folder(code.digest)
    if has_code(digest):
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}.", suffix=".tmp"))  # mode 0700
        try:
            for name, content in code.files.items():
                path = temporary / name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_atomic(path, content, mode=0o600)
            _replace_folder(temporary, folder, digest=digest)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserCodeError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "choose another folder with the environment variable FORGE_CACHE"
        ) from error
    remove_unused_code()
    return folder


def has_code(digest: str) -> bool:
    """Return whether the cache holds all files of this digest, unchanged, and no others, such as byte code.

    This counts as a use: for `UNUSED_DAYS` from now the code is not removed.

    Raises: UserCodeError if another user owns the folder or can write it.
    """
    folder = code_folder(digest)
    try:
        status = folder.stat(follow_symlinks=False)
    except OSError:
        return False
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UserCodeError(
            f"{folder} can be written by another user, who could have replaced the code in it; remove it, or "
            "choose another folder with the environment variable FORGE_CACHE"
        )
    lock = _lock(folder, fcntl.LOCK_SH)
    try:
        os.utime(folder)
        is_clean = not any(_is_left_out(path.name) for path in folder.rglob("*"))
        return is_clean and pack_code(folder).digest == digest
    except (UserCodeError, OSError):
        return False
    finally:
        if lock is not None:
            os.close(lock)


def hold_code(digest: str) -> None:
    """Keep unpacked code from being removed until this process and the children it forks end, or `release_code`."""
    folder = code_folder(digest)
    if folder in _held and not _is_open_as(folder, _held[folder]):
        release_code(digest)  # it was replaced
    if folder not in _held and (lock := _lock(folder, fcntl.LOCK_SH)) is not None:
        _held[folder] = lock


def release_code(digest: str) -> None:
    """Undo `hold_code`."""
    lock = _held.pop(code_folder(digest), None)
    if lock is not None:
        os.close(lock)


def remove_unused_code() -> list[str]:
    """Remove the unpacked code that no process holds and none has used for `UNUSED_DAYS`; log one line.

    Returns: the sorted digests.
    """
    home = default_cache_dir().absolute() / "code"
    names = sorted(path.name for path in home.iterdir() if _DIGEST.fullmatch(path.name)) if home.is_dir() else []
    removed = [name for name in names if _remove_if_unused(home / name)]
    if removed:
        listed = ", ".join(name[:8] for name in removed[:_MAX_LISTED]) + ", …" * (len(removed) > _MAX_LISTED)
        _log.warning(
            "removed the unpacked code of %d job%s from %s, unused for %d days: %s",
            len(removed), "s" * (len(removed) > 1), home, UNUSED_DAYS, listed,
        )  # fmt: skip
    return removed


def _remove_if_unused(folder: Path) -> bool:
    if not _is_unused(folder) or (lock := _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)) is None:
        return False
    try:
        if not _is_unused(folder):  # it was used before the lock was taken
            return False
        hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".unused"))
        folder.rename(hidden)
    except OSError:  # removed by another process, or not this user's
        return False
    finally:
        os.close(lock)
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def _is_unused(folder: Path) -> bool:
    try:
        return time.time() - folder.stat(follow_symlinks=False).st_mtime > UNUSED_DAYS * 86_400
    except OSError:
        return False


def _lock(folder: Path, operation: int) -> int | None:
    """Lock a folder. Returns: a handle to close, or None if the folder is gone, held, or cannot be locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, operation)
        is_locked = _is_open_as(folder, handle)  # false if it was removed while this process waited
    except OSError:  # held by another process, or a file system without locks
        is_locked = False
    if not is_locked:
        os.close(handle)
    return handle if is_locked else None


def _is_open_as(folder: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), folder.stat(follow_symlinks=False))
    except OSError:
        return False


def restore_code(digest: str, *, run_folder: Path) -> Path:
    """Return the unpacked code of a run, and hold it; unpack the archive in the run folder if the cache lacks it.

    Raises: UserCodeError if neither holds the code.
    """
    if not has_code(digest):
        unpack_code(read_run_code(digest, run_folder=run_folder))
    hold_code(digest)
    return code_folder(digest)


def trust_code(digest: str) -> None:
    """Record in the state folder that a job of this user has used code; the cache may lose the code later."""
    folder = state_home() / "trusted-code"
    with suppress(OSError):  # then the code is trusted as long as the cache has it
        make_private(folder)
        (folder / digest).touch(mode=0o600)


def require_trusted(digest: str, *, run_folder: Path) -> None:
    """Raises: UserCodeError unless the code of a run was packed or used on this machine before, or the environment
    variable FORGE_TRUST_CODE names its digest: a run folder from elsewhere must not execute its code unasked."""
    if has_code(digest) or (state_home() / "trusted-code" / digest).is_file() or os.environ.get(TRUST) == digest:
        return
    raise UserCodeError(
        f"{run_folder.name} brings code of its own, which was never used on this machine and would be executed: "
        f"read {run_folder / ARCHIVE}, and if you trust it, run the command again with {TRUST}={digest}"
    )


def read_run_code(digest: str, *, run_folder: Path) -> PackedCode:
    """Read the archive of a run folder. Raises: UserCodeError."""
    try:
        archive = read_file(run_folder / ARCHIVE, max_bytes=2 * MAX_CODE_BYTES)
    except ValueError as error:
        raise UserCodeError(f"the code archive of {run_folder.name} cannot be read: {error}") from error
    except OSError as error:
        raise UserCodeError(
            f"the code of {run_folder.name} is neither in the cache nor in {run_folder / ARCHIVE}: "
            f"{error.strerror or error}"
        ) from error
    return read_archive(archive, digest=digest)


def code_folder(digest: str) -> Path:
    """Return where the cache keeps the code of a digest. Raises: UserCodeError for what is no digest."""
    if not _DIGEST.fullmatch(str(digest)):  # a plan from elsewhere may hold anything
        raise UserCodeError(f"{digest!r} is not the digest of a code folder")
    return default_cache_dir().absolute() / "code" / digest


def changed_files(before: PackedCode, after: PackedCode) -> list[str]:
    """Return the sorted names of files that were added, removed or changed."""
    names = before.files.keys() | after.files.keys()
    return sorted(name for name in names if before.files.get(name) != after.files.get(name))


def _files(folder: Path, *, root: Path) -> Iterator[Path]:
    """The files below a folder; folders that are links are refused, since they may contain themselves."""
    for path in sorted(folder.iterdir()):
        name = path.name
        if _is_left_out(name):
            continue
        try:
            target = path.resolve()
        except RuntimeError as error:
            raise UserCodeError(f"{path} is a link that leads to itself") from error
        if not target.is_relative_to(root):
            raise UserCodeError(f"{path} is a link that leads out of the folder; copy the file instead")
        if path.is_symlink() and not target.is_file():
            raise UserCodeError(f"{path} is a link to no file; only links to files of the same folder are packed")
        if not _is_plain(name):
            raise UserCodeError(f"{str(path)!r}: a file name must be printable and have no backslash")
        if path.is_dir():
            yield from _files(path, root=root)
        elif path.is_file():
            yield path
        else:
            raise UserCodeError(f"{path} is neither a file nor a folder")


def _is_left_out(name: str) -> bool:
    """Whether a file or folder of this name is never packed."""
    return name.startswith(".") or name == "__pycache__" or name.endswith(".pyc")


def _is_plain(name: str) -> bool:
    """Whether a name stays inside the folder and is valid on every machine."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and all(part not in ("", ".", "..") for part in parts)


def _check_size(sizes: Mapping[str, int], *, folder: Path) -> None:
    """Raises: UserCodeError that names the largest files, or the folders with most of them."""
    total_bytes = sum(sizes.values())
    if total_bytes > MAX_CODE_BYTES:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_MAX_LISTED]
        listed = ", ".join(f"{name} ({format_bytes(sizes[name])})" for name in largest)
        raise UserCodeError(
            f"{folder} has {format_bytes(total_bytes)}, more than the {format_bytes(MAX_CODE_BYTES)} that are sent "
            f"to every machine; largest: {listed}. Keep data and results outside the code folder"
        )
    if len(sizes) > MAX_CODE_FILES:
        counts: dict[str, int] = {}
        for name in sizes:
            top = name.split("/")[0] if "/" in name else "."
            counts[top] = counts.get(top, 0) + 1
        fullest = sorted(counts, key=lambda name: -counts[name])[:_MAX_LISTED]
        listed = ", ".join(f"{name} ({counts[name]} files)" for name in fullest)
        raise UserCodeError(
            f"{folder} has {len(sizes)} files, more than {MAX_CODE_FILES}; most are in: {listed}. Keep data and "
            "results outside the code folder"
        )


def _replace_folder(temporary: Path, folder: Path, *, digest: str) -> None:
    """Rename a complete folder to its final name, unless another process was faster; replace a damaged one."""
    for is_last in (False, True):
        try:
            temporary.rename(folder)
            sync_folder(folder.parent)
            return
        except OSError:
            if has_code(digest):
                return
            if is_last:
                raise
            damaged = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{digest}.", suffix=".damaged"))
            with suppress(FileNotFoundError):
                folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
