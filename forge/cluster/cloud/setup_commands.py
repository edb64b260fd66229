"""How forge is installed on a rented machine: shell commands that Ray's launcher runs there.

They install the package of `forge.cluster.ssh.bootstrap` in an environment that is named after it and used only
when it is complete. Ray requires the same version of Python on all nodes; if it is missing on the rented machine's
image, uv, itself pinned by its hash, downloads it and checks it.
"""

from __future__ import annotations

import platform
from pathlib import Path

from forge.cluster.cloud.ray_config import ForgeInstall
from forge.cluster.ssh.bootstrap import Package
from forge.config.cluster import CloudSpec


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
        setup_commands=(install_command(package, cloud=spec.provider, archive=remote),),
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


def install_command(package: Package, *, cloud: str, archive: str) -> str:
    """A shell command that builds the environment, or does nothing if it is complete.

    Args:
        cloud: whose lock file has the libraries that Ray's autoscaler needs on the head.
        archive: the package's file on the machine.
    """
    minor = ".".join(platform.python_version_tuple()[:2])
    environment = f'"$HOME"/.forge/envs/{package.digest}'
    python = f"{environment}/env/bin/python"
    source = "--no-index --find-links wheels " if package.has_wheels else ""
    # uv's environment has no pip, so that pip of the environment with uv works on it.
    create = (
        f"if command -v python{minor} > /dev/null; then python{minor} -m venv {environment}/env && "
        f'forge_pip() {{ {python} -P -m pip "$@"; }}; else '
        "{ python3 -m venv ~/.forge/uv || "
        "{ sudo apt-get update -q && sudo apt-get install -qy python3-venv && python3 -m venv ~/.forge/uv; }; } && "
        f"~/.forge/uv/bin/python -m pip install -q --require-hashes {source}-r uv.txt && "
        f"~/.forge/uv/bin/uv venv -q --python {minor} {environment}/env && "
        f'forge_pip() {{ ~/.forge/uv/bin/python -m pip --python {python} "$@"; }}; fi'
    )
    install = package.install_commands("forge_pip", python=python, locks=(cloud,))
    return (
        f"test -e {environment}/complete || {{ rm -rf {environment} && mkdir -p {environment}/source && "
        f"tar -xf {archive} -C {environment}/source && cd {environment}/source && {{ {create}; }} && "
        f"{install} && touch {environment}/complete; }}"
    )
