"""Restrict ssh access to machines on GCP and Azure, where Ray's launcher opens port 22 to the whole world.

On AWS the cluster has its own security group, `forge.cluster.cloud.aws_network`. On the other clouds, their command
line tools set the rules with the user's credentials, before a machine exists:

- GCP: three firewall rules for the cluster's network tag. Existing ones are changed in place, never deleted first.
- Azure: a resource group with a network, whose subnet has a network security group of forge's own. Ray's template
  keeps an existing subnet's group, and a packet needs the permission of the subnet's and of the machine's group, so
  that Ray's rule for every address opens nothing. That rule is narrowed too, however the launch ends.

What has the cluster's name without its id is not changed. No command passes through a shell, and what the tools
list is compared here, exactly.

Source: gcloud's reference, "gcloud compute firewall-rules"; Azure CLI's, "az network nsg"; Azure's documentation,
"How network security groups filter network traffic"; names in Azure from Ray's `azure-config-template.json`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forge.cluster.cloud.ray_config import azure_network, azure_unique_id, network_tag, resource_group_of
from forge.cluster.cloud.state import OWNER, ClusterIdentity
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError, printable

_TIMEOUT_S = 180.0
_DELETE_TIMEOUT_S = 900.0
_GONE_TIMEOUT_S = 120.0
_POLL_S = 2.0


def restrict_before_launch(spec: CloudSpec, *, cluster: ClusterIdentity, region: str, allow_from: str) -> None:
    """Before machines are rented, allow port 22 only from `allow_from` and the cluster's machines.

    Raises: ClusterError if that fails; nothing has been rented then.
    """
    if spec.provider == "gcp":
        _GcpRules.of(spec, cluster).restrict(allow_from)
    elif spec.provider == "azure":
        _AzureNetwork.of(spec, cluster).create(region=region, allow_from=allow_from)


def restrict_after_launch(spec: CloudSpec, *, cluster: ClusterIdentity, region: str, allow_from: str) -> None:
    """The same for the rule that Ray creates on Azure. Raises: ClusterError if it fails."""
    if spec.provider == "azure":
        network = _AzureNetwork.of(spec, cluster)
        network.create(region=region, allow_from=allow_from)
        network.narrow_rays_rule(allow_from)


def require_own(spec: CloudSpec, *, cluster: ClusterIdentity) -> bool:
    """Check before machines are ended that what is named after the cluster is its own.

    Returns: whether there is anything that Ray's launcher may end.

    Raises: ClusterError if it is not the cluster's, or the cloud cannot be asked.
    """
    return spec.provider != "azure" or _AzureNetwork.of(spec, cluster).exists()


def remove_rules(spec: CloudSpec, *, cluster: ClusterIdentity) -> list[str]:
    """Delete the rules once the machines are gone.

    Returns: what is left, one line each.

    Raises: ClusterError if the cloud cannot be asked, or refuses.
    """
    if spec.provider == "gcp":
        _GcpRules.of(spec, cluster).remove()
        return []
    return _AzureNetwork.of(spec, cluster).remove() if spec.provider == "azure" else []


@dataclass(frozen=True, slots=True, kw_only=True)
class _GcpRules:
    """The firewall rules of a cluster on GCP. Of those that match, the lowest priority number decides."""

    project: str
    cluster: ClusterIdentity

    @classmethod
    def of(cls, spec: CloudSpec, cluster: ClusterIdentity) -> _GcpRules:
        return cls(project=str(spec.project), cluster=cluster)

    def restrict(self, allow_from: str) -> None:
        """Create the missing rules, that against the world first, and update the addresses of ssh."""
        tag, existing = network_tag(self.cluster), self._existing()
        rules = [
            ("world", ["--action=DENY", "--rules=all", "--source-ranges=0.0.0.0/0"], 900),  # the default's is 65534
            ("own", ["--action=ALLOW", "--rules=all", f"--source-tags={tag}"], 800),
            ("ssh", ["--action=ALLOW", "--rules=tcp:22", f"--source-ranges={allow_from}"], 810),
        ]
        for name, options, priority in rules:
            rule = f"{tag}-{name}"
            if rule not in existing:
                target = ["--direction=INGRESS", f"--target-tags={tag}", f"--description={self._description}"]
                self._gcloud("create", rule, *options, f"--priority={priority}", *target)
            elif name == "ssh":
                self._gcloud("update", rule, f"--source-ranges={allow_from}")

    def remove(self) -> None:
        for rule in self._existing():
            self._gcloud("delete", rule)

    @property
    def _description(self) -> str:
        return f"forge cluster {self.cluster.name} {self.cluster.id}"

    def _existing(self) -> list[str]:
        """Return the names of the cluster's rules. Raises: ClusterError if one is not the cluster's."""
        names = [f"{network_tag(self.cluster)}-{name}" for name in ("own", "ssh", "world")]
        listed = self._gcloud("list", "--format=json", f"--filter=name=({' '.join(names)})")
        found = {rule["name"]: rule for rule in _parsed(listed, tool="gcloud") if rule["name"] in names}
        for name, rule in found.items():
            if rule.get("description") != self._description:
                raise ClusterError(
                    f"the firewall rule {name} of {self.project} was not created by this cluster; delete it: "
                    f"gcloud compute firewall-rules delete {name} --project={self.project}"
                )
        return list(found)

    def _gcloud(self, verb: str, *words: str) -> str:
        command = ["gcloud", "compute", "firewall-rules", verb, *words, f"--project={self.project}", "--quiet"]
        return _run(command)


@dataclass(frozen=True, slots=True, kw_only=True)
class _AzureNetwork:
    """The resource group of a cluster on Azure, and the network in it."""

    subscription: str
    group: str
    cluster: ClusterIdentity

    @classmethod
    def of(cls, spec: CloudSpec, cluster: ClusterIdentity) -> _AzureNetwork:
        return cls(subscription=str(spec.project), group=resource_group_of(spec), cluster=cluster)

    def create(self, *, region: str, allow_from: str) -> None:
        """Create what is missing, and allow port 22 from `allow_from` alone in the subnet."""
        tags = [f"{key}={value}" for key, value in {**self.cluster.tags, **OWNER}.items()]
        if not self.exists():
            self._az("group", "create", "--name", self.group, "--location", region, "--tags", *tags)
        if self._own_rules not in self._names("nsg"):
            self._network("nsg", "create", "--name", self._own_rules, "--location", region, "--tags", *tags)
        self._network(
            *("nsg", "rule", "create", "--nsg-name", self._own_rules, "--name", "ssh", "--priority", "1000"),
            *("--direction", "Inbound", "--access", "Allow", "--protocol", "Tcp"),
            *("--source-address-prefixes", allow_from, "--source-port-ranges", "*"),
            *("--destination-address-prefixes", "*", "--destination-port-ranges", "22"),
        )
        vnet, subnet, mask = f"{self._prefix}-vnet", f"{self._prefix}-subnet", azure_network(self.cluster)
        rules = ("--network-security-group", self._own_rules)
        found = next((one for one in self._list("vnet") if one["name"] == vnet), None)
        if found is None:
            self._network(
                *("vnet", "create", "--name", vnet, "--location", region, "--address-prefixes", mask),
                *("--subnet-name", subnet, "--subnet-prefixes", mask, *rules, "--tags", *tags),
            )
        elif not self._has_own_rules(found, subnet):
            self._network("vnet", "subnet", "update", "--vnet-name", vnet, "--name", subnet, *rules)

    def narrow_rays_rule(self, allow_from: str) -> None:
        """Narrow the rule that Ray's template creates for every address, if Ray has come to that."""
        rules = f"{self._prefix}-nsg"
        if rules in self._names("nsg"):
            sources = ("--source-address-prefixes", allow_from, "VirtualNetwork")
            self._network("nsg", "rule", "update", "--nsg-name", rules, "--name", "SSH", *sources)

    def exists(self) -> bool:
        """Whether the resource group exists. Raises: ClusterError if it is not the cluster's."""
        listed = _parsed(self._az("group", "list", "--output", "json"), tool="az")
        found = next((one for one in listed if one["name"].lower() == self.group.lower()), None)
        if found is not None and not self.cluster.owns(found.get("tags") or {}):
            marks = [f"tags.{key}={value}" for key, value in self.cluster.tags.items()]
            give = shlex.join(
                [
                    "az",
                    "group",
                    "update",
                    "--subscription",
                    self.subscription,
                    "--name",
                    self.group,
                    "--set",
                    *marks,
                ]
            )
            raise ClusterError(
                f"the resource group {self.group} exists and does not belong to this cluster. Ray's head may "
                "delete everything in its group, so that a cluster needs one of its own: choose another "
                f"resource_group: or name: in the file. If nothing else needs it, give it to the cluster: {give}"
            )
        return found is not None

    def remove(self) -> list[str]:
        """Delete the network, then the group if nothing else is in it. Returns: what is in it, one line each."""
        if not self.exists():
            return []
        for kind, name in (
            ("vnet", f"{self._prefix}-vnet"),
            ("nsg", self._own_rules),
            ("nsg", f"{self._prefix}-nsg"),
        ):
            if name in self._names(kind):
                self._network(kind, "delete", "--name", name)
        deadline = time.monotonic() + _GONE_TIMEOUT_S
        while left := self._resources():
            if time.monotonic() > deadline:
                return [f"{one['type']} {one['name']} in the resource group {self.group}" for one in left]
            time.sleep(_POLL_S)
        self._az("group", "delete", "--name", self.group, "--yes", timeout_s=_DELETE_TIMEOUT_S)
        return []

    @property
    def _prefix(self) -> str:
        """The beginning of the names that Ray gives to the resources of the cluster."""
        return f"ray-{self.cluster.ray_name}-{azure_unique_id(self.cluster)}"

    @property
    def _own_rules(self) -> str:
        return f"forge-{self.cluster.ray_name}-nsg"

    def _has_own_rules(self, vnet: Mapping[str, Any], subnet: str) -> bool:
        for one in vnet.get("subnets") or ():
            if one["name"] == subnet:
                rules = str((one.get("networkSecurityGroup") or {}).get("id", ""))
                return rules.rpartition("/")[2] == self._own_rules
        return False

    def _resources(self) -> list[dict[str, Any]]:
        listed = self._az("resource", "list", "--resource-group", self.group, "--output", "json")
        return _parsed(listed, tool="az")

    def _names(self, kind: str) -> list[str]:
        return [one["name"] for one in self._list(kind)]

    def _list(self, kind: str) -> list[dict[str, Any]]:
        return _parsed(self._network(kind, "list", "--output", "json"), tool="az")

    def _network(self, *words: str) -> str:
        return self._az("network", *words, "--resource-group", self.group)

    def _az(self, *words: str, timeout_s: float = _TIMEOUT_S) -> str:
        return _run(["az", *words, "--subscription", self.subscription], timeout_s=timeout_s)


def _parsed(output: str, *, tool: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(output or "[]")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(one, dict) and "name" in one for one in found):
        raise ClusterError(f"{tool} answers in another form than forge knows: {printable(output, limit=200)}")
    return found


def _run(command: list[str], *, timeout_s: float = _TIMEOUT_S) -> str:
    """Run a cloud's tool, not interrupted by Ctrl-C in the terminal. Returns: its output. Raises: ClusterError."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            start_new_session=True,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(
            f"{command[0]}, which restricts access to the machines, cannot be run: {error}"
        ) from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
        raise ClusterError(
            f"{command[0]} cannot restrict access to the machines: {printable(lines[-1], limit=400)}"
        )
    return done.stdout.decode(errors="replace")
