"""Create and delete what a cluster needs in an AWS region: security group, key pair, roles.

Ray would open port 22 to the whole world, create a key in `~/.ssh`, and start workers without access to the bucket.
So forge creates a security group, a key and two roles for each cluster, all with its name and id as tags. What has
the name without the id belongs to another owner: it is neither changed nor deleted, and `up` is refused.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from forge.aws_client import ANY_REGION, aws_errors, client, ignore_codes
from forge.cluster.cloud.aws import foreign, require_no_other, tag_filters, tags_of
from forge.cluster.cloud.state import CLUSTER_TAG, ID_TAG, OWNER, ClusterIdentity
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_GPU_IMAGE = ("amazon", "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04)*")
_CPU_IMAGE = ("099720109477", "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*")
"""Owner and name. Source: AWS Deep Learning AMIs documentation; Ubuntu on AWS documentation, of Canonical."""
_READY_TIMEOUT_S = 90.0
"""A new role takes about ten seconds to be usable everywhere."""
_GONE_TIMEOUT_S = 300.0
_POLL_S = 1.0
_USED_BY_MACHINES = (
    *("capacity-reservation", "key-pair", "network-interface", "placement-group", "security-group"),
    *("spot-instances-request", "subnet"),
)
"""Kinds of resources that a request for machines refers to, or creates without a tag."""
_SPOT_ROLE = "arn:aws:iam::*:role/aws-service-role/spot.amazonaws.com/*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """The resources of a cluster in one region; fields as in `RegionContext`."""

    image: str
    cpu_image: str
    key_name: str
    subnets: tuple[str, ...]
    security_group: str
    head_profile: str
    worker_profile: str
    is_internal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vpc:
    id: str
    subnets: tuple[str, ...]
    is_internal: bool
    """Whether machines in the subnets have only private addresses."""


def prepare_network(
    spec: CloudSpec, *, cluster: ClusterIdentity, region: str, public_key: str, allow_from: str
) -> Network:
    """Create what the machines need in a region, or update what exists.

    Raises: ClusterError if AWS refuses, or something of this name belongs to another cluster; then nothing is
        changed.
    """
    require_own(cluster, region=region)
    with aws_errors(region):
        ec2 = client("ec2", region)
        vpc = _default_vpc(ec2, region)
        group = _security_group(ec2, cluster, vpc=vpc.id, allow_from=allow_from)
        key_name = _key_pair(ec2, cluster, public_key)
        image = spec.image or _image(ec2, region, *_CPU_IMAGE if spec.gpu == "none" else _GPU_IMAGE)
        cpu_image = spec.image or _image(ec2, region, *_CPU_IMAGE)
        head, worker = _profiles(spec, cluster)
        _await_profile(ec2, image=cpu_image, subnet=vpc.subnets[0], profile=head)
    return Network(
        image=image,
        cpu_image=cpu_image,
        key_name=key_name,
        subnets=vpc.subnets,
        security_group=group,
        head_profile=head,
        worker_profile=worker,
        is_internal=vpc.is_internal,
    )


def remove_network(cluster: ClusterIdentity, *, region: str) -> list[str]:
    """Delete what `prepare_network` created in a region, after its machines.

    Returns: what is left, one line each.
    """
    left = []
    with aws_errors(region):
        ec2 = client("ec2", region)
        for pair in ec2.describe_key_pairs(Filters=tag_filters(cluster.tags))["KeyPairs"]:
            if cluster.owns(tags_of(pair)):
                ec2.delete_key_pair(KeyName=pair["KeyName"])
        for group in ec2.describe_security_groups(Filters=tag_filters(cluster.tags))["SecurityGroups"]:
            if cluster.owns(tags_of(group)) and not _delete_group(ec2, group["GroupId"]):
                left.append(f"security group {group['GroupId']} in {region}, free of charge, still in use")
    return left


def remove_profiles(cluster: ClusterIdentity) -> None:
    """Delete the roles that `prepare_network` created. Raises: ClusterError if AWS refuses."""
    with aws_errors(ANY_REGION):
        iam = client("iam", ANY_REGION)
        for name in _role_names(cluster):
            role, profile = _find_role(iam, name), _find_profile(iam, name)
            if profile is not None and cluster.owns(tags_of(profile)):
                for inside in profile["Roles"]:
                    iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=inside["RoleName"])
                iam.delete_instance_profile(InstanceProfileName=name)
            if role is not None and cluster.owns(tags_of(role)):
                with ignore_codes("NoSuchEntity"):
                    iam.delete_role_policy(RoleName=name, PolicyName="forge")
                with ignore_codes("NoSuchEntity"):
                    iam.delete_role(RoleName=name)


def require_own(cluster: ClusterIdentity, *, region: str) -> None:
    """Raises: ClusterError if a machine, group, key, role or profile of the cluster's name is not its own."""
    require_no_other(cluster, region=region)
    named = _group_name(cluster)
    with aws_errors(region):
        ec2, iam = client("ec2", region), client("iam", ANY_REGION)
        group = _find_group(ec2, named, vpc=_default_vpc(ec2, region).id)
        found = [
            (f"the security group {named} in {region}", group),
            (f"the key pair {named} in {region}", _find_key_pair(ec2, named)),
        ]
        for name in _role_names(cluster):
            found.append((f"the role {name}", _find_role(iam, name)))
            found.append((f"the instance profile {name}", _find_profile(iam, name)))
    for what, resource in found:
        if resource is not None and not cluster.owns(tags_of(resource)):
            raise foreign(cluster, what, tags=tags_of(resource))


def _group_name(cluster: ClusterIdentity) -> str:
    return f"forge-{cluster.name}"


def _role_names(cluster: ClusterIdentity) -> tuple[str, str]:
    return f"forge-{cluster.name}-head", f"forge-{cluster.name}-worker"


def _find_group(ec2: Any, name: str, *, vpc: str) -> dict[str, Any] | None:
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [name]}]
    groups = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    return next((group for group in groups if group["GroupName"] == name), None)


def _find_key_pair(ec2: Any, name: str) -> dict[str, Any] | None:
    pairs = ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [name]}])["KeyPairs"]
    return next((pair for pair in pairs if pair["KeyName"] == name), None)


def _find_role(iam: Any, name: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = []
    with ignore_codes("NoSuchEntity"):
        found.append(iam.get_role(RoleName=name)["Role"])
    return found[0] if found else None


def _find_profile(iam: Any, name: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = []
    with ignore_codes("NoSuchEntity"):
        found.append(iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"])
    return found[0] if found else None


def _default_vpc(ec2: Any, region: str) -> _Vpc:
    """Find the default VPC, and its public subnets or else all of them. Raises: ClusterError if it has none."""
    vpcs = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not vpcs:
        raise ClusterError(
            f"the region {region} has no default VPC; make one: aws ec2 create-default-vpc --region {region}"
        )
    vpc = vpcs[0]["VpcId"]
    subnets = ec2.describe_subnets(
        Filters=[{"Name": "vpc-id", "Values": [vpc]}, {"Name": "state", "Values": ["available"]}]
    )["Subnets"]
    public = [subnet for subnet in subnets if subnet["MapPublicIpOnLaunch"]]
    usable = sorted(public or subnets, key=lambda subnet: subnet["AvailabilityZone"])
    if not usable:
        raise ClusterError(f"the default VPC of {region} has no subnets; make one: aws ec2 create-default-subnet")
    return _Vpc(id=vpc, subnets=tuple(subnet["SubnetId"] for subnet in usable), is_internal=not public)


def _security_group(ec2: Any, cluster: ClusterIdentity, *, vpc: str, allow_from: str) -> str:
    """Create the security group: open to its own machines, and port 22 to `allow_from`. Returns: its id."""
    found = _find_group(ec2, _group_name(cluster), vpc=vpc)
    if found is not None:
        group, current = found["GroupId"], found["IpPermissions"]
    else:
        made = ec2.create_security_group(
            GroupName=_group_name(cluster),
            Description=f"Machines of the forge cluster {cluster.name}",
            VpcId=vpc,
            TagSpecifications=[_tags("security-group", cluster)],
        )
        group, current = made["GroupId"], []
    if current:  # `allow_from` may have changed
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=current)
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=ingress(group, allow_from=allow_from))
    return str(group)


def ingress(group: str, *, allow_from: str) -> list[dict[str, Any]]:
    """The security group's rules: everything from its own machines, and port 22 from one network."""
    if ipaddress.ip_network(allow_from).version == 6:
        ranges: dict[str, Any] = {"Ipv6Ranges": [{"CidrIpv6": allow_from}]}
    else:
        ranges = {"IpRanges": [{"CidrIp": allow_from}]}
    return [
        {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]},
        {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, **ranges},
    ]


def _key_pair(ec2: Any, cluster: ClusterIdentity, public_key: str) -> str:
    key_name = _group_name(cluster)
    ec2.delete_key_pair(KeyName=key_name)  # the key may have changed; AWS ignores a missing one
    ec2.import_key_pair(
        KeyName=key_name,
        PublicKeyMaterial=public_key.encode(),
        TagSpecifications=[_tags("key-pair", cluster)],
    )
    return key_name


def _image(ec2: Any, region: str, owner: str, name: str) -> str:
    filters = [{"Name": "name", "Values": [name]}, {"Name": "architecture", "Values": ["x86_64"]}]
    images = ec2.describe_images(Owners=[owner], Filters=filters)["Images"]
    if not images:
        raise ClusterError(f"{region} has no image named '{name}'; name one in the file: image: ami-...")
    return str(max(images, key=lambda image: image["CreationDate"])["ImageId"])


def _profiles(spec: CloudSpec, cluster: ClusterIdentity) -> tuple[str, str]:
    """Create the instance profiles of the head and of the workers."""
    iam = client("iam", ANY_REGION)
    names = _role_names(cluster)
    head_role, worker_role = (_role(iam, role, cluster=cluster) for role in names)
    storage = storage_rights(spec.storage)
    _allow(iam, names[0], head_rights(cluster, roles=(head_role, worker_role)) + storage)
    _allow(iam, names[1], storage)
    return names


def _role(iam: Any, name: str, *, cluster: ClusterIdentity) -> str:
    """Create a role and its instance profile of the same name. Returns: the role's ARN."""
    trust = _policy(
        [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]
    )
    tags = _tag_list(cluster)
    with ignore_codes("EntityAlreadyExists"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust, Tags=tags)
    with ignore_codes("EntityAlreadyExists"):
        iam.create_instance_profile(InstanceProfileName=name, Tags=tags)
    with ignore_codes("LimitExceeded"):  # a profile holds one role, and has this one already
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    role = iam.get_role(RoleName=name)["Role"]
    if not cluster.owns(tags_of(role)):  # made since it was looked for
        raise foreign(cluster, f"the role {name}", tags=tags_of(role))
    return str(role["Arn"])


def _allow(iam: Any, role: str, rights: list[dict[str, Any]]) -> None:
    if rights:
        iam.put_role_policy(RoleName=role, PolicyName="forge", PolicyDocument=_policy(rights))


def head_rights(cluster: ClusterIdentity, *, roles: Sequence[str]) -> list[dict[str, Any]]:
    """The head's rights: rent machines with the cluster's id as a tag, and tag and terminate those that have it.

    A machine of another owner has no such tag, and cannot be given one: tags are only set while a machine is
    created, or on what has the id already; and the id itself is never changed.

    Source: EC2 user guide, "Grant permission to tag resources on creation", "Control access using tags"; service
    authorization reference, "Actions, resources, and condition keys for Amazon EC2".
    """
    is_own = {"StringEquals": {f"aws:ResourceTag/{ID_TAG}": cluster.id}}
    gets_id = {f"aws:RequestTag/{ID_TAG}": cluster.id}
    is_rented = {"StringEquals": gets_id | {"ec2:CreateAction": "RunInstances"}}
    keeps_id = {"ForAllValues:StringNotEquals": {"aws:TagKeys": [ID_TAG, CLUSTER_TAG]}}
    to_ec2 = {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
    rented = ["arn:*:ec2:*:*:instance/*", "arn:*:ec2:*:*:volume/*"]
    used = [f"arn:*:ec2:*:*:{kind}/*" for kind in _USED_BY_MACHINES]
    used += ["arn:*:ec2:*::image/*", "arn:*:ec2:*::snapshot/*"]
    return [
        _right("ec2:Describe*", "*"),
        _right("ec2:RunInstances", rented, condition={"StringEquals": gets_id}),
        _right("ec2:RunInstances", used),
        _right("ec2:CreateTags", rented, condition=is_rented),
        _right("ec2:CreateTags", rented, condition=is_own | keeps_id),
        _right("ec2:TerminateInstances", rented[0], condition=is_own),
        _right("iam:PassRole", list(roles), condition=to_ec2),
        _right("iam:CreateServiceLinkedRole", _SPOT_ROLE),
    ]


def _right(
    action: str, resource: str | list[str], *, condition: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    right: dict[str, Any] = {"Effect": "Allow", "Action": [action], "Resource": resource}
    return right if condition is None else right | {"Condition": condition}


def storage_rights(storage: str | None) -> list[dict[str, Any]]:
    """Every machine's rights to the bucket of `storage`; none if it is not on S3."""
    url = urlsplit(storage or "")
    if url.scheme != "s3":
        return []
    bucket, path = f"arn:aws:s3:::{url.netloc}", url.path.strip("/")
    objects = f"{bucket}/{path}/*" if path else f"{bucket}/*"
    actions = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    return [
        {"Effect": "Allow", "Action": actions, "Resource": objects},
        {"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetBucketLocation"], "Resource": bucket},
    ]


def _policy(statements: list[dict[str, Any]]) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def _await_profile(ec2: Any, *, image: str, subnet: str, profile: str) -> None:
    """Wait until dry runs of a launch accept a new instance profile."""
    import botocore.exceptions

    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            ec2.run_instances(
                DryRun=True,
                ImageId=image,
                InstanceType="m5.large",
                SubnetId=subnet,
                IamInstanceProfile={"Name": profile},
                MinCount=1,
                MaxCount=1,
            )
        except botocore.exceptions.ClientError as error:
            if "nstance Profile" not in error.response["Error"].get("Message", "") or time.monotonic() > deadline:
                return  # usable, or another error, which the launcher will report
        time.sleep(_POLL_S)


def _delete_group(ec2: Any, group: str) -> bool:
    """Delete a security group once no machine uses it. Returns: whether it is gone."""
    import botocore.exceptions

    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while True:
        try:
            ec2.delete_security_group(GroupId=group)
            return True
        except botocore.exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "InvalidGroup.NotFound":
                return True
            if code != "DependencyViolation":
                raise
            if time.monotonic() > deadline:
                return False
        time.sleep(_POLL_S)


def _tags(kind: str, cluster: ClusterIdentity) -> dict[str, Any]:
    return {"ResourceType": kind, "Tags": _tag_list(cluster)}


def _tag_list(cluster: ClusterIdentity) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in {**cluster.tags, **OWNER}.items()]
