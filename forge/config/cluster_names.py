"""What the names in a cluster file may look like: machines, users, paths, and the clouds' own identifiers.

These values reach ssh, cloud command-line tools, shells on other machines, Ray's launcher file and Kubernetes
manifests. Each of those quotes them too; a name that the cloud itself would refuse is refused here, before anything
is rented. A string never has a line break, so that it cannot become a second line anywhere.

Source: AWS, EC2 API reference, "DataTypes"; Google Cloud, "Resource naming convention", "Creating and managing
projects"; Azure, "Naming rules and restrictions for Azure resources"; Kubernetes, "Labels and Selectors".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

MAX_MACHINES = 10_000
"""Far above the largest Ray cluster; a typing error above it would be rented, or planned for hours."""
MAX_USD_PER_HOUR = 1e6
MAX_TYPES = 100
"""Regions, or machine types, in one file."""

HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9:-]{0,62})(\.[A-Za-z0-9:-]{1,63})*(?<!-)")
USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}")
GPU = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,39}")
REMOTE_PATH = r"^(/|~/)[A-Za-z0-9._@%+=:,/-]{1,500}$"
"""A path on another machine, where a shell sees it."""
K8S_IMAGE = r"^[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,511}$"
K8S_CONTEXT = r"^[A-Za-z0-9][A-Za-z0-9._/:@+= -]{0,252}$"
LABEL_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudNames:
    """One cloud's patterns, each with an example."""

    region: tuple[str, str]
    machine_type: tuple[str, str]
    image: tuple[str, str]
    project: tuple[str, str] | None = None


CLOUDS: Mapping[str, CloudNames] = {
    "aws": CloudNames(
        region=(r"[a-z]{2,6}(-[a-z]{2,12}){1,3}-[0-9]{1,2}", "us-east-1"),
        machine_type=(r"[a-z][a-z0-9-]{0,30}\.[a-z0-9-]{1,30}", "g5.xlarge"),
        image=(r"ami-[0-9a-f]{8,17}", "ami-0123456789abcdef0"),
    ),
    "gcp": CloudNames(
        region=(r"[a-z]{2,20}(-[a-z]{2,20}){1,2}[0-9]{1,2}-[a-z]{1,2}[0-9]{0,2}[a-z]?", "us-central1-a"),
        machine_type=(r"(?=.{1,50}\Z)[a-z][a-z0-9]{0,20}(-[a-z0-9]{1,20}){1,5}", "g2-standard-8"),
        image=(r"(projects/([a-z0-9.-]{1,63}:)?[a-z0-9-]{1,63}/)?global/images/(family/)?[a-z][a-z0-9-]{0,62}",
               "projects/my-project/global/images/my-image"),
        project=(r"([a-z0-9.-]{1,63}:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "my-project"),
    ),
    "azure": CloudNames(
        region=(r"[a-z][a-z0-9]{2,30}", "eastus"),
        machine_type=(r"[A-Za-z][A-Za-z0-9]{0,30}(_[A-Za-z0-9-]{1,30}){0,5}", "Standard_NC8as_T4_v3"),
        image=(r"/subscriptions/[0-9A-Fa-f-]{36}(/[A-Za-z0-9._()-]{1,90}){4,12}",
               "/subscriptions/.../resourceGroups/.../providers/Microsoft.Compute/images/my-image"),
        project=(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}", "00000000-0000-0000-0000-000000000000"),
    ),
}  # fmt: skip

RESOURCE_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.()-]{0,88}[A-Za-z0-9_()-]|[A-Za-z0-9_]")
"""Azure's own rule without the letters of other alphabets, and without a dash at the start, as of an option."""


def require_names(values: tuple[str, ...], pattern: tuple[str, str], *, what: str) -> str | None:
    """Return what is wrong with the first of these names that the cloud does not have; None if all are valid."""
    for value in values:
        if not re.fullmatch(pattern[0], value):
            return f"{value!r} is not {what}, which looks like {pattern[1]}"
    # As Ray's node types, which have only letters, digits and dashes.
    if len({re.sub(r"[^a-z0-9]+", "-", value.lower()) for value in values}) < len(values):
        return "contains a name twice"
    if len(values) > MAX_TYPES:
        return f"has {len(values)} names; at most {MAX_TYPES} are allowed"
    return None


def strings_in(value: object) -> Iterator[str]:
    """Yield every string in a value of a section, the keys of mappings among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from strings_in(inner)


def local_path(value: str) -> str:
    """Check a path on this machine. Raises: ValueError for another user's home folder, or an option."""
    if value.startswith("~") and not (value == "~" or value.startswith("~/")):
        raise ValueError("must not name another user's home folder; write it in full")
    if value.startswith("-"):
        raise ValueError("must not begin with '-'; write ./-name")
    return value
