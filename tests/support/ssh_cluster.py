"""Hosts with sshd, and the file of a cluster on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from forge.config.cluster import SshSpec
from tests.support.hosts import Hosts
from tests.support.sshd import client_key, start_sshd


def start(
    hosts: Hosts, host: int, *, environment: Mapping[str, str] | None = None, private: Sequence[Path] = ()
) -> None:
    """Start a host's sshd; each host has its own cache, under the same path."""
    cache = hosts.folder / "cache"
    start_sshd(
        hosts, host, environment={"FORGE_CACHE": str(cache), **(environment or {})}, private=[cache, *private]
    )


def spec_of(hosts: Hosts, **changes: object) -> SshSpec:
    """A cluster of all hosts, with a folder that they share and the Python of the tests."""
    settings = {
        "name": "lab",
        "provider": "ssh",
        "machines": tuple(hosts.ip(host) for host in range(hosts.count)),
        "user": "root",
        "identity_file": str(client_key(hosts)),
        "python": sys.executable,
        "folder": str(hosts.folder / "forge"),
        "storage": str(hosts.folder / "shared"),
    }
    return SshSpec.model_validate(settings | changes)


def write_spec(path: Path, spec: SshSpec) -> None:
    """Write a cluster file."""
    values = spec.model_dump(mode="json", exclude_unset=True)
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
