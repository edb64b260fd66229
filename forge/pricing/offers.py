"""Where machines are for rent, and at what price: the offers of all clouds in one form.

`load_offers` returns the prices that forge can know: of each cloud the newest of those fetched (`refresh=True`
asks the clouds, see `forge.pricing.fetch`) and those of the price list shipped with forge. What is unknown is None,
never zero; the notes of the table say how old the prices of each cloud are, and what could not be asked.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime

from forge.errors import ForgeError
from forge.pricing.catalog import machine_types
from forge.pricing.fetch.sources import FETCHERS
from forge.pricing.offer import InterruptionBand as InterruptionBand
from forge.pricing.offer import Offer as Offer
from forge.pricing.offer import build_offer
from forge.pricing.price_list import listed_prices
from forge.pricing.snapshot import Fetch, PriceSnapshot, SpotRisk, read_snapshot, save_snapshot
from forge.pricing.transfer import StoragePrices

CLOUDS = ("aws", "azure", "gcp")
_STALE_DAYS = 30
SOURCES = ("aws", "spot-advisor", "azure", "gcp", "gpuhunt")


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferTable:
    """All offers that are known, and what there is to say about them."""

    offers: tuple[Offer, ...]
    notes: tuple[str, ...] = ()
    """Age of each cloud's prices, what was not asked, and what failed."""
    storage: StoragePrices = field(default_factory=dict)
    """What the clouds said; `storage_usd_per_gib_month` has those that forge ships."""


def load_offers(
    *, offline: bool = False, refresh: bool = False, fetchers: Mapping[str, Fetch] = FETCHERS
) -> OfferTable:
    """Return the newest prices of each cloud that are known on this machine.

    Args:
        offline: use only the price list shipped with forge.
        refresh: ask all sources first, and keep their answers for later calls.
        fetchers: by name of the source.
    """
    today = datetime.now(UTC).date()
    if offline:
        return OfferTable(offers=offline_offers(), notes=_age_notes(offline_offers(), today=today))
    fresh, notes = _refresh(fetchers, today=today) if refresh else ({}, [])
    snapshots = dict(fresh)
    for source in SOURCES:
        if source not in fresh:
            try:
                earlier = read_snapshot(source)
            except (OSError, ValueError) as error:
                notes.append(f"{source}: the cached prices cannot be read and are ignored: {error}")
                continue
            if earlier is not None:
                snapshots[source] = earlier
    notes += [f"{source}: {note}" for source, snapshot in snapshots.items() for note in snapshot.notes]
    offers = _merge(snapshots)
    storage: dict[tuple[str, str, str], float] = {
        (one.cloud, one.region, one.kind): one.usd_per_gib_month
        for snapshot in snapshots.values()
        for one in snapshot.storage
        if one.usd_per_gib_month > 0
    }
    notes += _storage_notes(snapshots)
    ages = _age_notes(offers, today=today, is_refreshed=refresh)
    return OfferTable(offers=offers, storage=storage, notes=(*ages, *notes))


@functools.cache
def offline_offers() -> tuple[Offer, ...]:
    """Return the offers of the price list shipped with forge, of all machine types in the catalogue."""
    return tuple(
        build_offer(
            machine_types(price.cloud)[price.instance],
            cloud=price.cloud,
            region=price.region,
            zone=price.zone,
            usd_per_hour=price.usd_per_hour,
            spot_usd_per_hour=price.spot_usd_per_hour,
            interruption=None
            if price.interruption is None
            else InterruptionBand(low=price.interruption[0], high=price.interruption[1]),
            observed=price.observed,
            source=price.source,
        )
        for price in listed_prices()
    )


def _refresh(fetchers: Mapping[str, Fetch], *, today: date) -> tuple[dict[str, PriceSnapshot], list[str]]:
    """Ask all sources and keep what they answer. Returns: the answers, and a line for each problem."""

    def ask(source: str) -> PriceSnapshot | str:
        try:
            return fetchers[source](today)
        except ForgeError as error:
            return f"{source}: was not asked or did not answer: {error}; earlier prices are used"

    with ThreadPoolExecutor(max_workers=max(1, len(fetchers))) as pool:
        answers = dict(zip(fetchers, pool.map(ask, fetchers), strict=True))
    fresh = {source: answer for source, answer in answers.items() if not isinstance(answer, str)}
    notes = [answer for answer in answers.values() if isinstance(answer, str)]
    try:
        for snapshot in fresh.values():
            save_snapshot(snapshot)
    except OSError as error:
        notes.append(f"the prices cannot be kept for later: {error}; choose another cache with FORGE_CACHE")
    return fresh, notes


def _merge(snapshots: Mapping[str, PriceSnapshot]) -> tuple[Offer, ...]:
    """Return of each cloud the newest answer: its own, gpuhunt's or the shipped list's, in this order if equal."""
    candidates: dict[str, list[tuple[Offer, ...]]] = {}
    for offers in (
        *(snapshots[cloud].offers for cloud in CLOUDS if cloud in snapshots),
        snapshots["gpuhunt"].offers if "gpuhunt" in snapshots else (),
        offline_offers(),
    ):
        for cloud, own in _by_cloud(offers).items():
            candidates.setdefault(cloud, []).append(own)
    risks = snapshots["spot-advisor"].risks if "spot-advisor" in snapshots else ()
    merged: list[Offer] = []
    for cloud in sorted(
        candidates, key=lambda one: (one not in CLOUDS, CLOUDS.index(one) if one in CLOUDS else one)
    ):
        newest = max(candidates[cloud], key=lambda offers: max(offer.observed for offer in offers))
        merged += _with_risks(newest, risks) if cloud == "aws" else newest
    return tuple(merged)


def _by_cloud(offers: Sequence[Offer]) -> dict[str, tuple[Offer, ...]]:
    found: dict[str, list[Offer]] = {}
    for offer in offers:
        found.setdefault(offer.cloud, []).append(offer)
    return {cloud: tuple(own) for cloud, own in found.items()}


def _with_risks(offers: Sequence[Offer], risks: Sequence[SpotRisk]) -> list[Offer]:
    """Add Spot Advisor's interruption bands, and estimate the spot prices of regions where none is known."""
    known = {(risk.instance, risk.region): risk for risk in risks}
    priced = {(offer.instance, offer.region) for offer in offers if offer.spot_usd_per_hour is not None}
    found: list[Offer] = []
    for offer in offers:
        place = offer.instance, offer.region
        risk = known.get(place)
        if risk is not None and offer.spot_usd_per_hour is not None:
            offer = replace(offer, interruption=risk.interruption)
        elif risk is not None and risk.savings and offer.usd_per_hour is not None and place not in priced:
            offer = replace(
                offer,
                spot_usd_per_hour=offer.usd_per_hour * (1 - risk.savings),
                interruption=risk.interruption,
                source=f"{offer.source}; spot estimated from Spot Advisor's average savings, within a factor of 2",
            )
        found.append(offer)
    return found


def _age_notes(offers: Sequence[Offer], *, today: date, is_refreshed: bool = False) -> tuple[str, ...]:
    """Say how old the prices of each cloud are, a line per cloud."""
    return tuple(
        f"{cloud}: prices as of {_span({offer.observed for offer in own}, today=today, is_refreshed=is_refreshed)}"
        for cloud, own in _by_cloud(offers).items()
    )


def _storage_notes(snapshots: Mapping[str, PriceSnapshot]) -> list[str]:
    """Say which clouds told their prices of storage, and when."""
    found = {source: {one.region for one in snapshot.storage} for source, snapshot in snapshots.items()}
    return [
        f"{source}: storage prices of {len(regions)} regions as of {snapshots[source].observed}"
        for source, regions in found.items()
        if regions
    ]


def _span(days: set[date], *, today: date, is_refreshed: bool) -> str:
    oldest, newest = min(days), max(days)
    age = (today - oldest).days
    since = f"{oldest}" if oldest == newest else f"{oldest} to {newest}"
    old = "; --refresh asks for those of today" if age > _STALE_DAYS and not is_refreshed else ""
    return f"{since}, up to {age} days old{old}" if age > 0 else since
