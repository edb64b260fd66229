"""The cluster file: which machines there are, or may be bought, and what they may cost.

`provider` says which of five sections the whole file is. The default of every key is what a small team
would choose; what must be chosen has no default.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from forge.config.section import Bytes, Duration, FieldError, RangeFromZero, Section, Strings
from forge.units import Range

_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.:-]*[A-Za-z0-9])?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")


def _read_mapping(value: object) -> object:
    return {} if value is None else value


class ClusterSection(Section):
    """What every cluster file has."""

    name: str = Field(max_length=40, json_schema_extra={"pattern": _NAME})
    """Lower-case letters, digits and dashes: what `--cluster` takes, and how machines are tagged."""

    storage: str | None = Field(None, min_length=1)
    """Where runs on this cluster keep their checkpoints, unless the job says: a URL such as `s3://bucket/runs`,
    or a folder that all machines share. One machine alone needs none."""

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if not re.fullmatch(_NAME[1:-1], value):
            raise ValueError("must be lower-case letters, digits and dashes, such as 'aws-spot'")
        return value


class LocalSpec(ClusterSection):
    """This machine alone."""

    provider: Literal["local"]
    """This machine."""

    nodes: int = Field(1, ge=1, le=64)
    """Simulated machines on this one; they share its cores."""

    port: int | None = Field(None, ge=1, le=65535)
    """Of Ray's head; a free one by default."""


class SshSpec(ClusterSection):
    """Machines that are there already, reached by OpenSSH: its client's own configuration counts too."""

    provider: Literal["ssh"]
    """Machines that are there already."""

    machines: Strings
    """Their host names or addresses, as this machine and they themselves reach them; the first one is the head."""

    min_machines: int | None = Field(None, ge=1)
    """`up` goes on if at least so many machines are ready, the head among them; all of them by default."""

    user: str | None = None
    """To log in as; by default OpenSSH's own choice."""

    identity_file: str | None = Field(None, min_length=1)
    """The private key's file; by default OpenSSH's own choice."""

    port: int = Field(22, ge=1, le=65535)
    """Of sshd."""

    python: str | None = Field(None, pattern=r"^(/|~/)")
    """The Python of an environment that has forge in it, on every machine: nothing is installed then."""

    folder: str = Field("~/.forge", pattern=r"^(/|~/)[^\s'\"$`\\;&|<>*?]+$")
    """Where forge keeps its environment, logs and runs on each machine."""

    ray_port: int = Field(6379, ge=1024, le=65535)
    """Of Ray's head."""

    wheels: str | None = Field(None, min_length=1)
    """A folder of this machine with wheels to install from, where the machines reach no package index."""

    clouds: Strings = ()
    """Clouds whose reclaim notices are to be heard, `aws`, `gcp` or `azure`, where machines are rented there."""

    usd_per_hour: float | None = Field(None, ge=0)
    """What one machine costs, if the cost is to be shown and limited."""

    max_usd_per_hour: float | None = Field(None, gt=0)
    """Runs stop, with a checkpoint, when all machines together cost more."""

    @field_validator("machines")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("must name at least one machine")
        for host in value:
            if not _HOST.fullmatch(host):
                raise ValueError(f"must be host names or addresses, and {host!r} is none")
        if len(set(value)) < len(value):
            raise ValueError("names a machine twice")
        return value

    @field_validator("user")
    @classmethod
    def _is_user(cls, value: str | None) -> str | None:
        if value is not None and not _USER.fullmatch(value):
            raise ValueError("is no user's name")
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
            raise FieldError("min_machines", f"is more than the {len(self.machines)} machines there are")
        return self


class CloudSpec(ClusterSection):
    """Machines rented by the hour: one on-demand head, and spot workers that come and go."""

    provider: Literal["aws", "gcp", "azure"]
    """The cloud; credentials are its own, from the environment or where its tools keep them."""

    regions: Strings = ("auto",)
    """Where to rent, tried in order of price; `auto`: every region where the GPU can be had."""

    gpu: str = Field("none", min_length=1)
    """A GPU's name such as `A100-80GB`, or `none` for workers without."""

    instance_types: Strings = ()
    """Worker types to choose among; by default all that forge knows to have that GPU."""

    head: str | None = Field(None, min_length=1)
    """The head's instance type; by default a small one with room for the supervisor and the records."""

    workers: RangeFromZero = Range(low=0, high=4)
    """Machines besides the head, `0..64`: the autoscaler rents what runs ask for, between the two."""

    spot: bool = True
    """Workers are spot machines: a third of the price or less, and taken away at two minutes' notice or less."""

    on_demand_fallback: bool = False
    """Where no spot machine can be had, workers are rented at the full price."""

    max_usd_per_hour: float | None = Field(None, gt=0)
    """No more machines are asked for than may cost this together, and runs stop, with a checkpoint, when what is
    there costs more."""

    usd_per_hour: Annotated[
        dict[str, float], BeforeValidator(_read_mapping), WithJsonSchema({"type": "object"})
    ] = Field(default_factory=dict)
    """Prices by instance type, for those that the cloud itself does not tell."""

    idle_minutes: float = Field(5.0, gt=0)
    """After so long without work a worker is given back."""

    image: str | None = Field(None, min_length=1)
    """The machines' image; by default the provider's own for deep learning, found by name."""

    disk: Bytes = 200 * 10**9
    """Of each machine."""

    user: str | None = None
    """To log in as; by default the image's own."""

    identity_file: str | None = Field(None, min_length=1)
    """The private key's file; by default one that is made for the cluster."""

    allow_from: str = Field("auto", min_length=1)
    """The only addresses besides the cluster's own that may reach its machines, by ssh: a CIDR such as
    `203.0.113.4/32`; `auto`: this machine's own, as the internet sees it."""

    python: str | None = Field(None, pattern=r"^(/|~/)")
    """The Python of an environment in the image that has forge in it: nothing is installed then."""

    wheels: str | None = Field(None, min_length=1)
    """A folder of this machine with wheels to install from, where the machines reach no package index."""

    project: str | None = Field(None, min_length=1)
    """GCP's project, or Azure's subscription."""

    resource_group: str | None = Field(None, min_length=1)
    """Azure's resource group; made if it is not there. By default `forge-<name>`."""

    startup_timeout: Duration = 900.0
    """How long a machine may take from being asked for until Ray runs on it."""

    @field_validator("allow_from")
    @classmethod
    def _is_cidr(cls, value: str) -> str:
        if value != "auto":
            try:
                network = ipaddress.ip_network(value)
            except ValueError:
                raise ValueError("must be auto, or a CIDR such as 203.0.113.4/32") from None
            if network.prefixlen == 0:
                raise ValueError("must not be the whole world")
        return value

    @model_validator(mode="after")
    def _fits_the_provider(self) -> CloudSpec:
        if self.provider in ("gcp", "azure") and self.project is None:
            raise FieldError("project", "is missing: GCP's project, or Azure's subscription")
        if self.provider == "aws" and self.project is not None:
            raise FieldError("project", "belongs to gcp and azure")
        if self.provider != "azure" and self.resource_group is not None:
            raise FieldError("resource_group", "belongs to azure")
        if any(price < 0 for price in self.usd_per_hour.values()):
            raise FieldError("usd_per_hour", "must not be negative")
        return self


class KubernetesSpec(ClusterSection):
    """Pods that the KubeRay operator starts."""

    provider: Literal["kubernetes"]
    """A RayCluster of KubeRay's."""

    namespace: str = Field("default", pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
    """Where the pods live."""

    context: str | None = Field(None, min_length=1)
    """kubectl's context; by default its current one."""

    image: str = Field(min_length=1)
    """The pods' image; it has forge in it."""

    gpu: str = Field("none", min_length=1)
    """A GPU's name such as `A100-80GB`, or `none`."""

    gpus_per_worker: int = Field(1, ge=1, le=16)
    """GPUs of one pod, where it has any."""

    cpus_per_worker: int = Field(8, ge=1)
    """CPUs of one worker's pod."""

    memory_per_worker: Bytes = 32 * 2**30
    """Memory of one worker's pod."""

    workers: RangeFromZero = Range(low=0, high=4)
    """Worker pods, `0..64`: the autoscaler starts what runs ask for, between the two."""

    spot: bool = True
    """Workers go to spot machines."""

    node_selector: Annotated[dict[str, str], BeforeValidator(_read_mapping), WithJsonSchema({"type": "object"})] = (
        Field(default_factory=dict)
    )
    """Labels of the machines for workers; by default those by which the cloud below marks its spot machines."""

    cloud: Literal["aws", "gcp", "azure"] | None = None
    """Whose machines these are: its spot label is selected, its taint tolerated, its notices heard."""

    idle_minutes: float = Field(5.0, gt=0)
    """After so long without work a worker's pod ends."""

    usd_per_hour: float | None = Field(None, ge=0)
    """What one worker costs, if the cost is to be shown and limited."""

    max_usd_per_hour: float | None = Field(None, gt=0)
    """Runs stop, with a checkpoint, when all workers together cost more."""


ClusterSpec = LocalSpec | SshSpec | CloudSpec | KubernetesSpec

SECTIONS: dict[str, type[LocalSpec] | type[SshSpec] | type[CloudSpec] | type[KubernetesSpec]] = {
    "local": LocalSpec,
    "ssh": SshSpec,
    "aws": CloudSpec,
    "gcp": CloudSpec,
    "azure": CloudSpec,
    "kubernetes": KubernetesSpec,
}
"""The type of a cluster file, by its `provider`."""
