"""AWS requests that Ray's launcher does not make: regions, spot prices, instances, termination."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from forge.aws_client import ANY_REGION, aws_errors, client
from forge.cluster.base import ClusterNode
from forge.cluster.cloud.region_choice import MarketToday
from forge.cluster.cloud.state import CLUSTER_TAG, ID_TAG, ClusterIdentity
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError
from forge.pricing.catalog import machine_types, workers_of
from forge.pricing.fetch.aws import zone_spot_prices

_GONE_TIMEOUT_S = 300.0
_POLL_S = 1.0
_ALIVE = ("pending", "running", "stopping", "stopped")
"""States in which an instance costs something, if only its disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """An EC2 instance of the cluster."""

    id: str
    kind: str
    """`head` or `worker`; empty if Ray has not tagged it yet."""
    node_type: str
    machine_type: str
    state: str
    zone: str
    private_address: str | None
    public_address: str | None
    num_cpus: int
    num_gpus: int

    @property
    def address(self) -> str | None:
        """The address at which this machine reaches it."""
        return self.public_address or self.private_address


def market_today(spec: CloudSpec, *, region: str | None) -> MarketToday:
    """Ask for the account's regions with the file's types, their spot prices, and the region of its bucket.

    Args:
        region: the cluster's, if it has one: then only that is asked.

    Raises: ClusterError if AWS cannot be asked, or no region has the types.
    """
    names = workers_of(spec)
    regions = (region,) if region else find_regions(spec, names=names)
    spot = spot_prices(regions, names=names) if spec.spot else {one: dict[str, float]() for one in regions}
    return MarketToday(spot=spot, storage_region=bucket_region(spec.storage))


def bucket_region(url: str | None) -> str | None:
    """Return the region of a bucket on S3; None if the URL names none, or AWS does not say it."""
    place = urlsplit(url or "")
    if place.scheme != "s3":
        return None
    try:
        with aws_errors(ANY_REGION):
            found = client("s3", ANY_REGION).get_bucket_location(Bucket=place.netloc)["LocationConstraint"]
    except ClusterError:  # such as a bucket that does not exist yet
        return None
    # AWS's names of the two regions that were there before regions had names.
    old: dict[str | None, str] = {None: "us-east-1", "EU": "eu-west-1"}
    return old.get(found) or str(found)


def find_regions(spec: CloudSpec, *, names: Sequence[str]) -> tuple[str, ...]:
    """The regions to try: those of the file, or for `auto` all regions of the account with these instance types.

    Raises: ClusterError if AWS cannot be asked, or no region has them.
    """
    if spec.regions != ("auto",):
        return spec.regions
    with aws_errors(ANY_REGION):
        found = client("ec2", ANY_REGION).describe_regions()["Regions"]
    regions = sorted(region["RegionName"] for region in found)
    with ThreadPoolExecutor(max_workers=16) as pool:
        offers = list(pool.map(lambda region: _is_offered(region, names), regions))
    offering = tuple(region for region, is_offered in zip(regions, offers, strict=True) if is_offered)
    if not offering:
        raise ClusterError(f"no AWS region of this account has {', '.join(names)}")
    return offering


def spot_prices(regions: Sequence[str], *, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The current spot prices in USD per hour by region and instance type, of the cheapest zone.

    Raises: ClusterError if AWS cannot be asked.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(lambda region: _spot_prices(region, names), regions))
    return dict(zip(regions, found, strict=True))


def list_instances(cluster: ClusterIdentity, *, region: str) -> list[Instance]:
    """The cluster's instances that are not terminated, the head first.

    Raises: ClusterError if AWS cannot be asked.
    """
    found = [
        _instance(machine)
        for machine in _describe(region, tag_filters(cluster.tags))
        if cluster.owns(tags_of(machine))  # a filter's `*` and `?` match more than themselves
    ]
    return sorted(found, key=lambda instance: (instance.kind != "head", instance.id))


def require_no_other(cluster: ClusterIdentity, *, region: str) -> None:
    """Raises: ClusterError if the region has machines of another cluster with this name, by forge or by Ray."""
    for tag in (CLUSTER_TAG, "ray-cluster-name"):
        for machine in _describe(region, tag_filters({tag: cluster.name})):
            tags = tags_of(machine)
            if tags.get(tag) == cluster.name and not cluster.owns(tags):
                raise foreign(cluster, f"the machine {machine['InstanceId']} in {region}", tags=tags)


def foreign(cluster: ClusterIdentity, what: str, *, tags: Mapping[str, str]) -> ClusterError:
    """The error for something that has the cluster's name and is not its own."""
    owner = f"has the id {tags[ID_TAG]}" if ID_TAG in tags else "was not created by this version of forge"
    return ClusterError(
        f"{what} belongs to another cluster named '{cluster.name}': it {owner}, this one has {cluster.id}. Nothing "
        "of it was changed. Choose another name: in the file; or, if it is yours, stop that cluster where it was "
        "started from, or in AWS's console"
    )


def tag_filters(tags: Mapping[str, str]) -> list[dict[str, Any]]:
    """EC2's filters for all of these tags."""
    return [{"Name": f"tag:{key}", "Values": [value]} for key, value in tags.items()]


def tags_of(resource: Mapping[str, Any]) -> dict[str, str]:
    """The tags of one of AWS's resources."""
    return {tag["Key"]: tag["Value"] for tag in resource.get("Tags") or ()}


def _describe(region: str, filters: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the instances that are not terminated. Raises: ClusterError if AWS cannot be asked."""
    filters = [*filters, {"Name": "instance-state-name", "Values": list(_ALIVE)}]
    with aws_errors(region):
        pages = client("ec2", region).get_paginator("describe_instances").paginate(Filters=filters)
        return [
            machine
            for page in pages
            for reservation in page["Reservations"]
            for machine in reservation["Instances"]
        ]


def list_nodes(cluster: ClusterIdentity, *, region: str, prices: Mapping[str, float | None]) -> list[ClusterNode]:
    """The cluster's instances as nodes with their prices.

    Args:
        prices: USD per hour by Ray's node type.

    Raises: ClusterError if AWS cannot be asked.
    """
    return [
        ClusterNode(
            name=instance.private_address or instance.id,
            kind=instance.kind or "worker",
            state={"running": "alive", "pending": "starting"}.get(instance.state, "gone"),
            machine_type=instance.machine_type,
            num_cpus=float(instance.num_cpus),
            num_gpus=float(instance.num_gpus),
            usd_per_hour=prices.get(instance.node_type),
        )
        for instance in list_instances(cluster, region=region)
    ]


def terminate_all(cluster: ClusterIdentity, *, region: str) -> list[str]:
    """Terminate all instances of the cluster, the head first: it would rent new ones. Returns: ids of what is left.

    Raises: ClusterError if AWS cannot be asked, or refuses.
    """
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    was_empty = False
    while time.monotonic() < deadline:
        left = list_instances(cluster, region=region)
        if not left and was_empty:
            return []
        was_empty = not left  # a request of the dying head appears a little later
        if left:
            heads = [instance.id for instance in left if instance.kind == "head"]
            with aws_errors(region):
                client("ec2", region).terminate_instances(InstanceIds=heads or [instance.id for instance in left])
        time.sleep(_POLL_S)
    return [instance.id for instance in list_instances(cluster, region=region)]


def _is_offered(region: str, names: Sequence[str]) -> bool:
    with aws_errors(region):
        found = client("ec2", region).describe_instance_type_offerings(
            LocationType="region", Filters=[{"Name": "instance-type", "Values": list(names)}]
        )
    return bool(found["InstanceTypeOfferings"])


def _spot_prices(region: str, names: Sequence[str]) -> dict[str, float]:
    prices: dict[str, float] = {}
    for (name, _), price in zone_spot_prices(region, names=names).items():
        prices[name] = min(price.usd_per_hour, prices.get(name, price.usd_per_hour))
    return prices


def _instance(machine: Mapping[str, Any]) -> Instance:
    tags = tags_of(machine)
    cpus, known = machine.get("CpuOptions", {}), machine_types("aws").get(machine["InstanceType"])
    return Instance(
        id=machine["InstanceId"],
        kind=tags.get("ray-node-type", ""),
        node_type=tags.get("ray-user-node-type", ""),
        machine_type=machine["InstanceType"],
        state=machine["State"]["Name"],
        zone=machine["Placement"]["AvailabilityZone"],
        private_address=machine.get("PrivateIpAddress"),
        public_address=machine.get("PublicIpAddress"),
        num_cpus=known.num_cpus if known is not None else cpus.get("CoreCount", 0) * cpus.get("ThreadsPerCore", 0),
        num_gpus=known.num_gpus if known is not None else 0,
    )
