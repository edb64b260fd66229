"""A machine made ready for a cluster: looked at, and forge installed in an environment of its own.

The environment is named after what it is made of, built by one at a time, and believed only when whole; the next
`up` finds it there. Where the cluster's file names an environment, that one must have the versions of this machine.
"""

from __future__ import annotations

import io
import json
import platform
import shlex
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge.cluster.ssh.session import SshHost
from forge.cluster.ssh.wheel import build_wheel, digest_of, locked_requirements, wheel_name
from forge.errors import ClusterError
from forge.units import format_bytes

_INSTALL_TIMEOUT_S = 3600.0
_MOST_SKEW_S = 30.0
"""More than this between two clocks, and the times of events mean nothing."""
_LEAST_FREE_BYTES = 2 * 10**9
_INSTALLED_BYTES = 12 * 10**9
"""With the CUDA build of torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrappedHost:
    """A machine on which Ray can be started."""

    python: str
    folder: str
    """Without `~`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What is installed on a machine: an environment of its own, named after what it is made of."""

    content: bytes
    """A tar file: the wheel, the requirements, and the wheels they are to be taken from."""
    digest: str
    has_wheels: bool

    @classmethod
    def of(cls, wheels: str | None) -> Package:
        """Args:
        wheels: a folder of this machine to install from; None: from the machines' package index.

        Raises: ClusterError if the folder cannot be read.
        """
        wheel, requirements = build_wheel(), locked_requirements()
        target = io.BytesIO()
        try:
            with tarfile.open(fileobj=target, mode="w") as archive:
                for name, content in ((wheel_name(), wheel), ("requirements.txt", requirements.encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
                for path in sorted(Path(wheels).expanduser().glob("*.whl")) if wheels else ():
                    archive.add(path, arcname=f"wheels/{path.name}")
        except OSError as error:
            raise ClusterError(f"wheels: {error.filename}: {error.strerror}") from error
        digest = digest_of(wheel, requirements)
        return cls(content=target.getvalue(), digest=digest, has_wheels=wheels is not None)

    def install(self, machine: SshHost, facts: Mapping[str, Any]) -> str:
        """Have the environment there; one at a time, and believed only when whole. Returns: its Python.

        Raises: ClusterError with pip's last words.
        """
        place = f"{facts['folder']}/envs/{self.digest}"
        source = "--no-index --find-links wheels" if self.has_wheels else ""
        build = (
            f"rm -rf {place} && mkdir -p {place}/source && cd {place}/source && tar xf - && "
            f"{shlex.quote(str(facts['python']))} -m venv {place}/env && {place}/env/bin/python -m pip install -q "
            f"--disable-pip-version-check --no-input {source} -r requirements.txt ./{wheel_name()} && "
            f"touch {place}/whole"
        )
        once = f"test -e {place}/whole || {{ {build}; }}"
        line = f"mkdir -p {facts['folder']}/envs && flock {place}.lock sh -c {shlex.quote(once)}"
        done = machine.run(line, stdin=self.content, timeout_s=_INSTALL_TIMEOUT_S, ends_with_us=True)
        if done.returncode:
            raise ClusterError(f"forge could not be installed there: {last_line(done.stderr)}")
        return f"{place}/env/bin/python"


def bootstrap(
    machine: SshHost, *, folder: str, python: str | None, package: Package | None, tell: Callable[[str], None]
) -> BootstrappedHost:
    """Look at a machine, and have an environment there.

    Args:
        folder: forge's there.
        python: of an environment that is there already; then there is no package.
        tell: told what happens.

    Raises: ClusterError if the machine is of no use, or forge cannot be installed.
    """
    tell("checking")
    facts = probe(machine, folder=folder, python=python)
    require_usable(facts, needs_install=package is not None)
    gpus = ""
    if facts["gpus"]:
        name, _, driver = facts["gpus"][0]
        gpus = f", {len(facts['gpus'])} × {name} (driver {driver})"
    size = f"{facts['num_cpus']} CPUs, {format_bytes(facts['memory_bytes'])}{gpus}"
    place = str(facts["folder"])
    if package is None:
        tell(size)
        return BootstrappedHost(python=str(facts["python"]), folder=place)
    tell(f"{size}; installing forge")
    return BootstrappedHost(python=package.install(machine, facts), folder=place)


def probe(machine: SshHost, *, folder: str, python: str | None) -> dict[str, Any]:
    """What a machine is, as `forge.cluster.ssh.probe` says, and `skew_s`, how far its clock is ahead at least.

    Raises: ClusterError if it is not reached, or has no Python.
    """
    minor = ".".join(platform.python_version_tuple()[:2])
    script = Path(__file__).with_name("probe.py").read_bytes()
    words = shlex.join(["-", folder, minor, *([python] if python else [])])
    choice = f"if command -v python{minor} >/dev/null; then python{minor} {words}; else python3 {words}; fi"
    began = time.time()
    done = machine.run(choice, stdin=script)
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        said = last_line(done.stderr) or f"it ended with {done.returncode}"
        raise ClusterError(f"no Python could be run there, {said}; install python{minor}") from None
    return facts | {"skew_s": skew_of(facts["time"], began=began, ended=time.time())}


def skew_of(there: float, *, began: float, ended: float) -> float:
    """How many seconds a clock there is ahead at least; negative where it is behind.

    It was read at some moment between two of this machine's, of which nobody knows which: a machine that is slow
    to answer has no wrong clock.
    """
    return max(0.0, there - ended) + min(0.0, there - began)


def require_usable(facts: Mapping[str, Any], *, needs_install: bool) -> None:
    """Raises: ClusterError if a machine cannot be part of the cluster."""
    minor = ".".join(platform.python_version_tuple()[:2])
    if not facts["version"]:
        raise ClusterError(f"{facts['python']} does not run there")
    if ".".join(str(facts["version"]).split(".")[:2]) != minor:
        raise ClusterError(
            f"it has Python {facts['version']} ({facts['python']}), and {platform.python_version()} runs here: Ray "
            f"wants the same {minor} everywhere; install python{minor} there"
        )
    ours = {name: version(name) for name in ("forge-train", "ray", "torch")}
    for name, here in ours.items() if not needs_install else ():
        there = facts["versions"].get(name)
        if there is None:
            raise ClusterError(
                f"{facts['python']} has no {name}; install it there, or leave python out of the file"
            )
        wanted = here.partition("+")[0]
        if there.partition("+")[0] != wanted:
            mend = f"{facts['python']} -m pip install {name}=={wanted}"
            raise ClusterError(f"it has {name} {there}, and {here} is here: {mend}")
    if not facts["is_writable"]:
        raise ClusterError(f"{facts['folder']} cannot be written there; choose another: folder in the file")
    least = _INSTALLED_BYTES if needs_install else _LEAST_FREE_BYTES
    if facts["free_bytes"] < least:
        free = format_bytes(facts["free_bytes"])
        raise ClusterError(
            f"its disk has {free} free under {facts['folder']}, and {format_bytes(least)} are needed"
        )
    if facts["gpu_problem"]:
        raise ClusterError(f"its GPU's driver does not work: {facts['gpu_problem']}; reboot it, or mend the driver")
    if abs(facts["skew_s"]) > _MOST_SKEW_S:
        ahead = "ahead" if facts["skew_s"] > 0 else "behind"
        raise ClusterError(f"its clock is {abs(facts['skew_s']):.0f} s {ahead}; have it set, by chrony or ntpd say")


def last_line(words: bytes) -> str:
    """Of what a command has said; empty if it said nothing."""
    lines = [line for line in words.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
