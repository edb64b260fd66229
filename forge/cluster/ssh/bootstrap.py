"""Prepare a host for a cluster: check it, and install forge in its own environment.

The environment is named after the digest of its contents, built by one process at a time, used only when it is
complete, and reused by later calls of `up`. An environment named in the cluster's file must have this machine's
versions.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shlex
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forge import limits
from forge.cluster.locks.lock_file import LOCKS, base_lock
from forge.cluster.ssh.session import SshHost
from forge.cluster.ssh.wheel import Requirements, build_wheel, digest_of, wheel_name
from forge.errors import ClusterError
from forge.units import format_bytes

_FUTURE = "from __future__ import annotations\n"
_INSTALL_TIMEOUT_S = 3600.0
_MAX_CLOCK_SKEW_S = 30.0
"""With clocks further apart the times of events would mislead."""
_MIN_FREE_BYTES = 2 * 10**9
_INSTALLED_BYTES = 12 * 10**9
"""The size of an environment with the CUDA build of torch."""
_COMPILE = "import compileall, sysconfig; compileall.compile_dir(sysconfig.get_path('purelib'), quiet=2, workers=0)"
"""Compile all modules on all cores, while pip would use one; files that are no Python 3, as templates, are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootstrappedHost:
    """The paths on a host that is ready for Ray."""

    python: str
    """The Python of the environment that has forge."""
    folder: str
    """forge's folder, with `~` expanded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What is installed on a host: forge's wheel and its locked dependencies."""

    content: bytes
    """A tar file with the wheel, the requirements with their hashes, and the wheels to install from, if any."""
    digest: str
    has_wheels: bool

    @classmethod
    def of(cls, wheels: str | None) -> Package:
        """Build the package.

        Args:
            wheels: a folder of this machine with wheels to install from; None: from the hosts' package index, in
                the versions and files of forge's lock.

        Raises: ClusterError if the folder cannot be read, or this machine's Ray or torch differs from the lock's.
        """
        folder = None if wheels is None else Path(wheels).expanduser()
        if folder is not None and not any(folder.glob("*.whl")):
            raise ClusterError(f"wheels: {folder} has no wheels; fill it with pip download or pip wheel")
        target = io.BytesIO()
        try:
            requirements = Requirements.locked() if folder is None else Requirements.of_folder(folder)
            wheel = build_wheel()
            own = f"./{wheel_name()} --hash=sha256:{hashlib.sha256(wheel).hexdigest()}\n"
            files = {
                wheel_name(): wheel,
                "requirements.txt": requirements.wheels.encode(),
                "source.txt": (requirements.sources + own).encode(),
                **{path.name: path.read_bytes() for path in LOCKS.values() if path != base_lock()},
            }
            with tarfile.open(fileobj=target, mode="w") as archive:
                for name, content in files.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
                for path in sorted(folder.glob("*.whl")) if folder is not None else ():
                    archive.add(path, arcname=f"wheels/{path.name}")
        except OSError as error:
            raise ClusterError(f"wheels: {error.filename}: {error.strerror}") from error
        digest = digest_of(wheel, requirements)
        return cls(content=target.getvalue(), digest=digest, has_wheels=wheels is not None)

    def install_commands(self, pip: str, *, python: str, locks: Sequence[str] = ()) -> str:
        """Shell commands that install the package from the folder with its files; nothing without a hash.

        Args:
            pip: the command of pip.
            python: the Python of the environment, quoted.
            locks: names of further lock files; not used with a folder of wheels, which has everything.
        """
        base = f"{pip} install -q --no-compile --disable-pip-version-check --no-input --require-hashes"
        if self.has_wheels:
            base += " --no-index --find-links wheels"
            locks = ()
        steps = [f"{base} --only-binary :all: -r {name}.txt" for name in ("requirements", *locks)]
        steps.append(f"{base} --no-deps --no-build-isolation -r source.txt")
        # Without it each module is compiled when it is first imported.
        compiles = f"{{ {python} -P -c {shlex.quote(_COMPILE)} || true; }}"
        return " && ".join([*steps, compiles])

    def install(self, host: SshHost, facts: Mapping[str, Any]) -> str:
        """Build the environment on a host unless it exists. Returns: its Python.

        Args:
            facts: the result of `probe`.

        Raises: ClusterError with the last line of pip's output.
        """
        environment = f"{facts['folder']}/envs/{self.digest}"
        there = shlex.quote(environment)
        python = f"{there}/env/bin/python"
        build = (
            f"rm -rf {there} && mkdir -p {there}/source && cd {there}/source && tar xf - && "
            f"{shlex.quote(str(facts['python']))} -m venv {there}/env && "
            f"{self.install_commands(f'{python} -P -m pip', python=python)} && touch {there}/complete"
        )
        once = f"test -e {there}/complete || {{ {build}; }}"
        envs = shlex.quote(f"{facts['folder']}/envs")
        line = f"umask 077; mkdir -p {envs} && flock {there}.lock sh -c {shlex.quote(once)}"
        done = host.run(line, stdin=self.content, timeout_s=_INSTALL_TIMEOUT_S, kill_on_disconnect=True)
        if done.returncode:
            raise ClusterError(f"forge could not be installed there: {last_line(done.stderr)}")
        return f"{environment}/env/bin/python"


def bootstrap(
    host: SshHost, *, folder: str, python: str | None, package: Package | None, report: Callable[[str], None]
) -> BootstrappedHost:
    """Check a host, and install forge's environment on it.

    Args:
        folder: forge's folder there.
        python: the Python of an existing environment; then `package` is None.
        report: called with progress messages.

    Raises: ClusterError if the host cannot be used, or forge cannot be installed.
    """
    report("checking")
    facts = probe(host, folder=folder, python=python)
    require_usable(facts, needs_install=package is not None)
    gpus = ""
    if facts["gpus"]:
        name, _, driver = facts["gpus"][0]
        gpus = f", {len(facts['gpus'])} × {name} (driver {driver})"
    size = f"{facts['num_cpus']} CPUs, {format_bytes(facts['memory_bytes'])}{gpus}"
    if package is None:
        report(size)
        return BootstrappedHost(python=str(facts["python"]), folder=str(facts["folder"]))
    report(f"{size}; installing forge")
    return BootstrappedHost(python=package.install(host, facts), folder=str(facts["folder"]))


def probe(host: SshHost, *, folder: str, python: str | None) -> dict[str, Any]:
    """Run `forge.cluster.ssh.probe` on a host.

    Returns: its facts, and `skew_s`, by how much its clock is ahead at least.

    Raises: ClusterError if the host is not reached, or has no Python.
    """
    minor = ".".join(platform.python_version_tuple()[:2])
    script = probe_script()
    words = shlex.join(["-", folder, minor, *([python] if python else [])])
    choice = f"if command -v python{minor} >/dev/null; then python{minor} {words}; else python3 {words}; fi"
    began = time.time()
    done = host.run(choice, stdin=script)
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        reason = last_line(done.stderr) or f"it ended with {done.returncode}"
        raise ClusterError(f"no Python could be run there, {reason}; install python{minor}") from None
    return facts | {"skew_s": clock_skew(facts["time"], began=began, ended=time.time())}


def probe_script() -> bytes:
    """Return the source of `forge.cluster.ssh.probe` and of what it imports, for a Python without forge."""
    *_, source = Path(limits.__file__).read_text().partition(_FUTURE)
    before, _, after = Path(__file__).with_name("probe.py").read_text().partition("from forge.limits import ")
    return (before + source + after.partition("\n")[2]).encode()


def clock_skew(there: float, *, began: float, ended: float) -> float:
    """The seconds by which a host's clock is ahead at least; negative where it is behind.

    It was read at an unknown moment between `began` and `ended`, so a slow answer does not count as a wrong clock.
    """
    return max(0.0, there - ended) + min(0.0, there - began)


def require_usable(facts: Mapping[str, Any], *, needs_install: bool) -> None:
    """Check that a host can be part of the cluster.

    Raises: ClusterError with what is wrong and how to fix it.
    """
    _require_python(facts)
    if not needs_install:
        _require_versions(facts)
    if not facts["is_writable"]:
        raise ClusterError(f"{facts['folder']} cannot be written there; choose another: folder in the file")
    needed = _INSTALLED_BYTES if needs_install else _MIN_FREE_BYTES
    if facts["free_bytes"] < needed:
        free = format_bytes(facts["free_bytes"])
        raise ClusterError(
            f"its disk has {free} free under {facts['folder']}, and {format_bytes(needed)} are needed"
        )
    if facts["gpu_problem"]:
        raise ClusterError(
            f"its GPU driver does not work: {facts['gpu_problem']}; reboot it, or reinstall the driver"
        )
    if abs(facts["skew_s"]) > _MAX_CLOCK_SKEW_S:
        ahead = "ahead" if facts["skew_s"] > 0 else "behind"
        raise ClusterError(
            f"its clock is {abs(facts['skew_s']):.0f} s {ahead}; synchronise it, for example with chrony"
        )


def _require_python(facts: Mapping[str, Any]) -> None:
    minor = ".".join(platform.python_version_tuple()[:2])
    if not facts["version"]:
        raise ClusterError(f"{facts['python']} does not run there")
    if ".".join(str(facts["version"]).split(".")[:2]) != minor:
        raise ClusterError(
            f"it has Python {facts['version']} ({facts['python']}), and this machine {platform.python_version()}: "
            f"Ray requires {minor} on all nodes; install python{minor} there"
        )


def _require_versions(facts: Mapping[str, Any]) -> None:
    for name in ("forge-train", "ray", "torch"):
        here, there = version(name), facts["versions"].get(name)
        if there is None:
            raise ClusterError(
                f"{facts['python']} has no {name}; install it there, or leave python out of the file"
            )
        wanted = here.partition("+")[0]
        if there.partition("+")[0] != wanted:
            command = f"{facts['python']} -m pip install {name}=={wanted}"
            raise ClusterError(f"it has {name} {there}, and this machine {here}: {command}")


def last_line(output: bytes) -> str:
    """The last line of a command's output that is not blank; empty if there is none."""
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
