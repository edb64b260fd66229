"""What a run's data cost beside its machines: disks, stored checkpoints, and traffic out of the region.

Checkpoints are taken to be in the object storage of the machines' region, unless `checkpoint.to` names another
cloud's; the trained weights are downloaded once. What comes into a cloud is free on AWS, Azure and GCP.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge.config.cluster import CloudSpec
from forge.plan.interruptions import HOURS_PER_MONTH
from forge.plan.plan import DraftPlan
from forge.plan.snapshot_memory import WEIGHT_BYTES
from forge.plan.space import checkpoint_bytes
from forge.pricing.transfer import (
    INTERNET,
    StoragePrices,
    cloud_of,
    egress_usd_per_gib,
    storage_usd_per_gib_month,
)

_DISK_GIB = CloudSpec.model_fields["disk"].default / 2**30
"""Of each machine, as in a cluster file that names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCosts:
    """Costs of data in one region; None: a price is unknown."""

    disk_usd_per_machine_hour: float | None
    storage_usd_per_hour: float | None
    """Of the checkpoints that are kept."""
    egress_usd: float | None
    """Of the whole run."""


def data_costs(
    plan: DraftPlan, *, cloud: str, region: str, num_checkpoints: int, prices: StoragePrices | None = None
) -> DataCosts:
    """Return the costs of a job's data on machines in one region.

    Args:
        num_checkpoints: that the run writes.
        prices: of storage, as the clouds said, before those that forge ships.
    """
    size_gib = checkpoint_bytes(plan.model, plan.job.training) / 2**30
    kept = plan.job.checkpoint.keep + (plan.job.checkpoint.keep_best or 0)
    disk = storage_usd_per_gib_month(cloud, region, kind="disk", fetched=prices)
    stored = storage_usd_per_gib_month(cloud, region, fetched=prices)
    place = cloud_of(plan.job.checkpoint.to)
    sent_gib = plan.model.num_trainable_parameters * WEIGHT_BYTES[plan.job.training.precision] / 2**30
    if place not in (None, cloud):
        stored = None  # which region of the other cloud is not known
        sent_gib += size_gib * num_checkpoints
    price = egress_usd_per_gib(cloud, region, to=INTERNET)
    elsewhere = _corpus_clouds(plan) - {cloud}
    return DataCosts(
        disk_usd_per_machine_hour=None if disk is None else disk * _DISK_GIB / HOURS_PER_MONTH,
        storage_usd_per_hour=None if stored is None else stored * kept * size_gib / HOURS_PER_MONTH,
        egress_usd=None if price is None or elsewhere else price * sent_gib,
    )


def _corpus_clouds(plan: DraftPlan) -> set[str]:
    """The clouds that the files of the corpus are read from, each of which charges for what leaves it."""
    patterns = plan.files.patterns if plan.files is not None else ()
    return {cloud for one in patterns if (cloud := cloud_of(one.pattern)) is not None}
