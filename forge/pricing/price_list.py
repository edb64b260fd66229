"""Prices of machine types by region, as shipped with forge in `prices.csv`.

They are what forge knows without network. The file begins with a line for each source, `# key,day,text`: the day on
which the prices were observed, and where they were published; the column `source` has its key. An empty cell is
unknown. `python -m forge.pricing.update` writes the file.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib.resources import files

_COLUMNS = (
    "cloud",
    "instance",
    "region",
    "zone",
    "usd_per_hour",
    "spot_usd_per_hour",
    "interruption_percent",
    "source",
)


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
    observed: date
    source: str


@functools.cache
def listed_prices() -> tuple[ListedPrice, ...]:
    """Return all lines of the shipped price list."""
    return read_prices(files("forge.pricing").joinpath("prices.csv").read_text(encoding="utf-8"))


def read_prices(text: str) -> tuple[ListedPrice, ...]:
    """Read a price list as `write_prices` writes it."""
    lines = text.splitlines()
    about = [line[2:].split(",", 2) for line in lines if line.startswith("# ")]
    sources = {key: (date.fromisoformat(day), source) for key, day, source in about}
    return tuple(_listed(row, sources) for row in csv.DictReader(lines[len(about) :]))


def write_prices(prices: Iterable[ListedPrice]) -> str:
    """Return the text of a price list."""
    prices = sorted(prices, key=lambda price: (price.cloud, price.instance, price.region, price.zone or ""))
    keys: dict[tuple[str, date, str], str] = {}
    for price in prices:
        source = price.cloud, price.observed, price.source
        keys.setdefault(source, f"{price.cloud}-{sum(cloud == price.cloud for cloud, *_ in keys) + 1}")
    text = io.StringIO()
    text.writelines(f"# {key},{day},{source}\n" for (_, day, source), key in keys.items())
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    table.writerows(_row(price, keys[price.cloud, price.observed, price.source]) for price in prices)
    return text.getvalue()


def _listed(row: dict[str, str], sources: dict[str, tuple[date, str]]) -> ListedPrice:
    low, _, high = row["interruption_percent"].partition("-")
    observed, source = sources[row["source"]]
    return ListedPrice(
        cloud=row["cloud"],
        instance=row["instance"],
        region=row["region"],
        zone=row["zone"] or None,
        usd_per_hour=float(row["usd_per_hour"]) if row["usd_per_hour"] else None,
        spot_usd_per_hour=float(row["spot_usd_per_hour"]) if row["spot_usd_per_hour"] else None,
        interruption=(int(low) / 100, int(high) / 100) if low else None,
        observed=observed,
        source=source,
    )


def _row(price: ListedPrice, source: str) -> tuple[str, ...]:
    band = price.interruption
    return (
        price.cloud,
        price.instance,
        price.region,
        price.zone or "",
        _number(price.usd_per_hour),
        _number(price.spot_usd_per_hour),
        "" if band is None else f"{band[0] * 100:.0f}-{band[1] * 100:.0f}",
        source,
    )


def _number(price: float | None) -> str:
    return "" if price is None else f"{price:.4f}".rstrip("0").rstrip(".")
