"""The evaluation of a step on the held-out rows, which says how far it is while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from forge.data.loader import HeldOutBatches, MicroBatch
from forge.events import Evaluated, EvaluationProgress, Reporter
from forge.train.engine import Engine

_FIRST_AFTER_S = 2.0
"""A shorter evaluation reports its result alone."""
_PART = 20
"""A long one reports each time that it has run a twentieth longer, so that an hour gives about a hundred events."""


def evaluate(engine: Engine, held_out: HeldOutBatches, *, step: int, weights: str, reporter: Reporter) -> Evaluated:
    """Measure the loss and the metrics of the objective over all held-out rows; collective."""
    began = time.monotonic()
    batches = with_progress(held_out, step=step, weights=weights, reporter=reporter)
    means = engine.evaluate(batches, parts=tuple(held_out.parts))
    evaluated = Evaluated(
        step=step,
        loss=means.pop("loss"),
        metrics=means,
        num_tokens=held_out.num_targets,
        weights=weights,
        seconds=time.monotonic() - began,
    )
    reporter.event(evaluated)
    return evaluated


def with_progress(
    held_out: HeldOutBatches,
    *,
    step: int,
    weights: str,
    reporter: Reporter,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[MicroBatch]:
    """Yield a rank's micro-batches, and report how many of them are done.

    Args:
        clock: seconds since any moment.
    """
    began = reported_at = clock()
    for number, batch in enumerate(held_out):
        now = clock()
        if now - reported_at >= max(_FIRST_AFTER_S, (now - began) / _PART):
            reported_at = now
            total = held_out.num_batches
            reporter.event(EvaluationProgress(step=step, weights=weights, num_done=number, num_batches=total))
        yield batch
