"""A long evaluation says how far it is, and costs the accounting of the run's time nothing."""

from __future__ import annotations

import itertools

from forge.data.loader import HeldOutBatches
from forge.data.prepare import open_rows
from forge.events import EvaluationProgress
from forge.plan.inputs import CorpusInfo
from forge.runs.goodput import goodput_of
from forge.train.evaluation import with_progress
from tests.support.ranks import RecordingReporter
from tests.support.runs import History


def reported(corpus: CorpusInfo, *, batch_s: float) -> tuple[list[EvaluationProgress], int]:
    """The reports of an evaluation whose batches take so long, and the number of its batches."""
    _, held_out = open_rows(corpus)
    batches = HeldOutBatches(rows=held_out, rank=0, world_size=2, micro_batch_size=1)
    reporter, ticks = RecordingReporter(None), itertools.count(step=batch_s)
    taken = list(with_progress(batches, step=5, weights="ema", reporter=reporter, clock=lambda: float(next(ticks))))
    assert len(taken) == batches.num_batches
    events = [event for event in reporter.recording.events if isinstance(event, EvaluationProgress)]
    assert len(events) == len(reporter.recording.events)
    return events, batches.num_batches


def test_evaluation__short__reports_nothing(corpus: CorpusInfo) -> None:
    events, num_batches = reported(corpus, batch_s=0.1)
    assert (events, num_batches) == ([], 12)


def test_evaluation__long__reports_batches_at_growing_intervals(corpus: CorpusInfo) -> None:
    events, num_batches = reported(corpus, batch_s=1.0)
    assert [event.num_done for event in events] == [1, 3, 5, 7, 9, 11]
    assert {(event.step, event.weights, event.num_batches) for event in events} == {(5, "ema", num_batches)}
    slow, _ = reported(corpus, batch_s=100.0)
    assert [event.num_done for event in slow] == list(range(12))


def test_goodput__reports_of_an_evaluation__change_no_bucket() -> None:
    history = History()
    history.start()
    history.form(1.0)
    for step in range(1, 5):
        history.step(step, 2.0, evaluation_s=30.0 if step == 2 else 0.0)
    evaluated = next(event for event in history.events if event["event"] == "Evaluated")
    between = [
        {
            "time": evaluated["time"] - 25.0 + 5 * number,
            "event": "EvaluationProgress",
            "step": 2,
            "weights": "current",
        }
        for number in range(5)
    ]
    events = sorted([*history.events, *between], key=lambda record: record["time"])
    now = history.steps[-1]["time"]
    assert goodput_of(events, history.steps, now=now) == goodput_of(history.events, history.steps, now=now)
