"""Measure what membership changes cost one run of forge.

Two of three simulated machines train. Then, repeatedly, for each machine in turn:

    growth      the third machine is added: pause
    notice      one gets a notice of 20 s, and is killed afterwards without replacement: pause
    growth      it is added again: pause
    hang        a rank gets SIGSTOP: seconds until the end of the first step of the next generation.
                Its machine is then killed, because a slot whose rank hung is quarantined for a minute.

A pause is the time from the end of the last step of the old generation to the end of the first step of the
new one, minus the median duration of the following steps.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.program import Program, module, records_of, running, wait
from benchmarks.report import Measured, print_table
from forge.runs.goodput import goodput_of
from forge.runs.goodput_report import MembershipChange
from forge.runs.reader import read_metrics, read_run

SETTLE_S = 4.0
"""After a change, for the steps that are usual; long enough for some dozens."""
_NODES = 3
_NOTICE_S = 20.0
_LIMIT_S = 90.0
_START_LIMIT_S = 180.0
_NAMES = {"growth": "growth_pause", "notice": "planned_change_pause", "hang": "hang_recovery"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of one change."""

    seconds: float
    parts_s: Mapping[str, float]
    """What forming the next generation was made of."""


def measure_changes(job: Mapping[str, Any], *, repeats: int) -> dict[str, Any]:
    """Apply all changes to one run, `repeats` times, and print their cost. Returns: the figures."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as text:
        folder = Path(text)
        request = {**job, "folder": text, "nodes": _NODES - 1, "max_nodes": _NODES}
        with running(module("forge_elastic", request), folder=folder) as program:
            watch = Watch(folder, program.process)
            watch.await_formed(None, since_s=0.0)
            time.sleep(SETTLE_S)
            missing = _NODES - 1
            for _ in range(repeats):
                missing = go_round(missing, program, watch)
        costs = costs_of(folder)
    return report({_NAMES[cause]: of for cause, of in costs.items()})


def go_round(missing: int, program: Program, watch: Watch) -> int:
    """Apply each kind of change once. Returns: the machine that is missing afterwards."""

    def have(line: str, *, cause: str) -> None:
        began_s = time.time()
        program.say(line)
        watch.await_formed(cause, since_s=began_s)
        time.sleep(SETTLE_S)

    noticed, halted = (missing + 1) % _NODES, (missing + 2) % _NODES
    have(f"add {missing}", cause="growth")
    noticed_at = time.monotonic()
    have(f"notice {noticed} {_NOTICE_S}", cause="notice")
    time.sleep(max(0.0, noticed_at + _NOTICE_S - time.monotonic()))
    program.say(f"remove {noticed}")
    have(f"add {noticed}", cause="growth")
    have(f"hang {halted}", cause="hang")
    program.say(f"remove {halted}")
    return halted


class Watch:
    """Follows the only run under a folder."""

    def __init__(self, folder: Path, process: subprocess.Popen[Any]) -> None:
        """Args:
        process: the driver; the run is over when it ends.
        """
        self._folder, self._process = folder, process

    def await_formed(self, cause: str | None, *, since_s: float) -> None:
        """Wait until a generation has started, after a change of this cause if one is given.

        Raises: RuntimeError after a timeout, or if the process has ended.
        """

        def is_formed() -> bool:
            changes = [e["time"] for e in self._events("MembershipChangeStarted") if e["cause"] == cause]
            begun_s = min((at for at in changes if at > since_s), default=None if cause else since_s)
            formed = [e["time"] for e in self._events("GenerationStarted")]
            return begun_s is not None and any(at > begun_s for at in formed)

        limit_s = _LIMIT_S if cause else _START_LIMIT_S
        self._await(is_formed, f"generation after {cause or 'the start'}", limit_s=limit_s)

    def await_world(self, size: int) -> None:
        """Wait until the newest generation has this size. Raises: as `await_formed`."""

        def is_formed() -> bool:
            formed = self._events("GenerationStarted")
            return bool(formed) and formed[-1]["world_size"] == size

        self._await(is_formed, f"generation of {size} ranks", limit_s=_START_LIMIT_S)

    def _await(self, is_so: Callable[[], bool], what: str, *, limit_s: float) -> None:
        if not wait(is_so, self._process, deadline=time.monotonic() + limit_s, poll_s=0.25):
            events = "\n".join(str(event) for event in self._events()[-30:])
            code = self._process.poll()
            reason = f"within {limit_s:.0f} s" if code is None else f"before the program ended with {code}"
            done = [record for record in records_of(self._folder / "steps.jsonl") if "step" not in record]
            raise RuntimeError(f"no {what} {reason}; machines: {done}; events:\n{events}")

    def _events(self, kind: str | None = None) -> list[dict[str, Any]]:
        files = (self._folder / "runs").glob("*/events.jsonl")
        return [event for path in files for event in records_of(path) if kind in (None, event["event"])]


def changes_of(folder: Path) -> tuple[MembershipChange, ...]:
    """Return the changes of the only run under a folder, which has ended."""
    (plan,) = (folder / "runs").glob("*/plan.json")
    return goodput_of(read_run(plan.parent).events, read_metrics(plan.parent), now=None).changes


def costs_of(folder: Path) -> dict[str, list[Cost]]:
    """Return the costs of changes that the benchmark caused; print any other change."""
    records = records_of(folder / "steps.jsonl")
    steps_s = sorted(record["time"] for record in records if "step" in record)
    began_s = min(record["time"] for record in records if "added" in record)
    halted_s = [record["time"] for record in records if "halted" in record]
    costs: dict[str, list[Cost]] = {cause: [] for cause in _NAMES}
    for change in changes_of(folder):
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
        costs[change.cause].append(Cost(seconds=seconds, parts_s=change.parts))
    return costs


def costs_of_losses(folder: Path, lost_s: Sequence[float]) -> list[Cost]:
    """Return the time from each loss of a machine to the end of the first step of the others.

    Args:
        lost_s: when machines were lost, by `time.time()`.
    """
    changes = [change for change in changes_of(folder) if change.cause == "loss" and change.seconds is not None]
    costs = []
    for at in lost_s:
        change = next(change for change in changes if change.time > at)
        assert change.seconds is not None
        costs.append(Cost(seconds=change.time + change.seconds - at, parts_s=change.parts))
    return costs


def pause_s(steps_s: Sequence[float], *, first_s: float) -> float:
    """Return the time between two generations' steps beyond the usual duration of a step.

    Args:
        steps_s: when steps ended, in order.
        first_s: when the first step of the new generation ended.
    """
    # The times of a change and of its steps are rounded apart.
    before = max(at for at in steps_s if at < first_s - 0.005)
    following = [at for at in steps_s if first_s - 0.005 <= at <= first_s + SETTLE_S]
    return first_s - before - statistics.median(late - early for early, late in pairwise(following))


def medians_of_parts(parts_s: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the median of every part, in order."""
    found: dict[str, list[float]] = {}
    for parts in parts_s:
        for part, seconds in parts.items():
            found.setdefault(part, []).append(seconds)
    return {part: statistics.median(seconds) for part, seconds in found.items()}


def report(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    """Print the table. Returns: the figures."""
    rows, figures = [], dict[str, Any]()
    for name, of in costs.items():
        seconds = Measured(values=tuple(cost.seconds for cost in of))
        parts = medians_of_parts(cost.parts_s for cost in of)
        figures |= {
            f"{name}_s": seconds.median,
            f"{name}_max_s": max(seconds.values),
            f"{name}_parts_s": parts,
            f"{name}_all_s": seconds.values,
        }
        rows.append([name, seconds.text(".2f"), ", ".join(f"{part} {value:.2f}" for part, value in parts.items())])
    print_table(
        "What changes of its machines cost a run of forge's, seconds; median [range]",
        header=["", "seconds", "of these"],
        rows=rows,
    )
    return figures
