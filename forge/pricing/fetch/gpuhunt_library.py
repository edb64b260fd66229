"""Prices of smaller clouds, where GPUs are often cheapest, by the library gpuhunt where it is installed.

It reads catalogues that dstack publishes, and asks some clouds itself. What it says of AWS, GCP and Azure is used
where those were not asked themselves. GPUHUNT_CATALOG_URL, its own variable, leads to other catalogues.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

from forge.errors import ClusterError
from forge.plan.gpus import find_gpu
from forge.pricing.catalog import machine_types
from forge.pricing.offer import Offer, co2_g_per_hour
from forge.pricing.snapshot import PriceSnapshot

_OWN = ("aws", "gcp", "azure")


def fetch_gpuhunt(today: date, *, catalog: Any = None) -> PriceSnapshot:
    """Return the offers with NVIDIA GPUs of all clouds that gpuhunt reaches.

    Args:
        catalog: a `gpuhunt.Catalog`; by default one of all its clouds.

    Raises: ClusterError if gpuhunt is not installed, or reaches no cloud.
    """
    try:
        import gpuhunt
    except ImportError:
        raise ClusterError("is not installed; for smaller clouds: pip install 'forge-train[prices]'") from None
    with _logged() as notes:
        try:
            catalog = catalog or gpuhunt.default_catalog()
            items = list(catalog.query())
        except Exception as error:  # a cloud's answer may break its library in any way
            raise ClusterError(f"gpuhunt failed: {error}") from error
    offers = _offers(items, today=today)
    if not offers:
        raise ClusterError("gpuhunt reached no cloud that has NVIDIA GPUs")
    if others := sum(not _is_usable(item) for item in items if item.gpu_count):
        notes.append(f"{others} offers were left out: not NVIDIA's, with ARM CPUs, or for reservation only")
    skipped = [found[1] for note in notes if (found := re.match(r"Skipping provider (\w+?)(?:Provider)?:", note))]
    if skipped:
        notes = [note for note in notes if not note.startswith("Skipping provider")]
        notes.append(f"not asked, because they need credentials: {', '.join(skipped)}")
    return PriceSnapshot(source="gpuhunt", observed=today, offers=tuple(offers), notes=tuple(notes))


@contextmanager
def _logged() -> Iterator[list[str]]:
    """Collect what gpuhunt logs, such as clouds that it skips, instead of printing it."""
    lines: list[str] = []
    logger, handler = logging.getLogger("gpuhunt"), logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage()[:200])  # type: ignore[method-assign]
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _is_usable(item: Any) -> bool:
    vendor, architecture = str(getattr(item.gpu_vendor, "value", "")), str(getattr(item.cpu_arch, "value", ""))
    return vendor == "nvidia" and architecture == "x86" and not item.provider_data.get("is_dws_calendar_mode")


def _offers(items: Iterable[Any], *, today: date) -> list[Offer]:
    """Join the on-demand and spot prices of each machine and place, the cheapest where there are several."""
    machines: dict[tuple[str, str, str], Any] = {}
    prices: dict[tuple[str, str, str, bool], float] = {}
    for item in items:
        if not item.gpu_count or not item.gpu_name or not item.gpu_memory or not item.price or not _is_usable(item):
            continue
        place = item.provider, item.instance_name, item.location
        machines.setdefault(place, item)
        key = (*place, bool(item.spot))
        prices[key] = min(item.price, prices.get(key, item.price))
    return [
        _offer(item, on_demand=prices.get((*place, False)), spot=prices.get((*place, True)), today=today)
        for place, item in machines.items()
    ]


def _offer(item: Any, *, on_demand: float | None, spot: float | None, today: date) -> Offer:
    gpu = _gpu_name(item.gpu_name, memory_gib=item.gpu_memory)
    known = machine_types(item.provider).get(item.instance_name) if item.provider in _OWN else None
    is_zone = item.provider == "gcp"
    region = item.location.rpartition("-")[0] if is_zone else item.location
    return Offer(
        cloud=item.provider,
        instance=item.instance_name,
        gpu=gpu,
        num_gpus=item.gpu_count,
        gpu_memory_gib=item.gpu_memory,
        num_cpus=item.cpu,
        memory_gib=item.memory,
        inter_node_gbps=None if known is None else known.inter_node_gbps,
        region=region,
        zone=item.location if is_zone else None,
        usd_per_hour=on_demand,
        spot_usd_per_hour=spot,
        interruption=None,
        observed=today,
        source="gpuhunt",
        co2_g_per_hour=co2_g_per_hour(gpu, item.gpu_count, cloud=item.provider, region=region),
    )


def _gpu_name(name: str, *, memory_gib: float) -> str:
    """Return forge's name of a GPU: gpuhunt writes H100NVL and RTX4090, and A100 for both sizes of memory."""
    spaced = re.sub(
        r"(?<=\d)(NVL)$|^(RTX)(?=\d)", lambda match: f"-{match[1]}" if match[1] else f"{match[2]}-", name
    )
    for known in (find_gpu(f"{spaced}-{memory_gib:.0f}GB"), find_gpu(spaced)):
        if known is not None and abs(known.memory_gib - memory_gib) <= 0.05 * known.memory_gib:
            return known.name
    return name
