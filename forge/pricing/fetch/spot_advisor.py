"""AWS Spot Advisor: how often spot instances were interrupted in the last 30 days, and what they cost less.

Source: the file behind https://aws.amazon.com/ec2/spot/instance-advisor/, which anyone may read.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from forge.errors import ClusterError
from forge.pricing.catalog import machine_types
from forge.pricing.fetch.http_json import MALFORMED, JsonClient
from forge.pricing.offer import InterruptionBand
from forge.pricing.snapshot import PriceSnapshot, SpotRisk

_URL = "https://spot-bid-advisor.s3.amazonaws.com/spot-advisor-data.json"


def fetch_spot_advisor(today: date, *, url: str = _URL, client: JsonClient | None = None) -> PriceSnapshot:
    """Return the interruption bands of the catalogue's machine types. Raises: ClusterError as `JsonClient.get`."""
    answer = (client or JsonClient(name="AWS Spot Advisor", headers={})).get(url)
    try:
        bands = _bands(answer["ranges"])
        regions = dict(answer["spot_advisor"])
    except MALFORMED:
        raise ClusterError("AWS Spot Advisor's file has changed its form") from None
    risks: list[SpotRisk] = []
    skipped = 0
    for region, systems in regions.items():
        linux = systems.get("Linux") if isinstance(systems, dict) else None
        for name, entry in linux.items() if isinstance(linux, dict) else ():
            if name not in machine_types("aws"):
                continue
            try:
                risks.append(_risk(entry, instance=name, region=str(region), bands=bands))
            except MALFORMED:
                skipped += 1
    if not risks:
        raise ClusterError("AWS Spot Advisor's file has none of the machine types that forge knows")
    notes = (f"{skipped} entries without a band were skipped",) if skipped else ()
    return PriceSnapshot(source="spot-advisor", observed=today, risks=tuple(risks), notes=notes)


def _bands(ranges: list[Mapping[str, Any]]) -> dict[int, InterruptionBand]:
    """Each range has its upper bound in percent (100 for the last) and begins where the one before it ends."""
    bounds = sorted((float(one["max"]), int(one["index"])) for one in ranges)
    bands, low = {}, 0.0
    for high, index in bounds:
        band_end = 1.0 if index == bounds[-1][1] else _rounded(high) / 100
        bands[index] = InterruptionBand(low=low, high=band_end)
        low = band_end
    return bands


def _rounded(percent: float) -> float:
    """The file writes 5, 11, 16, 22 for the bounds that the page shows as 5, 10, 15, 20 %."""
    return 5 * (percent // 5)


def _risk(
    entry: Mapping[str, Any], *, instance: str, region: str, bands: Mapping[int, InterruptionBand]
) -> SpotRisk:
    savings = entry.get("s")
    has_savings = isinstance(savings, (int, float)) and 0 < savings < 100
    return SpotRisk(
        instance=instance,
        region=region,
        interruption=bands[entry["r"]],
        savings=savings / 100 if has_savings and savings is not None else None,
    )
