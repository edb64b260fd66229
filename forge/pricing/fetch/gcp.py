"""GCP's Cloud Billing Catalog: prices of CPUs, memory, GPUs and local SSDs, from which machines are composed.

It needs an API key, of any project, in the environment variable FORGE_GCP_API_KEY.
Source: https://cloud.google.com/billing/docs/reference/rest/v1/services.skus/list
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any
from urllib.parse import quote

from forge.errors import ClusterError
from forge.pricing.catalog import MachineType, machine_types
from forge.pricing.fetch.http_json import MALFORMED, JsonClient
from forge.pricing.offer import Offer, build_offer
from forge.pricing.snapshot import PriceSnapshot
from forge.pricing.transfer import StoragePrice

API_KEY = "FORGE_GCP_API_KEY"
_URL = "https://cloudbilling.googleapis.com/v1/services/6F81-5844-456A/skus"
"""The entries of Compute Engine."""
_MAX_PAGES = 200
_HOURS_PER_MONTH = 730
"""With which GCP converts prices per month, such as those of disks."""
_PART = re.compile(r"(?:Spot Preemptible )?(.+?) (Core|Ram|GPU)\b")
_LOCAL_SSD = "SSD backed Local Storage"
_DISK = "Balanced PD Capacity"
"""Of one zone; `Regional Balanced PD Capacity` has two copies."""
_OTHER_PRODUCTS = ("Sole Tenancy", "Reserved", "Premium", "Custom", "Suspended", "suspended", "DWS", "Commitment")
_ANY_NAME = {"Nvidia H100 80GB Plus": "Nvidia H100 80GB Mega"}

_Places = dict[tuple[str, bool], float]
"""USD per hour by region and whether it is spot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFamily:
    """What a family of machine types is composed of, in the words of the catalog."""

    machine: str
    gpu: str | None = None
    ssd_gib_per_gpu: int = 0
    """Local SSDs that every machine of the family has."""


_FAMILIES = {
    "e2-standard": MachineFamily(machine="E2 Instance"),
    "n2-standard": MachineFamily(machine="N2 Instance"),
    "c3-standard": MachineFamily(machine="C3 Instance"),
    "g2-standard": MachineFamily(machine="G2 Instance", gpu="Nvidia L4"),
    "a2-highgpu": MachineFamily(machine="A2 Instance", gpu="Nvidia Tesla A100"),
    "a2-ultragpu": MachineFamily(machine="A2 Instance", gpu="Nvidia Tesla A100 80GB", ssd_gib_per_gpu=375),
    "a3-highgpu": MachineFamily(machine="A3 Instance", gpu="Nvidia H100 80GB", ssd_gib_per_gpu=750),
    "a3-megagpu": MachineFamily(machine="A3Plus Instance", gpu="Nvidia H100 80GB Mega", ssd_gib_per_gpu=750),
}
"""Source: GCP's page "GPU machine types"."""


def fetch_gcp(today: date, *, url: str = _URL, client: JsonClient | None = None) -> PriceSnapshot:
    """Return the prices of the catalogue's machine types in all regions.

    Raises: ClusterError without an API key, as `JsonClient.get`, or if no type is in the answer.
    """
    key = os.environ.get(API_KEY)
    if not key:
        raise ClusterError(f"GCP's price catalog needs an API key of a project: set {API_KEY}")
    client = client or JsonClient(name="GCP's price catalog", headers={"X-Goog-Api-Key": key})
    parts: dict[str, _Places] = {}  # of disks per month
    skipped = 0
    for sku in _skus(url, client):
        try:
            _add_sku(parts, sku)
        except MALFORMED:
            skipped += 1
    offers = [offer for machine in machine_types("gcp").values() for offer in _offers(machine, parts, today=today)]
    if not offers:
        raise ClusterError("GCP's price catalog has none of the machine types that forge knows")
    notes = (f"{skipped} entries without a price or region were skipped",) if skipped else ()
    disks = tuple(
        StoragePrice(cloud="gcp", region=region, kind="disk", usd_per_gib_month=price)
        for (region, is_spot), price in sorted(parts.get(_DISK, {}).items())
        if not is_spot
    )
    return PriceSnapshot(source="gcp", observed=today, offers=tuple(offers), storage=disks, notes=notes)


def _skus(url: str, client: JsonClient) -> Iterator[Any]:
    """Yield the entries of all pages. Raises: ClusterError if a page is not of the documented form."""
    token = ""
    for _ in range(_MAX_PAGES):
        answer = client.get(f"{url}?currencyCode=USD&pageSize=5000&pageToken={quote(token)}")
        if not isinstance(answer, dict) or not isinstance(answer.get("skus"), list):
            raise ClusterError("GCP's price catalog has changed its form: no skus")
        yield from answer["skus"]
        token = str(answer.get("nextPageToken") or "")
        if not token:
            return
    raise ClusterError(f"GCP's price catalog has more than {_MAX_PAGES} pages")


def _add_sku(parts: dict[str, _Places], sku: Mapping[str, Any]) -> None:
    """Add the price of one part. Raises: one of MALFORMED if something is missing."""
    category, description = sku["category"], str(sku["description"])
    if category["usageType"] not in ("OnDemand", "Preemptible") or any(
        one in description for one in _OTHER_PRODUCTS
    ):
        return
    if match := _PART.match(description):
        part = f"{_ANY_NAME.get(match[1], match[1])} {match[2]}"
    elif description.startswith(_LOCAL_SSD):
        part = _LOCAL_SSD
    elif description.startswith(_DISK):
        part = _DISK
    else:
        return
    rate = sku["pricingInfo"][-1]["pricingExpression"]["tieredRates"][0]["unitPrice"]  # in the order of time
    if rate.get("currencyCode", "USD") != "USD":
        raise ValueError("not in USD")
    price = int(rate.get("units") or 0) + int(rate.get("nanos") or 0) / 1e9
    if part == _LOCAL_SSD:
        price /= _HOURS_PER_MONTH
    if price > 0:
        for region in sku["serviceRegions"]:
            parts.setdefault(part, {})[str(region), category["usageType"] == "Preemptible"] = price


def _offers(machine: MachineType, parts: Mapping[str, _Places], *, today: date) -> list[Offer]:
    """Return the offers of one machine type where all its parts have a price."""
    family = _FAMILIES[machine.name.rpartition("-")[0]]
    needed = {f"{family.machine} Core": float(machine.num_cpus), f"{family.machine} Ram": machine.memory_gib}
    if family.gpu is not None:
        needed[f"{family.gpu} GPU"] = machine.num_gpus
    if family.ssd_gib_per_gpu:
        needed[_LOCAL_SSD] = family.ssd_gib_per_gpu * machine.num_gpus
    places = set.intersection(*(set(parts.get(part, ())) for part in needed))
    prices = {place: sum(count * parts[part][place] for part, count in needed.items()) for place in places}
    return [
        build_offer(
            machine,
            cloud="gcp",
            region=region,
            usd_per_hour=prices.get((region, False)),
            spot_usd_per_hour=prices.get((region, True)),
            observed=today,
            source="GCP's Cloud Billing Catalog",
        )
        for region in sorted({region for region, _ in places})
    ]
