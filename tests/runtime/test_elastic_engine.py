"""How long a driver waits for a supervisor that does not answer."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from forge.errors import ClusterError
from forge.runtime import elastic_engine


@pytest.mark.parametrize(
    "num_answers, seconds, problem",
    [(0, 180, "has not started the run's supervisor within 180 s"), (2, 40, "has not answered for 40 s")],
)
def test_await_outcome__silent_supervisor__waits_longer_for_its_start(
    monkeypatch: pytest.MonkeyPatch, num_answers: int, seconds: int, problem: str
) -> None:
    now = [0.0]
    answers = iter([None] * num_answers)
    poll = SimpleNamespace(remote=lambda timeout_s: timeout_s)

    def get(_: Any, *, timeout: float) -> None:
        now[0] += timeout
        try:
            return next(answers)
        except StopIteration:
            raise ray.exceptions.GetTimeoutError("some object(s) not ready.") from None

    monkeypatch.setattr(ray, "get", get)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None)
    monkeypatch.setattr(elastic_engine, "time", clock)
    with pytest.raises(ClusterError, match=problem):
        elastic_engine._await_outcome(SimpleNamespace(outcome=poll), threading.Event())
    assert seconds < now[0] - 8 * num_answers <= seconds + 8
