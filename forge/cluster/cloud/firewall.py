"""Restrict ssh access to machines on GCP and Azure, where Ray's launcher opens port 22 to the whole world.

On AWS the cluster has its own security group, `forge.cluster.cloud.aws_network`. On the other clouds, their command
line tools set the rules with the user's credentials: on GCP before a machine exists; on Azure as soon as
Ray has created its network security group, which it does again at each `up`. Every login needs the key as well.

Source: gcloud's reference, "gcloud compute firewall-rules create"; Azure CLI's, "az network nsg rule update";
names in Azure from Ray's `azure-config-template.json`.
"""

from __future__ import annotations

import hashlib
import subprocess

from forge.cluster.cloud.ray_config import network_tag, resource_group_of
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_TIMEOUT_S = 180.0


def restrict_before_launch(spec: CloudSpec, *, allow_from: str) -> None:
    """Before machines are rented, allow port 22 only from `allow_from` and the cluster's machines.

    Raises: ClusterError if that fails; nothing has been rented then.
    """
    for command in before_commands(spec, allow_from=allow_from):
        _run(command, spec)


def restrict_after_launch(spec: CloudSpec, *, allow_from: str) -> None:
    """The same on a cloud where it is possible only once the head exists. Raises: ClusterError if it fails."""
    for command in after_commands(spec, allow_from=allow_from):
        _run(command, spec)


def remove_rules(spec: CloudSpec) -> None:
    """Delete the rules once the machines are gone. Raises: ClusterError if that fails."""
    for command in end_commands(spec):
        _run(command, spec)


def before_commands(spec: CloudSpec, *, allow_from: str) -> list[list[str]]:
    """GCP's rules. Of those that match, the lowest priority number decides; the default network's is 65534."""
    if spec.provider != "gcp":
        return []
    tag = network_tag(spec)
    common = ["--direction=INGRESS", f"--target-tags={tag}", f"--project={spec.project}", "--quiet"]
    create = ["gcloud", "compute", "firewall-rules", "create"]
    rules = [
        ("own", "--allow=all", f"--source-tags={tag}", 800),
        ("ssh", "--allow=tcp:22", f"--source-ranges={allow_from}", 810),
        ("world", "--action=DENY", "--source-ranges=0.0.0.0/0", 900),
    ]
    commands = [
        [*create, f"{tag}-{name}", action, source, f"--priority={priority}", *common]
        for name, action, source, priority in rules
    ]
    commands[-1].append("--rules=all")
    return [*end_commands(spec), *commands]


def after_commands(spec: CloudSpec, *, allow_from: str) -> list[list[str]]:
    """Azure's rule for port 22, which Ray has created for every address."""
    if spec.provider != "azure":
        return []
    group = resource_group_of(spec)
    unique = hashlib.sha256(group.encode()).hexdigest()[:4]  # as Ray does
    return [
        [
            *("az", "network", "nsg", "rule", "update", "--subscription", str(spec.project)),
            *("--resource-group", group, "--nsg-name", f"ray-{spec.name}-{unique}-nsg", "--name", "SSH"),
            *("--source-address-prefixes", allow_from, "VirtualNetwork"),
        ]
    ]


def end_commands(spec: CloudSpec) -> list[list[str]]:
    """Return the commands that delete GCP's existing rules; Azure deletes its rules with the machines."""
    if spec.provider != "gcp":
        return []
    rules = " ".join(f"{network_tag(spec)}-{name}" for name in ("own", "ssh", "world"))
    tool = f"gcloud compute firewall-rules --project={spec.project} --quiet"
    # gcloud fails on a rule that does not exist, so list them first.
    script = (
        f'for rule in $({tool} list --filter="name:({rules})" --format="value(name)"); '
        f"do {tool} delete $rule || exit 1; done"
    )
    return [["sh", "-c", script]]


def _run(command: list[str], spec: CloudSpec) -> None:
    tool = {"gcp": "gcloud", "azure": "az"}[spec.provider]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"{tool}, which restricts access to the machines, cannot be run: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
        raise ClusterError(f"{tool} cannot restrict access to the machines: {lines[-1]}")
