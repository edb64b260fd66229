"""The progress of a run or a search as plain lines, for programs that wait for one with `forge.train_job`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from forge.config.overrides import search_of
from forge.errors import harmless
from forge.plan.plan import Plan
from forge.report.text import evaluating_text, evaluation_text, step_text
from forge.report.trial_event_text import TrialEventDescriber
from forge.runs.event_text import EventDescriber

_INTERVAL_S = 5.0


class ProgressLines:
    """Prints the first and the last step, one every five seconds, evaluations and how far a long one is, trials and
    membership changes.

    Args:
        out: by default stderr.
        clock: seconds since any moment.
    """

    def __init__(
        self, plan: Plan, *, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._out, self._clock = plan, out, clock
        self._events = EventDescriber()
        self._trials = TrialEventDescriber(search_of(plan.job)) if plan.search is not None else None
        self._printed_at = -math.inf

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Print the line of a record, if it has one."""
        line = self.line(record)
        if line is not None:
            (self._out or sys.stderr).write(harmless(line).replace("\n", " ") + "\n")

    def line(self, record: Mapping[str, Any]) -> str | None:
        """Return the line of a record; None if it has none."""
        if "event" not in record:
            is_first_or_last = record["step"] in (1, self._plan.total_steps)
            if not is_first_or_last and self._clock() - self._printed_at < _INTERVAL_S:
                return None
            self._printed_at = self._clock()
            return step_text(record, total_steps=self._plan.total_steps)
        if record["event"] == "EvaluationProgress":
            if self._clock() - self._printed_at < _INTERVAL_S:
                return None
            self._printed_at = self._clock()
            return f"step {record['step']:>6}  {evaluating_text(record)}"
        if record["event"] == "Evaluated":
            return f"step {record['step']:>6}  held-out {evaluation_text(record)}"
        trial = self._trials.describe(record) if self._trials is not None else None
        return trial or self._events.describe(record)
