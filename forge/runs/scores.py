"""The scores of tasks in the folder of a run: `evaluation.jsonl`, one line for a task and a checkpoint.

`forge eval` appends to it, one process at a time; a line that says the same as an earlier one is not written again.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from forge.errors import RunError
from forge.foreign import LineReader, from_record, parse_object
from forge.runs.patient_file import open_whole_lines

SCORES = "evaluation.jsonl"
_MAX_BYTES = 2**28
_MAX_LINE_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskValue:
    """One value of a metric, with the bounds of its 95 % bootstrap interval; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None
    direction: str
    """`min` or `max`: what is better."""
    num_examples: int
    signature: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """The scores of one model in one task."""

    task: str
    kind: str
    model: str
    """Name of the run or the folder."""
    step: int | None
    """Of the checkpoint; None for a folder of weights."""
    ema: bool
    model_digest: str
    task_digest: str
    """Of the task file and the examples."""
    values: Mapping[str, TaskValue]
    """By the name of the metric."""
    num_examples: int
    num_skipped: int
    """Records that could not be used."""
    contamination: Mapping[str, float] | None
    """What of the task's data the run has trained on, by name; None if that was not checked."""
    examples: str
    """The file with the answers, relative to the folder."""
    time: float = 0.0
    """Seconds since the epoch."""


def append_score(folder: Path, score: TaskScore) -> TaskScore:
    """Add a score to a folder's file, unless it has it. Returns: what the file has. Raises: RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(folder / f".{SCORES}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for known in read_scores(folder):
                if replace(known, time=0.0) == replace(score, time=0.0):
                    return known
            written = replace(score, time=round(time.time(), 3))
            with open_whole_lines(folder / SCORES) as file:
                file.write(json.dumps(asdict(written), allow_nan=False) + "\n")
            return written
    except OSError as error:
        raise RunError(f"cannot write {folder / SCORES}: {error.strerror}") from error


def read_scores(folder: Path) -> list[TaskScore]:
    """Read the scores of a run: of each task and checkpoint the newest, in the order in which they were written."""
    found: dict[tuple[Any, ...], TaskScore] = {}
    try:
        for line in LineReader(folder / SCORES, max_bytes=_MAX_BYTES, max_line_bytes=_MAX_LINE_BYTES).lines():
            try:
                score = from_record(TaskScore, parse_object(line))
            except ValueError:  # not written by forge
                continue
            key = (score.task, score.model_digest)
            found.pop(key, None)
            found[key] = score
    except (OSError, ValueError):
        return []
    return list(found.values())


def finite(value: float) -> float | None:
    """A number for a file; None if it is not defined."""
    return value if math.isfinite(value) else None


def newest_scores(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Of each task the score of the latest step, in the order of the tasks."""
    found: dict[str, TaskScore] = {}
    for score in scores:
        known = found.get(score.task)
        if known is None or (score.step or 0) >= (known.step or 0):
            found[score.task] = score
    return [found[name] for name in sorted(found)]
