"""All sources of live prices, by name."""

from __future__ import annotations

from collections.abc import Mapping

from forge.pricing.fetch.aws import fetch_aws
from forge.pricing.fetch.azure import fetch_azure
from forge.pricing.fetch.gcp import fetch_gcp
from forge.pricing.fetch.gpuhunt_library import fetch_gpuhunt
from forge.pricing.fetch.spot_advisor import fetch_spot_advisor
from forge.pricing.snapshot import Fetch

FETCHERS: Mapping[str, Fetch] = {
    "aws": fetch_aws,
    "spot-advisor": fetch_spot_advisor,
    "azure": fetch_azure,
    "gcp": fetch_gcp,
    "gpuhunt": fetch_gpuhunt,
}
