"""How forge is installed on a rented machine: shell commands that Ray's launcher runs there.

They install the package of `forge.cluster.ssh.bootstrap` in an environment that is named after it and used only
when it is complete. Ray requires the same version of Python on all nodes; if it is missing on the rented machine's
image, uv downloads it.
"""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from forge.cluster.cloud.ray_config import ForgeInstall
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
"""The libraries that Ray's autoscaler needs on the head. Source: Ray documentation, "Launching Ray Clusters"."""


def plan_install(spec: CloudSpec, *, folder: Path) -> ForgeInstall:
    """The commands that install forge from a file written to `folder`; none if the cluster file names a Python.

    Raises: ClusterError if `wheels` cannot be read.
    """
    if spec.python is not None:
        return ForgeInstall(python=spec.python)
    package = Package.of(spec.wheels)
    remote = f"~/.forge/package-{package.digest}.tar"
    local = folder / Path(remote).name
    local.write_bytes(package.content)
    return ForgeInstall(
        python=f"~/.forge/envs/{package.digest}/env/bin/python",
        setup_commands=(install_command(package, sdks=pin_versions(_SDKS[spec.provider]), archive=remote),),
        file_mounts={remote: str(local)},
    )


def preview_install(spec: CloudSpec) -> ForgeInstall:
    """The same for a dry run, which writes nothing."""
    if spec.python is not None:
        return ForgeInstall(python=spec.python)
    return ForgeInstall(
        python="~/.forge/envs/DIGEST/env/bin/python",
        setup_commands=("# forge's wheel and its locked requirements are installed here",),
    )


def install_command(package: Package, *, sdks: tuple[str, ...], archive: str) -> str:
    """A shell command that builds the environment, or does nothing if it is complete.

    Args:
        archive: the package's file on the machine.
    """
    minor = ".".join(platform.python_version_tuple()[:2])
    environment = f'"$HOME"/.forge/envs/{package.digest}'
    source = "--no-index --find-links wheels" if package.has_wheels else ""
    create = (
        f"if command -v python{minor} > /dev/null; then python{minor} -m venv {environment}/env; else "
        "{ python3 -m venv ~/.forge/uv || "
        "{ sudo apt-get update -q && sudo apt-get install -qy python3-venv && python3 -m venv ~/.forge/uv; }; } && "
        f"~/.forge/uv/bin/pip install -q {source} uv && "
        f"~/.forge/uv/bin/uv venv -q --seed --python {minor} {environment}/env; fi"
    )
    packages = " ".join(["-r requirements.txt", f"./{wheel_name()}", *map(shlex.quote, sdks)])
    return (
        f"test -e {environment}/complete || {{ rm -rf {environment} && mkdir -p {environment}/source && "
        f"tar -xf {archive} -C {environment}/source && cd {environment}/source && {{ {create}; }} && "
        f"{environment}/env/bin/python -m pip install -q --disable-pip-version-check --no-input {source} "
        f"{packages} && touch {environment}/complete; }}"
    )


def pin_versions(names: tuple[str, ...]) -> tuple[str, ...]:
    """Pin each library to this machine's version; those that are not installed here stay unpinned."""
    found = []
    for name in names:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            found.append(name)
    return tuple(found)
