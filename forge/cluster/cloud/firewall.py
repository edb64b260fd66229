"""Who may reach the machines on GCP and Azure, where Ray's launcher lets in the whole world on port 22.

On AWS the cluster has a security group of its own, `forge.cluster.cloud.aws_network`. Here the clouds' own
command line
tools, which hold the user's credentials, set the rules: on GCP before a machine is there; on Azure as soon as Ray
has made its group of rules, which it does anew at each `up`. Who may enter is always asked for a key, too.

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


def close_before(spec: CloudSpec, *, allow_from: str) -> None:
    """Before machines are rented, let nobody in on port 22 but `allow_from` and the cluster's own.

    Raises: ClusterError if that cannot be done; nothing has been rented then.
    """
    for command in before_commands(spec, allow_from=allow_from):
        _run(command, spec)


def close_after(spec: CloudSpec, *, allow_from: str) -> None:
    """The same, where it can be done only once the head is there. Raises: ClusterError if it cannot."""
    for command in after_commands(spec, allow_from=allow_from):
        _run(command, spec)


def open_again(spec: CloudSpec) -> None:
    """Take the rules away, when the machines are gone. Raises: ClusterError if that fails."""
    for command in end_commands(spec):
        _run(command, spec)


def before_commands(spec: CloudSpec, *, allow_from: str) -> list[list[str]]:
    """GCP's rules: of those that fit, the one with the lowest number counts; the default's is 65534."""
    if spec.provider != "gcp":
        return []
    tag = network_tag(spec)
    common = ["--direction=INGRESS", f"--target-tags={tag}", f"--project={spec.project}", "--quiet"]
    allowed = [
        ("own", "--allow=all", f"--source-tags={tag}", 800),
        ("ssh", "--allow=tcp:22", f"--source-ranges={allow_from}", 810),
        ("world", "--action=DENY", "--source-ranges=0.0.0.0/0", 900),
    ]
    made = [
        [
            "gcloud",
            "compute",
            "firewall-rules",
            "create",
            f"{tag}-{name}",
            what,
            whom,
            f"--priority={number}",
            *common,
        ]
        for name, what, whom, number in allowed
    ]
    made[-1].append("--rules=all")
    return [*end_commands(spec), *made]


def after_commands(spec: CloudSpec, *, allow_from: str) -> list[list[str]]:
    """Azure's rule for port 22, which Ray has made for everybody."""
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
    """Delete GCP's rules, those that are there; Azure's go with the machines."""
    if spec.provider != "gcp":
        return []
    rules = " ".join(f"{network_tag(spec)}-{name}" for name in ("own", "ssh", "world"))
    tool = f"gcloud compute firewall-rules --project={spec.project} --quiet"
    # gcloud fails at a rule that is not there; what is there is asked first.
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
        raise ClusterError(f"{tool}, which guards the cluster's machines, cannot be run: {error}") from None
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip().splitlines() or ["it did not say why"]
        raise ClusterError(f"{tool} cannot guard the cluster's machines: {words[-1]}")
