"""What changes of its machines cost a run of forge's that goes on through all of them.

Two of three simulated machines train; then, again and again, in turn for every machine:

    growth      the third is added. Pause.
    notice      one is given notice of 20 s, and killed when they are over; nobody replaces it. Pause.
    growth      it is added again. Pause.
    hang        a rank gets SIGSTOP. Seconds from there to the end of the first step of the next generation.
                Its machine is killed, since a place whose rank hung is left out for a minute.

A pause is the time without a step's end beyond a usual step: from the end of the last step of the old
generation to the end of the first step of the new one, less the median of the steps that follow it.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.program import Program, module, records_of, running
from benchmarks.report import Measured, print_table
from forge.report.ledger import Ledger, ledger_of
from forge.report.runs import read_metrics, read_run

_NODES = 3
_NOTICE_S = 20.0
_SETTLE_S = 4.0
"""After a change, for the steps that are usual; long enough for some dozens."""
_LIMIT_S = 90.0
_START_LIMIT_S = 180.0
_NAMES = {"growth": "growth_pause", "notice": "planned_change_pause", "hang": "hang_recovery"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one change cost."""

    cause: str
    seconds: float
    parts_s: Mapping[str, float]


def measure_changes(job: Mapping[str, Any], *, repeats: int) -> dict[str, Any]:
    """Have everything happen to one run, `repeats` times, and print what it cost. Returns: the figures."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        request = {**job, "folder": text, "nodes": _NODES - 1, "max_nodes": _NODES}
        with running(module("forge_elastic", request), folder=Path(text)) as program:
            session = Session(program)
            missing = _NODES - 1
            for _ in range(repeats):
                missing = session.go_round(missing)
        costs = costs_of(Path(text))
    return report(costs)


class Session:
    """A run, to which one thing after another happens."""

    def __init__(self, program: Program) -> None:
        """Wait until it trains."""
        self._program = program
        self._await(lambda: bool(self._changes("GenerationFormed")), limit_s=_START_LIMIT_S)
        time.sleep(_SETTLE_S)

    def go_round(self, missing: int) -> int:
        """One of everything. Returns: the machine that is missing then."""
        noticed, halted = (missing + 1) % _NODES, (missing + 2) % _NODES
        self._do(f"add {missing}", cause="growth")
        noticed_at = time.monotonic()
        self._do(f"notice {noticed} {_NOTICE_S}", cause="notice")
        time.sleep(max(0.0, noticed_at + _NOTICE_S - time.monotonic()))
        self._program.say(f"remove {noticed}")
        self._do(f"add {noticed}", cause="growth")
        self._do(f"hang {halted}", cause="hang")
        self._program.say(f"remove {halted}")
        return halted

    def _do(self, line: str, *, cause: str) -> None:
        """Have something happen, and let the run settle in what follows from it."""
        num_before = len(self._changes("ChangeBegan", cause))
        self._program.say(line)

        def is_over() -> bool:
            changes, formed = self._changes("ChangeBegan", cause), self._changes("GenerationFormed")
            return len(changes) > num_before and formed[-1] > changes[-1]

        self._await(is_over, limit_s=_LIMIT_S)
        time.sleep(_SETTLE_S)

    def _await(self, is_done: Callable[[], bool], *, limit_s: float) -> None:
        if not self._program.wait(is_done, deadline=time.monotonic() + limit_s, poll_s=0.25):
            events = "\n".join(map(str, self._events()[-30:]))
            raise RuntimeError(f"not within {limit_s:.0f} s:\n{events}\n{self._program.last_words()}")

    def _changes(self, kind: str, cause: str | None = None) -> list[float]:
        """When the events of a kind, and of a cause, happened."""
        return [e["time"] for e in self._events() if e["event"] == kind and cause in (None, e.get("cause"))]

    def _events(self) -> list[dict[str, Any]]:
        files = (self._program.folder / "runs").glob("*/events.jsonl")
        return [event for path in files for event in records_of(path)]


def run_ledger(folder: Path) -> Ledger:
    """Where the time of the only run under a folder went."""
    run = read_run(_run_folder(folder))
    return ledger_of(run.events, read_metrics(run.folder), now=None)


def costs_of(folder: Path) -> list[Cost]:
    """What each change cost that followed on something done to a machine; one that was not meant to be is shown."""
    records = records_of(folder / "steps.jsonl")
    steps_s = sorted(record["time"] for record in records if "step" in record)
    began_s = min(record["time"] for record in records if "added" in record)
    halted_s = [record["time"] for record in records if "halted" in record]
    costs = []
    for change in run_ledger(folder).changes:
        if change.seconds is None or change.time < began_s:
            continue
        ended_s = change.time + change.seconds
        if change.cause == "hang":
            seconds = ended_s - max(at for at in halted_s if at < change.time)
        elif change.cause in _NAMES:
            seconds = pause_s(steps_s, first_s=ended_s)
        else:
            print(f"  a change that was not meant to be: {change}", file=sys.stderr)
            continue
        costs.append(Cost(cause=change.cause, seconds=seconds, parts_s=change.parts))
    return costs


def pause_s(steps_s: Sequence[float], *, first_s: float) -> float:
    """The time without a step's end beyond a usual step.

    Args:
        steps_s: when steps ended, in order.
        first_s: when the first step of the new generation ended.
    """
    # The times of a change and of its steps are rounded apart.
    before = max(at for at in steps_s if at < first_s - 0.005)
    following = [at for at in steps_s if first_s - 0.005 <= at <= first_s + _SETTLE_S]
    return first_s - before - statistics.median(late - early for early, late in pairwise(following))


def medians_of_parts(parts_s: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of every part, in the order in which they come."""
    found: dict[str, list[float]] = {}
    for parts in parts_s:
        for part, seconds in parts.items():
            found.setdefault(part, []).append(seconds)
    return {part: statistics.median(seconds) for part, seconds in found.items()}


def report(costs: Sequence[Cost]) -> dict[str, Any]:
    """The table. Returns: the figures."""
    rows, figures = [], dict[str, Any]()
    for cause, name in _NAMES.items():
        of = [cost for cost in costs if cost.cause == cause]
        seconds = Measured(values=tuple(cost.seconds for cost in of))
        parts = medians_of_parts(cost.parts_s for cost in of)
        figures |= {
            f"{name}_s": seconds.median,
            f"{name}_max_s": max(seconds.values),
            f"{name}_all_s": seconds.values,
            f"{name}_parts_s": parts,
        }
        rows.append([name, seconds.text(".2f"), ", ".join(f"{part} {value:.2f}" for part, value in parts.items())])
    print_table(
        "What changes of its machines cost a run of forge's, seconds; median [range]",
        header=["", "seconds", "of these"],
        rows=rows,
    )
    return figures


def _run_folder(folder: Path) -> Path:
    (plan,) = (folder / "runs").glob("*/plan.json")
    return plan.parent
