"""What a cloud said about its prices on one day, kept in forge's cache folder.

`$FORGE_CACHE/prices/SOURCE.json` is replaced by the next successful request; a broken file counts as absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from forge.foreign import from_record, parse_object, read_file
from forge.fs import default_cache_dir, write_atomic
from forge.pricing.offer import InterruptionBand, Offer
from forge.pricing.transfer import StoragePrice

_MAX_BYTES = 64 * 2**20
_FORM = 1
"""Version of the form of the files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotRisk:
    """What AWS Spot Advisor says about spot instances of a type in a region, as averages over 30 days."""

    instance: str
    region: str
    interruption: InterruptionBand
    savings: float | None
    """Share of the on-demand price that spot instances cost less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceSnapshot:
    """The answer of one source."""

    source: str
    """Of `forge.pricing.fetch`: `aws`, `spot-advisor`, `azure`, `gcp` or `gpuhunt`."""
    observed: date
    offers: tuple[Offer, ...] = ()
    risks: tuple[SpotRisk, ...] = ()
    storage: tuple[StoragePrice, ...] = ()
    notes: tuple[str, ...] = ()
    """What was skipped, and why."""


Fetch = Callable[[date], PriceSnapshot]
"""Asks a source; its argument is today. It raises ClusterError if the source does not answer."""


def save_snapshot(snapshot: PriceSnapshot) -> None:
    """Write a snapshot to the cache. Raises: OSError if the cache folder cannot be written."""
    folder = _folder()
    folder.mkdir(parents=True, exist_ok=True)
    record = {"form": _FORM} | asdict(snapshot)
    write_atomic(folder / f"{snapshot.source}.json", json.dumps(record, default=date.isoformat))


def read_snapshot(source: str) -> PriceSnapshot | None:
    """Return the last snapshot of a source; None if there is none.

    Raises: ValueError if the file is broken or of another version of forge; OSError if it cannot be read.
    """
    try:
        record = parse_object(read_file(_folder() / f"{source}.json", max_bytes=_MAX_BYTES))
    except FileNotFoundError:
        return None
    if record.pop("form", None) != _FORM:
        raise ValueError("another version of forge wrote it")
    offers = record.get("offers")
    for one in [record, *(offers if isinstance(offers, list) else [])]:
        _read_day(one)
    return from_record(PriceSnapshot, record)


def _read_day(record: Any) -> None:
    """Replace the text of a day by the day. Raises: ValueError if it is none."""
    if not isinstance(record, dict) or not isinstance(record.get("observed"), str):
        raise ValueError("'observed' is not a day")
    record["observed"] = date.fromisoformat(record["observed"])


def _folder() -> Path:
    return default_cache_dir() / "prices"
