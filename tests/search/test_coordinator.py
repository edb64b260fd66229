"""The search coordinator's arithmetic: shares of the head node, and running time."""

from __future__ import annotations

from typing import Any

import pytest

from forge.runs.records import seconds_run
from forge.search.coordinator import share_of


@pytest.mark.parametrize("num_trials", [1, 2, 3, 8, 40])
def test_share_of__any_count__fits_exactly_that_many_trials(num_trials: int) -> None:
    share = share_of(num_trials)
    assert num_trials * share < 0.999  # forge's other actors on the head need a little
    assert (num_trials + 1) * share > 1


def event(kind: str, time: float) -> dict[str, Any]:
    return {"event": kind, "time": time}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], 0.0),
        ([event("RunStarted", 10.0)], 0.0),
        ([event("RunStarted", 10.0), event("TrialSuggested", 12.0), event("RunStopped", 15.0)], 5.0),
        (
            [
                event("RunStarted", 10.0),
                event("TrialReported", 14.0),
                event("RunStarted", 100.0),  # the driver was killed, and the search resumed
                event("TrialReported", 103.0),
            ],
            7.0,
        ),
    ],
)
def test_seconds_run__interrupted__counts_time_with_a_driver(events: list[dict[str, Any]], expected: float) -> None:
    assert seconds_run(events) == pytest.approx(expected)
