"""What former runs in a folder measured, for the forecast of the next one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from forge.errors import ArgumentError, PlanError
from forge.plan.forecast import FormerRun, is_same_device
from forge.plan.inputs import HardwareInfo
from forge.runs.reader import iter_metrics, read_plan, read_run, run_folders

_MAX_FOLDERS = 40
_MAX_RUNS = 8
_MAX_STEPS = 5000
"""Of a run, from its first, that are read."""
_LEAST_STEPS = 5
_WARM_UP_STEPS = 2
"""After each start of workers; their first steps are slower."""


def former_runs(root: Path, *, hardware: HardwareInfo | None) -> list[FormerRun]:
    """Return what the newest runs on a device measured, the newest first. Unreadable folders are left out.

    Args:
        hardware: None for any GPU.
    """

    def is_wanted(found: HardwareInfo) -> bool:
        return found.device == "cuda" if hardware is None else is_same_device(found, hardware)

    found: list[FormerRun] = []
    for folder in run_folders(root)[:_MAX_FOLDERS]:
        if len(found) == _MAX_RUNS:
            break
        try:
            plan = read_plan(folder)
            if plan.search is None and is_wanted(plan.hardware):
                run = read_run(folder)
                steps = list(islice(iter_metrics(folder), _MAX_STEPS))
                found.append(
                    FormerRun(
                        run_id=run.run_id,
                        plan=plan,
                        step_s=_step_s(steps),
                        peak_flops=_peak_flops(run.events),
                        startup_s=_startup_s(run.events),
                        ending_s=_ending_s(run.events, run.last),
                        evaluation_s=_median(run.events, kind="Evaluated", key="seconds"),
                        tasks_s=_median(run.events, kind="TasksScored", key="seconds"),
                        stall_s=_median(run.events, kind="CheckpointSaved", key="stall_s"),
                    )
                )
        except (ArgumentError, PlanError):
            continue  # `forge runs list` says why
    return found


def _step_s(steps: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    by_size: dict[int, list[float]] = defaultdict(list)
    size, since = 0, 0
    for step in steps:
        now = int(step["elastic/world_size"] or 0)
        since = since + 1 if now == size else 1
        size = now
        if size and since > _WARM_UP_STEPS and step["speed/step_s"]:
            by_size[size].append(step["speed/step_s"])
    return {size: median(times) for size, times in by_size.items() if len(times) >= _LEAST_STEPS}


def _peak_flops(events: Sequence[Mapping[str, Any]]) -> float | None:
    for event in reversed(events):
        if event["event"] == "GenerationStarted" and event["peak_flops"] and event["world_size"]:
            return float(event["peak_flops"]) / int(event["world_size"])
    return None


def _startup_s(events: Sequence[Mapping[str, Any]]) -> float | None:
    """From the start of the first driver until its workers are ready."""
    if not events or events[0]["event"] != "RunStarted":
        return None
    ready = next((event["time"] for event in events if event["event"] == "GenerationStarted"), None)
    return None if ready is None else max(0.0, ready - events[0]["time"]) + (events[0]["startup_s"] or 0.0)


def _ending_s(events: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> float | None:
    if not events or not last or events[-1]["event"] != "RunFinished":
        return None
    scored = (event for event in events if event["event"] == "TasksScored" and event["time"] > last["time"])
    scoring_s = sum(float(event["seconds"]) for event in scored)
    return max(0.0, float(events[-1]["time"] - last["time"]) - scoring_s)


def _median(events: Sequence[Mapping[str, Any]], *, kind: str, key: str) -> float | None:
    values = [event[key] for event in events if event["event"] == kind and event[key] is not None]
    values = [value for value in values if math.isfinite(value)]
    return median(values) if values else None
