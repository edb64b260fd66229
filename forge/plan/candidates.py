"""Machines that a job could be trained on: every offer, in the numbers that the job allows, on demand and as spot.

Each gets the hours of the job, with the start of the machines and the interruptions of spot machines, and its cost.
What cannot be a candidate is left out with the reason. Pure: nothing is asked of a cloud.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from forge.config.resources import ResourcesSpec
from forge.plan.data_costs import DataCosts, data_costs
from forge.plan.durations import WorldHours
from forge.plan.forecast import FormerRun, forecast_world, num_checkpoints, world_on_gpu
from forge.plan.gpus import FP8_CAPABILITY, Gpu, find_gpu
from forge.plan.interruptions import NONE, Interruptions, interruptions_of
from forge.plan.machines import MAX_MACHINES, WITHOUT_BF16, interconnect
from forge.plan.memory import USABLE_SHARE
from forge.plan.plan import DraftPlan
from forge.plan.recovery import (
    BOOT_S,
    LEVELS,
    NODE_START_S,
    InterruptedRun,
    change_costs,
    interrupted_run,
)
from forge.plan.throughput import Estimate
from forge.pricing.catalog import head_price
from forge.pricing.offer import Offer
from forge.pricing.offers import CLOUDS
from forge.pricing.transfer import StoragePrices, cloud_of

NO_MEMORY = "the job does not fit in the GPU's memory"
WRONG_COUNT = "their GPUs cannot be the workers of resources.workers"
NO_SPOT = "no spot machines, or none with a known price"
"""Why an offer is left out as spot; on demand it may be a candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a run costs in USD, by part; None: the price is unknown."""

    machines_usd: float
    head_usd: float | None
    disks_usd: float | None
    """Of the machines and the head."""
    storage_usd: float | None
    """Of the checkpoints that are kept, during the run."""
    egress_usd: float | None
    """Of checkpoints and corpus to another cloud, and of the trained weights to their user."""

    @property
    def parts(self) -> dict[str, float | None]:
        """All parts by name."""
        return {
            "machines": self.machines_usd,
            "head": self.head_usd,
            "disks": self.disks_usd,
            "storage": self.storage_usd,
            "egress": self.egress_usd,
        }

    @property
    def usd(self) -> float:
        """The sum of all parts that are known."""
        return sum(part for part in self.parts.values() if part is not None)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names of the parts whose price is unknown."""
        return tuple(name for name, part in self.parts.items() if part is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Some machines of one offer, and what the job takes on them."""

    offer: Offer
    num_machines: int
    is_spot: bool
    uninterrupted_hours: Estimate
    """On machines that are up and are not lost."""
    hours: Estimate
    """From the request of the machines to the end."""
    num_interruptions: Estimate
    num_restarts: Estimate
    """Of all processes, from a checkpoint; the other interruptions cost a pause."""
    pausing_hours: float
    """Likely, as are the following."""
    repeated_hours: float
    waiting_hours: float
    """For machines in place of lost ones."""
    usd: Estimate
    """Of the parts that are known."""
    cost: Cost
    """The parts of the likely value."""

    @property
    def world_size(self) -> int:
        """Number of GPUs."""
        return self.num_machines * self.offer.num_gpus

    @property
    def usd_per_hour(self) -> float:
        """Of all machines, without the head."""
        return self.num_machines * (self.offer.price(spot=self.is_spot) or math.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Offers that are no candidates, for one reason."""

    reason: str
    """As in `12 offers: REASON`."""
    num_offers: int
    examples: tuple[str, ...]
    """GPUs or machine types."""


@dataclass(slots=True)
class _Reasons:
    """Counts the offers that are left out, by reason."""

    offers: dict[str, dict[tuple[str, ...], str]] = field(default_factory=dict)

    def add(self, offer: Offer, reason: str, *, example: str | None = None) -> None:
        key = offer.cloud, offer.instance, offer.region, offer.zone or ""
        self.offers.setdefault(reason, {})[key] = example or offer.instance

    def build(self) -> tuple[LeftOut, ...]:
        found = (
            LeftOut(reason=reason, num_offers=len(own), examples=tuple(dict.fromkeys(own.values())))
            for reason, own in self.offers.items()
        )
        return tuple(sorted(found, key=lambda one: -one.num_offers))


@dataclass(slots=True)
class _Shapes:
    """Hours of the job by kind and number of machines, which many regions share."""

    plan: DraftPlan
    former: Sequence[FormerRun]
    storage: StoragePrices | None = None
    known: dict[tuple[object, ...], WorldHours | str] = field(default_factory=dict)
    runs: dict[tuple[object, ...], tuple[InterruptedRun, ...]] = field(default_factory=dict)
    data_costs: dict[tuple[object, ...], DataCosts] = field(default_factory=dict)

    def hours(self, offer: Offer, count: int, *, gpu: Gpu) -> WorldHours | str:
        """The forecast, or why the job does not run on these machines."""
        key = gpu.name, offer.num_gpus, offer.inter_node_gbps, offer.memory_gib, count
        if key not in self.known:
            self.known[key] = self._hours(offer, count, gpu=gpu)
        return self.known[key]

    def _hours(self, offer: Offer, count: int, *, gpu: Gpu) -> WorldHours | str:
        world_size = count * offer.num_gpus
        links = interconnect(gpus_per_node=offer.num_gpus, gbps=offer.inter_node_gbps)
        world = world_on_gpu(self.plan, world_size, gpu=gpu, links=links)
        if not world.fits:
            return NO_MEMORY
        if offer.num_gpus * world.memory.host_bytes > USABLE_SHARE * offer.memory_gib * 2**30:
            return "the copies of the state do not fit in the machine's memory"
        return forecast_world(self.plan, world_size=world_size, gpu=gpu, interconnect=links, former=self.former)

    def interrupted(
        self, world: WorldHours, offer: Offer, count: int, *, risk: Interruptions
    ) -> tuple[InterruptedRun, ...]:
        """The course of the run: low, likely, high."""
        key = offer.gpu, offer.num_gpus, offer.inter_node_gbps, count, risk
        if key not in self.runs:
            least = max(1, math.ceil(self.plan.job.resources.workers.low / offer.num_gpus))
            self.runs[key] = tuple(
                interrupted_run(
                    getattr(world.hours, level),
                    num_machines=count,
                    min_machines=min(count, least),
                    losses_per_hour=getattr(risk.per_machine_hour, level),
                    start_s=getattr(BOOT_S, level) + NODE_START_S,
                    costs=change_costs(self.plan, num_machines=count, step_s=world.step_s, level=level),
                    available=risk.available,
                )
                for level in LEVELS
            )
        return self.runs[key]

    def data(self, world: WorldHours, offer: Offer) -> DataCosts:
        """What the job's data cost in the region."""
        steps_s = self.plan.total_steps * world.step_s
        num_saved = num_checkpoints(self.plan, world_size=world.world_size, steps_s=steps_s)
        is_sent = cloud_of(self.plan.job.checkpoint.to) not in (None, offer.cloud)
        key = offer.cloud, offer.region, num_saved if is_sent else 0
        if key not in self.data_costs:
            self.data_costs[key] = data_costs(
                self.plan,
                cloud=offer.cloud,
                region=offer.region,
                num_checkpoints=num_saved,
                prices=self.storage,
            )
        return self.data_costs[key]


def find_candidates(
    plan: DraftPlan,
    offers: Iterable[Offer],
    *,
    former: Sequence[FormerRun] = (),
    trace: Interruptions | None = None,
    max_machines: int = MAX_MACHINES,
    kinds: Sequence[bool] = (False, True),
    storage: StoragePrices | None = None,
) -> tuple[tuple[Candidate, ...], tuple[LeftOut, ...]]:
    """Return all candidates, the cheapest first, and the offers that are none.

    Args:
        former: measured runs, the newest first, which take precedence over estimates.
        trace: interruptions of spot machines, instead of those that the offers name.
        max_machines: at most so many.
        kinds: on demand is False, spot is True.
        storage: prices that the clouds said, before those that forge ships.
    """
    reasons, shapes = _Reasons(), _Shapes(plan, former, storage)
    found: list[Candidate] = []
    for offer in offers:
        if not offer.num_gpus:
            continue
        gpu = find_gpu(offer.gpu)
        problem = _problem(plan, offer, gpu)
        if problem is not None or gpu is None:
            reasons.add(offer, problem or "", example=offer.gpu)
            continue
        counts = machine_counts(plan.job.resources, gpus_per_machine=offer.num_gpus, most=max_machines)
        if not counts:
            workers = plan.job.resources.workers
            reasons.add(offer, f"{WRONG_COUNT}: {workers}")
        elif offer.usd_per_hour is None and offer.spot_usd_per_hour is None:
            reasons.add(offer, "no price is known", example=f"{offer.instance} in {offer.place}")
        else:
            options = product(kinds, counts)
            found += _of_offer(offer, options, gpu=gpu, shapes=shapes, reasons=reasons, trace=trace)
    return tuple(sorted(_cheapest_zones(found), key=_order)), reasons.build()


def describe(one: Candidate) -> str:
    """Name the machines of a candidate: `4 x g5.xlarge, spot, aws us-east-1`."""
    kind = "spot" if one.is_spot else "on demand"
    return (
        f"{one.num_machines} x {one.offer.instance} ({one.offer.gpu}), {kind}, {one.offer.cloud} {one.offer.place}"
    )


def machine_counts(resources: ResourcesSpec, *, gpus_per_machine: int, most: int = MAX_MACHINES) -> tuple[int, ...]:
    """Return the numbers of machines to look at: the fewest and the most that the job allows, and powers of two."""
    low = math.ceil(resources.workers.low / gpus_per_machine)
    high = min(most, resources.workers.high // gpus_per_machine)
    if low > high:
        return ()
    powers = [2**power for power in range(MAX_MACHINES.bit_length()) if low <= 2**power <= high]
    return tuple(sorted({low, high, *powers}))


def _problem(plan: DraftPlan, offer: Offer, gpu: Gpu | None) -> str | None:
    """Why an offer is no candidate whatever its number of machines."""
    wanted = plan.job.resources.gpu
    if wanted != "auto" and gpu != find_gpu(wanted):
        return f"another GPU than resources.gpu: {wanted}"
    if gpu is None:
        return "forge does not know the GPU's speed"
    if plan.job.training.precision == "bf16" and gpu.name in WITHOUT_BF16:
        return "the GPU does not compute in bf16, the job's precision"
    if plan.job.training.fp8 and gpu.compute_capability < FP8_CAPABILITY:
        return "the GPU does not compute in fp8 (training.fp8)"
    return None


def _of_offer(
    offer: Offer,
    options: Iterable[tuple[bool, int]],
    *,
    gpu: Gpu,
    shapes: _Shapes,
    reasons: _Reasons,
    trace: Interruptions | None,
) -> Iterator[Candidate]:
    """The candidates of an offer with a known GPU and a price: spot or not, and the number of machines."""
    limit, head = shapes.plan.job.resources.max_usd_per_hour, head_price(offer.cloud) or 0.0
    for is_spot, count in options:
        price = offer.price(spot=is_spot)
        if price is None:
            reasons.add(offer, NO_SPOT if is_spot else "sold as spot only")
            continue
        world = shapes.hours(offer, count, gpu=gpu)
        if isinstance(world, str):
            reasons.add(offer, world, example=f"{gpu.name} ({gpu.memory_gib} GiB)")
        elif limit is not None and count * price + head > limit:
            reasons.add(offer, f"above resources.max_usd_per_hour: {limit:g}")
        else:
            risk = NONE if not is_spot else trace or interruptions_of(offer)
            runs = shapes.interrupted(world, offer, count, risk=risk)
            if all(math.isfinite(run.hours) for run in runs):
                yield _candidate(
                    offer,
                    count,
                    world=world,
                    runs=runs,
                    is_spot=is_spot,
                    available=risk.available,
                    data=shapes.data(world, offer),
                )
            else:
                reasons.add(offer, "interrupted too often to make progress")


def _candidate(
    offer: Offer,
    count: int,
    *,
    world: WorldHours,
    runs: Sequence[InterruptedRun],
    is_spot: bool,
    available: float,
    data: DataCosts,
) -> Candidate:
    boots = [getattr(BOOT_S, level) / 3600 for level in LEVELS]
    costs = [
        _cost(
            offer,
            count,
            is_spot=is_spot,
            paid_hours=available * run.hours + boot,
            hours=run.hours + boot,
            data=data,
        )
        for run, boot in zip(runs, boots, strict=True)
    ]
    likely = runs[1]
    return Candidate(
        offer=offer,
        num_machines=count,
        is_spot=is_spot,
        uninterrupted_hours=world.hours,
        hours=_estimate([run.hours + boot for run, boot in zip(runs, boots, strict=True)]),
        num_interruptions=_estimate([run.num_interruptions for run in runs]),
        num_restarts=_estimate([run.num_restarts for run in runs]),
        pausing_hours=likely.pausing_hours,
        repeated_hours=likely.repeated_hours,
        waiting_hours=likely.waiting_hours,
        usd=_estimate([cost.usd for cost in costs]),
        cost=costs[1],
    )


def _cost(offer: Offer, count: int, *, is_spot: bool, paid_hours: float, hours: float, data: DataCosts) -> Cost:
    """Args:
    paid_hours: of each machine.
    hours: of the head.
    """
    head, disk = head_price(offer.cloud), data.disk_usd_per_machine_hour
    has_head = offer.cloud in CLOUDS
    return Cost(
        machines_usd=count * (offer.price(spot=is_spot) or 0.0) * paid_hours,
        head_usd=None if head is None else head * hours,
        disks_usd=None if disk is None else disk * (count * paid_hours + has_head * hours),
        storage_usd=None if data.storage_usd_per_hour is None else data.storage_usd_per_hour * hours,
        egress_usd=data.egress_usd,
    )


def _estimate(values: Sequence[float]) -> Estimate:
    low, likely, high = values
    return Estimate(low=low, likely=likely, high=high)


def _cheapest_zones(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Of each region, machine type, number and kind the cheapest zone."""
    cheapest: dict[tuple[object, ...], Candidate] = {}
    for one in sorted(candidates, key=_order):
        cheapest.setdefault(
            (one.offer.cloud, one.offer.region, one.offer.instance, one.num_machines, one.is_spot), one
        )
    return list(cheapest.values())


def _order(one: Candidate) -> tuple[float, float, str, str, str]:
    return one.usd.likely, one.hours.likely, one.offer.cloud, one.offer.instance, one.offer.place
