"""AWS Spot Advisor's file, in its form of 2026."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from forge.errors import ClusterError
from forge.pricing.fetch.spot_advisor import fetch_spot_advisor
from forge.pricing.offer import InterruptionBand
from tests.support.price_server import Answer, as_json, serve_prices

RANGES = [
    {"index": index, "label": label, "dots": index, "max": high}
    for index, (label, high) in enumerate(
        [("<5%", 5), ("5-10%", 11), ("10-15%", 16), ("15-20%", 22), (">20%", 100)]
    )
]


def advisor(linux: dict[str, Any]) -> dict[str, Any]:
    return {
        "global_rate": "<5%",
        "instance_types": {"g5.xlarge": {"emr": True, "cores": 4, "ram_gb": 16.0}},
        "ranges": RANGES,
        "spot_advisor": {
            "us-east-1": {"Windows": {"g5.xlarge": {"s": 10, "r": 4}}, "Linux": linux},
            "eu-west-1": {},
        },
    }


def test_fetch__bands_and_savings__of_known_types() -> None:
    linux = {
        "g5.xlarge": {"s": 59, "r": 0},
        "p5.48xlarge": {"s": 0, "r": 4},
        "p4d.24xlarge": {"r": 1},
        "m9.big": {},
    }
    with serve_prices(lambda *_: as_json(advisor(linux))) as server:
        found = fetch_spot_advisor(date(2026, 11, 28), url=server.url)
    assert {(risk.instance, risk.region): (str(risk.interruption), risk.savings) for risk in found.risks} == {
        ("g5.xlarge", "us-east-1"): ("<5%", 0.59),
        ("p5.48xlarge", "us-east-1"): (">20%", None),
        ("p4d.24xlarge", "us-east-1"): ("5-10%", None),
    }
    assert found.risks[0].interruption == InterruptionBand(low=0.0, high=0.05)


def test_fetch__throttled__asks_again() -> None:
    def reply(path: str, *_: Any) -> Answer:
        if server.times[path] == 1:
            return as_json({}, status=503, Retry_After="0")
        return as_json(advisor({"g5.xlarge": {"s": 59, "r": 0}}))

    with serve_prices(reply) as server:
        assert len(fetch_spot_advisor(date(2026, 11, 28), url=server.url).risks) == 1


def test_fetch__entry_without_band__is_counted() -> None:
    linux = {"g5.xlarge": {"s": 59}, "g6.xlarge": {"s": 50, "r": 9}, "g6.2xlarge": {"s": 50, "r": 2}}
    with serve_prices(lambda *_: as_json(advisor(linux))) as server:
        found = fetch_spot_advisor(date(2026, 11, 28), url=server.url)
    assert [str(risk.interruption) for risk in found.risks] == ["10-15%"]
    assert found.notes == ("2 entries without a band were skipped",)


@pytest.mark.parametrize("answer", [{}, [], {"ranges": RANGES}, {"ranges": [1], "spot_advisor": {}}])
def test_fetch__other_form__says_so(answer: Any) -> None:
    with serve_prices(lambda *_: as_json(answer)) as server, pytest.raises(ClusterError, match="changed its form"):
        fetch_spot_advisor(date(2026, 11, 28), url=server.url)


def test_fetch__no_known_type__says_so() -> None:
    with serve_prices(lambda *_: as_json(advisor({}))) as server, pytest.raises(ClusterError, match="none of the"):
        fetch_spot_advisor(date(2026, 11, 28), url=server.url)
