"""The cluster file: which machines exist or may be rented, and what they may cost.

`provider` decides which of the sections below the whole file must match. Defaults suit a small team; a key
without a sensible default is required.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from forge.config import cluster_names as names
from forge.config.secret import SECRET_PROBLEM, has_credential
from forge.config.section import Bytes, Duration, FieldError, RangeFromZero, Section, Strings
from forge.units import Range

_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_WIDEST = {4: 8, 6: 16}
"""The shortest prefix of `allow_from` by IP version: the largest network that one organisation has."""


def _read_mapping(value: object) -> object:
    return {} if value is None else value


def _is_user(value: str) -> str:
    if not names.USER.fullmatch(value):
        raise ValueError("is not a valid user name")
    return value


def _is_gpu(value: str) -> str:
    if not names.GPU.fullmatch(value):
        raise ValueError("is not the name of a GPU, such as A100-80GB")
    return value


def _is_count(value: Range) -> Range:
    if value.high > names.MAX_MACHINES:
        raise ValueError(f"must be at most {names.MAX_MACHINES} machines")
    return value


_User = Annotated[str, AfterValidator(_is_user)]
_Gpu = Annotated[str, AfterValidator(_is_gpu)]
_LocalPath = Annotated[str, Field(min_length=1, max_length=4000), AfterValidator(names.local_path)]
_RemotePath = Annotated[str, Field(pattern=names.REMOTE_PATH)]
_Workers = Annotated[RangeFromZero, AfterValidator(_is_count)]
_Price = Annotated[float, Field(ge=0, le=names.MAX_USD_PER_HOUR)]
_RentedPrice = Annotated[float, Field(gt=0, le=names.MAX_USD_PER_HOUR)]
_PriceLimit = Annotated[float, Field(gt=0, le=names.MAX_USD_PER_HOUR)]
_IdleMinutes = Annotated[float, Field(gt=0, le=10_000)]


class ClusterSection(Section):
    """Keys of every cluster file."""

    name: str = Field(max_length=40, json_schema_extra={"pattern": _NAME})
    """Lower-case letters, digits and dashes: the argument of `--cluster`, and the tag of the machines."""

    storage: str | None = Field(None, min_length=1, max_length=2000)
    """Where runs on this cluster save their checkpoints unless the job sets `checkpoint.to`: a URL such as
    `s3://bucket/runs`, or a folder that all machines share. A single machine needs none."""

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, value: Any) -> Any:
        for text in names.strings_in(value):
            if not text.isprintable():
                raise ValueError("must be one line of printable characters")
        return value

    @field_validator("storage")
    @classmethod
    def _has_no_credential(cls, value: str | None) -> str | None:
        if value is not None and "://" in value and has_credential(value):
            raise ValueError(f"{SECRET_PROBLEM}; write the URL without its user, password and signature")
        return value

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if not re.fullmatch(_NAME[1:-1], value):
            raise ValueError("must be lower-case letters, digits and dashes, such as 'aws-spot'")
        return value


class LocalSpec(ClusterSection):
    """The local machine."""

    provider: Literal["local"]
    """The local machine."""

    nodes: int = Field(1, ge=1, le=64)
    """Simulated machines (Ray nodes) on this one; they share its cores."""

    port: int | None = Field(None, ge=1, le=65535)
    """Port of Ray's head; by default a free one."""


class SshSpec(ClusterSection):
    """Existing machines, reached by OpenSSH; the client's configuration (`~/.ssh/config`) applies."""

    provider: Literal["ssh"]
    """Existing machines."""

    machines: Strings
    """Host names or addresses under which this machine and the machines themselves reach each other. The first one
    is the head."""

    min_machines: int | None = Field(None, ge=1)
    """`forge cluster up` succeeds if at least this many machines are ready, the head included; by default all."""

    user: _User | None = None
    """Login name; by default OpenSSH's choice."""

    identity_file: _LocalPath | None = None
    """File of the private key; by default OpenSSH's choice."""

    port: int = Field(22, ge=1, le=65535)
    """Port of sshd."""

    python: _RemotePath | None = None
    """Python executable, on every machine, of an environment that contains forge; then nothing is installed."""

    folder: _RemotePath = "~/.forge"
    """Folder on each machine for forge's environments, logs and runs."""

    ray_port: int = Field(6379, ge=1024, le=65535)
    """Port of Ray's head."""

    wheels: _LocalPath | None = None
    """Folder on this machine with wheels to install from, if the machines cannot reach a package index."""

    clouds: Strings = ()
    """Clouds whose preemption notices are watched, `aws`, `gcp` or `azure`, if the machines are rented there."""

    usd_per_hour: _Price | None = None
    """Price of one machine in USD per hour; required to show and limit the cost."""

    max_usd_per_hour: _PriceLimit | None = None
    """Limit in USD per hour for all machines together; above it, runs write a checkpoint and stop."""

    @field_validator("machines")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one machine")
        if len(value) > names.MAX_MACHINES:
            raise ValueError(f"must be at most {names.MAX_MACHINES} machines")
        for host in value:
            if not names.HOST.fullmatch(host):
                raise ValueError(f"must be host names or addresses; {host!r} is neither")
        if len(set(value)) < len(value):
            raise ValueError("contains a machine twice")
        return value

    @field_validator("clouds")
    @classmethod
    def _are_clouds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if set(value) - {"aws", "gcp", "azure"}:
            raise ValueError("must be 'aws', 'gcp' or 'azure', or a list of them")
        return value

    @model_validator(mode="after")
    def _minimum_is_possible(self) -> SshSpec:
        if self.min_machines is not None and self.min_machines > len(self.machines):
            raise FieldError("min_machines", f"is more than the {len(self.machines)} in 'machines'")
        return self


class CloudSpec(ClusterSection):
    """Rented machines: one on-demand head, and spot workers that are started and preempted."""

    provider: Literal["aws", "gcp", "azure"]
    """The cloud. Credentials are read as by its command-line tools, from the environment or their files."""

    regions: Strings = ("auto",)
    """Regions to try (zones on gcp), cheapest first on aws, in the given order elsewhere. `auto`: where training is
    cheapest, of the account's regions on aws and of those with a known price elsewhere; the choice is kept for
    later starts of the cluster."""

    storage_region: str | None = Field(None, max_length=60, pattern=r"^[a-z][a-z0-9-]*$")
    """Region of the bucket in `storage`, so that `regions: auto` counts the traffic to it; asked on aws by
    default."""

    gpu: _Gpu = "none"
    """Name of the workers' GPU such as `A100-80GB`, or `none`."""

    instance_types: Strings = ()
    """Machine types that workers may have; by default all of forge's catalogue with that GPU."""

    head: str | None = None
    """Machine type of the head; by default one with 4 CPUs and 16 GiB, enough for supervisor and recorder."""

    workers: _Workers = Range(low=0, high=4)
    """Number of machines besides the head, such as `0..64`; Ray's autoscaler rents what runs need within this range
    (`min_workers`, `max_workers`)."""

    spot: bool = True
    """Workers are spot machines: often a third of the price, but preempted with at most two minutes' notice."""

    on_demand_fallback: bool = False
    """Rent workers on demand, at full price, when no spot machine is available."""

    max_usd_per_hour: _PriceLimit | None = None
    """Limit in USD per hour for all machines together: no more machines are requested than it allows, and runs
    write a checkpoint and stop when the running machines cost more."""

    usd_per_hour: Annotated[
        dict[str, _RentedPrice], BeforeValidator(_read_mapping), WithJsonSchema({"type": "object"})
    ] = Field(default_factory=dict)
    """Prices by machine type in USD per hour, above 0; they override the catalogue and the cloud's own. Leave out a
    type whose price is unknown: a price of 0 would make it the cheapest everywhere."""

    idle_minutes: _IdleMinutes = 5.0
    """A worker that was idle for this many minutes is released. Ray's `idle_timeout_minutes`."""

    image: str | None = None
    """Machine image; by default the cloud's deep learning image."""

    disk: Annotated[Bytes, Field(ge=10**10, le=64 * 2**40)] = 200 * 10**9
    """Disk size of each machine."""

    user: _User | None = None
    """Login name; by default the image's."""

    identity_file: _LocalPath | None = None
    """File of the private key; by default a key is created for the cluster."""

    allow_from: str = Field("auto", min_length=1)
    """Addresses outside the cluster that may reach its machines, by ssh only: a CIDR such as `203.0.113.4/32`;
    `auto`: the public address of this machine."""

    python: _RemotePath | None = None
    """Python executable of an environment in the image that contains forge; then nothing is installed."""

    wheels: _LocalPath | None = None
    """Folder on this machine with wheels to install from, if the machines cannot reach a package index."""

    project: str | None = None
    """GCP project, or Azure subscription."""

    resource_group: str | None = None
    """Azure resource group of this cluster alone, created and deleted with it; by default `forge-<name>`."""

    startup_timeout: Annotated[Duration, Field(ge=1, le=86400)] = 900.0
    """Time limit from the request of a machine until Ray runs on it."""

    @field_validator("allow_from")
    @classmethod
    def _is_cidr(cls, value: str) -> str:
        if value != "auto":
            try:
                network = ipaddress.ip_network(value)
            except ValueError:
                raise ValueError("must be 'auto' or a CIDR such as 203.0.113.4/32") from None
            if network.prefixlen == 0:
                raise ValueError("must not allow the whole internet")
            if network.prefixlen < _WIDEST[network.version]:
                raise ValueError(f"must not be wider than /{_WIDEST[network.version]}")
            return str(network)
        return value

    @field_validator("resource_group")
    @classmethod
    def _is_resource_group(cls, value: str | None) -> str | None:
        if value is not None and not names.RESOURCE_GROUP.fullmatch(value):
            raise ValueError("is not a resource group's name: letters, digits, '_', '.', '(', ')' and '-'")
        return value

    @model_validator(mode="after")
    def _fits_the_provider(self) -> CloudSpec:
        if self.provider in ("gcp", "azure") and self.project is None:
            raise FieldError("project", "is missing: give the GCP project or the Azure subscription")
        if self.provider == "aws" and self.project is not None:
            raise FieldError("project", "is only for gcp and azure")
        if self.provider != "azure" and self.resource_group is not None:
            raise FieldError("resource_group", "is only for azure")
        if self.storage_region is not None and "://" not in (self.storage or ""):
            raise FieldError("storage_region", "is the region of a bucket: give its URL as storage")
        self._require_names()
        return self

    def _require_names(self) -> None:
        """Raises: FieldError for a name that this cloud does not have."""
        own, a_type = names.CLOUDS[self.provider], f"a machine type of {self.provider}"
        a_region = "a zone of gcp" if self.provider == "gcp" else f"a region of {self.provider}"
        checks = [
            ("regions", () if self.regions == ("auto",) else self.regions, own.region, a_region),
            ("instance_types", self.instance_types, own.machine_type, a_type),
            ("head", (self.head,), own.machine_type, a_type),
            ("usd_per_hour", tuple(self.usd_per_hour), own.machine_type, a_type),
            ("image", (self.image,), own.image, f"an image of {self.provider}"),
            (
                "project",
                (self.project,),
                own.project,
                "the project" if self.provider == "gcp" else "a subscription",
            ),
        ]
        if not self.regions:
            raise FieldError("regions", "must name at least one region, or auto")
        for key, values, pattern, what in checks:
            given = tuple(value for value in values if value is not None)
            problem = names.require_names(given, pattern, what=what) if pattern is not None else None
            if problem:
                raise FieldError(key, problem)


class KubernetesSpec(ClusterSection):
    """Pods on Kubernetes, started by the KubeRay operator."""

    provider: Literal["kubernetes"]
    """Kubernetes with the KubeRay operator."""

    namespace: str = Field("default", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    """Namespace of the pods."""

    context: str | None = Field(None, pattern=names.K8S_CONTEXT)
    """kubectl context; by default the current one."""

    image: str = Field(pattern=names.K8S_IMAGE)
    """Image of the pods; it must contain forge."""

    gpu: _Gpu = "none"
    """Name of the GPU such as `A100-80GB`, or `none`."""

    gpus_per_worker: int = Field(1, ge=1, le=16)
    """GPUs of one worker pod, if `gpu` is not `none`."""

    cpus_per_worker: int = Field(8, ge=1, le=4096)
    """CPUs of one worker pod; request and limit."""

    memory_per_worker: Annotated[Bytes, Field(ge=2**30, le=64 * 2**40)] = 32 * 2**30
    """Memory of one worker pod, snapshots of the training state included; request and limit."""

    workers: _Workers = Range(low=0, high=4)
    """Number of worker pods, such as `0..64`; Ray's autoscaler starts what runs need within this range (KubeRay's
    `minReplicas`, `maxReplicas`)."""

    spot: bool = True
    """Schedule workers on spot machines."""

    node_selector: Annotated[dict[str, str], BeforeValidator(_read_mapping), WithJsonSchema({"type": "object"})] = (
        Field(default_factory=dict)
    )
    """Node labels for workers; by default those with which `cloud` marks spot machines."""

    cloud: Literal["aws", "gcp", "azure"] | None = None
    """The cloud of the machines: its spot label is selected, its taint tolerated, its notices watched."""

    idle_minutes: _IdleMinutes = 5.0
    """A worker pod that was idle for this many minutes is removed. Ray's `idleTimeoutSeconds`."""

    usd_per_hour: _Price | None = None
    """Price of one worker in USD per hour; required to show and limit the cost."""

    max_usd_per_hour: _PriceLimit | None = None
    """Limit in USD per hour for all workers together; above it, runs write a checkpoint and stop."""

    @field_validator("node_selector")
    @classmethod
    def _are_labels(cls, value: dict[str, str]) -> dict[str, str]:
        for key, label in value.items():
            if not names.LABEL_KEY.fullmatch(key) or not names.LABEL_VALUE.fullmatch(label):
                raise ValueError(f"must be Kubernetes labels; {key!r}: {label!r} is none")
        return value


ClusterSpec = LocalSpec | SshSpec | CloudSpec | KubernetesSpec

SECTIONS: dict[str, type[LocalSpec] | type[SshSpec] | type[CloudSpec] | type[KubernetesSpec]] = {
    "local": LocalSpec,
    "ssh": SshSpec,
    "aws": CloudSpec,
    "gcp": CloudSpec,
    "azure": CloudSpec,
    "kubernetes": KubernetesSpec,
}
"""Type of the whole cluster file, by `provider`."""
