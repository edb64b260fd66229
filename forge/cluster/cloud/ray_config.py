"""A cluster file as what Ray's cluster launcher reads: plain dictionaries, made of a purchase and a site.

Pure. One head on demand, on which no ranks run; a worker type for each machine type, spot ones first and, where
the file allows it, on-demand ones of lower priority, so that Ray's autoscaler takes them only where no spot
machine could be had. The token is a file that Ray copies from machine to machine; no secret stands in here.

Source: Ray documentation, "Cluster YAML Configuration Options"; for the nodes: EC2 API reference,
"RunInstances"; Compute Engine API reference, "instances.insert"; Azure, "Microsoft.Compute virtualMachines", as
Ray's `azure-vm-template.json` names its parameters.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forge.cluster.cloud.instance_selection import InstanceOption, InstancePlan
from forge.config.cluster import CloudSpec
from forge.pricing.catalog import machine_types, size_of

HEAD = "head"
"""Ray's name for the head's node type."""
CLUSTER_TAG = "forge-cluster"
"""The tag, or label, that says whose a machine is; Ray adds its own."""
OWNER = {"owner": "forge"}
DASHBOARD_PORT = 8265
"""Of Ray's dashboard and job server, on the head's loopback."""
WORKER_RESOURCE = "forge_worker"
"""Ray's name for what every worker has one of, so that workers can be asked for by number."""
TOKEN_FILE = "~/.forge/token"
"""Where the cluster's token lies on every machine."""

_RAY_PORT = 6379
_USERS = {"aws": "ubuntu", "gcp": "ubuntu", "azure": "ubuntu"}
_GCP_IMAGES = {
    True: "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2404-nvidia-580",
    False: "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64",
}
"""By whether the machine has a GPU. Source: Deep Learning VM documentation, "Choose an image"."""
_AZURE_IMAGES = {
    True: {"imagePublisher": "microsoft-dsvm", "imageOffer": "ubuntu-hpc", "imageSku": "2404"},
    False: {"imagePublisher": "Canonical", "imageOffer": "ubuntu-24_04-lts", "imageSku": "server"},
}
"""By whether the machine has a GPU. Source: Azure documentation, "Azure HPC VM images"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionContext:
    """Where the machines will be, and what was made ready for them there."""

    region: str
    """The region; on gcp the zone."""
    key_file: str
    """Of the private key that opens all machines; Ray copies it to the head, which opens the workers with it."""
    public_key_file: str
    public_key: str
    token_file: str
    """The token's, on this machine."""
    image: str = ""
    """AWS's number of it; the other clouds find theirs by name."""
    cpu_image: str = ""
    """The same for machines without GPU."""
    key_name: str = ""
    """AWS's name of the public key."""
    subnets: tuple[str, ...] = ()
    """AWS's, one or more a zone."""
    security_group: str = ""
    """AWS's."""
    head_profile: str = ""
    """AWS's instance profile, with the right to rent machines."""
    worker_profile: str = ""
    """The same, with the right to the storage alone."""
    is_internal: bool = False
    """Whether the machines have private addresses only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """How forge comes to be on a machine."""

    python: str
    """Of the environment that has forge in it, there."""
    setup_commands: tuple[str, ...] = ()
    file_mounts: Mapping[str, str] = field(default_factory=dict)
    """From where they go there to where they lie here."""


def user_of(spec: CloudSpec) -> str:
    """Who logs in."""
    return spec.user or _USERS[spec.provider]


def render(spec: CloudSpec, *, purchase: InstancePlan, site: RegionContext, installed: Installed) -> dict[str, Any]:
    """The file for `ray up`.

    Raises: ClusterError if a machine type's size is not known to forge, and Ray does not find it out either.
    """
    workers = {
        offer.node_type: {
            **_node(spec, offer, site=site, is_head=False),
            # The fewest are asked for by number, of whichever type is to be had; Ray counts by type.
            "min_workers": 0,
            "max_workers": purchase.max_workers,
            # Ray takes of two types that fit equally well the one of higher priority, unless it lately failed.
            "priority": len(purchase.workers) - index,
        }
        for index, offer in enumerate(purchase.workers)
    }
    auth = {"ssh_user": user_of(spec), "ssh_private_key": site.key_file}
    if spec.provider == "azure":
        auth["ssh_public_key"] = site.public_key_file
    return {
        "cluster_name": spec.name,
        "max_workers": purchase.max_workers,
        # How many machines are asked for at once, as a multiple of those that are there.
        "upscaling_speed": float(max(1, purchase.max_workers)),
        "idle_timeout_minutes": spec.idle_minutes,
        "provider": _provider(spec, site=site),
        "auth": auth,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {**_node(spec, purchase.head, site=site, is_head=True), "min_workers": 0, "max_workers": 0},
            **workers,
        },
        "file_mounts": {TOKEN_FILE: site.token_file, **installed.file_mounts},
        "initialization_commands": [],
        "setup_commands": ["chmod 700 ~/.forge && chmod 600 ~/.forge/token", *installed.setup_commands],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": _head_commands(spec, purchase=purchase, python=installed.python),
        "worker_start_ray_commands": _worker_commands(spec, purchase=purchase, python=installed.python),
    }


def shell_path(path: str) -> str:
    """A path for a shell's command line; a leading `~/` still means the home."""
    return '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def _provider(spec: CloudSpec, *, site: RegionContext) -> dict[str, Any]:
    match spec.provider:
        case "aws":
            return {
                "type": "aws",
                "region": site.region,
                "cache_stopped_nodes": False,
                "use_internal_ips": site.is_internal,
            }
        case "gcp":
            region, _, _ = site.region.rpartition("-")
            return {
                "type": "gcp",
                "region": region,
                "availability_zone": site.region,
                "project_id": spec.project,
                "cache_stopped_nodes": False,
            }
        case "azure":
            return {
                "type": "azure",
                "location": site.region,
                "resource_group": resource_group_of(spec),
                "subscription_id": spec.project,
                "availability_zone": "auto",
                "cache_stopped_nodes": False,
                "tags": {CLUSTER_TAG: spec.name, **OWNER},
            }


def resource_group_of(spec: CloudSpec) -> str:
    """Azure's resource group."""
    return spec.resource_group or f"forge-{spec.name}"


def _node(spec: CloudSpec, offer: InstanceOption, *, site: RegionContext, is_head: bool) -> dict[str, Any]:
    match spec.provider:
        case "aws":
            config = _aws_node(spec, offer, site=site, is_head=is_head)
        case "gcp":
            config = _gcp_node(spec, offer, site=site, is_head=is_head)
        case "azure":
            config = _azure_node(spec, offer)
    return {"resources": _resources(spec, offer, is_head=is_head), "node_config": config}


def _resources(spec: CloudSpec, offer: InstanceOption, *, is_head: bool) -> dict[str, int]:
    """What Ray believes the machine to have; it asks AWS itself."""
    if is_head:
        return {"CPU": 0}
    if spec.provider == "aws":
        return {WORKER_RESOURCE: 1}
    size = size_of(offer.machine_type, cloud=spec.provider)
    return {WORKER_RESOURCE: 1, "CPU": size.num_cpus} | ({"GPU": size.num_gpus} if size.num_gpus else {})


def _aws_node(spec: CloudSpec, offer: InstanceOption, *, site: RegionContext, is_head: bool) -> dict[str, Any]:
    tags = [{"Key": key, "Value": value} for key, value in {CLUSTER_TAG: spec.name, **OWNER}.items()]
    config: dict[str, Any] = {
        "InstanceType": offer.machine_type,
        "ImageId": site.image if _has_gpu(spec, offer) else site.cpu_image,
        "KeyName": site.key_name,
        "SubnetIds": list(site.subnets),
        "SecurityGroupIds": [site.security_group],
        "IamInstanceProfile": {"Name": site.head_profile if is_head else site.worker_profile},
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": _gib(spec.disk), "VolumeType": "gp3", "DeleteOnTermination": True},
            }
        ],
        # The metadata service hands out the instance profile's credentials: only to whoever can hold a session.
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": [dict(tag) for tag in tags]} for kind in ("instance", "volume")
        ],
    }
    if offer.is_spot:
        config["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
        # A spot machine cannot be told what its own shutdown means; it is always its end.
        del config["InstanceInitiatedShutdownBehavior"]
    return config


def _gcp_node(spec: CloudSpec, offer: InstanceOption, *, site: RegionContext, is_head: bool) -> dict[str, Any]:
    has_gpu = _has_gpu(spec, offer)
    # Neither a spot machine nor one with a GPU can be moved to another host.
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE" if offer.is_spot or has_gpu else "MIGRATE"}
    if offer.is_spot:
        scheduling |= {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "automaticRestart": False,
        }
    config: dict[str, Any] = {
        "machineType": offer.machine_type,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "diskSizeGb": _gib(spec.disk),
                    "sourceImage": spec.image or _GCP_IMAGES[has_gpu],
                },
            }
        ],
        "labels": {CLUSTER_TAG: spec.name, **OWNER},
        "tags": {"items": [network_tag(spec)]},
        "metadata": {"items": [{"key": "ssh-keys", "value": f"{user_of(spec)}:{site.public_key}"}]},
        "scheduling": scheduling,
    }
    if not is_head:
        # Ray makes this account, and gives it to the head itself; workers need it for the storage.
        account = f"ray-autoscaler-sa-v1@{spec.project}.iam.gserviceaccount.com"
        scopes = ["https://www.googleapis.com/auth/devstorage.read_write"]
        config["serviceAccounts"] = [{"email": account, "scopes": scopes}]
    return config


def network_tag(spec: CloudSpec) -> str:
    """GCP's tag by which firewall rules find the machines."""
    return f"forge-{spec.name}"


def _azure_node(spec: CloudSpec, offer: InstanceOption) -> dict[str, Any]:
    parameters: dict[str, Any] = {"vmSize": offer.machine_type, "osDiskSize": _gib(spec.disk)}
    if spec.image:
        parameters["imageId"] = spec.image
    else:
        parameters |= {**_AZURE_IMAGES[_has_gpu(spec, offer)], "imageVersion": "latest"}
    if offer.is_spot:
        # A maximum price of -1 is the on-demand one: taken away for want of room alone, never for the price.
        parameters |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    return {"azure_arm_parameters": parameters, "tags": {CLUSTER_TAG: spec.name, **OWNER}}


def _has_gpu(spec: CloudSpec, offer: InstanceOption) -> bool:
    known = machine_types(spec.provider).get(offer.machine_type)
    return spec.gpu != "none" if known is None else known.num_gpus > 0


def _gib(size_bytes: int) -> int:
    return math.ceil(size_bytes / 2**30)


def _head_commands(spec: CloudSpec, *, purchase: InstancePlan, python: str) -> list[str]:
    ray = _ray(python)
    start = (
        f"{ray} start --head --port={_RAY_PORT} --object-manager-port=8076 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml "
        f"--dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD_PORT} --disable-usage-stats"
    )
    environment = _environment(spec, purchase=purchase)
    market = (
        f"setsid nohup {shell_path(python)} -P -m forge.cluster.cloud.capacity_backoff "
        "> ~/.forge/market.log 2>&1 < /dev/null &"
    )
    return [f"{ray} stop", f"{environment}; ulimit -n 65536; {start}", f"{environment}; {market}"]


def _worker_commands(spec: CloudSpec, *, purchase: InstancePlan, python: str) -> list[str]:
    ray = _ray(python)
    start = f"{ray} start --address=$RAY_HEAD_IP:{_RAY_PORT} --object-manager-port=8076 --disable-usage-stats"
    return [f"{ray} stop", f"{_environment(spec, purchase=purchase)}; ulimit -n 65536; {start}"]


def _environment(spec: CloudSpec, *, purchase: InstancePlan) -> str:
    """What Ray's processes, and forge's in them, find in their environment; the machine's own price among it.

    Ray names the node type to every start command, and has one start command for all workers.
    """
    values = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN_FILE,
        "FORGE_CLOUD": spec.provider,
        "AUTOSCALER_NODE_START_WAIT_S": str(math.ceil(spec.startup_timeout)),
    }
    if spec.storage is not None:
        values["FORGE_STORAGE"] = spec.storage
    if spec.max_usd_per_hour is not None:
        values["FORGE_MAX_USD_PER_HOUR"] = f"{spec.max_usd_per_hour:g}"
    exports = " ".join(f"{name}={shell_path(value)}" for name, value in values.items())
    offers = {HEAD: purchase.head, **{offer.node_type: offer for offer in purchase.workers}}
    prices = "".join(
        f" {node_type}) export FORGE_USD_PER_HOUR={offer.usd_per_hour:.6g};;"
        for node_type, offer in offers.items()
        if offer.usd_per_hour is not None
    )
    return f'export {exports}; case "$RAY_NODE_TYPE_NAME" in{prices} *) ;; esac'


def _ray(python: str) -> str:
    """Ray's command in the environment that has forge."""
    return shell_path(f"{python.rpartition('/')[0]}/ray")
