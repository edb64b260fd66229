"""Whatever a price list answers, fetching it ends in prices or in a ClusterError."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest

from forge.errors import ClusterError
from forge.pricing.fetch.azure import fetch_azure
from forge.pricing.fetch.gcp import API_KEY, fetch_gcp
from forge.pricing.fetch.spot_advisor import fetch_spot_advisor
from forge.pricing.snapshot import PriceSnapshot
from tests.pricing.fetch import test_azure, test_gcp, test_spot_advisor
from tests.support.fuzz import mutate_json
from tests.support.seeds import FUZZ_SEED

ANSWERS: dict[str, tuple[Callable[..., PriceSnapshot], Any]] = {
    "azure": (fetch_azure, {"Items": [test_azure.item(), test_azure.item(armRegionName="westus3")]}),
    "gcp": (fetch_gcp, {"skus": [*test_gcp.a3(spot=False), *test_gcp.a3(spot=True)]}),
    "spot-advisor": (fetch_spot_advisor, test_spot_advisor.advisor({"g5.xlarge": {"s": 59, "r": 0}})),
}


class Answering:
    """A client whose service always gives one answer."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def get(self, _: str) -> Any:
        return self._answer


@pytest.mark.parametrize("name", ANSWERS)
def test_fetch__any_answer__prices_or_a_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "key")
    fetch, answer = ANSWERS[name]
    chance = random.Random(FUZZ_SEED)
    outcomes = set()
    for _ in range(400):
        broken = mutate_json(copy.deepcopy(answer), chance)
        try:
            found = fetch(date(2026, 11, 28), client=Answering(broken))
        except ClusterError:
            outcomes.add("error")
            continue
        outcomes.add("prices")
        assert all(offer.usd_per_hour is None or offer.usd_per_hour > 0 for offer in found.offers)
    assert "prices" in outcomes
