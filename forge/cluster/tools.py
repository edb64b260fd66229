"""What each provider needs on this machine: programs and Python packages, and the commands that install them.

`up` looks for all of it before anything is rented: a launch that fails later leaves a head that costs. `forge
doctor` lists it. Importing this module imports none of the packages.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from forge.cluster.locks.lock_file import LOCKS
from forge.errors import ClusterError

_OPENSSH = {
    "apt-get": "openssh-client",
    "dnf": "openssh-clients",
    "apk": "openssh-client",
    "zypper": "openssh-clients",
}
_RSYNC = dict.fromkeys(("apt-get", "dnf", "apk", "zypper", "brew"), "rsync")
_INSTALL = {
    "apt-get": "sudo apt-get install -y",
    "dnf": "sudo dnf install -y",
    "zypper": "sudo zypper install -y",
    "apk": "sudo apk add",
    "brew": "brew install",
}
"""Package managers, in the order in which they are looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A program, or a Python package, that a provider needs on this machine."""

    name: str
    purpose: str
    packages: Mapping[str, str]
    """Its package by package manager."""
    other: str
    """The command that installs it where no such manager is found, or a page that says how."""
    module: str | None = None
    """What to import, if it is a Python package."""

    def is_here(self) -> bool:
        """Whether it is installed."""
        if self.module is None:
            return shutil.which(self.name) is not None or Path(sys.executable).with_name(self.name).exists()
        try:
            return find_spec(self.module) is not None
        except (ImportError, ValueError):  # a parent package is missing
            return False

    def remedy(self) -> str:
        """The command that installs it on this machine."""
        for manager, command in _INSTALL.items():
            if manager in self.packages and shutil.which(manager):
                return f"{command} {self.packages[manager]}"
        return self.other


def _package(name: str, module: str, *, cloud: str) -> Tool:
    pip = [sys.executable, "-P", "-m", "pip", "install", "--require-hashes", "-r", str(LOCKS[cloud])]
    install = shlex.join(pip)
    return Tool(name=name, purpose="asks the cloud's API", packages={}, other=install, module=module)


_SSH = Tool(name="ssh", purpose="logs in to the machines", packages=_OPENSSH, other="install OpenSSH's client")
_KEYGEN = Tool(name="ssh-keygen", purpose="makes the key", packages=_OPENSSH, other="install OpenSSH's client")
_LAUNCHER = (
    Tool(name="ray", purpose="starts the machines", packages={}, other="pip install 'ray[default]'"),
    _SSH,
    _KEYGEN,
    Tool(name="rsync", purpose="copies files to the machines", packages=_RSYNC, other="install rsync"),
)
TOOLS: Mapping[str, tuple[Tool, ...]] = {
    "ssh": (_SSH,),
    "aws": (*_LAUNCHER, _package("boto3", "boto3", cloud="aws")),
    "gcp": (
        *_LAUNCHER,
        Tool(
            name="gcloud",
            purpose="sets the firewall",
            packages={"brew": "google-cloud-sdk"},
            other="sudo snap install google-cloud-cli --classic, or https://cloud.google.com/sdk/docs/install",
        ),
        _package("google-api-python-client", "googleapiclient", cloud="gcp"),
        _package("google-auth", "google.auth", cloud="gcp"),
    ),
    "azure": (
        *_LAUNCHER,
        Tool(
            name="az",
            purpose="sets the firewall",
            packages={"brew": "azure-cli"},
            other="pipx install azure-cli, or https://learn.microsoft.com/cli/azure/install-azure-cli",
        ),
        *(
            _package(name, module, cloud="azure")
            for name, module in {
                "azure-cli-core": "azure.cli.core",
                "azure-common": "azure.common",
                "azure-identity": "azure.identity",
                "azure-mgmt-compute": "azure.mgmt.compute",
                "azure-mgmt-network": "azure.mgmt.network",
                "azure-mgmt-resource": "azure.mgmt.resource",
            }.items()
        ),
    ),
    "kubernetes": (
        Tool(
            name="kubectl",
            purpose="asks Kubernetes",
            packages={"brew": "kubernetes-cli"},
            other="sudo snap install kubectl --classic, or https://kubernetes.io/docs/tasks/tools/",
        ),
    ),
}
"""By provider. Source: Ray documentation, "Launching Ray Clusters", for what its launcher needs."""


def missing_tools(provider: str) -> list[Tool]:
    """What a provider needs and this machine does not have."""
    return [tool for tool in TOOLS.get(provider, ()) if not tool.is_here()]


def remedies(tools: list[Tool]) -> list[str]:
    """The commands that install these tools, each once."""
    return list(dict.fromkeys(tool.remedy() for tool in tools))


def require_tools(provider: str) -> None:
    """Raises: ClusterError naming everything that is missing, and how to install it."""
    missing = missing_tools(provider)
    if missing:
        listed = ", ".join(f"{tool.name} ({tool.purpose})" for tool in missing)
        raise ClusterError(
            f"clusters of the provider {provider} need on this machine: {listed}. Nothing was started. Install: "
            f"{'; '.join(remedies(missing))}"
        )
