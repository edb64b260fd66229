"""How forge comes to be on a rented machine: as commands for its shell, which Ray's launcher runs there.

What is installed is what `forge.cluster.ssh.bootstrap` installs on machines that are there already, in an
environment
that is named after it and believed only when whole. A rented machine is a bare image, though: where it has not
this machine's version of Python, which Ray wants everywhere, one is fetched by uv.
"""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from forge.cluster.cloud.ray_config import Installed
from forge.cluster.ssh.bootstrap import Package
from forge.cluster.ssh.wheel import wheel_name
from forge.config.cluster import CloudSpec

_SDKS = {
    "aws": ("boto3",),
    "gcp": ("google-api-python-client", "google-auth"),
    "azure": (
        *("azure-cli-core", "azure-identity", "azure-mgmt-compute", "azure-mgmt-network"),
        *("azure-mgmt-resource", "azure-common", "msrestazure"),
    ),
}
"""With which Ray's autoscaler on the head asks the cloud. Source: Ray documentation, "Launching Ray Clusters"."""


def plan_install(spec: CloudSpec, *, folder: Path) -> Installed:
    """Nothing where the file names an environment; else forge, from a file that is written below `folder`.

    Raises: ClusterError if `wheels` cannot be read.
    """
    if spec.python is not None:
        return Installed(python=spec.python)
    package = Package.of(spec.wheels)
    there = f"~/.forge/package-{package.digest}.tar"
    here = folder / Path(there).name
    here.write_bytes(package.content)
    return Installed(
        python=f"~/.forge/envs/{package.digest}/env/bin/python",
        setup_commands=(install_command(package, sdks=pinned(_SDKS[spec.provider]), archive=there),),
        file_mounts={there: str(here)},
    )


def would_install(spec: CloudSpec) -> Installed:
    """The same for a dry run, which writes nothing."""
    if spec.python is not None:
        return Installed(python=spec.python)
    return Installed(
        python="~/.forge/envs/DIGEST/env/bin/python",
        setup_commands=("# forge's wheel and its locked requirements are installed here",),
    )


def install_command(package: Package, *, sdks: tuple[str, ...], archive: str) -> str:
    """One command for the shell of a machine, where `archive` lies; it does nothing where all is done."""
    minor = ".".join(platform.python_version_tuple()[:2])
    place = f'"$HOME"/.forge/envs/{package.digest}'
    source = "--no-index --find-links wheels" if package.has_wheels else ""
    index = "--no-index --find-links wheels " if package.has_wheels else ""
    environment = (
        f"if command -v python{minor} > /dev/null; then python{minor} -m venv {place}/env; else "
        "{ python3 -m venv ~/.forge/uv || "
        "{ sudo apt-get update -q && sudo apt-get install -qy python3-venv && python3 -m venv ~/.forge/uv; }; } && "
        f"~/.forge/uv/bin/pip install -q {index}uv && "
        f"~/.forge/uv/bin/uv venv -q --seed --python {minor} {place}/env; fi"
    )
    packages = " ".join(["-r requirements.txt", f"./{wheel_name()}", *map(shlex.quote, sdks)])
    return (
        f"test -e {place}/whole || {{ rm -rf {place} && mkdir -p {place}/source && "
        f"tar -xf {archive} -C {place}/source && cd {place}/source && {{ {environment}; }} && "
        f"{place}/env/bin/python -m pip install -q --disable-pip-version-check --no-input {source} {packages} && "
        f"touch {place}/whole; }}"
    )


def pinned(names: tuple[str, ...]) -> tuple[str, ...]:
    """As this machine has them; those that it has not, in any version."""
    found = []
    for name in names:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            found.append(name)
    return tuple(found)
