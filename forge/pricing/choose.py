"""Find offers by GPU, place and risk, the cheapest per GPU-hour first.

Bad input is answered with what there is: the nearest GPU names, the regions that sell the GPU.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from forge.config.cluster import CloudSpec
from forge.errors import ArgumentError
from forge.plan.gpus import find_gpu
from forge.pricing.catalog import area_of, catalog_table, workers_of
from forge.pricing.offer import Offer
from forge.units import counted

TYPICAL_MFU = 0.45
"""Share of the peak that training uses: the median of 104 published measurements of 125M to 70B models on 8 to 512
GPUs is 46 %."""
_MOST_NAMED = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferFilter:
    """Which offers are wanted."""

    gpu: str | None = None
    """None: any machine with GPUs."""
    spot: bool = False
    max_interruption: float | None = None
    """Highest share of spot instances that are interrupted in a month; leaves out those whose share is unknown."""
    region: str | None = None
    """A part of the world such as `eu`, or the beginning of a region's or zone's name."""


def find_offers(offers: Sequence[Offer], *, wanted: OfferFilter) -> list[Offer]:
    """Return the offers with a known price, the cheapest per GPU-hour first; of each region the cheapest zone.

    Raises: ArgumentError if no cloud offers it; the message lists the GPUs on offer.
    """
    found = matching_offers(offers, wanted=wanted)
    if wanted.max_interruption is not None and not wanted.spot:
        raise ArgumentError("--max-interruption applies to spot prices only: add --spot")
    priced = [offer for offer in found if offer.price(spot=wanted.spot) is not None]
    if not priced:
        kind, other = ("spot", "without --spot") if wanted.spot else ("on-demand", "with --spot")
        raise ArgumentError(f"no {kind} price is known for {_what(wanted)}; try it {other}, or --refresh")
    if wanted.max_interruption is not None:
        priced = _safe_enough(priced, wanted=wanted)
    return _cheapest_zones(priced, spot=wanted.spot)


def unknown_interruptions(offers: Sequence[Offer], *, wanted: OfferFilter) -> tuple[str, ...]:
    """Return the line that says which places a `max_interruption` left out because theirs is unknown, if any."""
    if wanted.max_interruption is None:
        return ()
    priced = find_offers(offers, wanted=replace(wanted, max_interruption=None))
    unknown = [offer for offer in priced if offer.interruption is None]
    if not unknown:
        return ()
    clouds = ", ".join(sorted({offer.cloud for offer in unknown}))
    return (f"left out: {counted(len(unknown), 'place')} whose interruptions are not published ({clouds})",)


def matching_offers(offers: Sequence[Offer], *, wanted: OfferFilter) -> list[Offer]:
    """Return the offers of the GPU in the region, with a known price or not.

    Raises: ArgumentError if no cloud offers it; the message lists the GPUs on offer.
    """
    found = [offer for offer in offers if offer.num_gpus]
    if wanted.gpu is not None:
        found = _of_gpu(found, gpu=wanted.gpu)
    if wanted.region is not None:
        if not wanted.region.strip():
            raise ArgumentError("the region is empty; give eu, us, asia, or the beginning of a region's name")
        found = _in_region(found, region=wanted.region, gpu=wanted.gpu)
    return found


def cluster_offers(spec: CloudSpec, offers: Iterable[Offer]) -> list[Offer]:
    """Return the offers that a cluster file allows, at the prices that it states."""
    types, anywhere = workers_of(spec), spec.regions == ("auto",)
    found = [
        offer
        for offer in offers
        if offer.cloud == spec.provider
        and offer.instance in types
        and (anywhere or any(region.startswith(offer.region) for region in spec.regions))
    ]
    return [_at_stated_price(offer, spec) for offer in found]


def _at_stated_price(offer: Offer, spec: CloudSpec) -> Offer:
    stated = spec.usd_per_hour.get(offer.instance)
    if stated is None:
        return offer
    return replace(
        offer,
        usd_per_hour=None if spec.spot else stated,
        spot_usd_per_hour=stated if spec.spot else None,
    )


def usd_per_exaflop(offer: Offer, *, spot: bool) -> float | None:
    """Price of 10¹⁸ floating-point operations of training: USD per GPU-hour ÷ (peak × typical MFU × 3600 s).

    None if the price or the GPU's peak is unknown.
    """
    gpu, price = find_gpu(offer.gpu), offer.price(spot=spot, per_gpu=True)
    if gpu is None or price is None:
        return None
    return price / (gpu.bf16_flops * TYPICAL_MFU * 3600) * 1e18


def _of_gpu(offers: Sequence[Offer], *, gpu: str) -> list[Offer]:
    known = find_gpu(gpu)
    name = (known.name if known else gpu).lower()
    found = [offer for offer in offers if offer.gpu.lower() == name]
    if found:
        return found
    sold = sorted({offer.gpu for offer in offers})
    short = {name.partition("-")[0].lower(): name for name in sold} | {name.lower(): name for name in sold}
    close = [short[one] for one in difflib.get_close_matches(gpu.lower(), short, n=1)]
    plain = find_gpu(_letters(gpu))  # H-100 is H100, though nearer to H100-NVL
    near = plain.name if plain is not None and plain.name in sold else next(iter(close), None)
    hint = f"; did you mean {near}?" if near else "."
    raise ArgumentError(f"no cloud that forge knows sells the GPU '{gpu}'{hint} Sold are {_listed(sold)}")


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _in_region(offers: Sequence[Offer], *, region: str, gpu: str | None) -> list[Offer]:
    wanted = region.lower()
    patterns = catalog_table()["areas"].get(wanted, [f"{wanted}*"])
    found = [
        offer
        for offer in offers
        if any(
            fnmatchcase(name.lower(), pattern) for name in (offer.region, offer.zone or "") for pattern in patterns
        )
    ]
    if found:
        return found
    sold = sorted({offer.region for offer in offers})
    near = difflib.get_close_matches(wanted, sold, n=3)
    what = f"'{gpu}' is not sold" if gpu else "nothing is sold"
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    areas = [area for area in catalog_table()["areas"] if any(area_of(one) == area for one in sold)]
    raise ArgumentError(
        f"{what} in the region '{region}'{hint} Regions with it are {_listed(sold)}, in {', '.join(areas)}"
    )


def _safe_enough(offers: Sequence[Offer], *, wanted: OfferFilter) -> list[Offer]:
    assert wanted.max_interruption is not None
    bands = [(offer, offer.interruption) for offer in offers if offer.interruption is not None]
    found = [offer for offer, band in bands if band.high <= wanted.max_interruption + 1e-9]
    if found:
        return found
    lowest = min((band.high for _, band in bands), default=None)
    known = f"the least is below {lowest:.0%}" if lowest is not None else "none of them publishes its interruptions"
    raise ArgumentError(
        f"no spot offer of {_what(wanted)} is known to be interrupted in at most {wanted.max_interruption:.0%} of "
        f"cases a month: {known}"
    )


def _cheapest_zones(offers: Iterable[Offer], *, spot: bool) -> list[Offer]:
    def order(offer: Offer) -> tuple[float, str, str, str, float, str]:
        price, other = offer.price(spot=spot, per_gpu=True) or 0.0, offer.price(spot=not spot) or math.inf
        return price, offer.cloud, offer.region, offer.instance, other, offer.zone or ""

    cheapest: dict[tuple[str, str, str], Offer] = {}
    for offer in sorted(offers, key=order):
        cheapest.setdefault((offer.cloud, offer.instance, offer.region), offer)
    return list(cheapest.values())


def _what(wanted: OfferFilter) -> str:
    return f"{wanted.gpu or 'any GPU'}{f' in {wanted.region}' if wanted.region else ''}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
