"""Write the price list that forge ships from the clouds' prices of today: `python -m forge.pricing.update`.

It needs all that `forge prices --refresh` can use; a cloud that does not answer keeps its earlier prices and their
day. Review the difference before it is committed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from forge.fs import write_atomic
from forge.pricing.catalog import machine_types
from forge.pricing.offer import Offer
from forge.pricing.offers import CLOUDS, load_offers
from forge.pricing.price_list import ListedPrice, write_prices

_FILE = Path(__file__).with_name("prices.csv")


def main() -> None:
    """Replace `prices.csv` beside this file, and say on stderr what could not be asked."""
    table = load_offers(refresh=True)
    write_atomic(_FILE, write_prices(listed(table.offers)))
    sys.stderr.writelines(f"{note}\n" for note in table.notes)


def listed(offers: Iterable[Offer]) -> list[ListedPrice]:
    """Return the offers of the catalogue's machine types as lines of the price list."""
    return [
        ListedPrice(
            cloud=offer.cloud,
            instance=offer.instance,
            region=offer.region,
            zone=offer.zone,
            usd_per_hour=offer.usd_per_hour,
            spot_usd_per_hour=offer.spot_usd_per_hour,
            interruption=(offer.interruption.low, offer.interruption.high) if offer.interruption else None,
            observed=offer.observed,
            source=offer.source,
        )
        for offer in offers
        if offer.cloud in CLOUDS and offer.instance in machine_types(offer.cloud)
    ]


if __name__ == "__main__":
    main()
