"""What a search reckons with: places on the head, and for how long it has gone on."""

from __future__ import annotations

from typing import Any

import pytest

from forge.search.coordinator import seconds_run, share_of


@pytest.mark.parametrize("num_trials", [1, 2, 3, 8, 40])
def test_as_many_trials_have_room_on_the_head_as_are_to_run_at_once_and_no_more(num_trials: int) -> None:
    share = share_of(num_trials)
    assert num_trials * share < 0.999  # others need a little
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
                event("RunStarted", 100.0),  # the carrier was killed, and somebody came back
                event("TrialReported", 103.0),
            ],
            7.0,
        ),
    ],
)
def test_only_the_time_that_it_was_carried_counts(events: list[dict[str, Any]], expected: float) -> None:
    assert seconds_run(events) == pytest.approx(expected)
