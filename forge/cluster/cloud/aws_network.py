"""Create and delete what a cluster needs in an AWS region: security group, key pair, roles.

Ray would open port 22 to the whole world, create a key in `~/.ssh`, and start workers without access to the bucket.
So forge creates a security group, a key and two roles for each cluster, all with its tag.
"""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from forge.cluster.cloud.aws import ANY_REGION, aws_errors, client, ignore_codes
from forge.cluster.cloud.ray_config import CLUSTER_TAG, OWNER
from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_GPU_IMAGE = ("amazon", "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04)*")
_CPU_IMAGE = ("099720109477", "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-*")
"""Owner and name. Source: AWS Deep Learning AMIs documentation; Ubuntu on AWS documentation, of Canonical."""
_READY_TIMEOUT_S = 90.0
"""A new role takes about ten seconds to be usable everywhere."""
_GONE_TIMEOUT_S = 300.0
_POLL_S = 1.0
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


def prepare_network(spec: CloudSpec, *, region: str, public_key: str, allow_from: str) -> Network:
    """Create what the machines need in a region, or update what exists.

    Raises: ClusterError if AWS refuses.
    """
    with aws_errors(region):
        ec2 = client("ec2", region)
        vpc = _default_vpc(ec2, region)
        group = _security_group(ec2, spec.name, vpc=vpc.id, allow_from=allow_from)
        key_name = _key_pair(ec2, spec.name, public_key)
        image = spec.image or _image(ec2, region, *_CPU_IMAGE if spec.gpu == "none" else _GPU_IMAGE)
        cpu_image = spec.image or _image(ec2, region, *_CPU_IMAGE)
        head, worker = _profiles(spec)
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


def remove_network(name: str, *, region: str) -> list[str]:
    """Delete what `prepare_network` created in a region, after its machines.

    Returns: what is left, one line each.
    """
    left = []
    with aws_errors(region):
        ec2 = client("ec2", region)
        for pair in ec2.describe_key_pairs(Filters=_tagged(name))["KeyPairs"]:
            ec2.delete_key_pair(KeyName=pair["KeyName"])
        for group in ec2.describe_security_groups(Filters=_tagged(name))["SecurityGroups"]:
            if not _delete_group(ec2, group["GroupId"]):
                left.append(f"security group {group['GroupId']} in {region}, free of charge, still in use")
    return left


def remove_profiles(name: str) -> None:
    """Delete the roles that `prepare_network` created. Raises: ClusterError if AWS refuses."""
    with aws_errors(ANY_REGION):
        iam = client("iam", ANY_REGION)
        for role in (f"forge-{name}-head", f"forge-{name}-worker"):
            with ignore_codes("NoSuchEntity"):
                iam.remove_role_from_instance_profile(InstanceProfileName=role, RoleName=role)
            with ignore_codes("NoSuchEntity"):
                iam.delete_instance_profile(InstanceProfileName=role)
            with ignore_codes("NoSuchEntity"):
                iam.delete_role_policy(RoleName=role, PolicyName="forge")
            with ignore_codes("NoSuchEntity"):
                iam.delete_role(RoleName=role)


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


def _security_group(ec2: Any, name: str, *, vpc: str, allow_from: str) -> str:
    """Create the security group: open to its own machines, and port 22 to `allow_from`. Returns: its id."""
    group_name = f"forge-{name}"
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [group_name]}]
    found = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    if found:
        group, current = found[0]["GroupId"], found[0]["IpPermissions"]
    else:
        made = ec2.create_security_group(
            GroupName=group_name,
            Description=f"Machines of the forge cluster {name}",
            VpcId=vpc,
            TagSpecifications=[_tags("security-group", name)],
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


def _key_pair(ec2: Any, name: str, public_key: str) -> str:
    key_name = f"forge-{name}"
    ec2.delete_key_pair(KeyName=key_name)  # the key may have changed; AWS ignores a missing one
    ec2.import_key_pair(
        KeyName=key_name,
        PublicKeyMaterial=public_key.encode(),
        TagSpecifications=[_tags("key-pair", name)],
    )
    return key_name


def _image(ec2: Any, region: str, owner: str, name: str) -> str:
    filters = [{"Name": "name", "Values": [name]}, {"Name": "architecture", "Values": ["x86_64"]}]
    images = ec2.describe_images(Owners=[owner], Filters=filters)["Images"]
    if not images:
        raise ClusterError(f"{region} has no image named '{name}'; name one in the file: image: ami-...")
    return str(max(images, key=lambda image: image["CreationDate"])["ImageId"])


def _profiles(spec: CloudSpec) -> tuple[str, str]:
    """Create the instance profiles of the head and of the workers."""
    iam = client("iam", ANY_REGION)
    names = f"forge-{spec.name}-head", f"forge-{spec.name}-worker"
    head_role, worker_role = (_role(iam, role, cluster=spec.name) for role in names)
    storage = storage_rights(spec.storage)
    _allow(iam, names[0], head_rights(spec.name, roles=(head_role, worker_role)) + storage)
    _allow(iam, names[1], storage)
    return names


def _role(iam: Any, name: str, *, cluster: str) -> str:
    """Create a role and its instance profile of the same name. Returns: the role's ARN."""
    trust = _policy(
        [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]
    )
    tags = [{"Key": key, "Value": value} for key, value in {CLUSTER_TAG: cluster, **OWNER}.items()]
    with ignore_codes("EntityAlreadyExists"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust, Tags=tags)
    with ignore_codes("EntityAlreadyExists"):
        iam.create_instance_profile(InstanceProfileName=name, Tags=tags)
    with ignore_codes("LimitExceeded"):  # a profile holds one role, and has this one already
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return str(iam.get_role(RoleName=name)["Role"]["Arn"])


def _allow(iam: Any, role: str, rights: list[dict[str, Any]]) -> None:
    if rights:
        iam.put_role_policy(RoleName=role, PolicyName="forge", PolicyDocument=_policy(rights))


def head_rights(cluster: str, *, roles: Sequence[str]) -> list[dict[str, Any]]:
    """The head's rights: rent machines, and terminate those of its own cluster."""
    own = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster}}
    return [
        {"Effect": "Allow", "Action": ["ec2:Describe*", "ec2:RunInstances", "ec2:CreateTags"], "Resource": "*"},
        {"Effect": "Allow", "Action": ["ec2:TerminateInstances"], "Resource": "*", "Condition": own},
        {"Effect": "Allow", "Action": ["iam:PassRole"], "Resource": list(roles)},
        {"Effect": "Allow", "Action": ["iam:CreateServiceLinkedRole"], "Resource": _SPOT_ROLE},
    ]


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


def _tagged(name: str) -> list[dict[str, Any]]:
    return [{"Name": f"tag:{CLUSTER_TAG}", "Values": [name]}]


def _tags(kind: str, name: str) -> dict[str, Any]:
    tags = [{"Key": key, "Value": value} for key, value in {CLUSTER_TAG: name, **OWNER}.items()]
    return {"ResourceType": kind, "Tags": tags}
