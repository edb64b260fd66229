"""Choose the regions in which a cluster is tried, by what its workers cost there.

Pure: a cluster file, offers, and what AWS says about today, if it was asked, give a `RegionChoice`, which is shown
before money is spent. The cheapest place is the one with the lowest price of training: USD per hour of a worker ÷
floating-point operations that it trains an hour, spot if the file says so, plus the traffic to the storage if its
region is known.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Any

from forge.cluster.cloud.instance_selection import InstancePlan, PriceOf, listed_price, plan_instances
from forge.config.cluster import CloudSpec
from forge.errors import ArgumentError, ClusterError, JobFileError
from forge.plan.gpus import Gpu, find_gpu
from forge.pricing.catalog import MachineType, catalog_table, machine_types, workers_of
from forge.pricing.choose import TYPICAL_MFU
from forge.pricing.offer import Offer
from forge.pricing.transfer import INTERNET, cloud_of, egress_usd_per_gib, region_of

TRAFFIC_SHARE_PER_HOUR = 1 / 6
"""Assumed traffic to the storage, in GiB an hour, as a share of the memory of the GPUs: one checkpoint an hour of a
training state that fills a sixth of it. It decides only between regions of almost the same price."""
_CPU_TRAFFIC_GIB_PER_HOUR = 1.0
_MOST_TRIED = 12
_STALE_DAYS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MarketToday:
    """What AWS says about the account's regions."""

    spot: Mapping[str, Mapping[str, float]]
    """USD per hour by region, of those that have the file's types, and machine type; empty for on demand."""
    storage_region: str | None
    """Of the file's bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOption:
    """What a cluster file's workers cost in one region, or zone on GCP."""

    place: str
    machine: str
    """The worker with the lowest price of training."""
    usd_per_hour: float | None
    """Of that worker; None if unknown."""
    is_spot: bool
    usd_per_exaflop: float | None
    """None for machines without a known GPU."""
    traffic_usd_per_hour: float | None
    """Of that worker, to the storage; None if unknown."""
    units_per_hour: float
    """Work of that worker; see `_units`."""
    observed: date | None
    """Day of the price; None if it is of the file, of this moment, or unknown."""
    plan: InstancePlan

    def order(self, *, unknown_traffic: float) -> float:
        """Return the price of a unit of training, traffic included; infinite if no price is known."""
        if self.usd_per_hour is None:
            return math.inf
        traffic = unknown_traffic if self.traffic_usd_per_hour is None else self.traffic_usd_per_hour
        return (self.usd_per_hour + traffic) / self.units_per_hour


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionChoice:
    """The places where a cluster is tried, in order."""

    options: tuple[RegionOption, ...]
    is_chosen: bool
    """Whether forge chose the order, by price."""
    notes: tuple[str, ...]
    storage_region: str | None = None
    """Of the file's bucket; None if unknown."""


def choose_regions(
    spec: CloudSpec, *, offers: Sequence[Offer], market: MarketToday | None = None, earlier: Sequence[str] = ()
) -> RegionChoice:
    """Return the places of a cluster file with their prices, the cheapest first, or in the order that is given.

    Args:
        market: None where AWS was not asked, and on other clouds.
        earlier: where the cluster is, or the order of an earlier choice; it is kept.

    Raises: JobFileError if the file's GPU or regions do not exist, or `max_usd_per_hour` pays in no place.
    """
    own = [offer for offer in offers if offer.cloud == spec.provider]
    names = workers_of(spec)
    _require_known(spec, own)
    prices = _Prices(spec=spec, offers=[offer for offer in own if offer.instance in names], market=market)
    found, too_expensive = [], list[JobFileError]()
    for place in [*earlier] or prices.places():
        try:
            found.append(prices.option(place))
        except JobFileError as error:
            too_expensive.append(error)
    if not found:
        raise too_expensive[0]
    is_chosen = not earlier and (spec.regions == ("auto",) or spec.provider == "aws")
    if is_chosen:
        dearest = max((one.traffic_usd_per_hour or 0.0 for one in found), default=0.0)
        found.sort(key=lambda one: (one.is_spot != spec.spot, one.order(unknown_traffic=dearest)))
    tried = found[:_MOST_TRIED] if spec.regions == ("auto",) else found
    notes = [*prices.notes(tried), *_left_out(found, tried=tried, num_too_expensive=len(too_expensive))]
    if len(earlier) > 1:
        notes.append("the order is that of the cluster's first start; forge cluster down ends it")
    return RegionChoice(
        options=tuple(tried),
        is_chosen=is_chosen,
        notes=tuple(notes),
        storage_region=prices.storage_place()[0],
    )


def choice_record(spec: CloudSpec, choice: RegionChoice) -> dict[str, Any]:
    """Return what the cluster's state keeps of a choice: a later start of the same file uses the same order."""
    return {"regions": [one.place for one in choice.options], "for": _decisive(spec)}


def earlier_regions(spec: CloudSpec, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return where the cluster is, or the order of an earlier choice for a file that asks for the same."""
    if state.get("region"):
        return (str(state["region"]),)
    record = state.get("choice")
    if not isinstance(record, dict) or record.get("for") != _decisive(spec):
        return ()
    return tuple(str(region) for region in record.get("regions") or ())


def places_to_move(
    spec: CloudSpec,
    *,
    state: Mapping[str, Any],
    to: str | None,
    offers: Sequence[Offer],
    market: MarketToday | None = None,
) -> RegionChoice:
    """Return the places to which a cluster may move: the others of its file, then the one that it is in.

    It returns to that one if no other has capacity.

    Args:
        state: of the cluster's record.
        to: the place to try first; None: in the order of `choose_regions`.

    Raises: ClusterError if the cluster is not up; ArgumentError for a place that its file does not allow, or if
        it allows no other; JobFileError as `choose_regions`.
    """
    here = state.get("region")
    if here is None:
        raise ClusterError(f"the cluster '{spec.name}' is not up; start it: forge cluster up FILE")
    if to is not None and spec.regions != ("auto",) and to not in spec.regions:
        raise ArgumentError(
            f"'{spec.name}' may not move to {to}: its file allows the regions {', '.join(spec.regions)}"
        )
    choice = choose_regions(spec, offers=offers, market=market)
    by_place = {one.place: one for one in choice.options}
    if to is not None and to not in by_place:  # `auto` tries a few of many
        named = choose_regions(spec.model_copy(update={"regions": (to,)}), offers=offers, market=market)
        by_place = {one.place: one for one in named.options} | by_place
    others = [one for place, one in by_place.items() if place != here]
    if to == here or not others:
        why = f"is in {here} already" if to == here else f"has no other place: its file allows {here} alone"
        raise ArgumentError(f"'{spec.name}' {why}; allow others with regions: in its file")
    others.sort(key=lambda one: one.place != to)
    back = by_place.get(here) or choose_regions(spec, offers=offers, market=market, earlier=(here,)).options[0]
    return replace(choice, options=(*others, back))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prices:
    """What the types of a cluster file cost by place."""

    spec: CloudSpec
    offers: Sequence[Offer]
    """Of the file's cloud and types."""
    market: MarketToday | None

    def places(self) -> list[str]:
        """Return the file's places, or for `auto` all in which the cloud is known to sell the types."""
        spec = self.spec
        if spec.regions != ("auto",):
            return [*spec.regions]
        if self.market is not None:
            return sorted(self.market.spot)
        sold = {offer.zone or offer.region for offer in self.offers}
        if spec.provider == "gcp":
            zones = catalog_table()["gcp_zones"]
            found = [zone for zone in zones if zone in sold or region_of(zone) in sold]
            return (
                found + sorted(place for place in sold if region_of(place) != place and place not in zones) or zones
            )
        return sorted({offer.region for offer in self.offers}) or [catalog_table()["home"][spec.provider]]

    def option(self, place: str) -> RegionOption:
        """Raises: JobFileError if `max_usd_per_hour` does not pay for the cluster there."""
        plan = plan_instances(self.spec, price_of=self.price_of(place))
        names = dict.fromkeys(option.machine_type for option in plan.workers)
        options = [self._worker(name, place, plan=plan) for name in names]
        return min(options, key=lambda one: (one.is_spot != self.spec.spot, one.order(unknown_traffic=0.0)))

    def price_of(self, place: str) -> PriceOf:
        """Return prices in a place: the file's, else current, else offered, else of the cloud's home region."""
        listed = listed_price(self.spec)

        def price_of(name: str, is_spot: bool) -> float | None:
            on_demand = self._known(name, place, is_spot=False)[0]
            spot = self._known(name, place, is_spot=True)[0] if is_spot else None
            return spot or on_demand or listed(name, is_spot)

        return price_of

    def _worker(self, name: str, place: str, *, plan: InstancePlan) -> RegionOption:
        """Return the option of one type, as spot where the file wants it and the place sells it."""
        price, day = self._known(name, place, is_spot=True) if self.spec.spot else (None, None)
        is_spot = price is not None
        if price is None:
            price, day = self._known(name, place, is_spot=False)
        machine = machine_types(self.spec.provider).get(name)
        gpu = find_gpu(machine.gpu) if machine else None
        units = _units(machine, gpu)
        return RegionOption(
            place=place,
            machine=name,
            usd_per_hour=price,
            is_spot=is_spot,
            usd_per_exaflop=price / units if price and gpu is not None else None,
            traffic_usd_per_hour=self._traffic(machine, gpu, place=place),
            units_per_hour=units,
            observed=day,
            plan=plan,
        )

    def _known(self, name: str, place: str, *, is_spot: bool) -> tuple[float | None, date | None]:
        """Return the price of a type in a place, in its cheapest zone, and its day if it is of an offer."""
        if name in self.spec.usd_per_hour:
            return self.spec.usd_per_hour[name], None
        if is_spot and self.market is not None and place in self.market.spot:
            return self.market.spot[place].get(name), None  # AWS names no price where it sells no spot capacity
        here = [
            (price, offer.observed)
            for offer in self.offers
            if offer.instance == name and (offer.zone == place or offer.region == region_of(place))
            if offer.zone in (None, place) or self.spec.provider != "gcp"
            if (price := offer.price(spot=is_spot)) is not None
        ]
        return min(here, default=(None, None))

    def _traffic(self, machine: MachineType | None, gpu: Gpu | None, *, place: str) -> float | None:
        """Return the price of an hour's traffic from a machine to the storage; None if unknown."""
        region, cloud = self.storage_place()
        if region is None or machine is None:
            return None
        gib = machine.num_gpus * gpu.memory_gib * TRAFFIC_SHARE_PER_HOUR if gpu else _CPU_TRAFFIC_GIB_PER_HOUR
        price = egress_usd_per_gib(
            self.spec.provider, place, to=region if cloud == self.spec.provider else INTERNET
        )
        return None if price is None else gib * price

    def storage_place(self) -> tuple[str | None, str | None]:
        """Return region and cloud of the storage; no region if it is unknown."""
        cloud = cloud_of(self.spec.storage or "")
        region = self.spec.storage_region or (self.market.storage_region if self.market else None)
        return (region, cloud) if cloud else (None, None)

    def notes(self, tried: Sequence[RegionOption]) -> Iterator[str]:
        """Say on which prices the order is based."""
        spec, first = self.spec, tried[0]
        days = {one.observed for one in tried if one.observed is not None}
        if days:
            age = (datetime.now(UTC).date() - min(days)).days
            old = "; they are old: forge prices --refresh asks the clouds" if age > _STALE_DAYS else ""
            yield f"prices as of {min(days)}, {age} days old{old}"
        if spec.spot and not any(one.is_spot for one in tried):
            yield "no spot price of these types is known: they count with their on-demand price"
        if first.usd_per_hour is None:
            yield f"no price of {', '.join(workers_of(spec)[:3])} is known: give usd_per_hour in the file"
        if spec.provider == "aws" and self.market is None:
            yield "AWS was not asked: a start asks it for the account's regions and the spot prices of now"
        region, _ = self.storage_place()
        if region is not None and len(tried) > 1:
            share = f"{TRAFFIC_SHARE_PER_HOUR:.0%} of the GPUs' memory"
            amount = f"{_CPU_TRAFFIC_GIB_PER_HOUR:g} GiB" if spec.gpu == "none" else share
            yield f"assumed traffic of a worker to the storage in {region}: {amount} an hour"
        elif "://" in (spec.storage or "") and len(tried) > 1:
            yield "the storage's region is unknown and its traffic is not counted: give storage_region"


def _units(machine: MachineType | None, gpu: Gpu | None) -> float:
    """Work of a machine in an hour: 10¹⁸ FLOPs of training, or CPUs, or 1 if its size is unknown."""
    if machine is None:
        return 1.0
    if gpu is None:
        return float(machine.num_gpus or machine.num_cpus)
    return machine.num_gpus * gpu.bf16_flops * TYPICAL_MFU * 3600 / 1e18


def _left_out(
    found: Sequence[RegionOption], *, tried: Sequence[RegionOption], num_too_expensive: int
) -> Iterator[str]:
    if len(found) > len(tried):
        yield f"{len(found) - len(tried)} more places sell it; list them in regions to try them"
    if num_too_expensive:
        yield f"{num_too_expensive} places are left out: too expensive for max_usd_per_hour"


def _require_known(spec: CloudSpec, offers: Sequence[Offer]) -> None:
    """Raises: JobFileError for a region that the cloud does not have by any offer, if there is one like it."""
    if spec.regions == ("auto",):
        return
    known = {offer.region for offer in offers}
    for place in spec.regions:
        region = region_of(place) if spec.provider == "gcp" else place
        near = difflib.get_close_matches(region, known, n=1, cutoff=0.8)
        if region not in known and near:
            raise JobFileError(
                f"is no region of {spec.provider} that forge knows", key="regions", value=place, nearest=near[0]
            )


def _decisive(spec: CloudSpec) -> dict[str, Any]:
    """Return the keys of a file that decide about its regions."""
    keys = {"provider", "regions", "gpu", "instance_types", "spot", "storage", "storage_region"}
    return spec.model_dump(mode="json", include=keys)
