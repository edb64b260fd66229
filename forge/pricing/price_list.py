"""Prices of machine types by region, as shipped with forge in `prices.csv`.

They are what forge knows without network. An empty cell is unknown; the column `source` refers to the table
`sources` of `catalog.toml`, which has the day on which the prices were observed and where they were published.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedPrice:
    """One line of `prices.csv`."""

    cloud: str
    instance: str
    region: str
    zone: str | None
    """None: the price of the whole region. AWS's zones by id, such as `use1-az4`, which all accounts share."""
    usd_per_hour: float | None
    spot_usd_per_hour: float | None
    interruption: tuple[float, float] | None
    """Lowest and highest share of spot instances that are interrupted in a month."""
    source: str


@functools.cache
def listed_prices() -> tuple[ListedPrice, ...]:
    """Return all lines of the shipped price list."""
    text = files("forge.pricing").joinpath("prices.csv").read_text(encoding="utf-8")
    return tuple(_listed(row) for row in csv.DictReader(text.splitlines()))


def _listed(row: dict[str, str]) -> ListedPrice:
    low, _, high = row["interruption_percent"].partition("-")
    return ListedPrice(
        cloud=row["cloud"],
        instance=row["instance"],
        region=row["region"],
        zone=row["zone"] or None,
        usd_per_hour=float(row["usd_per_hour"]) if row["usd_per_hour"] else None,
        spot_usd_per_hour=float(row["spot_usd_per_hour"]) if row["spot_usd_per_hour"] else None,
        interruption=(int(low) / 100, int(high) / 100) if low else None,
        source=row["source"],
    )
