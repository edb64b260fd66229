"""Build the file for Ray's cluster launcher from a cluster file, an instance plan and a region's resources.

Pure. One on-demand head without workers, and a worker type for each instance type: spot first and, if the file
allows it, on demand with lower priority, so that Ray's autoscaler takes it only where no spot machine is available.
The token is a file that Ray copies from machine to machine; the result contains no secret.

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
from forge.cluster.cloud.machine_limits import MIN_WORKERS_VARIABLE
from forge.cluster.cloud.other_regions import REGIONS_VARIABLE, ClusterRegions, to_variable
from forge.cluster.cloud.state import OWNER, ClusterIdentity
from forge.config.cluster import CloudSpec
from forge.plan.interruptions import rate_of_band
from forge.pricing.budget import MTBF_VARIABLE
from forge.pricing.catalog import machine_types, size_of
from forge.pricing.offers import offline_offers

HEAD = "head"
"""Ray's name for the head's node type."""
DASHBOARD_PORT = 8265
"""The port of Ray's dashboard and job server, on the head's loopback."""
WORKER_RESOURCE = "forge_worker"
"""A custom resource of which every worker has one, so that workers can be requested by number."""
TOKEN_FILE = "~/.forge/token"
"""The file with the cluster's token on every machine."""

_RAY_PORT = 6379
_USERS = {"aws": "ubuntu", "gcp": "ubuntu", "azure": "ubuntu"}
_GCP_IMAGES = {
    True: "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2404-nvidia-580",
    False: "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64",
}
"""Images with (True) and without GPU driver. Source: Deep Learning VM documentation, "Choose an image"."""
_AZURE_IMAGES = {
    True: {"imagePublisher": "microsoft-dsvm", "imageOffer": "ubuntu-hpc", "imageSku": "2404"},
    False: {"imagePublisher": "Canonical", "imageOffer": "ubuntu-24_04-lts", "imageSku": "server"},
}
"""Images with (True) and without GPU driver. Source: Azure documentation, "Azure HPC VM images"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionContext:
    """A region, and the resources in it that machines need."""

    region: str
    """The region; on GCP the zone."""
    key_file: str
    """The private key for all machines; Ray copies it to the head, which logs in to the workers with it."""
    public_key_file: str
    public_key: str
    token_file: str
    """The file with the token on this machine."""
    image: str = ""
    """AWS's image id; the other clouds have images by name."""
    cpu_image: str = ""
    """The image id for machines without GPU."""
    key_name: str = ""
    """The key pair's name on AWS."""
    subnets: tuple[str, ...] = ()
    """Subnet ids on AWS, one or more per zone."""
    security_group: str = ""
    """Its id on AWS."""
    head_profile: str = ""
    """The instance profile on AWS that may rent machines."""
    worker_profile: str = ""
    """The instance profile on AWS that may only use the storage."""
    is_internal: bool = False
    """Whether the machines have only private addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgeInstall:
    """How forge is installed on a machine."""

    python: str
    """The Python there that has forge."""
    setup_commands: tuple[str, ...] = ()
    file_mounts: Mapping[str, str] = field(default_factory=dict)
    """Paths on the machine → files on this machine."""


def user_of(spec: CloudSpec) -> str:
    """The user name for ssh."""
    return spec.user or _USERS[spec.provider]


def build_ray_config(
    spec: CloudSpec,
    *,
    cluster: ClusterIdentity,
    plan: InstancePlan,
    context: RegionContext,
    install: ForgeInstall,
    regions: ClusterRegions | None = None,
) -> dict[str, Any]:
    """Build the file for `ray up`, with the regions to which the cluster may move.

    Raises: ClusterError if the size of an instance type is unknown to forge on a cloud that Ray cannot ask.
    """
    workers = {
        option.node_type: {
            **_node(spec, option, cluster=cluster, context=context, is_head=False),
            # The minimum is requested by number, of whichever type is available; Ray's setting is per type.
            "min_workers": 0,
            "max_workers": plan.max_workers,
            # Of two types that fit equally well Ray takes the one with higher priority, unless it failed recently.
            "priority": len(plan.workers) - index,
        }
        for index, option in enumerate(plan.workers)
    }
    auth = {"ssh_user": user_of(spec), "ssh_private_key": context.key_file}
    if spec.provider == "azure":
        auth["ssh_public_key"] = context.public_key_file
    environment = _environment(spec, plan=plan, region=context.region, regions=regions)
    return {
        "cluster_name": cluster.ray_name,
        "max_workers": plan.max_workers,
        # How many machines are requested at once, as a multiple of the existing ones.
        "upscaling_speed": float(max(1, plan.max_workers)),
        "idle_timeout_minutes": spec.idle_minutes,
        "provider": _provider(spec, cluster=cluster, context=context),
        "auth": auth,
        "head_node_type": HEAD,
        "available_node_types": {
            HEAD: {
                **_node(spec, plan.head, cluster=cluster, context=context, is_head=True),
                "min_workers": 0,
                "max_workers": 0,
            },
            **workers,
        },
        "file_mounts": {TOKEN_FILE: context.token_file, **install.file_mounts},
        "initialization_commands": [],
        "setup_commands": ["chmod 700 ~/.forge && chmod 600 ~/.forge/token", *install.setup_commands],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": _head_commands(environment, python=install.python),
        "worker_start_ray_commands": _worker_commands(environment, python=install.python),
    }


def shell_path(path: str) -> str:
    """Quote a path for a shell's command line; a leading `~/` still means the home folder."""
    return '"$HOME"/' + shlex.quote(path[2:]) if path.startswith("~/") else shlex.quote(path)


def _provider(spec: CloudSpec, *, cluster: ClusterIdentity, context: RegionContext) -> dict[str, Any]:
    match spec.provider:
        case "aws":
            return {
                "type": "aws",
                "region": context.region,
                "cache_stopped_nodes": False,
                "use_internal_ips": context.is_internal,
            }
        case "gcp":
            region, _, _ = context.region.rpartition("-")
            return {
                "type": "gcp",
                "region": region,
                "availability_zone": context.region,
                "project_id": spec.project,
                "cache_stopped_nodes": False,
            }
        case "azure":
            return {
                "type": "azure",
                "location": context.region,
                "resource_group": resource_group_of(spec),
                "subscription_id": spec.project,
                "availability_zone": "auto",
                "cache_stopped_nodes": False,
                "unique_id": azure_unique_id(cluster),
                "subnet_mask": azure_network(cluster),
                "tags": {**cluster.tags, **OWNER},
            }


def resource_group_of(spec: CloudSpec) -> str:
    """The name of the resource group on Azure."""
    return spec.resource_group or f"forge-{spec.name}"


def azure_unique_id(cluster: ClusterIdentity) -> str:
    """What Ray appends to the names of the cluster's resources on Azure."""
    return cluster.id[-4:]


def azure_network(cluster: ClusterIdentity) -> str:
    """The network of the cluster's machines on Azure, as a CIDR."""
    return f"10.{1 + int(cluster.id[-4:], 16) % 254}.0.0/16"


def _node(
    spec: CloudSpec, option: InstanceOption, *, cluster: ClusterIdentity, context: RegionContext, is_head: bool
) -> dict[str, Any]:
    match spec.provider:
        case "aws":
            config = _aws_node(spec, option, cluster=cluster, context=context, is_head=is_head)
        case "gcp":
            config = _gcp_node(spec, option, cluster=cluster, context=context, is_head=is_head)
        case "azure":
            config = _azure_node(spec, option, cluster=cluster)
    return {"resources": _resources(spec, option, is_head=is_head), "node_config": config}


def _resources(spec: CloudSpec, option: InstanceOption, *, is_head: bool) -> dict[str, int]:
    """Return the resources that Ray assumes; on AWS it queries CPUs and GPUs itself."""
    if is_head:
        return {"CPU": 0}
    if spec.provider == "aws":
        return {WORKER_RESOURCE: 1}
    size = size_of(option.machine_type, cloud=spec.provider)
    return {WORKER_RESOURCE: 1, "CPU": size.num_cpus} | ({"GPU": size.num_gpus} if size.num_gpus else {})


def _aws_node(
    spec: CloudSpec, option: InstanceOption, *, cluster: ClusterIdentity, context: RegionContext, is_head: bool
) -> dict[str, Any]:
    tags = [{"Key": key, "Value": value} for key, value in {**cluster.tags, **OWNER}.items()]
    config: dict[str, Any] = {
        "InstanceType": option.machine_type,
        "ImageId": context.image if _has_gpu(spec, option) else context.cpu_image,
        "KeyName": context.key_name,
        "SubnetIds": list(context.subnets),
        "SecurityGroupIds": [context.security_group],
        "IamInstanceProfile": {"Name": context.head_profile if is_head else context.worker_profile},
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/sda1",
                "Ebs": {"VolumeSize": _gib(spec.disk), "VolumeType": "gp3", "DeleteOnTermination": True},
            }
        ],
        # The metadata service hands out the instance profile's credentials: require sessions (IMDSv2).
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "InstanceInitiatedShutdownBehavior": "terminate",
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": [dict(tag) for tag in tags]} for kind in ("instance", "volume")
        ],
    }
    if option.is_spot:
        config["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
        # Not allowed for spot machines, which always terminate at shutdown.
        del config["InstanceInitiatedShutdownBehavior"]
    return config


def _gcp_node(
    spec: CloudSpec, option: InstanceOption, *, cluster: ClusterIdentity, context: RegionContext, is_head: bool
) -> dict[str, Any]:
    has_gpu = _has_gpu(spec, option)
    # Machines that are spot or have a GPU cannot be migrated to another host.
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE" if option.is_spot or has_gpu else "MIGRATE"}
    if option.is_spot:
        scheduling |= {
            "provisioningModel": "SPOT",
            "instanceTerminationAction": "DELETE",
            "automaticRestart": False,
        }
    config: dict[str, Any] = {
        "machineType": option.machine_type,
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
        "labels": {**cluster.tags, **OWNER},
        "tags": {"items": [network_tag(cluster)]},
        "metadata": {"items": [{"key": "ssh-keys", "value": f"{user_of(spec)}:{context.public_key}"}]},
        "scheduling": scheduling,
    }
    if not is_head:
        # Ray creates this account and gives it to the head; workers need it for the storage.
        account = f"ray-autoscaler-sa-v1@{spec.project}.iam.gserviceaccount.com"
        scopes = ["https://www.googleapis.com/auth/devstorage.read_write"]
        config["serviceAccounts"] = [{"email": account, "scopes": scopes}]
    return config


def network_tag(cluster: ClusterIdentity) -> str:
    """The tag by which GCP's firewall rules select the machines, and the beginning of the rules' names."""
    return f"forge-{cluster.ray_name}"


def _azure_node(spec: CloudSpec, option: InstanceOption, *, cluster: ClusterIdentity) -> dict[str, Any]:
    parameters: dict[str, Any] = {"vmSize": option.machine_type, "osDiskSize": _gib(spec.disk)}
    if spec.image:
        parameters["imageId"] = spec.image
    else:
        parameters |= {**_AZURE_IMAGES[_has_gpu(spec, option)], "imageVersion": "latest"}
    if option.is_spot:
        # A maximum price of -1 means the on-demand price: evicted only for lack of capacity, never for the price.
        parameters |= {"priority": "Spot", "evictionPolicy": "Delete", "billingProfile": {"maxPrice": -1}}
    return {"azure_arm_parameters": parameters, "tags": {**cluster.tags, **OWNER}}


def _has_gpu(spec: CloudSpec, option: InstanceOption) -> bool:
    known = machine_types(spec.provider).get(option.machine_type)
    return spec.gpu != "none" if known is None else known.num_gpus > 0


def _gib(size_bytes: int) -> int:
    return math.ceil(size_bytes / 2**30)


def _head_commands(environment: str, *, python: str) -> list[str]:
    start = (
        f"{_define_ray(python)}; ray start --head --port={_RAY_PORT} --object-manager-port=8076 "
        "--autoscaling-config=~/ray_bootstrap_config.yaml "
        f"--dashboard-host=127.0.0.1 --dashboard-port={DASHBOARD_PORT} --disable-usage-stats"
    )
    backoff = (
        f"setsid nohup {shell_path(python)} -P -m forge.cluster.cloud.capacity_backoff "
        "> ~/.forge/capacity-backoff.log 2>&1 < /dev/null &"
    )
    stop = f"{_define_ray(python)}; ray stop"
    return [stop, f"{environment}; ulimit -n 65536; {start}", f"{environment}; {backoff}"]


def _worker_commands(environment: str, *, python: str) -> list[str]:
    start = (
        f"{_define_ray(python)}; ray start --address=$RAY_HEAD_IP:{_RAY_PORT} --object-manager-port=8076 "
        "--disable-usage-stats"
    )
    return [
        f"{_define_ray(python)}; ray stop",
        f"{environment}; ulimit -n 65536; {start}",
    ]


def _environment(spec: CloudSpec, *, plan: InstancePlan, region: str, regions: ClusterRegions | None) -> str:
    """Shell commands that set the environment of Ray's processes, with the machine's own price.

    Ray has one start command for all workers, and passes it the node type.
    """
    values = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN_FILE,
        "FORGE_CLOUD": spec.provider,
        "AUTOSCALER_NODE_START_WAIT_S": str(math.ceil(spec.startup_timeout)),
        MIN_WORKERS_VARIABLE: str(plan.min_workers),
    }
    if spec.storage is not None:
        values["FORGE_STORAGE"] = spec.storage
    if spec.max_usd_per_hour is not None:
        values["FORGE_MAX_USD_PER_HOUR"] = f"{spec.max_usd_per_hour:g}"
    if regions is not None and regions.others:
        values[REGIONS_VARIABLE] = to_variable(regions)
    exports = " ".join(f"{name}={shell_path(value)}" for name, value in values.items())
    options = {HEAD: plan.head, **{option.node_type: option for option in plan.workers}}
    prices = "".join(
        f" {node_type}) export FORGE_USD_PER_HOUR={option.usd_per_hour:.6g}"
        f"{_on_demand(option, spec)}{_interruption(option, spec, region=region)};;"
        for node_type, option in options.items()
        if option.usd_per_hour is not None
    )
    return f'export {exports}; case "$RAY_NODE_TYPE_NAME" in{prices} *) ;; esac'


def _on_demand(option: InstanceOption, spec: CloudSpec) -> str:
    """The price of a spot machine on demand, which the cost of a run is compared with."""
    known = machine_types(spec.provider).get(option.machine_type) if option.is_spot else None
    if known is None or known.usd_per_hour is None:
        return ""
    return f" FORGE_ON_DEMAND_USD_PER_HOUR={known.usd_per_hour:.6g}"


def _interruption(option: InstanceOption, spec: CloudSpec, *, region: str) -> str:
    """How long a spot machine lasts on average; only AWS publishes it."""
    offers = offline_offers() if option.is_spot and spec.provider == "aws" else ()
    place = (option.machine_type, region)
    bands = (one.interruption for one in offers if (one.instance, one.region) == place)
    band = next((band for band in bands if band is not None), None)
    return "" if band is None else f" {MTBF_VARIABLE}={1 / rate_of_band(band).likely:.0f}"


def _define_ray(python: str) -> str:
    """Make `ray`, for whose absence Ray's launcher warns, run `forge.cluster.ray_cli`, which requires the token."""
    return f'ray() {{ {shell_path(python)} -P -m forge.cluster.ray_cli "$@"; }}'
